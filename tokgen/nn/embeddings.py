"""Embeddings: tokens into vectors, labels into vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import boundary, choices
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn import linear
from tokgen.nn.precision import Precision


class Tokens(nnx.Module):
    """A position's vector is the sum of its symbols' rows.

    `extra` rows follow those of the alphabet: the first is read by V, "nothing here".
    """

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        *,
        extra: int = 0,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (layout.groups, layout.absent + extra, width)
        # rows are looked up one at a time: their scale is that of the vectors, not of a product
        self.table = nnx.Param(
            std(width) * jax.random.normal(rngs.params(), shape, precision.params_dtype)
        )
        self.groups = layout.groups

    @property
    def rows(self) -> jax.Array:
        """[G, V + extra, D], for a head that is tied to them."""
        return self.table[...]

    def __call__(self, tokens_BlG: jax.Array) -> jax.Array:
        """[B, l, G] tokens, V only where there is a row for it -> [B, l, D]."""
        table_GVD = self.table[...]
        return sum(table_GVD[g][tokens_BlG[..., g]] for g in range(self.groups))


class Bits(nnx.Module):
    """A position's vector is a linear map of its bits, -1 or 1, and 0 where there is nothing.

    MaskBit's embedding-free input (arXiv:2409.16211, section 3.3): the bits of a symbol from the
    lowest on, symbol after symbol.
    """

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        *,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
        **_,  # `extra`: zeros need no row
    ):
        self.rows = None  # nothing that a head could be tied to
        self.widths = tuple(int(size).bit_length() - 1 for size in layout.vocab)
        if tuple(2**bits for bits in self.widths) != layout.vocab:
            raise UserError(f"bits need alphabets that are powers of two; found {layout.vocab}")
        self.absent = layout.absent
        self.embed = linear.Linear(
            sum(self.widths), width, bias=True, std=std, precision=precision, rngs=rngs
        )

    def __call__(self, tokens_BlG: jax.Array) -> jax.Array:
        """[B, l, G] tokens, V for "nothing here" -> [B, l, D]."""
        parts = []
        for symbol, bits in enumerate(self.widths):
            token_Bl1 = tokens_BlG[..., symbol, None]
            signs = 2 * ((token_Bl1 >> np.arange(bits, dtype=np.int32)[None, None]) & 1) - 1
            parts.append(jnp.where(token_Bl1 == self.absent, 0, signs))
        return self.embed(jnp.concatenate(parts, axis=-1).astype(jnp.float32))


INPUTS = {"tokens": Tokens, "bits": Bits}


def named(name: str) -> type[nnx.Module]:
    """The kind of input vectors that a config names."""
    return choices.named(INPUTS, name, "inputs")


class Labels(nnx.Module):
    """A row per class and, last, one for "no class"; `classes` = 0 is an unconditional model.

    `nulls` = 0 leaves the last row out: such a model cannot be guided (MaskGIT).
    """

    def __init__(
        self,
        classes: int,
        width: int,
        *,
        nulls: int = 1,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        if classes + nulls < 1:
            raise UserError(
                "an unconditional model needs the row of no class; found neither classes nor that "
                "row: set label_drop=0.0 in the place of None"
            )
        shape = (classes + nulls, width)
        self.table = nnx.Param(
            std(width) * jax.random.normal(rngs.params(), shape, precision.params_dtype)
        )
        self.classes, self.nulls = classes, nulls

    def null(self, label_B: jax.Array) -> jax.Array:
        """The label that stands for none."""
        if not self.nulls:
            raise UserError(
                'guidance needs a model that knows "no class"; this one was trained without: '
                "sample it with --preset no_guidance, or train it with a preset of weight 1"
            )
        return jnp.full_like(self.check(label_B), self.classes)

    def check(self, label_B: jax.Array) -> jax.Array:
        """The labels as int32, or an error that says which there are."""
        return boundary.labels(label_B, self.classes, self.nulls)

    def __call__(self, label_B: jax.Array) -> jax.Array:
        """[B] labels -> [B, D]; of one that is none the vector is NaN, as far as it is traced."""
        label_B = self.check(label_B)
        # an index beyond the table would read its last row, which is "no class"
        rows = self.table[...]
        row_B = jnp.where(label_B < 0, len(rows), label_B)
        return rows.at[row_B].get(mode="fill", fill_value=jnp.nan)


class Table(nnx.Module):
    """Rows that are looked up by number."""

    def __init__(
        self, rows: int, width: int, *, std: linear.Std, precision: Precision, rngs: nnx.Rngs
    ):
        draw = jax.random.normal(rngs.params(), (rows, width), precision.params_dtype)
        self.table = nnx.Param(std(width) * draw)

    def __call__(self, index: jax.Array | np.ndarray) -> jax.Array:
        """[...] numbers -> [..., D]."""
        return self.table[...][index]
