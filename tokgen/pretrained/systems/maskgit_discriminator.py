"""MaskGIT's discriminator (arXiv:2202.04200): a StyleGAN form."""

from __future__ import annotations

import jax.numpy as jnp

from tokgen import losses, rng
from tokgen.discriminators import stylegan
from tokgen.pretrained import keymap
from tokgen.pretrained.families import discriminators
from tokgen.pretrained.formats import reader
from tokgen.pretrained.system import System, Weights


def maskgit_rows(network: stylegan.Discriminator) -> list[keymap.Row]:
    """MaskGIT's Flax tree, its path joined by dots."""
    places = {
        "Conv_0": ("conv_in", keymap.AS_IS),
        "Conv_1": ("conv_out", keymap.AS_IS),
        "Dense_0": ("conv_flat", discriminators.FLAT_HWC),
        "Dense_1": ("last", discriminators.FLAT_HWC),
    }
    for n in range(len(network.blocks)):
        for key, name in (("Conv_0", "conv_in"), ("Conv_1", "conv_skip"), ("Conv_2", "conv_out")):
            places[f"ResBlock_{n}.{key}"] = (f"blocks/{n}/{name}", keymap.AS_IS)
    rows = []
    for key, (path, rule) in places.items():
        rows.append(keymap.row(f"{key}.kernel", f"{path}/kernel", rule))
        if not path.endswith("conv_skip"):
            rows.append(keymap.row(f"{key}.bias", f"{path}/bias"))
    return rows


def maskgit_discriminator(folder) -> Weights:
    """MaskGIT's StyleGAN form with and without blur, its losses and its penalty."""
    size, file, arrays = folder.setting("image_size"), folder.file(), {}
    image, fake = (jnp.asarray(folder.given(name)) for name in ("image", "image_fake"))
    weights = reader.read(file, "params", flatten=True)
    for form, name in (("blur", "blur"), ("average", "avg")):
        network = discriminators.filled(
            lambda form=form: stylegan.Discriminator(
                image.shape[3],
                size,
                discriminators.widths(size, folder.setting("filters")),
                form=form,
                rngs=rng.rngs(0),
            ),
            maskgit_rows,
            weights,
            file,
        )
        arrays[f"logits_{name}"] = discriminators.logits_and_gradient(network, 2 * image - 1)[0]
        if form == "blur":
            arrays["logits_fake_blur"] = discriminators.logits_and_gradient(network, 2 * fake - 1)[
                0
            ]
            arrays["r1_penalty"] = 10 * losses.r1(network, image)
    logits = arrays["logits_blur"], arrays["logits_fake_blur"]
    arrays["d_loss_hinge"] = losses.hinge_sum_discriminator(*logits)
    arrays["g_loss_hinge"] = losses.hinge_generator(logits[1])
    arrays["d_loss_non-saturating"] = losses.non_saturating_discriminator(*logits)
    arrays["g_loss_non-saturating"] = losses.non_saturating_generator(logits[1])
    return arrays


SYSTEMS = {
    "maskgit_discriminator": System(
        maskgit_discriminator,
        form="flax",
        home="github.com/google-research/maskgit",
        licence="Apache-2.0",
    ),
}
