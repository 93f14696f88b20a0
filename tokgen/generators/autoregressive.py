"""One position at a time, in any order.

The sequence is [prefix, token of place 0, ..., of place L - 2]; the output at the slot before a
token is that token's distribution. What published systems disagree about is named by the config:
the conditioning, the positions, the variant of the transformer, the head. LlamaGen
(arXiv:2406.06525) has a label or text as its prefix and rotary positions; RAR (arXiv:2411.00776)
trains in random orders that turn into raster order; NPP (arXiv:2412.15321) trains on groups of
tokens first.
"""

from __future__ import annotations

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokgen import boundary, orders, ranges, rng
from tokgen.generators import autoregressive_options, token_groups
from tokgen.interfaces import (
    DecodeState,
    Draw,
    Given,
    Phase,
    PyTree,
    Quantizer,
    TokenBatch,
    TokenLayout,
)
from tokgen.nn import (
    attention,
    blocks,
    conditioning as conditioning_names,
    dropout,
    embeddings,
    heads as head_names,
    linear,
    positions as position_names,
    transformer,
    variants,
)
from tokgen.nn.precision import Precision
from tokgen.orders import random

LAYERS = 32  # of all windows together, that are compiled for a CPU


class Generator(nnx.Module):
    """p(tokens | cond) = product over places of p(token | cond, the tokens before it).

    Args:
        order: of decoding and of `nats`, and of training where nothing else is said.
        shuffle: steps (a, b); every sample is trained in a random order up to step a, none after
            step b, a share that falls linearly between (RAR's annealing).
        groups: ((side, last step), ...) of NPP: up to a step, trained on square groups of tokens,
            each the mean of its tokens' vectors, which predict all tokens of the next group.
        texts: length and channels of the text features, for the conditioning "captions".
        unused: rows of the embeddings that nobody reads; RAR's files have one.
        factor: depth of the transformer over the symbols of a position, for the head "factor".
        budget: bytes up to which decoding computes what adaptive blocks need beforehand.
    """

    exact = any_order = True
    knobs = ()

    @ranges.checked
    def __init__(
        self,
        layout: TokenLayout,
        classes: int,
        *,
        width: ranges.Width,
        depth: ranges.Depth,
        heads: ranges.Heads,
        hidden: ranges.Hidden | None = None,
        order: str = "raster",
        shuffle: tuple[ranges.Whole, ranges.Whole] | None = None,
        groups: tuple[tuple[ranges.Side, ranges.Count], ...] = (),
        conditioning: str = "label",
        texts: tuple[ranges.Positions, ranges.Width] | None = None,
        unused: ranges.Optional = 0,
        positions: str = "rotary",
        variant: str = "llama",
        head: str = "linear",
        factor: Annotated[int, ranges.Range(0, 512)] = 0,
        rates: dropout.Rates | None = None,
        label_drop: ranges.Share = 0.1,
        window: ranges.Positions = 64,
        budget: Annotated[int, ranges.Range(0, 2**62)] = 2**31,
        remat: str = "none",
        unroll: ranges.Depth | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        autoregressive_options.check_variant(variant, conditioning, head)
        autoregressive_options.check(conditioning, texts, head, factor, shuffle)
        variant = variants.named(variant)
        options = dict(precision=precision, rngs=rngs)
        self.layout, self.classes = layout, classes
        self.label_drop = label_drop
        self.window, self.budget = window, budget
        self.order, self.shuffle, self.groups = orders.named(order), shuffle, groups
        jax.eval_shape(lambda key: self.order(layout, key), jax.random.key(0))  # raises here
        self.embeddings = embeddings.Tokens(layout, width, extra=unused, std=variant.std, **options)
        texts = {} if texts is None else {"texts": texts}
        self.conditioning = conditioning_names.named(conditioning)(
            classes, width, layout.length, variant=variant, **texts, **options
        )
        self.positions = position_names.named(positions)(
            layout, self.conditioning.slots, width, heads, **options
        )
        sizes = dict(heads=heads, hidden=hidden)
        running = dict(rates=rates or dropout.Rates(), remat=remat, unroll=unroll)
        self.transformer = transformer.Transformer(
            blocks.Config(width, depth, variant=variant, **sizes, **running), **options
        )
        more = dict(depth=factor, **sizes, **running) if factor else {}
        self.head = head_names.named(head)(
            head_names.Config(layout, width, variant), **more, **options
        )
        token_groups.check(groups, layout, positions)

    @property
    def cond(self) -> str:
        """What its condition is: "label" or "text"."""
        return self.conditioning.cond

    @property
    def text(self) -> tuple[int, int] | None:
        """(length, channels) of the text features that it reads; None with a label."""
        return self.conditioning.text

    def check(self, cond) -> None:
        """An error where a condition is none of this generator's."""
        self.conditioning.check(cond)

    def null(self, cond):
        """The conditions that stand for none."""
        return self.conditioning.null(cond)

    @property
    def sees_given(self) -> bool:
        """Whether what is given may come first: of drawn orders none is better than another."""
        return self.order is random.order

    def orders(self, keys_B: jax.Array) -> jax.Array:
        """[B, L] the position handled at each place, per image."""
        return jax.vmap(lambda key: self.order(self.layout, rng.use(key, rng.ORDER)))(keys_B)

    def logits(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Teacher-forced logits [B, L, G, V]; row j is place j of the order."""
        del codec
        batch = self._checked(batch)
        order_BL = self._order_of(batch)
        sequence_BLG = jnp.take_along_axis(batch.tokens_BLG, order_BL[..., None], axis=1)
        inputs_BlD = self.embeddings(sequence_BLG[:, :-1])
        hidden_BLD, cond = self.taught(inputs_BlD, order_BL, batch.cond, self.positions, key)
        return self.ended(hidden_BLD, cond, sequence_BLG[..., :-1], rng.use(key, rng.HEAD))

    def loss(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean nats per position, scalars). The condition is dropped with its stated rate."""
        batch, B = self._checked(batch), len(batch.tokens_BLG)
        cond = dropout.conditions(
            batch.cond, self.null(batch.cond), self.label_drop, rng.use(key, rng.LABEL_DROP)
        )
        if batch.order_BL is None:
            batch = batch.replace(order_BL=self.training_orders(step, key, B))
        batch, key = batch.replace(cond=cond), rng.use(key, rng.DROPOUT)
        sides = [side for side, _ in self.groups]
        ends = jnp.asarray([end for _, end in self.groups], jnp.int32)
        # stages have other shapes: one program holds all of them, and a step runs its own
        nats, hits = jax.lax.switch(
            jnp.sum(jnp.asarray(step) >= ends),
            [functools.partial(token_groups.loss, self, side) for side in sides] + [self._plain],
            batch,
            key,
        )
        return nats, {"nats_per_token": nats, "token_accuracy": hits}

    def nats(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L] nats of the tokens, place by place: exact, nothing dropped."""
        del key
        batch = self._checked(batch)
        batch = batch.replace(order_BL=self._order_of(batch))
        logits_BLGV = self.logits(batch, codec)
        targets_BLG = jnp.take_along_axis(batch.tokens_BLG, batch.order_BL[..., None], axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLGV, targets_BLG).sum(-1)

    def unstacked(self) -> Generator:
        """A copy for decoding, with the layers of the transformer and of the head apart.

        What lies on a CPU is in panels, as far as it isn't traced: a step has few rows.
        """
        apart = transformer.unstacked(self, "transformer")
        apart.head = transformer.unstacked(self.head, *self.head.stacks)
        linear.panelled(apart.transformer, but=("modulation",))
        linear.panelled(apart.head, but=("logits",))  # a stack of maps
        if linear.on_cpu(self.embeddings.table[...]):
            # XLA updates no bfloat16 in place on a CPU, and multiplies it as float32
            apart.transformer.cached = jnp.dtype("float32")
            # every window is compiled, layer by layer, and a core gains little from the next one
            windows = max(1, LAYERS // self.transformer.depth)
            apart.window = max(self.window, -(-(self.layout.length - 1) // windows))
        return apart

    def plan(self) -> tuple[Phase, ...]:
        """The first step with the prefix, then windows of the rest: early steps read few slots."""
        slots = self.conditioning.slots
        phases, length = [Phase(0, 1, 0, 1, slots)], self.layout.length
        for first in range(1, length, self.window):
            steps = min(self.window, length - first)
            phases.append(Phase(first, steps, first, 1, slots - 1 + first + steps))
        return tuple(phases)

    def start(
        self, cond: PyTree, codec: Quantizer | None = None, *, keys_B: jax.Array, given: Given
    ) -> DecodeState:
        """The state before the first step."""
        self.check(cond)
        tokens_BLG, given_BLG = given
        order_BL = self.orders(keys_B)
        if self.sees_given:
            order_BL = _first(order_BL, jnp.all(given_BLG, axis=-1))
        return DecodeState(
            tokens_BLG=tokens_BLG,
            given_BLG=given_BLG,
            order_BL=order_BL,
            cond=cond,
            keys_B=keys_B,
            cache=self.transformer.cache(len(keys_B)),
        )

    def told(
        self, cond: PyTree, phase: Phase, index: jax.Array | int, steps: int
    ) -> tuple[jax.Array, ...] | None:
        """What adaptive blocks need at the slots of some steps, where it stays within budget."""
        slots_l = self.conditioning.slots - 1 + phase.place(index) + jnp.arange(steps)
        if phase.first == 0:
            slots_l = jnp.arange(self.conditioning.slots)
        shape = jax.eval_shape(self.conditioning.adapt, cond, slots_l)
        if shape is None:
            return None
        # the tables of slots are the same for all rows, the sum is not
        size = 6 * shape.size * self.transformer.depth
        if size * self.transformer.precision.compute_dtype.itemsize > self.budget:
            return None
        return self.transformer.modulation(self.conditioning.adapt(cond, slots_l))

    def step(
        self, state: DecodeState, phase: Phase, index: jax.Array | int, codec: Quantizer, draw: Draw
    ) -> DecodeState:
        """Draw the token of one place."""
        place = phase.place(index)
        if phase.first == 0:
            inputs_BlD, slots_l = self.conditioning(state.cond), jnp.arange(self.conditioning.slots)
        else:
            before_B1 = jax.lax.dynamic_slice_in_dim(state.order_BL, place - 1, 1, axis=1)
            inputs_BlD = self.embeddings(state.read(before_B1))
            slots_l = self.conditioning.slots - 1 + place + jnp.arange(1)
        hidden_BlD, cache = self.hidden(
            inputs_BlD,
            state.order_BL,
            slots_l,
            state.cond,
            self.positions,
            slots=phase.slots,
            modulation=state.modulation,
            cache=state.cache,
        )
        position_B1 = jax.lax.dynamic_slice_in_dim(state.order_BL, place, 1, axis=1)
        cond = self.conditioning.adapt(state.cond, slots_l[-1:])
        state = self._drawn(state, hidden_BlD[:, -1:], position_B1, cond, draw)
        return state.replace(cache=cache)

    def _drawn(
        self,
        state: DecodeState,
        hidden_B1D: jax.Array,
        position_B1: jax.Array,
        cond: PyTree,
        draw: Draw,
    ) -> DecodeState:
        """The state with the symbols of a position: all at once, or in the head's turns."""
        tokens_B1G = state.read(position_B1)
        given_B1G = jnp.take_along_axis(state.given_BLG, position_B1[..., None], axis=1)
        for first in self.head.turns:
            logits_B1gV = self.ended(hidden_B1D, cond, tokens_B1G[..., :first])[:, :, first:]
            reach = slice(first, first + logits_B1gV.shape[2])
            given_B1g = given_B1G[..., reach]
            drawn_B1g, *_ = draw(logits_B1gV, symbol=first, wanted_BlG=~given_B1g)
            kept_B1g = jnp.where(given_B1g, tokens_B1G[..., reach], drawn_B1g)
            tokens_B1G = tokens_B1G.at[..., reach].set(kept_B1g)
        return state.write(position_B1, tokens_B1G)

    def ended(
        self,
        hidden_BlD: jax.Array,
        cond: PyTree,
        given_Blt: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the symbols that the head gives at once, `given_Blt` known."""
        rows_GVD = self.embeddings.table[...]
        return self.head(hidden_BlD, cond=cond, given=given_Blt, embeddings=rows_GVD, key=key)

    def _checked(self, batch: TokenBatch) -> TokenBatch:
        """The batch, its tokens as int32; an error where it is none of this generator's."""
        tokens_BLG = boundary.tokens(batch.tokens_BLG, self.layout)
        self.check(batch.cond)
        if batch.order_BL is not None:
            boundary.orders(batch.order_BL, self.layout)
        boundary.rows(tokens=tokens_BLG, conditions=batch.cond, orders=batch.order_BL)
        return batch.replace(tokens_BLG=tokens_BLG)

    def _order_of(self, batch: TokenBatch) -> jax.Array:
        """The orders that a batch states, or the generator's own; of a random one, one for all."""
        if batch.order_BL is not None:
            return batch.order_BL
        order_L = self.order(self.layout, jax.random.key(0))
        return jnp.broadcast_to(order_L, batch.tokens_BLG.shape[:2])

    def training_orders(self, step: jax.Array | int, key: jax.Array, B: int) -> jax.Array:
        """[B, L] orders of a training step: the generator's own, or shuffled ones for a share."""
        keys_B = rng.numbered(rng.use(key, rng.ORDER), B)
        order_BL = self.orders(keys_B)
        if self.shuffle is None:
            return order_BL
        begin, end = self.shuffle
        share = jnp.clip((end - jnp.asarray(step, jnp.float32)) / max(end - begin, 1), 0, 1)

        def drawn(key):
            shuffled_L = random.order(self.layout, rng.use(key, rng.SHUFFLE))
            return shuffled_L, jax.random.uniform(rng.use(key, rng.CHANCE))

        shuffled_BL, chance_B = jax.vmap(drawn)(keys_B)
        return jnp.where((chance_B < share)[:, None], shuffled_BL, order_BL)

    def _plain(self, batch: TokenBatch, key) -> tuple[jax.Array, jax.Array]:
        """(mean nats per position, share of likeliest tokens that are right)."""
        logits_BLGV = self.logits(batch, key=key)
        targets_BLG = jnp.take_along_axis(batch.tokens_BLG, batch.order_BL[..., None], axis=1)
        nats_BLG = optax.softmax_cross_entropy_with_integer_labels(logits_BLGV, targets_BLG)
        return nats_BLG.sum(-1).mean(), (head_names.likeliest(logits_BLGV) == targets_BLG).mean()

    def taught(
        self,
        inputs_BlD: jax.Array,
        order_BL: jax.Array,
        cond: PyTree,
        positions: nnx.Module,
        key: jax.Array,
    ):
        """(outputs [B, L, D] that predict the places of an order, what adaptive heads are told)."""
        L = order_BL.shape[1]
        inputs_BlD = jnp.concatenate([self.conditioning(cond), inputs_BlD], axis=1)
        rate, inputs_key = self.transformer.rates.token, rng.use(key, rng.INPUTS)
        inputs_BlD = dropout.dropout(inputs_BlD, rate, inputs_key)
        slots_l = jnp.arange(inputs_BlD.shape[1])
        hidden_BlD, _ = self.hidden(
            *(inputs_BlD, order_BL, slots_l, cond, positions),
            slots=len(slots_l),
            key=rng.use(key, rng.TRUNK),
        )
        return hidden_BlD[:, -L:], self.conditioning.adapt(cond, slots_l[-L:])

    def hidden(
        self,
        inputs_BlD: jax.Array,
        order_BL: jax.Array,
        slots_l: jax.Array,
        cond: PyTree,
        positions: nnx.Module,
        *,
        slots: int,
        modulation: tuple[jax.Array, ...] | None = None,
        cache: tuple[attention.KVCache, ...] | None = None,
        key: jax.Array | None = None,
    ):
        """(outputs [B, l, D], cache) of some slots: each sees itself and the slots before it.

        Without a cache they are all slots.
        """
        seen, rule = self.conditioning.seen, self.conditioning.rule
        added_BlD, rotary = positions(order_BL, slots_l)
        inputs_BlD = inputs_BlD if added_BlD is None else inputs_BlD + added_BlD
        told = self.conditioning.adapt(cond, slots_l)
        return self.transformer(
            inputs_BlD,
            cond=told,
            modulation=modulation,
            rotary=rotary,
            mask=rule(cond, slots) if cache is None else seen(cond, slots_l, slots),
            cache=cache,
            at=slots_l[0],
            slots=slots,
            key=key,
        )


def _first(order_BL: jax.Array, chosen_BL: jax.Array) -> jax.Array:
    """Orders in which the chosen positions come first, and each group in its order."""
    there_BL = jnp.take_along_axis(chosen_BL, order_BL, axis=1)
    place_BL = jnp.argsort(~there_BL, axis=1, stable=True)
    return jnp.take_along_axis(order_BL, place_BL, axis=1)
