"""The blocks of which transformers are stacks, each of attention and an MLP.

A block says whether it is `adaptive`: then it needs the six vectors that `modulate` makes of a
condition. `Variant` is what the config's word for a published transformer stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import rng
from tokgen.nn import attention, dropout, linear
from tokgen.nn.precision import Precision

Cache = attention.KVCache | None
Out = tuple[jax.Array, Cache]

# Blocks that are run without a loop by default: XLA fuses across them and slices no weights, but
# compiles each of them.
UNROLLED = 6


@dataclasses.dataclass(frozen=True)
class Drop:
    """What a block drops in training: nothing without a key."""

    rates: dropout.Rates
    path: jax.Array | float = 0.0  # of this block's whole branches, where `rates` has any
    key: jax.Array | None = None


class PreNorm(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    adaptive = False

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            config, precision=precision, rngs=rngs
        )

    def __call__(self, x_BlD: jax.Array, *, drop: Drop, cache: Cache = None, **context: Any) -> Out:
        """(outputs [B, l, D], cache)."""
        after, keys = _branches(drop)
        y_BlD, cache = self.attention(
            self.attention_norm(x_BlD),
            cache=cache,
            rate=drop.rates.attention,
            key=keys[0],
            **context,
        )
        x_BlD = x_BlD + after(y_BlD, keys[1])
        y_BlD = self.mlp(self.mlp_norm(x_BlD), rate=drop.rates.hidden, key=keys[2])
        return x_BlD + after(y_BlD, keys[3]), cache


class PostNorm(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), as BERT has it (arXiv:1810.04805)."""

    adaptive = False

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            config, precision=precision, rngs=rngs
        )

    def __call__(self, x_BlD: jax.Array, *, drop: Drop, cache: Cache = None, **context: Any) -> Out:
        """(outputs [B, l, D], cache)."""
        after, keys = _branches(drop)
        y_BlD, cache = self.attention(
            x_BlD, cache=cache, rate=drop.rates.attention, key=keys[0], **context
        )
        x_BlD = self.attention_norm(x_BlD + after(y_BlD, keys[1]))
        y_BlD = self.mlp(x_BlD, rate=drop.rates.hidden, key=keys[2])
        return self.mlp_norm(x_BlD + after(y_BlD, keys[3])), cache


class Adaptive(nnx.Module):
    """A PreNorm block whose norms and branches are shifted, scaled and gated by a condition.

    adaLN-zero of DiT (arXiv:2212.09748). The six vectors are, in this order, shift, scale and gate
    of the attention, then of the MLP. They come from a linear map of the block's own.
    """

    adaptive = True

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        options, width, variant = dict(precision=precision, rngs=rngs), config.width, config.variant
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(config, **options)
        self.modulation = linear.Linear(width, (6, width), bias=True, std=None, **options)
        if variant.starts:
            kernel = self.modulation.kernel
            starts_161 = jnp.asarray(variant.starts)[None, :, None]
            draw = starts_161 * jax.random.normal(rngs.params(), kernel.shape)
            kernel[...] = draw.astype(precision.params_dtype)

    def modulate(self, cond_BlD: jax.Array) -> jax.Array:
        """The six vectors [B, l, 6, D] of a condition."""
        return self.modulation(jax.nn.silu(cond_BlD))

    def __call__(self, x_BlD: jax.Array, *, modulation: jax.Array, **told: Any) -> Out:
        """(outputs [B, l, D], cache), told the six vectors [B, l or 1, 6, D] of `modulate`."""
        return _adapted(self, x_BlD, modulation, **told)


class SharedAdaptive(nnx.Module):
    """An `Adaptive` block whose six vectors are those that all blocks share, and six learned ones
    of its own added (VAR d36)."""

    adaptive = True

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            config, precision=precision, rngs=rngs
        )
        # N(0, 1) / sqrt(D), as published
        draw = jax.random.normal(rngs.params(), (6, config.width), precision.params_dtype)
        self.table = nnx.Param(draw * config.width**-0.5)

    def modulate(self, shared_Bl6D: jax.Array) -> jax.Array:
        """The six vectors [B, l, 6, D] of this block."""
        return shared_Bl6D + self.table[...].astype(shared_Bl6D.dtype)[None, None]

    def __call__(self, x_BlD: jax.Array, *, modulation: jax.Array, **told: Any) -> Out:
        """(outputs [B, l, D], cache), told the six vectors [B, l or 1, 6, D] of `modulate`."""
        return _adapted(self, x_BlD, modulation, **told)


