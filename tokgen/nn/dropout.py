"""Dropout and stochastic depth, as functions of a key, none without one; and their rates."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import ranges, sharding
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
    """Dropout as a function of a key (arXiv:1207.0580); none without one.

    A word of 32 random bits decides about four entries, so the rate is rounded to 1/256: 0.1 is
    26/256. What is kept is divided by exactly the share that is kept, so that the expectation
    is that of `x`. Where a rounding to 1/256 would move the share that is dropped, or that is kept,
    by more than a twentieth of it (below about 0.04), a decision takes 2 or all 4 bytes.
    """
    if key is None or rate == 0.0:
        return x
    bits, dropped = _rounded(rate)
    keep = _numbers(key, x.shape, bits) >= jnp.uint32(dropped)
    share = np.float32(1 - dropped / 2**bits)
    return jnp.where(keep, x.astype(jnp.float32) / share, 0).astype(x.dtype)


def _rounded(rate: float) -> tuple[int, int]:
    """(bits of a decision, how many of its 2^bits values drop)."""
    for bits in (8, 16):
        dropped = round(rate * 2**bits)
        if abs(dropped / 2**bits - rate) <= min(rate, 1 - rate) / 20:
            return bits, dropped
    # neither is ever none: what is kept can be scaled up
    return 32, min(max(round(rate * 2**32), 1), 2**32 - 1)


def _numbers(key: jax.Array, shape: tuple[int, ...], bits: int) -> jax.Array:
    """Independent numbers below 2^bits, as uint32: the parts of 32-bit words.

    A word serves neighbours along the last axis but one, which never lies over several devices, so
    that no part is moved. jax.random draws a whole word for a narrower one, too (jax 0.10.2).
    """
    axis, parts = max(len(shape) - 2, 0), 32 // bits
    before, length, after = shape[:axis], shape[axis], shape[axis + 1 :]
    count = -(-length // parts)
    words = _words(key, (*before, count, 1, *after), axis)
    part = jax.lax.broadcasted_iota(jnp.uint32, (*before, count, parts, *after), axis + 1)
    numbers = (words >> (part * bits)) & jnp.uint32(2**bits - 1)
    numbers = numbers.reshape(*before, count * parts, *after)
    return jax.lax.slice_in_dim(numbers, 0, length, axis=axis)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry's rounds, four and four


def _words(key: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """jax.random.bits(key, shape, uint32), bit for bit, on a CPU in one pass over memory.

    jax loops over the rounds there and writes all words at each (jax 0.10.2): six times as long. A
    loop over an axis writes every word once; without one, XLA would draw it anew for every reader.
    """
    known = str(jax.random.key_impl(key)) == "threefry2x32"
    known &= jax.config.jax_threefry_partitionable and math.prod(shape) < 2**32
    if not known or sharding.platform() != "cpu":
        return jax.random.bits(key, shape, jnp.uint32)
    others = shape[:axis] + shape[axis + 1 :]
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    rest = jnp.zeros(others, jnp.uint32)
    for n, stride in enumerate(strides[:axis] + strides[axis + 1 :]):
        rest += jax.lax.broadcasted_iota(jnp.uint32, others, n) * jnp.uint32(stride)
    places = jnp.arange(shape[axis], dtype=jnp.uint32) * jnp.uint32(strides[axis])
    words = jax.lax.map(lambda place: _threefry(jax.random.key_data(key), place + rest), places)
    return jnp.moveaxis(words, 0, axis)


def _threefry(key: jax.Array, number: jax.Array) -> jax.Array:
    """The word of every number below 2^32: both halves of Threefry-2x32, one xor the other.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), 20 rounds.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = jnp.broadcast_to(keys[0], number.shape), number + keys[1]
    for turn in range(5):
        for by in ROTATIONS[turn % 2]:
            x = x + y
            y = x ^ (y << jnp.uint32(by) | y >> jnp.uint32(32 - by))
        x = x + keys[(turn + 1) % 3]
        y = y + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return x ^ y


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
