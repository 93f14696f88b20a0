"""3 x 3 convolutions from fewer products, for CPUs (minimal filtering, arXiv:1509.09308).

Four outputs in a column need six products with what is computed once of their six inputs and of the
three weights, where twelve are written: half of them. Of a map whose every place is first shown
2 x 2 times, the four outputs of a place need nine products of 36.

In float32 all through. The sums are rounded otherwise than those of the plain form, at most twice
as coarsely: four outputs are interpolated at 0, +-3/4 and +-3/2, better than at 0, +-1 and +-2.

Only a program for a CPU is lowered so (`jax.lax.platform_dependent`): accelerators have units, and
libraries, for the plain form. Derivatives are those of the plain form everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import xla_metadata

# Sizes from which the products saved cost more than the sums that save them, and their compiling
LEAST = 96  # channels
PLACES = 1024  # of a map
WHOLE = 2**14  # places of a map that is transformed at once; of a larger one,
STRIP = 8  # so many rows: what lies between two steps then stays in the processor's cache
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity


def pays(shape: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether a map [B, H, W, I] and a kernel [h, w, I, O] are of the sizes that gain."""
    _, H, W, _ = shape
    large = min(kernel[2:]) >= LEAST and H * W >= PLACES
    return tuple(kernel[:2]) == (3, 3) and large and H % 4 == 0


