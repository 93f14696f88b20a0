"""MaskBit's discriminators (arXiv:2409.16211), those of VQGAN+ and TiTok too."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp

from tokgen import losses, rng
from tokgen.discriminators import blur
from tokgen.pretrained import keymap
from tokgen.pretrained.families import discriminators
from tokgen.pretrained.formats import reader
from tokgen.pretrained.system import System, Weights


def blur_rows(network: blur.Discriminator) -> list[keymap.Row]:
    """The discriminator of VQGAN+, MaskBit and TiTok."""
    rows = keymap.pair("block_in.0", "first", keymap.CONV)
    for n in range(len(network.stages)):
        rows += keymap.pair(f"blocks.{n}.0", f"stages/{n}/conv", keymap.CONV)
        rows += keymap.norm(f"blocks.{n}.2", f"stages/{n}/norm")
    rows += keymap.pair("to_logits.0", "conv_out", keymap.CONV)
    return rows + keymap.pair("to_logits.2", "last", keymap.CONV)


def disc_maskbit(folder) -> Weights:
    """MaskBit's discriminators, each from its own file, and the losses of the first."""
    arrays = {}
    images = {name: folder.given(name) for name in ("real", "fake")}
    for name, options in folder.setting("files").items():
        options, label = {**folder.config, **options}, _label(name)
        weights = reader.read(folder.path / name)
        if label == "original":
            sizes = (options["hidden_channels"], options["num_stages"], options["num_channels"])
            _, network = discriminators.patchgan_pair(weights, *sizes, name)
            # this one is published on [0, 1]; ours takes what it is given
            inputs = {key: discriminators.image(image, -1.0) for key, image in images.items()}
        else:
            network = _blur(weights, options, name)
            inputs = {key: discriminators.image(image, 0.0) for key, image in images.items()}
        for key, image_BHW3 in inputs.items():
            logits, gradient = discriminators.logits_and_gradient(network, image_BHW3)
            arrays[f"logits_{key}_{label}"] = logits
            if f"grad_{key}_{label}" in folder.arrays:
                # d/d image in [0, 1]: the discriminator's own range is twice as wide
                arrays[f"grad_{key}_{label}"] = (1 if label == "original" else 2) * gradient
    # of the README's name for the first; a folder with other files has another first one
    label = (
        "blur4" if "logits_real_blur4" in arrays else _label(next(iter(folder.setting("files"))))
    )
    real, fake = arrays[f"logits_real_{label}"], arrays[f"logits_fake_{label}"]
    for name in ("hinge", "vanilla", "non_saturating"):
        arrays[f"{name}_d_loss"] = losses.DISCRIMINATOR[name](real, fake)
    for name in ("hinge", "non_saturating"):
        arrays[f"{name}_g_loss"] = losses.GENERATOR[name](fake)
    averages = {"real": jnp.asarray(0.3), "fake": jnp.asarray(-0.2)}  # of the fixture's README
    arrays["lecam_loss"] = losses.lecam_means(real, fake, averages)
    return arrays


def _label(name: str) -> str:
    """What a file of MaskBit's discriminators adds to the names of its arrays."""
    return name.partition(".")[0].removeprefix("v2_")


def _blur(weights: Weights, options: dict, file: str | pathlib.Path) -> blur.Discriminator:
    down = "average"
    if options.get("blur_resample", False):
        down = f"blur{options.get('blur_kernel_size', 4)}"
    # there, every other name is taken for SiLU
    activation = (
        "leaky_relu" if options.get("activation_fn", "leaky_relu") == "leaky_relu" else "silu"
    )
    return discriminators.filled(
        lambda: blur.Discriminator(
            options["num_channels"],
            options["hidden_channels"],
            options["num_stages"],
            down,
            activation,
            rngs=rng.rngs(0),
        ),
        blur_rows,
        weights,
        file,
        (r"blocks\.\d+\.1\.kernel",),
    )


SYSTEMS = {
    "disc_maskbit": System(
        disc_maskbit, home="github.com/markweberdev/maskbit", licence="Apache-2.0"
    ),
}
