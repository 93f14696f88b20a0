"""Conditioning of a causal sequence: slots of the condition before the first token, its prefix.

And what adaptive blocks are told at every slot (`adapt`), which slots are seen (`seen`, and `rule`
of all slots), what is no condition (`check`) and the condition that stands for none (`null`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices
from tokgen.interfaces import Statistic, Text, UserError
from tokgen.nn import blocks, embeddings, linear, masks, mlp
from tokgen.nn.precision import Precision


def nothing(label_B1D: jax.Array) -> None:
    """Adaptive blocks are told nothing; there are none."""


def everywhere(label_B1D: jax.Array) -> jax.Array:
    """Adaptive blocks are told the class at every slot."""
    return label_B1D


class Label(nnx.Module):
    """One slot: the class (LlamaGen). The condition is label_B.

    `told` makes of the vector of the class what adaptive blocks are told.
    """

    cond, text = "label", None

    def __init__(
        self,
        classes: int,
        width: int,
        length: int,
        *,
        told: Callable = nothing,
        variant: blocks.Variant,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        del length
        self.slots, self.told = 1, told
        self.labels = embeddings.Labels(
            classes, width, std=variant.std, precision=precision, rngs=rngs
        )

    def __call__(self, label_B: jax.Array) -> jax.Array:
        """[B] -> [B, 1, D]."""
        return self.labels(label_B)[:, None]

    def check(self, label_B: jax.Array) -> None:
        """An error where they are no labels of these classes."""
        self.labels.check(label_B)

    def null(self, label_B: jax.Array) -> jax.Array:
        """The labels that stand for no class."""
        return self.labels.null(label_B)

    def adapt(self, label_B: jax.Array, slots_l: jax.Array) -> jax.Array | None:
        """What adaptive blocks are told at some slots: [B, 1, D] whatever the slots, or nothing."""
        return self.told(self.labels(label_B)[:, None])

    def seen(self, label_B: jax.Array, slots_l: jax.Array, slots: int) -> jax.Array:
        """[1, 1, l, S]: a slot sees itself and the slots before it."""
        return causal(slots_l, slots)

    def rule(self, label_B: jax.Array, slots: int) -> masks.Blocks:
        """What `seen` says of all slots."""
        return masks.causal(slots)


def adaptive_label(*args, **options) -> Label:
    """`Label`, which adaptive blocks are told at every slot, too (IBQ)."""
    return Label(*args, told=everywhere, **options)


class ClsLabel(nnx.Module):
    """Two slots: a learned vector, then the class; adaptive blocks are told class and slot (RAR).

    arXiv:2411.00776 and its code. `SPARE` rows of the slots' table are read by nobody; published
    files have them.
    """

    cond, text = "label", None
    SPARE = 98
    check, null = Label.check, Label.null  # of `labels`, as there
    seen, rule = Label.seen, Label.rule

    def __init__(
        self,
        classes: int,
        width: int,
        length: int,
        *,
        variant: blocks.Variant,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.slots = 2
        options = dict(std=variant.std, precision=precision, rngs=rngs)
        self.token = nnx.Param(jnp.zeros(width, precision.params_dtype))
        self.labels = embeddings.Labels(classes, width, **options)
        self.steps = embeddings.Table(self.slots + length + self.SPARE, width, **options)

    def __call__(self, label_B: jax.Array) -> jax.Array:
        """[B] -> [B, 2, D]."""
        label_B1D = self.labels(label_B)[:, None]
        token_11D = self.token[...].astype(label_B1D.dtype)[None, None]
        return jnp.concatenate([jnp.broadcast_to(token_11D, label_B1D.shape), label_B1D], axis=1)

    def adapt(self, label_B: jax.Array, slots_l: jax.Array) -> jax.Array:
        """[B, l, D]: the class and the slot's number, which an order never permutes."""
        return self.labels(label_B)[:, None] + self.steps(slots_l)[None]


