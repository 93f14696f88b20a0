"""Many positions at a time, the most confident first: masked token models.

MaskGIT (arXiv:2202.04200), TiTok's generators (arXiv:2406.07550), MaskBit (arXiv:2409.16211). The
sequence is [label, token 0, ..., token L - 1], seen both ways. A slot is one symbol of one
position; slots are masked one by one, so that bit tokens may be known in part. A step draws every
unknown slot and masks the least confident of them again; how many stay unknown is the schedule's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import boundary, choices, interfaces, ranges, rng
from tokgen.generators import mask_schedules
from tokgen.interfaces import DecodeState, Phase, Quantizer, TokenBatch, TokenLayout, UserError
from tokgen.nn import (
    blocks,
    dropout,
    embeddings,
    heads as head_names,
    linear,
    norms,
    positions,
    transformer,
    variants,
)
from tokgen.nn.precision import Precision

LEAST = 1e-8  # added weight, where there may be none
STACKS = {"stack": transformer.Transformer, "u_shaped": transformer.UShaped}


class Typed(nnx.Module):
    """BERT's embeddings: a vector for the type of a segment, always the first, then a norm."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.types = embeddings.Table(2, width, std=linear.published, **options)
        self.norm = norms.bert_norm(width, **options)

    def __call__(self, x_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, D]."""
        return self.norm(x_BlD + self.types(0)[None, None])


ENTRIES = {"plain": norms.Identity, "normed": norms.bert_norm, "typed": Typed}


def counted(uniform_BN: jax.Array, share_B: jax.Array) -> jax.Array:
    """[B, N] true for round(share * N) slots, at least one, of uniform numbers (TiTok)."""
    number_B = jnp.maximum(jnp.round(share_B * uniform_BN.shape[1]), 1)
    # as published, what sorts them and not their ranks: it is as uniform
    return jnp.argsort(uniform_BN, axis=-1) < number_B[:, None]


def tossed(uniform_BN: jax.Array, share_B: jax.Array) -> jax.Array:
    """[B, N] each true with probability `share`, none perhaps, of uniform numbers (MaskBit)."""
    return uniform_BN < share_B[:, None]


MASKINGS = {"counted": counted, "tossed": tossed}


def over_slots(cost_BLG: jax.Array, weight_BLG: jax.Array) -> jax.Array:
    """The weighted mean of a batch: all its slots alike."""
    # no slot may be masked where each is tossed for by itself
    return jnp.sum(weight_BLG * cost_BLG) / jnp.maximum(jnp.sum(weight_BLG), LEAST)


def over_samples(cost_BLG: jax.Array, weight_BLG: jax.Array) -> jax.Array:
    """The mean of every sample's weighted mean: a mask of few slots counts as much (MaskGIT)."""
    return jnp.mean(jax.vmap(over_slots)(cost_BLG, weight_BLG))


MEANS = {"slots": over_slots, "samples": over_samples}


