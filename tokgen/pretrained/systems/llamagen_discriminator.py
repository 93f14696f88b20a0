"""LlamaGen's discriminators (arXiv:2406.06525): PatchGAN and a StyleGAN form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import losses, rng
from tokgen.discriminators import patchgan, stylegan
from tokgen.pretrained import keymap
from tokgen.pretrained.families import discriminators
from tokgen.pretrained.formats import reader
from tokgen.pretrained.system import System, Weights


def strided_rows(network: stylegan.Discriminator) -> list[keymap.Row]:
    """LlamaGen's StyleGAN form; place 1 of its `blocks` is an activation."""
    rows = keymap.pair("blocks.0", "conv_in", keymap.CONV)
    for n in range(len(network.blocks)):
        key, path = f"blocks.{n + 2}", f"blocks/{n}"
        rows += keymap.pair(f"{key}.conv_res", f"{path}/conv_skip", keymap.CONV)
        rows += keymap.pair(f"{key}.net.0", f"{path}/conv_in", keymap.CONV)
        rows += keymap.pair(f"{key}.net.2", f"{path}/conv_out", keymap.CONV)
        rows += keymap.pair(f"{key}.downsample.1", f"{path}/conv_down", keymap.CONV)
    rows += keymap.pair("final_conv.0", "conv_out", keymap.CONV)
    rows += keymap.pair("final_linear.0", "conv_flat", discriminators.FLAT_CHW)
    return rows + keymap.pair("final_linear.2", "last", discriminators.FLAT_CHW)


MOMENTUM = 0.1  # of PyTorch's running statistics


def _running(network: patchgan.Discriminator, weights: Weights, image_BHW3: jax.Array) -> Weights:
    """PyTorch's running statistics after one training call on `image_BHW3`."""
    after, x = {}, jax.nn.leaky_relu(network.first(image_BHW3), patchgan.SLOPE)
    for n, (conv, norm) in enumerate(zip(network.convs, network.norms, strict=True)):
        x = conv(x)
        places = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        seen = {"running_mean": places.mean(0), "running_var": places.var(0, ddof=1)}
        for name, value in seen.items():
            key = f"main.{3 * n + 3}.{name}"
            after[f"after_{key}"] = (1 - MOMENTUM) * weights[key] + MOMENTUM * value
        x = jax.nn.leaky_relu(norm(x), patchgan.SLOPE)
    return after


def disc_patchgan(folder) -> Weights:
    """LlamaGen's PatchGAN in both modes, its losses and the adaptive weight."""
    file = folder.file()
    weights = reader.read(file)
    sizes = (folder.setting(name) for name in ("ndf", "n_layers", "input_nc"))
    training, evaluating = discriminators.patchgan_pair(weights, *sizes, file)
    real, fake = (discriminators.image(folder.given(name)) for name in ("real", "fake"))
    arrays = _running(training, weights, real)
    arrays["logits_real_train"] = discriminators.logits_and_gradient(training, real)[0]
    arrays["logits_real"], arrays["grad_real"] = discriminators.logits_and_gradient(
        evaluating, real
    )
    arrays["logits_fake"], _ = discriminators.logits_and_gradient(evaluating, fake)
    real, fake = arrays["logits_real"], arrays["logits_fake"]
    arrays["hinge_d_loss"] = losses.hinge_discriminator(real, fake)
    arrays["vanilla_d_loss"] = losses.vanilla_discriminator(real, fake)
    arrays["hinge_gen_loss"] = losses.hinge_generator(fake)
    arrays["non_saturating_d_loss"] = 0.5 * (
        _swapped(np.ones_like(real), real) + _swapped(np.zeros_like(fake), fake)
    )
    arrays["non_saturating_gen_loss"] = _swapped(np.ones_like(fake), fake)
    weight = folder.given("aw_weight")
    u, v = jnp.asarray(folder.given("aw_u")), jnp.asarray(folder.given("aw_v"))
    reconstruction = jax.grad(lambda w: jnp.sum((w * u) ** 2))(jnp.asarray(weight))
    adversarial = jax.grad(lambda w: jnp.sum(w * v))(jnp.asarray(weight))
    arrays["aw_value"] = losses.adaptive_weight(reconstruction, adversarial)
    return arrays


def _swapped(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """LlamaGen's cross-entropy with prediction and target in each other's place.

    Wrong, and recorded in its fixture; `losses.non_saturating_*` are the right ones.
    """
    target, logits = target.astype(np.float64), logits.astype(np.float64)
    return np.mean(np.logaddexp(0, target) - target * logits)


def disc_stylegan(folder) -> Weights:
    """LlamaGen's StyleGAN form."""
    size, channels = folder.setting("image_size"), folder.setting("channels")
    real, fake = (discriminators.image(folder.given(name)) for name in ("real", "fake"))
    file = folder.file()
    widths = discriminators.widths(size, channels)
    network = discriminators.filled(
        lambda: stylegan.Discriminator(
            real.shape[3], size, widths, form="strided", rngs=rng.rngs(0)
        ),
        strided_rows,
        reader.read(file),
        file,
        (r"blocks\.\d+\.downsample\.0\.f",),
    )
    logits, gradient = discriminators.logits_and_gradient(network, real)
    return {
        "logits_real": logits,
        "grad_real": gradient,
        "logits_fake": discriminators.logits_and_gradient(network, fake)[0],
    }


SYSTEMS = {
    "disc_patchgan": System(
        disc_patchgan, home="github.com/FoundationVision/LlamaGen", licence="MIT"
    ),
    "disc_stylegan": System(
        disc_stylegan, home="github.com/FoundationVision/LlamaGen", licence="MIT"
    ),
}