class Captions(nnx.Module):
    """A slot per text feature, through two linear maps (LlamaGen t2i). The condition is a Text.

    Padding is on the left, and seen by itself alone. "No text" is a fixed draw, N(0, 1) / sqrt(E).
    """

    cond = "text"

    def __init__(
        self,
        classes: int,
        width: int,
        length: int,
        *,
        texts: tuple[int, int] = (120, 2048),
        variant: blocks.Variant,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        del classes, length
        self.slots, channels = texts
        options = dict(std=variant.std, precision=precision, rngs=rngs)
        self.hidden = linear.Linear(channels, width, **options)
        self.dense = linear.Linear(width, width, **options)
        draw = jax.random.normal(rngs.params(), (self.slots, channels))
        self.absent = Statistic(draw * channels**-0.5)

    @property
    def text(self) -> tuple[int, int]:
        """(length, channels) of the features that it reads."""
        return self.absent.shape

    def __call__(self, text: Text) -> jax.Array:
        """[B, T, E] -> [B, T, D]."""
        self.check(text)
        return self.dense(mlp.tanh_gelu(self.hidden(text.features_BTE)))

    def null(self, text: Text) -> Text:
        """The texts that stand for none, padded alike."""
        self.check(text)
        absent_BTE = jnp.broadcast_to(self.absent[...][None], text.features_BTE.shape)
        return text.replace(features_BTE=absent_BTE.astype(text.features_BTE.dtype))

    def adapt(self, text: Text, slots_l: jax.Array) -> None:
        """What adaptive blocks are told at some slots: nothing."""

    def seen(self, text: Text, slots_l: jax.Array, slots: int) -> jax.Array:
        """[B, 1, l, S]: a slot sees itself and the valid slots before it."""
        own_lS = slots_l[:, None] == jnp.arange(slots)[None]
        valid_B1lS = self._valid(text, slots)[:, None, None] | own_lS[None, None]
        return causal(slots_l, slots) & valid_B1lS

    def rule(self, text: Text, slots: int) -> masks.Blocks:
        """What `seen` says of all slots."""
        return masks.causal(slots, self._valid(text, slots))

    def _valid(self, text: Text, slots: int) -> jax.Array:
        """[B, S]: false where a slot is padding of its text."""
        valid_BT = text.mask_BT.astype(bool)
        return jnp.pad(valid_BT, ((0, 0), (0, slots)), constant_values=True)[:, :slots]

    def check(self, text: Text) -> None:
        """An error where they are no texts of this encoder's features."""
        if not isinstance(text, Text):
            raise UserError(
                "the generator reads text: its condition is interfaces.Text(features [B, T, E], "
                f"mask [B, T]); found {type(text).__name__}"
            )
        if text.features_BTE.ndim != 3 or text.mask_BT.shape != text.features_BTE.shape[:2]:
            raise UserError(
                "texts are features [B, T, E] with a mask [B, T]; found "
                f"{tuple(text.features_BTE.shape)} and {tuple(text.mask_BT.shape)}"
            )
        need, found = self.absent.shape, text.features_BTE.shape[1:]
        if found != need:
            raise UserError(
                f"the generator reads texts of {need[0]} features of {need[1]} channels; found "
                f"{found[0]} of {found[1]}: pad them on the left, by the mask, with features of "
                "the encoder that it was trained with"
            )


def causal(slots_l: jax.Array, slots: int) -> jax.Array:
    """[1, 1, l, S]: a slot sees itself and the slots before it."""
    return (jnp.arange(slots)[None, :] <= slots_l[:, None])[None, None]


KINDS = {
    "label": Label,
    "adaptive_label": adaptive_label,
    "cls_label": ClsLabel,
    "captions": Captions,
}
ADAPTIVE = (
    "adaptive_label",
    "cls_label",
)  # what adaptive blocks and heads are told comes from them


def named(name: str) -> Callable:
    """The kind of conditioning that a config names."""
    return choices.named(KINDS, name, "conditioning")
