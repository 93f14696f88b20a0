"""Convolutions as products of bfloat16 with float32 sums, for CPUs with a unit for them (AMX).

XLA converts a bfloat16 convolution to float32 on a CPU; a product that gives float32 goes to the
unit, if there is one. So a map is taken by tiles, small enough that what lies between two steps
stays in the processor's cache: shifted columns side by side, one product for each row of weights.

Where the unit is missing, nothing here is used; derivatives, and other platforms, have the plain
form.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tokgen.nn import winograd

SIDE = 16  # of a tile
LEAST = 32  # channels from which a product gains


@functools.cache
def unit() -> bool:
    """Whether this processor multiplies bfloat16 by tiles (AMX), as the kernel tells it."""
    told = pathlib.Path("/proc/cpuinfo")
    return told.exists() and "amx_bf16" in told.read_text().split()


def pays(shape: Sequence[int], kernel: Sequence[int], dtype: jax.typing.DTypeLike) -> bool:
    """Whether a map [B, H, W, I] and a kernel [h, w, I, O] gain, here and in this dtype."""
    odd = kernel[0] == kernel[1] and kernel[0] % 2 == 1
    large = min(kernel[2:]) >= LEAST and min(shape[1:3]) >= SIDE // 2
    return dtype == jnp.bfloat16 and odd and large and unit()


def _tiled(x_BHWI: jax.Array, kernel_hwIO: jax.Array, scale: int = 1) -> jax.Array:
    """The convolution of a map whose every place is first shown scale x scale times."""
    (B, H, W, inputs), (size, _, _, outputs) = x_BHWI.shape, kernel_hwIO.shape
    border, rows, columns = size // 2, min(SIDE // scale, H), min(SIDE // scale, W)
    kernels = [row_wIO.reshape(size * inputs, outputs) for row_wIO in kernel_hwIO]
    pads = ((0, 0), (border, border), (border, border), (0, 0))
    # What is only moved is moved as bits: XLA would take bfloat16 to float32 for it, and back
    bits_BHWI = jnp.pad(_bits(x_BHWI), pads)

    def tile(row: jax.Array | int, column: jax.Array | int) -> jax.Array:
        sizes = (B, rows + 2 * border, columns + 2 * border, inputs)
        part_BhwI = jax.lax.dynamic_slice(bits_BHWI, (0, row, column, 0), sizes)
        h, w = scale * rows, scale * columns
        if scale > 1:
            part_BhwI = jnp.repeat(jnp.repeat(part_BhwI, scale, axis=1), scale, axis=2)
            cut = (scale - 1) * border
            part_BhwI = part_BhwI[:, cut : h + size - 1 + cut, cut : w + size - 1 + cut]
        seen_BhwJ = jnp.concatenate([part_BhwI[:, :, j : j + w] for j in range(size)], -1)
        sums = [
            jax.lax.dot_general(
                _numbers(seen_BhwJ[:, i : i + h].reshape(B * h * w, -1)),
                kernel_JO,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for i, kernel_JO in enumerate(kernels)
        ]
        return _bits(sum(sums[1:], sums[0]).astype(x_BHWI.dtype)).reshape(B, h, w, outputs)

    if (rows, columns) == (H, W):
        return _numbers(tile(0, 0))
    across = -(-W // columns)

    def put(y_BHWO, index):
        # the last tiles begin where they end with the map: some places are made twice
        row = jnp.minimum(index // across * rows, H - rows)
        column = jnp.minimum(index % across * columns, W - columns)
        start = (0, scale * row, scale * column, 0)
        return jax.lax.dynamic_update_slice(y_BHWO, tile(row, column), start), None

    # any numbers, as in `winograd`: equal zeros of several layers would be made once, and copied
    any_BHWO = jnp.broadcast_to(bits_BHWI[:, :1, :1, :1], (B, scale * H, scale * W, outputs))
    return _numbers(jax.lax.scan(put, any_BHWO, jnp.arange(-(-H // rows) * across))[0])


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _numbers(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


same = winograd.lowered(_tiled, winograd.plain)
doubled = winograd.lowered(functools.partial(_tiled, scale=2), winograd.plain_doubled)
