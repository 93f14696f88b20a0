"""Positional embeddings: rotary rows and learned tables, over grids."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import choices
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn.precision import Precision

Rotary = tuple[jax.Array, jax.Array]  # cos and sin, each [B or 1, 1, l, K/2]


def rotary_angles(grid: tuple[int, int], size: int, base: float = 10000.0) -> np.ndarray:
    """[cells, K/2] angles of a grid in raster order: first by row, then by column.

    Frequencies base^(-2j / (K/2)), j < K/4, as in LlamaGen (arXiv:2406.06525) and its code.
    """
    if size % 4:
        raise UserError(f"2-D rotary positions need a head size divisible by 4; found {size}")
    frequencies = base ** (-2 * np.arange(size // 4) / (size // 2))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], -1)


def rotate(x_BNLK: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotate interleaved pairs by their angles; a row of zeros gives a zero vector."""
    cos, sin = (part.astype(x_BNLK.dtype) for part in rotary)
    even, odd = x_BNLK[..., 0::2], x_BNLK[..., 1::2]
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x_BNLK.shape)


class Rotary2D(nnx.Module):
    """Rotary positions over a grid; a slot of the prefix has zero rows, which are no angle.

    An input token carries the angle of its own position (LlamaGen's convention).
    """

    def __init__(
        self,
        layout: TokenLayout,
        prefix: int,
        width: int,
        heads: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        del precision, rngs
        if len(layout.grids) != 1:
            raise UserError(f"rotary positions need one grid; the layout has {layout.grids}")
        self.prefix, self.grid, self.size = prefix, layout.grids[0], width // heads
        rotary_angles(self.grid, self.size)  # raises here, at construction

    def __call__(self, order_BL: jax.Array, slots_l: jax.Array) -> tuple[None, Rotary]:
        """(what is added to the inputs: nothing, rotary rows) of some slots of the sequence."""
        angles_LK = jnp.asarray(rotary_angles(self.grid, self.size), jnp.float32)
        positions_Bl = jnp.take(order_BL, jnp.maximum(slots_l - self.prefix, 0), axis=1)
        angles_B1lK = angles_LK[positions_Bl][:, None]
        image_l1 = (slots_l >= self.prefix)[None, None, :, None]
        cos = jnp.where(image_l1, jnp.cos(angles_B1lK), 0)
        return None, (cos, jnp.where(image_l1, jnp.sin(angles_B1lK), 0))


class Learned(nnx.Module):
    """A learned vector per slot of the prefix, then per position of the image.

    `spare` rows follow that nobody reads; some published files have them.
    """

    def __init__(
        self,
        layout: TokenLayout,
        prefix: int,
        width: int,
        heads: int,
        *,
        spare: int = 0,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        del heads
        self.prefix = prefix
        shape = (prefix + layout.length + spare, width)
        self.table = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), shape, precision.params_dtype)
        )

    def __call__(self, order_BL: jax.Array, slots_l: jax.Array) -> tuple[jax.Array, None]:
        """(what is added to the inputs [B, l, D], no rotary rows) of some slots."""
        positions_Bl = jnp.take(order_BL, jnp.maximum(slots_l - self.prefix, 0), axis=1)
        slots_1l = slots_l[None]
        rows_Bl = jnp.where(slots_1l < self.prefix, slots_1l, self.prefix + positions_Bl)
        return self.table[...][rows_Bl], None


class TargetAware(nnx.Module):
    """Learned vectors of a slot's own position and of the position that it predicts.

    What a random order needs: without the second table the model can't know which position is
    asked for. RAR, arXiv:2411.00776, section 3.3. With `rows`, each table has so many beyond the
    positions of the image, as published files have them.
    """

    def __init__(
        self,
        layout: TokenLayout,
        prefix: int,
        width: int,
        heads: int,
        *,
        rows: int = 0,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        spare = max(rows - prefix, 0)
        self.own = Learned(layout, prefix, width, heads, spare=spare, **options)
        self.target = Learned(layout, 0, width, heads, spare=rows, **options)
        self.prefix, self.length = prefix, layout.length

    def __call__(self, order_BL: jax.Array, slots_l: jax.Array) -> tuple[jax.Array, None]:
        """(what is added to the inputs [B, l, D], no rotary rows) of some slots."""
        own_BlD, _ = self.own(order_BL, slots_l)
        target_l = jnp.clip(slots_l - self.prefix + 1, 0, self.length - 1)
        target_BlD, _ = self.target(order_BL, target_l)
        predicts_l = (slots_l >= self.prefix - 1) & (slots_l < self.prefix - 1 + self.length)
        return own_BlD + jnp.where(predicts_l[None, :, None], target_BlD, 0), None


def rar(layout: TokenLayout, prefix: int, width: int, heads: int, **options) -> TargetAware:
    """Tables of as many rows as RAR's files have: 1024 beyond those of the image."""
    return TargetAware(layout, prefix, width, heads, rows=1024, **options)


KINDS = {"rotary": Rotary2D, "learned": Learned, "target_aware": TargetAware, "rar": rar}


def named(name: str) -> Callable:
    """The kind of positions that a config names."""
    return choices.named(KINDS, name, "positions")
