"""Resizing as a product with a small matrix per axis, as published weights were trained with it.

A matrix [outputs, inputs] is a function of two sizes, computed in float64 when a program is traced
and applied to rows, then to columns. `jax.image.resize` is no substitute: its cubic kernel has
a = -0.5, and it smooths when it shrinks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SHARPNESS = -0.75  # a of Keys' cubic in PyTorch


def area(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] equal weights over bins that may overlap: 16 -> 5 has 0-3, 3-6, ..."""
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        first, last = row * inputs // outputs, -(-(row + 1) * inputs // outputs)
        matrix[row, first:last] = 1 / (last - first)
    return matrix.astype(np.float32)


def bicubic_torch(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] Keys' cubic between half-pixel centres, not smoothed when shrinking.

    Taps beyond the edge give their weight to the sample at the edge.
    """
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        centre = (row + 0.5) * inputs / outputs - 0.5
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


def _cubic(distance: float) -> float:
    a = SHARPNESS
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def _product(formula: str, matrix: np.ndarray, x_BHWC: jax.Array) -> jax.Array:
    # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
    return jnp.einsum(formula, jnp.asarray(matrix), x_BHWC, precision=jax.lax.Precision.HIGHEST)
