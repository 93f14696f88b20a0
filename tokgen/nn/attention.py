"""Multi-head attention, and the cache of its keys and values."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct

from tokgen import sharding
from tokgen.nn import linear, positions
from tokgen.nn.precision import Precision


@struct.dataclass
class KVCache:
    """Keys and values of one layer; the decode product reads them without a transpose."""

    keys_BNSK: jax.Array
    values_BNSK: jax.Array

    @classmethod
    def empty(cls, rows: int, heads: int, size: int, dtype) -> KVCache:
        """A cache without slots."""
        return cls(*(jnp.zeros((rows, heads, 0, size), dtype) for _ in range(2)))

    def write(self, keys_BNlK: jax.Array, values_BNlK: jax.Array, at: jax.Array | int) -> KVCache:
        """The cache with l slots written from slot `at` on."""

        def put(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=2)

        return KVCache(put(self.keys_BNSK, keys_BNlK), put(self.values_BNSK, values_BNlK))

    def grow(self, slots: int) -> KVCache:
        """The cache with room for `slots` slots; it never shrinks."""
        more = max(0, slots - self.keys_BNSK.shape[2])
        pad = ((0, 0), (0, 0), (0, more), (0, 0))
        return KVCache(jnp.pad(self.keys_BNSK, pad), jnp.pad(self.values_BNSK, pad))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout as a function of a key; none without one."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def attend(
    queries_BNlK: jax.Array,
    keys_BNSK: jax.Array,
    values_BNSK: jax.Array,
    mask: jax.Array | None,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T) v in [B, N, l, K]; `mask` broadcasts to [B, N, l, S], true where seen.

    Queries come scaled. Scores and softmax are float32: probabilities in bfloat16 lose the tail.
    """
    scores = jnp.einsum(
        "BNlK,BNSK->BNlS", queries_BNlK, keys_BNSK, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, key)
    return jnp.einsum("BNlS,BNSK->BNlK", weights.astype(values_BNSK.dtype), values_BNSK)


class Attention(nnx.Module):
    """Self-attention with optional rotary positions and a cache that is handed in and returned."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = False,
        std: Callable[[int], float] = linear.published,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        size = width // heads
        self.query, self.key, self.value = (
            linear.Linear(width, (heads, size), bias=bias, std=std, precision=precision, rngs=rngs)
            for _ in range(3)
        )
        self.out = linear.Linear(
            (heads, size), width, bias=bias, std=std, precision=precision, rngs=rngs
        )
        self.size = size

    def __call__(
        self,
        x_BlD: jax.Array,
        *,
        rotary: positions.Rotary | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        at: jax.Array | int = 0,
        rate: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """(outputs [B, l, D], the cache with slots at .. at + l written)."""
        queries, keys, values = (
            sharding.constrain(jnp.swapaxes(project(x_BlD), 1, 2), "BNLK")
            for project in (self.query, self.key, self.value)
        )
        queries = queries * self.size**-0.5
        if rotary is not None:
            queries, keys = positions.rotate(queries, rotary), positions.rotate(keys, rotary)
        if cache is not None:
            cache = cache.write(keys, values, at)
            keys, values = cache.keys_BNSK, cache.values_BNSK
        mixed = attend(queries, keys, values, mask, rate=rate, key=key)
        return self.out(jnp.swapaxes(mixed, 1, 2)), cache
