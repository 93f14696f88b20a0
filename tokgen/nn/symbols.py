"""Tokens into vectors, vectors into logits, labels into vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import sharding
from tokgen.interfaces import TokenLayout
from tokgen.nn import linear
from tokgen.nn.precision import Precision


class Symbols(nnx.Module):
    """A position's vector is the sum of its symbols' rows."""

    def __init__(self, layout: TokenLayout, width: int, *, std, precision: Precision, rngs):
        shape = (layout.groups, layout.absent, width)
        # rows are looked up one at a time: their scale is that of the vectors, not of a product
        self.table = nnx.Param(
            std(width) * jax.random.normal(rngs.params(), shape, precision.params_dtype)
        )
        self.groups = layout.groups

    def __call__(self, tokens_BlG: jax.Array) -> jax.Array:
        """[B, l, G] tokens below V -> [B, l, D]."""
        table_GVD = self.table[...]
        return sum(table_GVD[g][tokens_BlG[..., g]] for g in range(self.groups))


class Labels(nnx.Module):
    """A row per class and, last, one for "no class"; `classes` = 0 is an unconditional model."""

    def __init__(self, classes: int, width: int, *, std, precision: Precision, rngs):
        self.table = nnx.Param(
            std(width)
            * jax.random.normal(rngs.params(), (classes + 1, width), precision.params_dtype)
        )
        self.classes = classes

    def null(self, label_B: jax.Array) -> jax.Array:
        """The label that stands for none."""
        return jnp.full_like(label_B, self.classes)

    def __call__(self, label_B: jax.Array) -> jax.Array:
        """[B] labels -> [B, D]."""
        return self.table[...][label_B]


class Head(nnx.Module):
    """Norm, then logits [B, l, G, V] in float32; beyond a smaller alphabet they are -inf."""

    def __init__(self, layout: TokenLayout, width: int, *, norm, precision: Precision, rngs):
        self.norm = norm(width, precision=precision, rngs=rngs)
        # zeros: the first predictions are uniform, the first loss is log V
        self.head = linear.Linear(
            width, (layout.groups, layout.absent), std=None, precision=precision, rngs=rngs
        )
        self.layout = layout

    def __call__(self, x_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, G, V]."""
        logits_BlGV = sharding.constrain(self.head(self.norm(x_BlD)), "BLGV")
        # float32: differences of logits decide draws and losses
        logits_BlGV = logits_BlGV.astype(jnp.float32)
        if len(set(self.layout.vocab)) == 1:
            return logits_BlGV
        sizes_G1 = jnp.asarray(self.layout.vocab)[:, None]
        valid_GV = jnp.arange(self.layout.absent)[None] < sizes_G1
        return jnp.where(valid_GV[None, None], logits_BlGV, -jnp.inf)
