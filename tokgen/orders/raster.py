"""Row by row, from the upper left corner; grid by grid where there are several."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokgen.interfaces import TokenLayout


def order(layout: TokenLayout, key: jax.Array | None = None) -> jax.Array:
    """[L] positions as they lie in the sequence."""
    del key
    return jnp.arange(layout.length)
