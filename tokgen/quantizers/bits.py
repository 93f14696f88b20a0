"""Bits of channels as tokens and back: one symbol per group of neighbouring channels.

Group 0 holds the first channels. "little" makes the first channel of a group its least significant
bit (MaskBit, Open-MAGVIT2), "big" the most significant one (Infinity).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import choices
from tokgen.interfaces import UserError

ORDERS = ("little", "big")
LARGEST = 18  # bits of one symbol


def checked(bits: int, groups: tuple[int, ...] | None, order: str) -> tuple[int, ...]:
    """The channels of each group; all of them in one group when `groups` is None."""
    groups = (bits,) if groups is None else tuple(int(size) for size in groups)
    if order not in ORDERS:
        raise UserError(choices.refusal(ORDERS, order, "order"))
    if sum(groups) != bits or not groups or min(groups) < 1:
        raise UserError(f"groups must be positive and sum to bits={bits}; found groups={groups}")
    if max(groups) > LARGEST:
        raise UserError(
            f"a symbol has at most {LARGEST} bits; found {max(groups)}: split bits={bits} into "
            f"groups, such as groups={(bits // 2, bits - bits // 2)}"
        )
    return groups


def pack(bits_BPC: jax.Array, groups: tuple[int, ...], order: str) -> jax.Array:
    """Bits (bool) -> tokens [B, P, G]."""
    symbols, start = [], 0
    for size in groups:
        weights_C = jnp.asarray(1 << _shifts(size, order), jnp.int32)[None, None]
        part_BPC = bits_BPC[..., start : start + size].astype(jnp.int32)
        symbols.append(jnp.sum(part_BPC * weights_C, -1))
        start += size
    return jnp.stack(symbols, -1)


def unpack(tokens_BLG: jax.Array, groups: tuple[int, ...], order: str) -> jax.Array:
    """Tokens [B, P, G] -> bits 0 and 1 [B, P, C]."""
    parts = [
        tokens_BLG[..., g : g + 1] >> jnp.asarray(_shifts(size, order), jnp.int32)[None, None] & 1
        for g, size in enumerate(groups)
    ]
    return jnp.concatenate(parts, -1)


def _shifts(size: int, order: str) -> np.ndarray:
    shifts = np.arange(size)
    return shifts if order == "little" else shifts[::-1]
