"""Mask schedules: the share of tokens that is still unknown when a share of the steps is done.

Each function maps r in [0, 1] to a share that falls from 1 to 0. Where the published code clips
the share, it does so from 1e-6 on. `count` is the number of slots that were unknown at first, of
which the share is taken; one, or one per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokgen import choices

LEAST = 1e-6
Count = jax.Array | int


def cosine(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """cos(pi r / 2) (MaskGIT, arXiv:2202.04200)."""
    return jnp.cos(math.pi / 2 * r)


def arccos(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """arccos(r) / (pi / 2) (TiTok, MaskBit)."""
    return jnp.arccos(r) / (math.pi / 2)


def linear(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - r; MaskGIT's code calls it uniform."""
    return 1 - r


def square(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - r^2."""
    return 1 - r**2


def root(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - sqrt(r)."""
    return 1 - jnp.sqrt(r)


def power(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - r^exponent."""
    return 1 - r**exponent


def log(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """-log2(r) / log2(count) (MaskGIT's code)."""
    return -jnp.log2(r) / jnp.log2(jnp.asarray(count, jnp.float32))


def exponential(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - 2^(-log2(count) (1 - r)) (MaskGIT's code)."""
    return 1 - jnp.exp2(-jnp.log2(jnp.asarray(count, jnp.float32)) * (1 - r))


def decay(r: jax.Array, count: Count, exponent: float) -> jax.Array:
    """1 - exp(-5 (1 - r)) (eMIGM, arXiv:2503.07197)."""
    return 1 - jnp.exp(-5 * (1 - r))


KNOWN = {
    schedule.__name__: schedule
    for schedule in (
        *(cosine, arccos, linear, square, root),
        *(power, log, exponential, decay),
    )
}


def share(name: str, r: jax.Array, count: Count, exponent: float = 2.0) -> jax.Array:
    """The clipped share of a schedule by name; float32, as published samplers compute it."""
    return jnp.clip(named(name)(jnp.asarray(r, jnp.float32), count, exponent), LEAST, 1)


def named(name: str) -> Callable:
    """The function of this file that a config names."""
    return choices.named(KNOWN, name, "schedule")