class Generator(nnx.Module):
    """p(slots | cond, the slots that are known), slot by slot independently.

    Args:
        steps: of decoding.
        schedule: how many slots are unknown, in training (at a random time) and in decoding.
        masking: "counted", so many slots of a sample; or "tossed", each by itself.
        visible: weight of the known slots in the loss; masked ones have 1.
        smoothing: of the targets.
        mean: of the loss, over "slots" of the whole batch or over "samples".
        inputs, entry, stack, variant, head: what published systems disagree about.
        label_drop: None for a model that knows no "no class", and cannot be guided.
    """

    exact = any_order = False
    sees_given = True
    cond, text = "label", None
    knobs = ("steps", "schedule", "exponent")

    @ranges.checked
    def __init__(
        self,
        layout: TokenLayout,
        classes: int,
        *,
        steps: ranges.Steps = 8,
        schedule: str = "arccos",
        exponent: ranges.Amount = 2.0,
        width: ranges.Width,
        depth: ranges.Depth,
        heads: ranges.Heads,
        hidden: ranges.Hidden | None = None,
        masking: str = "counted",
        visible: ranges.Amount = 0.0,
        smoothing: ranges.Rate = 0.0,
        mean: str = "slots",
        inputs: str = "tokens",
        entry: str = "plain",
        stack: str = "stack",
        variant: str = "vit",
        head: str = "linear",
        rates: dropout.Rates | None = None,
        label_drop: ranges.Share | None = 0.1,
        remat: str = "none",
        unroll: ranges.Depth | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        mask_schedules.named(schedule)
        if variants.named(variant).adaptive or head in (*head_names.ADAPTIVE, "factor"):
            raise UserError(
                "masked has no condition for an adaptive variant or head, nor symbols in turn; "
                f"found variant={variant!r}, head={head!r}: use 'vit' or 'bert', 'linear' or 'bare'"
            )
        if head in head_names.TIED and inputs != "tokens":
            raise UserError(f"head {head!r} needs inputs='tokens'; found inputs={inputs!r}")
        variant = variants.named(variant)
        self.layout, self.classes = layout, classes
        self.label_drop = label_drop
        self.steps, self.schedule, self.exponent = steps, schedule, exponent
        self.masking = choices.named(MASKINGS, masking, "masking")
        self.visible, self.smoothing = visible, smoothing
        self.mean = choices.named(MEANS, mean, "mean")
        self.embeddings = embeddings.named(inputs)(
            layout, width, extra=1, std=variant.std, **options
        )
        nulls = 0 if label_drop is None else 1
        self.labels = embeddings.Labels(classes, width, nulls=nulls, std=variant.std, **options)
        self.positions = positions.Learned(layout, 1, width, heads, **options)
        self.entry = choices.named(ENTRIES, entry, "entry")(width, **options)
        self.transformer = choices.named(STACKS, stack, "stack")(
            blocks.Config(
                width, depth, heads, variant, hidden, rates or dropout.Rates(), remat, unroll
            ),
            **options,
        )
        self.closing = variant.closing(width, **options) if variant.closing else None
        self.head = head_names.named(head)(
            head_names.Config(layout, width, variant, classes), **options
        )

    def check(self, cond: jax.Array) -> None:
        """An error where a condition is none of this generator's."""
        self.labels.check(cond)

    def null(self, cond: jax.Array) -> jax.Array:
        """The labels that stand for no class."""
        return self.labels.null(cond)

    def logits(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, L, G, V] of all slots, where `batch` says V for those that are unknown."""
        del codec
        batch = self._checked(batch, absent=True)
        x_BLD = self.hidden(batch.tokens_BLG, batch.cond, key=key)[:, 1:]
        return self.head(x_BLD, embeddings=self.embeddings.rows)

    def loss(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(smoothed, weighted cross-entropy of slots, scalars); label and slots drop at random."""
        del step, codec
        batch, B = self._checked(batch), len(batch.tokens_BLG)
        if self.label_drop:
            cond = dropout.conditions(
                batch.cond, self.null(batch.cond), self.label_drop, rng.use(key, rng.LABEL_DROP)
            )
            batch = batch.replace(cond=cond)
        mask_BLG = self.masks(rng.numbered(rng.use(key, rng.MASK), B))
        return self.masked_loss(batch, mask_BLG, key=rng.use(key, rng.DROPOUT))

    def masked_loss(
        self, batch: TokenBatch, mask_BLG: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss with slots masked as given and nothing else dropped at random but by `key`."""
        batch = self._checked(batch)
        seen_BLG = jnp.where(mask_BLG, self.layout.absent, batch.tokens_BLG)
        columns_BLGX = self.columns(seen_BLG, batch.cond, key=key)
        cost_BLG, nats_BLG = self.costs(columns_BLGX, batch.tokens_BLG)
        weight_BLG = jnp.where(mask_BLG, 1.0, self.visible)
        loss = self.mean(cost_BLG, weight_BLG)
        masked = jnp.maximum(jnp.sum(mask_BLG), 1)
        logits_BLGV = columns_BLGX[..., : self.layout.absent]
        hits_BLG = mask_BLG & (head_names.likeliest(logits_BLGV) == batch.tokens_BLG)
        return loss, {
            "nats_per_token": jnp.sum(mask_BLG * nats_BLG) / masked * self.layout.groups,
            "token_accuracy": jnp.sum(hits_BLG) / masked,
        }

    def nats(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L]: one random estimate, by a random order, of a bound on the nats of the tokens.

        A number n of slots, uniform from 1 to all N, is masked; their nats times N / n. In
        expectation the nats of drawing slot by slot in a random order, which is no less than those
        of the mixture of all orders (arXiv:2110.02037, equation 2).
        """
        del codec
        batch = self._checked(batch)
        B, slots = len(batch.tokens_BLG), self.layout.length * self.layout.groups
        key = jax.random.key(0) if key is None else key

        def one(key):
            number_key, order_key = rng.numbered(key, 2)
            number = jax.random.randint(number_key, (), 1, slots + 1)
            return jax.random.permutation(order_key, slots) < number, slots / number

        mask_BN, weight_B = jax.vmap(one)(rng.numbered(key, B))
        mask_BLG = mask_BN.reshape(batch.tokens_BLG.shape)
        seen_BLG = jnp.where(mask_BLG, self.layout.absent, batch.tokens_BLG)
        logits_BLGV = self.logits(batch.replace(tokens_BLG=seen_BLG))
        _, nats_BLG = self.costs(logits_BLGV, batch.tokens_BLG)
        return jnp.sum(jnp.where(mask_BLG, nats_BLG, 0), axis=-1) * weight_B[:, None]

    def unstacked(self) -> Generator:
        """A copy for decoding, with the layers of the transformer apart."""
        apart = transformer.without_stacks(self)
        linear.widened(apart)
        return apart

    def plan(self) -> tuple[Phase, ...]:
        """Every step handles all positions."""
        mask_schedules.named(self.schedule)  # a preset may have named another
        return (Phase(0, self.steps, 0, self.layout.length),)

    def start(
        self,
        cond: jax.Array,
        codec: Quantizer | None = None,
        *,
        keys_B: jax.Array,
        given: interfaces.Given,
    ) -> DecodeState:
        """The state before the first step."""
        self.check(cond)
        tokens_BLG, given_BLG = given
        order_BL = jnp.broadcast_to(jnp.arange(self.layout.length), tokens_BLG.shape[:2])
        near_B = jnp.zeros(len(keys_B), bool)
        return DecodeState(tokens_BLG, given_BLG, order_BL, cond, keys_B, near_B=near_B)

    def step(
        self,
        state: DecodeState,
        phase: Phase,
        index: jax.Array | int,
        codec: Quantizer,
        draw: interfaces.Draw,
    ) -> DecodeState:
        """Draw every unknown slot, then mask the least confident again."""
        unknown_BLG = state.tokens_BLG == self.layout.absent
        logits_BLGV = self.logits(TokenBatch(state.tokens_BLG, state.cond))
        drawn_BLG, confidence_BLG, unsure_BLG = draw(logits_BLGV, wanted_BlG=unknown_BLG)
        confidence_BLG = jnp.where(unknown_BLG, confidence_BLG, jnp.inf)
        first_B = jnp.sum(~state.given_BLG, axis=(1, 2))
        left_B = self.left(index, first_B, unknown_BLG.sum((1, 2)))
        again_BLG, near_B = self._least(confidence_BLG, unsure_BLG, left_B)
        tokens_BLG = jnp.where(unknown_BLG, drawn_BLG, state.tokens_BLG)
        tokens_BLG = jnp.where(unknown_BLG & again_BLG, self.layout.absent, tokens_BLG)
        return state.replace(tokens_BLG=tokens_BLG, near_B=state.near_B | near_B)

    def left(self, index: jax.Array | int, first_B: jax.Array, unknown_B: jax.Array) -> jax.Array:
        """[B] how many slots stay unknown after step `index`: at least one, and fewer than before.

        Of the `first_B` that were unknown at first; none after the last step.
        """
        wanted_B = self.wanted(index, first_B.astype(jnp.float32)).astype(jnp.int32)
        left_B = jnp.maximum(jnp.minimum(unknown_B - 1, wanted_B), 1)
        return jnp.where(jnp.asarray(index) == self.steps - 1, 0, left_B)

    def wanted(self, index, count_B: jax.Array) -> jax.Array:
        """[B] how many of `count_B` slots the schedule leaves unknown after step `index`."""
        # divided here: in a compiled loop XLA multiplies by a rounded 1 / T
        done_T = np.arange(1, self.steps + 1, dtype=np.float32) / np.float32(self.steps)
        share = mask_schedules.share(
            self.schedule, jnp.asarray(done_T)[index], count_B, self.exponent
        )
        # floored in float32, as published: cos(pi/3) of 32 is 15
        return jnp.floor(count_B * share)

    def masks(self, keys_B: jax.Array) -> jax.Array:
        """[B, L, G] true for the slots that a training step hides."""
        slots = self.layout.length * self.layout.groups

        def one(key):
            time = jax.random.uniform(rng.use(key, rng.TIME))
            return time, jax.random.uniform(rng.use(key, rng.SLOTS), (slots,))

        return self.hidden_slots(*jax.vmap(one)(keys_B))

    def hidden_slots(self, time_B: jax.Array, uniform_BN: jax.Array) -> jax.Array:
        """[B, L, G] true for the slots that are hidden by numbers drawn from [0, 1)."""
        L, G = self.layout.length, self.layout.groups
        share_B = mask_schedules.share(self.schedule, time_B, L * G, self.exponent)
        return self.masking(uniform_BN, share_B).reshape(-1, L, G)

    def columns(
        self, tokens_BLG: jax.Array, cond: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L, G, V, then what else the head's rows stand for]; V is an unknown token."""
        return self.read_out(self.hidden(tokens_BLG, cond, key=key)[:, 1:])

    def hidden(
        self, tokens_BLG: jax.Array, cond: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, 1 + L, D] behind the last block: the label's slot, then those of the positions."""
        L = self.layout.length
        x_BlD = jnp.concatenate([self.labels(cond)[:, None], self.embeddings(tokens_BLG)], axis=1)
        order_1L = jnp.arange(L)[None]
        x_BlD = self.entry(x_BlD + self.positions(order_1L, jnp.arange(1 + L))[0])
        rate, inputs_key = self.transformer.rates.token, rng.use(key, rng.INPUTS)
        x_BlD = dropout.dropout(x_BlD, rate, inputs_key)
        x_BlD, _ = self.transformer(x_BlD, key=rng.use(key, rng.TRUNK))
        return x_BlD if self.closing is None else self.closing(x_BlD)

    def costs(self, columns_BLGX: jax.Array, tokens_BLG: jax.Array) -> tuple[jax.Array, jax.Array]:
        """([B, L, G] smoothed cross-entropy, nats of the tokens)."""
        logs_BLGX = jax.nn.log_softmax(columns_BLGX, axis=-1)
        nats_BLG = -jnp.take_along_axis(logs_BLGX, tokens_BLG[..., None], axis=-1)[..., 0]
        # columns beyond a smaller alphabet are -inf, and no target
        there_BLGX = jnp.isfinite(columns_BLGX)
        even_BLG = -jnp.sum(jnp.where(there_BLGX, logs_BLGX, 0), axis=-1)
        even_BLG = even_BLG / jnp.sum(there_BLGX, axis=-1)
        return (1 - self.smoothing) * nats_BLG + self.smoothing * even_BLG, nats_BLG

    def read_out(self, x_BlD: jax.Array) -> jax.Array:
        """The head's columns; a tied one reads the embeddings of tokens and labels."""
        return self.head(x_BlD, embeddings=self.embeddings.rows, labels=self.labels.table[...])

    def _checked(self, batch: TokenBatch, *, absent: bool = False) -> TokenBatch:
        """The batch, its tokens as int32; an error where it is none of this generator's."""
        tokens_BLG = boundary.tokens(batch.tokens_BLG, self.layout, absent=absent)
        self.check(batch.cond)
        boundary.rows(tokens=tokens_BLG, conditions=batch.cond)
        return batch.replace(tokens_BLG=tokens_BLG)

    def _least(
        self, confidence_BLG: jax.Array, unsure_BLG: jax.Array, left_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """([B, L, G] true for the `left_B` least confident slots, [B] where rounding may tell).

        It may where one of them and one of the others are nearer than both of them may move.
        """
        flat_BN = confidence_BLG.reshape(len(confidence_BLG), -1)
        rank_BN = jnp.argsort(jnp.argsort(flat_BN, axis=-1), axis=-1)
        least_BN = rank_BN < left_B[:, None]
        unsure_BN = unsure_BLG.reshape(flat_BN.shape)
        last_B = jnp.max(jnp.where(least_BN, flat_BN + unsure_BN, -jnp.inf), axis=-1)
        next_B = jnp.min(jnp.where(least_BN, jnp.inf, flat_BN - unsure_BN), axis=-1)
        return least_BN.reshape(confidence_BLG.shape), next_B < last_B
