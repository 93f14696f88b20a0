"""A new permutation for every image, as in RAR (arXiv:2411.00776)."""

from __future__ import annotations

import jax

from tokgen.interfaces import TokenLayout


def order(layout: TokenLayout, key: jax.Array) -> jax.Array:
    """[L] a uniformly drawn permutation."""
    return jax.random.permutation(key, layout.length)