class Shared(nnx.Module):
    """The six vectors that all blocks share, of a condition."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.modulation = linear.Linear(
            width, (6, width), bias=True, precision=precision, rngs=rngs
        )

    def __call__(self, cond_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, 6, D]."""
        return self.modulation(jax.nn.silu(cond_BlD))


def _layers(config: Config, **options) -> tuple:
    """What every block is made of: norm, attention, norm, MLP."""
    width, variant = config.width, config.variant
    hidden = variant.hidden(width) if config.hidden is None else config.hidden
    return (
        variant.norm(width, **options),
        attention.Attention(
            width,
            config.heads,
            biased=variant.biased,
            similarity=variant.similarity,
            std=variant.std,
            **options,
        ),
        variant.norm(width, **options),
        variant.mlp(width, hidden, std=variant.std, **options),
    )


def _branches(drop: Drop) -> tuple[Callable, tuple]:
    """(what becomes of a residual branch, keys of attention, its branch, MLP, its branch)."""
    uses = (rng.ATTENTION, rng.ATTENDED, rng.HIDDEN, rng.MAPPED)
    keys = tuple(rng.use(drop.key, what) for what in uses)

    def after(y_BlD, key):
        y_BlD = dropout.dropout(y_BlD, drop.rates.residual, rng.use(key, rng.RESIDUAL))
        if drop.rates.path == 0.0 or key is None:
            return y_BlD
        return dropout.drop_path(y_BlD, drop.path, rng.use(key, rng.PATH))

    return after, keys


def _adapted(
    block: Adaptive | SharedAdaptive,
    x_BlD: jax.Array,
    modulation_Bl6D: jax.Array,
    *,
    drop: Drop,
    cache: Cache = None,
    **context: Any,
) -> Out:
    """(outputs, cache) of an adaptive block, from its six vectors."""
    after, keys = _branches(drop)
    # of a split, gradients are laid side by side; of six slices, six padded ones are added
    parts = jnp.split(modulation_Bl6D.astype(x_BlD.dtype), 6, axis=-2)
    six = (part_Bl1D[..., 0, :] for part_Bl1D in parts)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = six
    y_BlD = block.attention_norm(x_BlD) * (1 + scale) + shift
    y_BlD, cache = block.attention(
        y_BlD, cache=cache, rate=drop.rates.attention, key=keys[0], **context
    )
    x_BlD = x_BlD + after(gate * y_BlD, keys[1])
    y_BlD = block.mlp_norm(x_BlD) * (1 + mlp_scale) + mlp_shift
    y_BlD = block.mlp(y_BlD, rate=drop.rates.hidden, key=keys[2])
    return x_BlD + after(mlp_gate * y_BlD, keys[3]), cache


@dataclasses.dataclass(frozen=True)
class Variant:
    """The module factories and functions that make up the blocks of a transformer."""

    block: Callable
    norm: Callable
    mlp: Callable
    hidden: Callable[[int], int]
    std: Callable[[int], float]
    biased: tuple[str, ...] = ()  # which maps of the attention have a bias; an MLP brings its own
    similarity: Callable = attention.Scaled
    shared: Callable | None = None  # what all adaptive blocks have in common
    starts: tuple[float, ...] = ()  # deviations of the maps to the six vectors; zeros where empty
    closing: Callable | None = None  # a norm after the last block, where the head brings none

    @property
    def adaptive(self) -> bool:
        """Whether the blocks follow a condition."""
        return self.block.adaptive


@dataclasses.dataclass(frozen=True)
class Config:
    """What a stack of blocks is, and how it runs in training.

    Args:
        hidden: width of the MLPs; None: the variant's own.
        remat: what of a block the backward pass computes again, one of remat.KINDS.
        unroll: blocks in one turn of the scan over them; None: all of up to UNROLLED where nothing
            is computed again, else one.
    """

    width: int
    depth: int
    heads: int
    variant: Variant
    hidden: int | None = None
    rates: dropout.Rates = dropout.Rates()
    remat: str = "none"
    unroll: int | None = None

    def turn(self, depth: int) -> int:
        """Blocks in one turn of the scan over `depth` of them."""
        if self.unroll is not None:
            return self.unroll
        # without a loop, XLA on a CPU moves what is computed again ahead, and keeps it (jax 0.10.2)
        return depth if depth <= UNROLLED and self.remat == "none" else 1
