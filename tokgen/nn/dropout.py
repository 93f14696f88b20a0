"""Dropout and stochastic depth, as functions of a key, none without one; and their rates."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokgen import ranges
from tokgen.interfaces import PyTree


@dataclasses.dataclass(frozen=True)
class Rates:
    """Dropout rates: of the tokens' vectors, attention weights, residual branches, hidden values
    of the MLPs, and of whole branches (`path`, rising from 0 at the first block to it at the last).
    """

    token: ranges.Rate = 0.0
    attention: ranges.Rate = 0.0
    residual: ranges.Rate = 0.0
    hidden: ranges.Rate = 0.0
    path: ranges.Rate = 0.0

    def __post_init__(self):
        ranges.check(self)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout as a function of a key; none without one."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_path(x_BlD: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """A residual branch left out for whole samples (arXiv:1603.09382); none without a key."""
    if key is None:
        return x_BlD
    keep_B11 = jax.random.bernoulli(key, 1 - rate, (len(x_BlD), 1, 1))
    return jnp.where(keep_B11, x_BlD / (1 - rate), 0).astype(x_BlD.dtype)


def conditions(cond: PyTree, null: PyTree, rate: float, key: jax.Array) -> PyTree:
    """Conditions, each replaced by its null with a probability of `rate` (arXiv:2207.12598)."""
    drop_B = jax.random.bernoulli(key, rate, (len(jax.tree.leaves(cond)[0]),))

    def one(null, cond):
        return jnp.where(drop_B.reshape(-1, *(1,) * (cond.ndim - 1)), null, cond)

    return jax.tree.map(one, null, cond)
