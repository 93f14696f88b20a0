"""Finite scalar quantization: round every channel to a few levels (arXiv:2309.15505)."""

from __future__ import annotations

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, TokenLayout, UserError

Level = Annotated[int, ranges.Range(2, 2**16)]
Levels = Annotated[tuple[Level, ...], ranges.Length(1, 24)]
MOST = 2**24  # codes; whoever counts them has a number for each
MARGIN = 1e-3  # widens the bound a little, so that the outer levels can be reached


class Quantizer(nnx.Module):
    """prod(levels) codes, all of them used by construction; no parameters, no losses."""

    @ranges.checked
    def __init__(
        self,
        levels: Levels,
        *,
        grid: tuple[int, int],
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        levels = tuple(int(level) for level in levels)
        if math.prod(levels) > MOST:
            raise UserError(
                f"levels must have at most {MOST:,} codes, their product; found levels={levels}"
            )
        self.levels = levels
        self.inputs = self.channels = len(levels)
        self.layout = TokenLayout((math.prod(levels),), (grid,))

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path: codes with a straight-through gradient."""
        del key
        bounded_BPC = self._bound(latents_BPC)
        rounded_BPC = bounded_BPC + jax.lax.stop_gradient(jnp.round(bounded_BPC) - bounded_BPC)
        latents = rounded_BPC / self._half()[None, None]
        return Quantized(latents, self._index(rounded_BPC), {})

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, P, 1]."""
        return self._index(jnp.round(self._bound(latents_BPC)))

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, P, 1] -> codes [B, P, C] in [-1, 1]; the first channel is the fastest."""
        basis_C, levels_C = self._basis()[None, None], jnp.asarray(self.levels)[None, None]
        digits_BPC = tokens_BLG // basis_C % levels_C
        half_C = self._half()[None, None]
        return (digits_BPC.astype(jnp.float32) - half_C) / half_C

    def preimage(self, tokens_BLG: jax.Array) -> jax.Array:
        """Latents [B, P, C] in the middle of the bins that `encode` maps to these tokens.

        The codes themselves won't do: the bound squeezes them onto inner levels.
        """
        codes_BPC = self.decode(tokens_BLG) * self._half()[None, None]
        half_C, offset_C, shift_C = self._bounds()
        # the outermost levels lie on the edge of tanh
        inside = jnp.clip((codes_BPC + offset_C) / half_C, -1 + 1e-6, 1 - 1e-6)
        return jnp.arctanh(inside) - shift_C

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """Nothing to keep up between steps."""

    def _half(self) -> jax.Array:
        return jnp.asarray(np.asarray(self.levels) // 2, jnp.float32)

    def _basis(self) -> jax.Array:
        return jnp.asarray(np.cumprod((1, *self.levels[:-1])), jnp.int32)

    def _bound(self, latents_BPC: jax.Array) -> jax.Array:
        """Eq. 2, with the offset that even numbers of levels need."""
        # float32: integers above 256 and the edges of the bins don't exist in bfloat16
        half_C, offset_C, shift_C = self._bounds()
        return jnp.tanh(latents_BPC.astype(jnp.float32) + shift_C) * half_C - offset_C

    def _bounds(self) -> tuple[jax.Array, ...]:
        """Half width, offset and shift of the bound, per channel."""
        levels = np.asarray(self.levels)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        return tuple(jnp.asarray(part, jnp.float32)[None, None] for part in (half, offset, shift))

    def _index(self, rounded_BPC: jax.Array) -> jax.Array:
        # rounded first: a straight-through value may miss its integer by one unit in the last place
        middle_C = jnp.asarray(np.asarray(self.levels) // 2, jnp.int32)
        digits_BPC = jnp.round(rounded_BPC).astype(jnp.int32) + middle_C[None, None]
        return jnp.sum(digits_BPC * self._basis()[None, None], axis=-1, keepdims=True)
