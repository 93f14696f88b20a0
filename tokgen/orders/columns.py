"""Column by column, from the upper left corner."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokgen.interfaces import TokenLayout, UserError


def order(layout: TokenLayout, key: jax.Array | None = None) -> jax.Array:
    """[L] positions; UserError where there is more than one grid."""
    del key
    if len(layout.grids) != 1:
        raise UserError(f"columns need one grid; found {layout.grids}: use raster or random")
    ((rows, columns),) = layout.grids
    return jnp.arange(rows * columns).reshape(rows, columns).T.reshape(-1)