def plain(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
    """The convolution as it is written; SAME padding."""
    return _convolved(x_BHWI, kernel_hwIO, "SAME")


def plain_doubled(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
    """`plain` of a map whose every place is first shown 2 x 2 times."""
    # transposed convolutions are slow on every backend
    return plain(jnp.repeat(jnp.repeat(x_BHWI, 2, axis=1), 2, axis=2), kernel_hwIO)


def _fewer(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
    """`plain` from six products for four outputs in a column."""
    outputs, filters, inputs = MATRICES
    kernels = [part_wIO[None] for part_wIO in _combined(filters, list(kernel_hwIO))]

    def rows(x_BHWI: jax.Array) -> jax.Array:
        B, H, W, _ = x_BHWI.shape
        fours, channels = (H - 2) // 4, kernel_hwIO.shape[-1]
        seen = _combined(inputs, [_every(x_BHWI, i, fours, 4, axis=1) for i in range(6)])
        products = [
            _convolved(part_BfWI, part_1wIO, ((0, 0), (1, 1)))
            for part_BfWI, part_1wIO in zip(seen, kernels, strict=True)
        ]
        return jnp.stack(_combined(outputs, products), 2).reshape(B, 4 * fours, W, channels)

    return _in_strips(rows, jnp.pad(x_BHWI, ((0, 0), (1, 1), (0, 0), (0, 0))), 1)


def _fewer_doubled(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
    """`plain_doubled` from nine products for the four outputs of a place."""
    kernels = [_doubled_filters(part_wIO) for part_wIO in _doubled_filters(kernel_hwIO)]

    def rows(x_BHWI: jax.Array) -> jax.Array:
        B, H, W, channels = x_BHWI.shape
        h, w = H - 2, W - 2
        products = []  # a row of them: the two columns that they make
        for part_BhWI, parts in zip(_doubled_inputs(x_BHWI, h, axis=1), kernels, strict=True):
            seen = _doubled_inputs(part_BhWI, w, axis=2)
            row = [v.reshape(-1, channels) @ u for v, u in zip(seen, parts, strict=True)]
            products.append(_doubled_outputs([v.reshape(B, h, w, -1) for v in row]))
        columns = [_doubled_outputs([row[j] for row in products]) for j in range(2)]
        y_BhiwjO = jnp.stack([jnp.stack([columns[j][i] for j in range(2)], 3) for i in range(2)], 2)
        return y_BhiwjO.reshape(B, 2 * h, 2 * w, -1)

    return _in_strips(rows, jnp.pad(x_BHWI, ((0, 0), (1, 1), (1, 1), (0, 0))), 2)


def _in_strips(rows: Callable, x_BHWI: jax.Array, scale: int) -> jax.Array:
    """What `rows` makes of the map, which has a border; whole, or strip by strip."""
    B, H, W, _ = x_BHWI.shape
    H, W = H - 2, W - 2 if scale == 2 else W
    size = STRIP // scale
    if scale**2 * H * W <= WHOLE or H % size:
        return rows(x_BHWI)

    def strip(y_BHWO, first):
        part_BhWO = rows(jax.lax.dynamic_slice_in_dim(x_BHWI, first, size + 2, axis=1))
        start = scale * first
        return jax.lax.dynamic_update_slice_in_dim(y_BHWO, part_BhWO, start, axis=1), None

    channels = jax.eval_shape(rows, x_BHWI).shape[-1]
    # any number: all are written over. One of the map's, since equal zeros of several layers would
    # be made once, at the start, and copied
    any_BHWO = jnp.broadcast_to(x_BHWI[:, :1, :1, :1], (B, scale * H, scale * W, channels))
    return jax.lax.scan(strip, any_BHWO, jnp.arange(0, H, size))[0]


def _doubled_inputs(x_BHWI: jax.Array, places: int, *, axis: int) -> list[jax.Array]:
    """What the products see along an axis: a place, and what its neighbours are beyond it."""
    before, it, behind = (_every(x_BHWI, i, places, 1, axis=axis) for i in range(3))
    return [before - it, it, behind - it]


def _doubled_filters(kernel: jax.Array) -> list[jax.Array]:
    """What they see of three weights, two of which meet the place itself."""
    return [kernel[0], kernel[0] + kernel[1] + kernel[2], kernel[2]]


def _doubled_outputs(products: Sequence[jax.Array]) -> list[jax.Array]:
    """The two outputs of a place."""
    before, it, behind = products
    return [before + it, it + behind]


def _convolved(x_BHWI: jax.Array, kernel_hwIO: jax.Array, padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BHWI, kernel_hwIO, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _every(x_BHWI: jax.Array, first: int, count: int, stride: int, *, axis: int) -> jax.Array:
    last = first + stride * (count - 1) + 1
    return jax.lax.slice_in_dim(x_BHWI, first, last, stride, axis)


def _combined(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The rows of a matrix of weights, each a sum of the parts that it weighs."""
    sums = []
    for row in matrix:
        first, *more = (
            float(weight) * part for weight, part in zip(row, parts, strict=True) if weight
        )
        sums.append(sum(more, first))
    return sums


def _matrices(points: Sequence[float], taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outputs, filters, inputs): y = outputs @ ((filters @ kernel) * (inputs @ x)).

    Products of polynomials known at the points and at infinity (Toom and Cook), transposed.
    """
    count = len(points) + 1
    outputs = np.vander(points, count - taps + 1, increasing=True).T
    outputs = np.concatenate([outputs, np.eye(len(outputs))[:, -1:]], 1)
    filters = np.concatenate([np.vander(points, taps, increasing=True), np.eye(taps)[-1:]])
    # inputs is what makes each output the sum of its window
    made = np.einsum("yp,pt->ytp", outputs, filters).reshape(-1, count)
    wanted = np.stack([np.eye(count)[y : y + taps] for y in range(len(outputs))]).reshape(-1, count)
    inputs = np.linalg.lstsq(made, wanted, rcond=None)[0]
    inputs[np.abs(inputs) < 1e-9] = 0
    # powers of two change no digit, and keep what is multiplied of one size
    size = 2.0 ** np.round(np.log2(np.abs(inputs).max(1, keepdims=True)))
    return outputs, filters * size, inputs / size


def _wide(fewer: Callable) -> Callable:
    """`fewer`, in float32: sums of eight bits would lose what the plain form keeps."""
    fewer = jax.jit(fewer)

    def wide(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
        x_wide, kernel_wide = x_BHWI.astype(jnp.float32), kernel_hwIO.astype(jnp.float32)
        # Called, not written out at every layer: what has the same sizes is compiled once, and the
        # sums of a layer's weights are held while it computes, not from the start
        with xla_metadata.set_xla_metadata(inlineable="false"):
            y_BHWO = fewer(x_wide, kernel_wide)
        return y_BHWO.astype(x_BHWI.dtype)

    return wide


def lowered(form: Callable, plain: Callable) -> Callable:
    """`form` where a CPU computes, `plain` elsewhere, and the derivatives of `plain`."""

    @jax.custom_jvp
    def product(x_BHWI: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x_BHWI, kernel_hwIO, cpu=form, default=plain)

    @product.defjvp
    def moved(operands, tangents):
        (x_BHWI, kernel_hwIO), (dx_BHWI, dkernel_hwIO) = operands, tangents
        moved_BHWO = plain(dx_BHWI, kernel_hwIO) + plain(x_BHWI, dkernel_hwIO)
        return product(x_BHWI, kernel_hwIO), moved_BHWO

    return product


MATRICES = _matrices(POINTS, 3)
same = lowered(_wide(_fewer), plain)
doubled = lowered(_wide(_fewer_doubled), plain_doubled)
