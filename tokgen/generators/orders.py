"""Who comes after whom: each function maps (layout, key) to the position at every place."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokgen.interfaces import TokenLayout, UserError


def raster(layout: TokenLayout, key: jax.Array | None = None) -> jax.Array:
    """[L] row by row, from the upper left corner."""
    del key
    return jnp.arange(layout.length)


def columns(layout: TokenLayout, key: jax.Array | None = None) -> jax.Array:
    """[L] column by column, from the upper left corner; needs a single grid."""
    del key
    if len(layout.grids) != 1:
        raise UserError(f"columns need one grid; found {layout.grids}: use raster or random")
    ((rows, columns),) = layout.grids
    return jnp.arange(rows * columns).reshape(rows, columns).T.reshape(-1)


def random(layout: TokenLayout, key: jax.Array) -> jax.Array:
    """[L] a uniformly drawn permutation."""
    return jax.random.permutation(key, layout.length)


def named(name: str) -> Callable:
    """The function of this file that a config names."""
    found = {
        key: value
        for key, value in globals().items()
        if inspect.isfunction(value) and key != "named" and value.__module__ == __name__
    }
    if name not in found:
        raise UserError(f"order must be one of {sorted(found)}; found {name!r}")
    return found[name]
