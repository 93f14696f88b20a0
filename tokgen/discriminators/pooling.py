"""How discriminators make their maps smaller: fixed filters, means, maxima."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def blur(x_BHWC: jax.Array, taps: Sequence[int], stride: int, padding: str | tuple) -> jax.Array:
    """Every channel filtered with the outer product of `taps`, normalised to a sum of one."""
    channels = x_BHWC.shape[-1]
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    kernel_HW1C = np.broadcast_to(kernel[:, :, None, None], (*kernel.shape, 1, channels))
    return jax.lax.conv_general_dilated(
        x_BHWC,
        jnp.asarray(kernel_HW1C, x_BHWC.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision=jax.lax.Precision.HIGHEST,
    )


def blur4(x_BHWC: jax.Array) -> jax.Array:
    """Half the size by [1, 3, 3, 1], padded with zeros as TensorFlow's SAME."""
    return blur(x_BHWC, (1, 3, 3, 1), 2, "SAME")


def blur3(x_BHWC: jax.Array) -> jax.Array:
    """Half the size by [1, 2, 1], padded with zeros as TensorFlow's SAME."""
    return blur(x_BHWC, (1, 2, 1), 2, "SAME")


def blur5(x_BHWC: jax.Array) -> jax.Array:
    """Half the size by [1, 4, 6, 4, 1], padded with zeros as TensorFlow's SAME."""
    return blur(x_BHWC, (1, 4, 6, 4, 1), 2, "SAME")


def average(x_BHWC: jax.Array) -> jax.Array:
    """Half the size by means of 2x2; an odd last row or column is left out."""
    rows, columns = (size // 2 for size in x_BHWC.shape[1:3])
    x_BHWC = x_BHWC[:, : 2 * rows, : 2 * columns]
    batch, channels = len(x_BHWC), x_BHWC.shape[3]
    return x_BHWC.reshape(batch, rows, 2, columns, 2, channels).mean((2, 4))


def smooth(x_BHWC: jax.Array) -> jax.Array:
    """[1, 2, 1] at full size; borders are mirrored, their outermost row not repeated."""
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    return blur(x_BHWC, (1, 2, 1), 1, "VALID")


def bins(size: int, count: int) -> list[tuple[int, int]]:
    """[start, stop) of PyTorch's adaptive pooling of `size` places to `count`; bins may overlap."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def adaptive_max(x_BHWC: jax.Array, count: int) -> jax.Array:
    """The largest value in each of count x count bins."""
    for axis in (1, 2):
        spans = bins(x_BHWC.shape[axis], count)
        longest = max(stop - start for start, stop in spans)
        # a short bin repeats its last place: a maximum does not mind
        places = np.array([[min(i, b - 1) for i in range(a, a + longest)] for a, b in spans])
        x_BHWC = jnp.take(x_BHWC, places, axis=axis).max(axis + 1)
    return x_BHWC
