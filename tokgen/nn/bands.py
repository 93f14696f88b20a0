"""Attention one head of one row after the other, in bands of rows: for a CPU, in training.

Where the scores of a head would fill the memory that a core keeps near, they are made when they are
needed, backwards again; and rows that see the same first keys, or nearly, meet no others.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokgen.nn import masks

LEAST = 64  # rows from which it pays to leave out keys that none of them sees
MOST = 6  # bands, about: each is compiled by itself, and a causal rule would have hundreds


class Band(NamedTuple):
    """Neighbouring rows of scores, and how many of the first keys they meet."""

    begin: int
    end: int
    seen: int
    masked: bool  # or every row sees all of these keys


def of_rule(rule: masks.Blocks) -> tuple[Band, ...]:
    """Blocks of a rule side by side, until there are enough rows."""
    bands, begin, end, blocks = [], 0, 0, 0
    least = max(LEAST, rule.length // MOST)
    for size in filter(None, rule.sizes):
        end, blocks = end + size, blocks + 1
        if end - begin >= least or end == rule.length:
            bands.append(Band(begin, end, end, blocks > 1))
            begin, blocks = end, 0
    return tuple(bands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    bands: tuple[Band, ...],
    queries_BNlK: jax.Array,
    keys_BNSK: jax.Array,
    values_BNSK: jax.Array,
    mask_lS: jax.Array | None,
) -> jax.Array:
    """One head of one row after the other, backwards too, where scores are computed again."""
    return _kept(bands, queries_BNlK, keys_BNSK, values_BNSK, mask_lS)[0]


def _kept(bands, queries_BNlK, keys_BNSK, values_BNSK, mask_lS) -> tuple[jax.Array, tuple]:
    def one(head):
        queries_lK, keys_SK, values_SK = head
        mixed = []
        for band in bands:
            weights_lS = _weights(band, queries_lK, keys_SK, mask_lS)
            mixed.append(weights_lS.astype(values_SK.dtype) @ values_SK[: band.seen])
        return jnp.concatenate(mixed)

    mixed = jax.lax.map(one, _heads(queries_BNlK, keys_BNSK, values_BNSK))
    mixed_BNlK = mixed.reshape(queries_BNlK.shape)
    return mixed_BNlK, (queries_BNlK, keys_BNSK, values_BNSK, mask_lS, mixed_BNlK)


def _slopes(bands, kept: tuple, slope_BNlK: jax.Array) -> tuple:
    *operands, mask_lS, mixed_BNlK = kept
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def one(head):
        queries_lK, keys_SK, values_SK, mixed_lK, slope_lK = head
        dtype, to_queries = values_SK.dtype, []
        to_keys_SK, to_values_SK = (jnp.zeros(keys_SK.shape, jnp.float32) for _ in range(2))
        # the weighted mean of the slopes of a row's weights is that of what they mix
        mean_l1 = jnp.sum((slope_lK * mixed_lK).astype(jnp.float32), axis=-1, keepdims=True)
        for band in bands:
            rows, seen = slice(band.begin, band.end), slice(band.seen)
            weights_lS = _weights(band, queries_lK, keys_SK, mask_lS)
            to_weights_lS = product(slope_lK[rows], values_SK[seen].T)
            to_scores_lS = (weights_lS * (to_weights_lS - mean_l1[rows])).astype(dtype)
            to_queries.append(to_scores_lS @ keys_SK[seen])
            to_keys_SK = to_keys_SK.at[seen].add(product(to_scores_lS.T, queries_lK[rows]))
            to_values_seen = product(weights_lS.astype(dtype).T, slope_lK[rows])
            to_values_SK = to_values_SK.at[seen].add(to_values_seen)
        return jnp.concatenate(to_queries), to_keys_SK.astype(dtype), to_values_SK.astype(dtype)

    found = jax.lax.map(one, _heads(*operands, mixed_BNlK, slope_BNlK))
    slopes = (a.reshape(b.shape) for a, b in zip(found, operands, strict=True))
    return (*slopes, None)


attend.defvjp(_kept, _slopes)


def _heads(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, N, ...] -> [B N, ...]."""
    return tuple(array.reshape(-1, *array.shape[2:]) for array in arrays)


def _weights(
    band: Band, queries_lK: jax.Array, keys_SK: jax.Array, mask_lS: jax.Array | None
) -> jax.Array:
    """The softmax of a band of a head's scores, float32."""
    queries_lK, keys_SK = queries_lK[band.begin : band.end], keys_SK[: band.seen]
    scores_lS = jnp.matmul(queries_lK, keys_SK.T, preferred_element_type=jnp.float32)
    if band.masked:
        mask_lS = mask_lS[band.begin : band.end, : band.seen]
        scores_lS = jnp.where(mask_lS, scores_lS, -jnp.inf)
    return jax.nn.softmax(scores_lS, axis=-1)
