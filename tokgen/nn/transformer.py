"""The transformer: a stack of blocks over vectors, with or without a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.nn import attention
from tokgen.nn.parts import Parts
from tokgen.nn.precision import Precision


@dataclasses.dataclass(frozen=True)
class Rates:
    """Dropout rates: of the tokens' vectors, attention weights, residual branches."""

    token: float = 0.0
    attention: float = 0.0
    residual: float = 0.0

    def __post_init__(self):
        for name, rate in dataclasses.asdict(self).items():
            if not 0 <= rate < 1:
                raise ValueError(f"dropout rate {name!r} must lie in [0, 1); found {rate}")


class Transformer(nnx.Module):
    """Vectors [B, l, D] through `depth` blocks. It ends with its last block: the norm before the
    logits belongs to the head. What generators disagree about arrives as values: parts, a mask or
    none (causality included), rotary rows or none, a cache or none.

    Layers are stacked (parameters lead with Y), so that training may scan over them; `unstacked`
    takes them apart for decoding, where a scan would copy weights and cache at every step.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        parts: Parts,
        rates: Rates = Rates(),
        remat: bool = False,
        unroll: int = 1,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"heads must divide width: width={width}, heads={heads}")

        def make(key):
            return parts.block(width, heads, parts, precision=precision, rngs=nnx.Rngs(key))

        self.blocks = jax.vmap(make)(jax.random.split(rngs.params(), depth))
        self.depth, self.heads, self.size = depth, heads, width // heads
        self.rates, self.remat, self.unroll, self.precision = rates, remat, unroll, precision

    def cache(self, rows: int) -> tuple[attention.KVCache, ...]:
        """An empty cache per layer."""
        dtype = self.precision.compute_dtype
        return tuple(
            attention.KVCache.empty(rows, self.heads, self.size, dtype) for _ in range(self.depth)
        )

    def unstacked(self) -> Transformer:
        """The same transformer with its layers taken apart."""
        apart = jax.tree.map(lambda leaf: leaf, self)
        apart.blocks = nnx.List(
            [jax.tree.map(lambda leaf: leaf[i], self.blocks) for i in range(self.depth)]  # noqa: B023
        )
        return apart

    def __call__(
        self, x_BlD: jax.Array, *, cache=None, key: jax.Array | None = None, **context: Any
    ) -> tuple[jax.Array, tuple[attention.KVCache, ...] | None]:
        """(outputs [B, l, D], cache); `context` (mask, rotary, at) reaches every block."""
        x_BlD = x_BlD.astype(self.precision.compute_dtype)
        keys = None if key is None else jax.random.split(key, self.depth)
        if isinstance(self.blocks, nnx.List):
            caches = []
            for i, block in enumerate(self.blocks):
                x_BlD, layer = block(
                    x_BlD,
                    rates=self.rates,
                    cache=None if cache is None else cache[i],
                    key=None if keys is None else keys[i],
                    **context,
                )
                caches.append(layer)
            return x_BlD, None if cache is None else tuple(caches)
        if cache is not None:
            stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *cache)
        else:
            stacked = None

        def body(x_BlD, layer):
            block, layer_key, layer_cache = layer
            return block(x_BlD, rates=self.rates, cache=layer_cache, key=layer_key, **context)

        body = jax.checkpoint(body) if self.remat else body
        x_BlD, stacked = jax.lax.scan(body, x_BlD, (self.blocks, keys, stacked), unroll=self.unroll)
        if stacked is None:
            return x_BlD, None
        return x_BlD, tuple(
            jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
            for i in range(self.depth)
        )
