"""The transformer: a stack of blocks over vectors, with or without a cache; its U-shaped sister."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import rng
from tokgen.interfaces import UserError
from tokgen.nn import attention, blocks, linear, remat
from tokgen.nn.precision import Precision


class Transformer(nnx.Module):
    """Vectors [B, l, D] through `depth` blocks. It ends with its last block: the norm before the
    logits belongs to the head. What generators disagree about arrives as values: variant, a mask or
    none (causality included), rotary rows or none, a condition or none, a cache or none.

    Layers are stacked (parameters lead with Y), so that training may scan over them, and decoding
    on a TPU. `unstacked` takes them apart for decoding elsewhere, where a scan would copy weights
    and cache at every step.
    """

    def __init__(self, config: blocks.Config, *, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.blocks = _stacked(config, config.depth, **options)
        shared = config.variant.shared
        self.shared = shared(config.width, **options) if shared else None
        self.depth, self.heads = config.depth, config.heads
        self.size = config.width // config.heads
        self.rates, self.unroll = config.rates, config.turn(config.depth)
        self.remat = remat.named(config.remat)
        self.precision, self.cached = precision, precision.compute_dtype

    def cache(
        self, rows: int, groups: int | None = None
    ) -> tuple[attention.KVCache | attention.StackedCache, ...]:
        """An empty cache per layer; of stacked layers, one for all.

        In that, the heads lie side by side in so many groups; None: each by itself.
        """
        dtype = self.cached
        if not isinstance(self.blocks, nnx.List):
            groups = groups or self.heads
            shape = rows, self.depth, groups, self.heads * self.size // groups
            return (attention.StackedCache.empty(*shape, dtype),)
        return tuple(
            attention.KVCache.empty(rows, self.heads, self.size, dtype) for _ in range(self.depth)
        )

    def unstacked(self) -> Transformer:
        """A transformer of the same arrays with its layers taken apart, as they may be already."""
        return self if isinstance(self.blocks, nnx.List) else _apart(self)

    def modulation(self, cond_BlD: jax.Array) -> tuple[jax.Array, ...]:
        """What every block needs from the condition, to be computed once: [B, l, 6, D] per layer,
        or [B, Y, l, 6, D] of stacked ones."""
        base = self._base(cond_BlD)
        if isinstance(self.blocks, nnx.List):
            return tuple(block.modulate(base) for block in self.blocks)
        stacked = jax.lax.map(lambda block: block.modulate(base), self.blocks)
        return (jnp.swapaxes(stacked, 0, 1),)

    def __call__(
        self,
        x_BlD: jax.Array,
        *,
        cond: jax.Array | None = None,
        modulation: tuple[jax.Array, ...] | None = None,
        cache: tuple[attention.KVCache | attention.StackedCache, ...] | None = None,
        key: jax.Array | None = None,
        **context: Any,
    ) -> tuple[jax.Array, tuple[attention.KVCache | attention.StackedCache, ...] | None]:
        """(outputs [B, l, D], cache); `context` (mask, rotary, at) reaches every block.

        Adaptive blocks read `cond` [B, l, D], or the `modulation` computed of it beforehand.
        """
        x_BlD = x_BlD.astype(self.precision.compute_dtype)
        keys = rng.numbered(key, self.depth)
        paths_Y = self.rates.path * jnp.arange(self.depth) / max(self.depth - 1, 1)
        base = None if cond is None else self._base(cond)

        def run(
            block: nnx.Module,
            x_BlD: jax.Array,
            layer_modulation: jax.Array | None,
            path: jax.Array,
            layer_key: jax.Array | None,
            layer_cache: attention.KVCache | attention.Layer | None,
        ) -> tuple[jax.Array, attention.KVCache | attention.Layer | None]:
            if layer_modulation is None and base is not None:
                layer_modulation = block.modulate(base)
            adapted = {} if layer_modulation is None else {"modulation": layer_modulation}
            drop = blocks.Drop(self.rates, path, layer_key)
            return block(x_BlD, drop=drop, cache=layer_cache, **adapted, **context)

        if isinstance(self.blocks, nnx.List):
            caches = []
            for i, block in enumerate(self.blocks):
                layer = tuple(
                    None if part is None else part[i] for part in (modulation, keys, cache)
                )
                x_BlD, layer_cache = run(block, x_BlD, layer[0], paths_Y[i], *layer[1:])
                caches.append(layer_cache)
            return x_BlD, None if cache is None else tuple(caches)

        def body(carry, layer):
            # the cache is carried whole: what a scan takes in slices and gives in slices is copied
            (x_BlD, stack), (index, block, *rest) = carry, layer
            view = None if stack is None else attention.Layer(stack, index, self.heads)
            x_BlD, view = run(block, x_BlD, *rest, view)
            return (x_BlD, None if stack is None else view.stack), None

        stack = None if cache is None else cache[0]
        modulation = None if modulation is None else jnp.swapaxes(modulation[0], 0, 1)
        layers = (jnp.arange(self.depth), self.blocks, modulation, paths_Y, keys)
        (x_BlD, stack), _ = jax.lax.scan(
            self.remat(body), (x_BlD, stack), layers, unroll=self.unroll
        )
        return x_BlD, None if cache is None else (stack,)

    def _base(self, cond_BlD: jax.Array) -> jax.Array:
        """What the blocks are told: the condition, or what they share of it."""
        cond_BlD = cond_BlD.astype(self.precision.compute_dtype)
        return cond_BlD if self.shared is None else self.shared(cond_BlD)


class UShaped(nnx.Module):
    """Blocks with long skips (U-ViT, arXiv:2209.12152): the first half's outputs join the second's.

    `depth` // 2 blocks on the way in, one in the middle, as many on the way out; a block on the way
    out first maps its input and the skip, the last one in first, back to the width. It looks both
    ways: no cache.
    """

    def __init__(self, config: blocks.Config, *, precision: Precision, rngs: nnx.Rngs):
        width, path = config.width, config.rates.path
        if path:
            raise UserError(f"a U-shaped stack drops no whole branches; found path={path}")
        if config.depth < 2:
            raise UserError(
                f"a U-shaped stack needs a depth of at least 2; found depth={config.depth}"
            )
        self.half = config.depth // 2
        self.depth = 2 * self.half + 1
        self.blocks = _stacked(config, self.depth, precision=precision, rngs=rngs)

        def make(key):
            options = dict(std=config.variant.std, precision=precision, rngs=rng.rngs(key))
            return linear.Linear(2 * width, width, bias=True, **options)

        self.skips = jax.vmap(make)(rng.numbered(rngs.params(), self.half))
        self.rates, self.unroll = config.rates, config.turn(self.depth)
        self.remat = remat.named(config.remat)
        self.precision = precision

    def unstacked(self) -> UShaped:
        """Itself: its steps are few and each reads every weight once."""
        return self

    def __call__(
        self, x_BlD: jax.Array, *, key: jax.Array | None = None, **context: Any
    ) -> tuple[jax.Array, None]:
        """(outputs [B, l, D], no cache)."""
        x_BlD = x_BlD.astype(self.precision.compute_dtype)
        keys = rng.numbered(key, self.depth)
        half = self.half

        def part(tree: nnx.Module | jax.Array | None, begin: int, end: int | None):
            return jax.tree.map(lambda leaf: leaf[begin:end], tree)

        def enter(x_BlD, layer):
            block, layer_key = layer
            x_BlD, _ = block(x_BlD, drop=blocks.Drop(self.rates, key=layer_key), **context)
            return x_BlD, x_BlD

        def leave(x_BlD, layer):
            block, layer_key, skip, entered_BlD = layer
            x_BlD = skip(jnp.concatenate([x_BlD, entered_BlD], axis=-1))
            x_BlD, _ = block(x_BlD, drop=blocks.Drop(self.rates, key=layer_key), **context)
            return x_BlD, None

        scan = dict(unroll=self.unroll)
        layers = (part(self.blocks, 0, half + 1), part(keys, 0, half + 1))
        x_BlD, entered_YBlD = jax.lax.scan(self.remat(enter), x_BlD, layers, **scan)
        # the last output is the middle's; the others are taken in reverse
        entered_YBlD = entered_YBlD[:half][::-1]
        rest = (part(self.blocks, half + 1, None), part(keys, half + 1, None))
        rest = (*rest, self.skips, entered_YBlD)
        x_BlD, _ = jax.lax.scan(self.remat(leave), x_BlD, rest, **scan)
        return x_BlD, None


def unstacked(owner: nnx.Module, *names: str) -> nnx.Module:
    """A copy of a module, of the same arrays, in which its stacks of these names are apart."""
    apart = jax.tree.map(lambda leaf: leaf, owner)
    for name in names:
        setattr(apart, name, getattr(apart, name).unstacked())
    return apart


def without_stacks(owner: nnx.Module) -> nnx.Module:
    """A copy of a module with the stacks of its transformers apart, but for those in lists."""
    apart = jax.tree.map(lambda leaf: leaf, owner)
    for name, part in list(vars(apart).items()):
        if isinstance(part, Transformer):
            setattr(apart, name, part.unstacked())
        elif isinstance(part, nnx.Module) and not isinstance(part, nnx.List):
            setattr(apart, name, without_stacks(part))
    return apart


def _stacked(
    config: blocks.Config, depth: int, *, precision: Precision, rngs: nnx.Rngs
) -> nnx.Module:
    """`depth` blocks in one, their parameters stacked."""
    if config.width % config.heads:
        raise UserError(f"heads must divide width: width={config.width}, heads={config.heads}")

    def make(key):
        return config.variant.block(config, precision=precision, rngs=rng.rngs(key))

    return jax.vmap(make)(rng.numbered(rngs.params(), depth))


def _apart(transformer: Transformer) -> Transformer:
    apart = jax.tree.map(lambda leaf: leaf, transformer)
    apart.blocks = nnx.List(_rows(transformer.blocks, transformer.depth))
    return apart


def _rows(tree, count: int) -> tuple:
    """The entries of a stacked tree."""
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count))
