"""Resizing as a product with a small matrix per axis, as published weights were trained with it.

A matrix [outputs, inputs] is a function of two sizes, computed in float64 when a program is traced
and applied to rows, then to columns. `jax.image.resize` is no substitute: its cubic kernel has
a = -0.5, and it smooths when it shrinks. Images of bytes are resized as PIL does it, rounding
included (`resize_pil`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SHARPNESS = -0.75  # a of Keys' cubic in PyTorch
SHARPNESS_PIL = -0.5
PIL_BITS = 22  # after the point, of PIL's weights for bytes: sums stay below 2^31


def area(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] equal weights over bins that may overlap: 16 -> 5 has 0-3, 3-6, ..."""
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        first, last = row * inputs // outputs, -(-(row + 1) * inputs // outputs)
        matrix[row, first:last] = 1 / (last - first)
    return matrix.astype(np.float32)


def bicubic_pil(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] Keys' cubic, as much wider as an axis shrinks, cut at the edges."""
    return _pil(inputs, outputs).astype(np.float32)


def bicubic_torch(inputs: int, outputs: int, ratio: float | None = None) -> np.ndarray:
    """[outputs, inputs] Keys' cubic between half-pixel centres, not smoothed when shrinking.

    Taps beyond the edge give their weight to the sample at the edge. `ratio` is the step between
    samples where it is not inputs / outputs: PyTorch's, when it is given a scale factor.
    """
    matrix = np.zeros((outputs, inputs))
    ratio = inputs / outputs if ratio is None else ratio
    for row in range(outputs):
        centre = (row + 0.5) * ratio - 0.5
        left = int(np.floor(centre))
        for tap in range(left - 1, left + 3):
            matrix[row, min(max(tap, 0), inputs - 1)] += _cubic(abs(centre - tap))
    return matrix.astype(np.float32)


def linear_antialias(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] a triangle as wide as the ratio of the sizes, cut at the edges."""
    matrix, ratio = np.zeros((outputs, inputs)), inputs / outputs
    reach = max(ratio, 1.0)
    for row in range(outputs):
        distances = np.arange(inputs) + 0.5 - (row + 0.5) * ratio
        weights = np.maximum(1 - np.abs(distances) / reach, 0)
        matrix[row] = weights / weights.sum()
    return matrix.astype(np.float32)


def linear_tf1(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] the two samples around i * inputs / outputs, as TensorFlow 1 resizes."""
    return _between(np.arange(outputs) * inputs / outputs, inputs)


def linear_torch(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] the two samples around half-pixel centres, not smoothed when shrinking."""
    return _between((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, inputs)


def nearest(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] the sample floor(i * inputs / outputs); whole factors repeat samples."""
    matrix = np.zeros((outputs, inputs), np.float32)
    rows = np.arange(outputs)
    matrix[rows, rows * inputs // outputs] = 1
    return matrix


def resize(
    x_BHWC: jax.Array, size: tuple[int, int], matrix: Callable[[int, int], np.ndarray]
) -> jax.Array:
    """[B, H, W, C] -> [B, *size, C] in float32, `matrix` being one of the functions above."""
    (_, height, width, _), (rows, columns) = x_BHWC.shape, size
    x_BHWC = x_BHWC.astype(jnp.float32)
    # an axis that keeps its size is left alone: all kernels interpolate, and TF32 would round
    if rows != height:
        x_BHWC = _product("hH,BHWC->BhWC", matrix(height, rows), x_BHWC)
    if columns != width:
        x_BHWC = _product("wW,BHWC->BHwC", matrix(width, columns), x_BHWC)
    return x_BHWC


def resize_pil(image_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 [B, H, W, C] -> uint8 [B, *size, C], the bytes of PIL's antialiased cubic.

    Columns first, rounded to bytes, then rows, as every PIL before Pillow 13 did; that one begins
    with rows where height loses more than twice the pixels that width does (never of a square), and
    rounds and clips other sums. In whole numbers, so the same on every device.
    """
    image_BHWC = _pil_pass(image_BHWC, 2, size[1])
    return _pil_pass(image_BHWC, 1, size[0])


def _pil_pass(image_BHWC: jax.Array, axis: int, outputs: int) -> jax.Array:
    inputs = image_BHWC.shape[axis]
    if inputs == outputs:
        return image_BHWC
    matrix = np.rint(_pil(inputs, outputs) * 2**PIL_BITS).astype(np.int32)
    first = (matrix != 0).argmax(1)
    taps = max(
        np.flatnonzero(row)[-1] + 1 - start for row, start in zip(matrix, first, strict=True)
    )
    # taps, not the matrix: products of whole numbers are slow everywhere
    places = np.minimum(first[None] + np.arange(taps)[:, None], inputs - 1)
    weights = np.take_along_axis(matrix, places.T, 1).T
    weights[np.arange(taps)[:, None] + first[None] >= inputs] = 0
    image = image_BHWC.astype(jnp.int32)
    shape = [outputs if a == axis else 1 for a in range(4)]

    def add(total: jax.Array, tap: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        place, weight = tap
        return total + jnp.take(image, place, axis) * weight.reshape(shape), None

    half = 2 ** (PIL_BITS - 1)
    start = jnp.full((*image.shape[:axis], outputs, *image.shape[axis + 1 :]), half, jnp.int32)
    total, _ = jax.lax.scan(add, start, (jnp.asarray(places), jnp.asarray(weights)))
    return jnp.clip(total >> PIL_BITS, 0, 255).astype(jnp.uint8)


def _pil(inputs: int, outputs: int) -> np.ndarray:
    """bicubic_pil in float64."""
    matrix, ratio = np.zeros((outputs, inputs)), inputs / outputs
    wider = max(ratio, 1.0)
    for row in range(outputs):
        centre = (row + 0.5) * ratio
        first = max(int(centre - 2 * wider + 0.5), 0)
        last = min(int(centre + 2 * wider + 0.5), inputs)
        distances = np.abs(np.arange(first, last) + 0.5 - centre) / wider
        weights = np.array([_cubic(distance, SHARPNESS_PIL) for distance in distances])
        matrix[row, first:last] = weights / weights.sum()
    return matrix


def _cubic(distance: float, a: float = SHARPNESS) -> float:
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def _between(places: np.ndarray, inputs: int) -> np.ndarray:
    """[places, inputs] weights of linear interpolation; the edge goes on outside the image."""
    places = np.clip(places, 0, inputs - 1)
    below, rows = np.floor(places).astype(int), np.arange(len(places))
    matrix = np.zeros((len(places), inputs))
    matrix[rows, below] = 1 - (places - below)
    matrix[rows, np.minimum(below + 1, inputs - 1)] += places - below
    return matrix.astype(np.float32)


def _product(formula: str, matrix: np.ndarray, x_BHWC: jax.Array) -> jax.Array:
    # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
    return jnp.einsum(formula, jnp.asarray(matrix), x_BHWC, precision=jax.lax.Precision.HIGHEST)
