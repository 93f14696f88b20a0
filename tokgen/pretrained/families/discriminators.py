"""What fixtures of published discriminators ask: keys, images, logits with their gradients."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import rng
from tokgen.discriminators import patchgan
from tokgen.pretrained import keymap
from tokgen.pretrained.system import Weights

# The linear map over the 4x4 map is a convolution of ours; files flatten channels first (PyTorch)
# or last (Flax).
FLAT_CHW = keymap.one(
    lambda a, shape: a.reshape(shape[3], shape[2], *shape[:2]).transpose(2, 3, 1, 0),
    lambda a: a.transpose(3, 2, 0, 1).reshape(a.shape[3], -1),
)
FLAT_HWC = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1, a.shape[3]))


def patchgan_rows(network: patchgan.Discriminator) -> list[keymap.Row]:
    """`main.N` of the PatchGAN of VQGAN and its descendants."""
    rows, last = keymap.pair("main.0", "first", keymap.CONV), 3 * len(network.convs) + 2
    for n in range(len(network.convs)):
        rows += keymap.pair(f"main.{3 * n + 2}", f"convs/{n}", keymap.CONV, bias=False)
        rows += keymap.norm(f"main.{3 * n + 3}", f"norms/{n}")
    return rows + keymap.pair(f"main.{last}", "last", keymap.CONV)


def filled(
    make: Callable,
    rows: Callable,
    weights: Weights,
    file: str | pathlib.Path,
    aside: tuple[str, ...] = (),
) -> nnx.Module:
    """`make()` with the arrays of a file, by its key table; those of `aside` are left out."""
    network = nnx.eval_shape(make)
    weights, _ = keymap.split(weights, aside)
    return keymap.fill(network, rows(network), weights, source=str(file))


def image(array_BCHW: np.ndarray, lowest: float = -1.0) -> jax.Array:
    """[B, C, H, W] in [lowest, 1] -> image_BHW3 in [-1, 1]."""
    return jnp.asarray(2 * (array_BCHW.transpose(0, 2, 3, 1) - lowest) / (1 - lowest) - 1)


def logits_and_gradient(
    network: nnx.Module, image_BHW3: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """(logits, gradient of their sum w.r.t. the image), channels first."""

    def summed(image_BHW3):
        logits = network(image_BHW3)
        return logits.sum(), logits

    gradient, logits = jax.jit(jax.grad(summed, has_aux=True))(image_BHW3)
    return _channels_first(logits), _channels_first(gradient)


def _channels_first(array: jax.Array) -> np.ndarray:
    array = np.asarray(array)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


def patchgan_pair(
    weights: Weights, width: int, layers: int, channels: int, file: str | pathlib.Path
) -> tuple[nnx.Module, nnx.Module]:
    """(the network as it trains, the network with its running statistics put in)."""
    training = filled(
        lambda: patchgan.Discriminator(channels, width, layers, rngs=rng.rngs(0)),
        patchgan_rows,
        weights,
        file,
        (r".*\.(running_mean|running_var|num_batches_tracked)",),
    )
    # with fixed statistics a batch norm is one factor and one bias per channel
    folded = {key: array for key, array in weights.items() if ".running" not in key}
    rows = keymap.pair("main.0", "first", keymap.CONV)
    for n in range(layers):
        conv, norm = f"main.{3 * n + 2}", f"main.{3 * n + 3}"
        deviation = np.sqrt(weights[f"{norm}.running_var"] + patchgan.EPSILON)
        factor = folded.pop(f"{norm}.weight") / deviation
        bias = folded.pop(f"{norm}.bias") - weights[f"{norm}.running_mean"] * factor
        folded[f"{conv}.weight"] = weights[f"{conv}.weight"] * factor.reshape(-1, 1, 1, 1)
        folded[f"{conv}.bias"] = bias
        rows += keymap.pair(conv, f"convs/{n}", keymap.CONV)
    rows += keymap.pair(f"main.{3 * layers + 2}", "last", keymap.CONV)
    evaluating = filled(
        lambda: patchgan.Discriminator(channels, width, layers, norm="none", rngs=rng.rngs(0)),
        lambda network: rows,
        folded,
        file,
        (r".*\.num_batches_tracked",),
    )
    return training, evaluating


def widths(size: int, widths: dict[str, int]) -> list[int]:
    """Widths from `size` pixels down to 4, of a table by resolution."""
    return [widths[str(size >> n)] for n in range(size.bit_length() - 2)]
