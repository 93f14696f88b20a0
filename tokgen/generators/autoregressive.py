"""One position at a time, in any order: the class-conditional Llama form of LlamaGen.

arXiv:2406.06525. The sequence is [label, token 0, ..., token L-2]; the output at slot p is the
distribution of token p. Positions are rotary over the grid, with zero rows for the label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokgen import rng
from tokgen.generators import orders
from tokgen.interfaces import DecodeState, Phase, Quantizer, TokenBatch, TokenLayout
from tokgen.nn import attention, positions, symbols, transformer
from tokgen.nn import parts as part_names
from tokgen.nn.precision import Precision

PREFIX = 1  # slots before the first token: the label


class Generator(nnx.Module):
    """p(tokens | label) = product over places of p(token | label, the tokens before it)."""

    def __init__(
        self,
        layout: TokenLayout,
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        order: str = "raster",
        places: str = "rotary",
        parts: str = "llama",
        rates: transformer.Rates | None = None,
        label_drop: float = 0.1,
        window: int = 64,
        remat: bool = False,
        unroll: int = 1,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        kit = part_names.named(parts)
        options = dict(precision=precision, rngs=rngs)
        self.layout, self.classes, self.label_drop, self.window = (
            layout,
            classes,
            label_drop,
            window,
        )
        self.order = orders.named(order)
        self.symbols = symbols.Symbols(layout, width, std=kit.std, **options)
        self.labels = symbols.Labels(classes, width, std=kit.std, **options)
        self.places = positions.named(places)(layout, PREFIX, width, heads, **options)
        self.transformer = transformer.Transformer(
            width,
            depth,
            heads,
            parts=kit,
            rates=rates or transformer.Rates(),
            remat=remat,
            unroll=unroll,
            **options,
        )
        self.head = symbols.Head(layout, width, norm=kit.norm, **options)

    def null(self, cond: jax.Array) -> jax.Array:
        """The labels that stand for no class."""
        return self.labels.null(cond)

    def orders(self, keys_B: jax.Array) -> jax.Array:
        """[B, L] the position handled at each place, per image."""
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, rng.ORDER))(keys_B)
        return jax.vmap(lambda key: self.order(self.layout, key))(keys_B)

    def logits(self, batch: TokenBatch, codec: Quantizer | None = None, *, key=None) -> jax.Array:
        """Teacher-forced logits [B, L, G, V]; row j is place j of the order."""
        del codec
        B, L = batch.tokens_BLG.shape[:2]
        order_BL = batch.order_BL
        if order_BL is None:
            order_BL = jnp.broadcast_to(self.order(self.layout, jax.random.key(0)), (B, L))
        sequence_BLG = jnp.take_along_axis(batch.tokens_BLG, order_BL[..., None], axis=1)
        inputs_BlD = self.symbols(sequence_BLG[:, :-1])
        inputs_BlD = jnp.concatenate([self.labels(batch.cond)[:, None], inputs_BlD], axis=1)
        keys = (None, None) if key is None else jax.random.split(key)
        inputs_BlD = attention.dropout(inputs_BlD, self.transformer.rates.token, keys[0])
        slots_l = jnp.arange(L)
        hidden_BlD, _ = self._hidden(inputs_BlD, order_BL, slots_l, slots=L, key=keys[1])
        return self.head(hidden_BlD)

    def loss(
        self, batch: TokenBatch, codec: Quantizer | None = None, *, step, key
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean nats per position, scalars). The label is dropped with its stated rate."""
        del step
        B = len(batch.tokens_BLG)
        drop_B = jax.random.bernoulli(
            jax.random.fold_in(key, rng.LABEL_DROP), self.label_drop, (B,)
        )
        order_BL = batch.order_BL
        if order_BL is None:
            order_BL = self.orders(jax.random.split(jax.random.fold_in(key, rng.ORDER), B))
        label_B = jnp.where(drop_B, self.null(batch.cond), batch.cond)
        batch = batch.replace(cond=label_B, order_BL=order_BL)
        logits_BLGV = self.logits(batch, codec, key=jax.random.fold_in(key, rng.DROPOUT))
        targets_BLG = jnp.take_along_axis(batch.tokens_BLG, order_BL[..., None], axis=1)
        nats_BLG = optax.softmax_cross_entropy_with_integer_labels(logits_BLGV, targets_BLG)
        nats = nats_BLG.sum(-1).mean()
        hits = (logits_BLGV.argmax(-1) == targets_BLG).mean()
        return nats, {"nats_per_token": nats, "token_accuracy": hits}

    def nats(self, batch: TokenBatch, codec: Quantizer | None = None) -> jax.Array:
        """[B, L] nats of the tokens, place by place: exact, nothing dropped."""
        order_BL = batch.order_BL
        if order_BL is None:
            order_BL = jnp.broadcast_to(
                self.order(self.layout, jax.random.key(0)), batch.tokens_BLG.shape[:2]
            )
        logits_BLGV = self.logits(batch.replace(order_BL=order_BL), codec)
        targets_BLG = jnp.take_along_axis(batch.tokens_BLG, order_BL[..., None], axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BLGV, targets_BLG).sum(-1)

    def plan(self) -> tuple[Phase, ...]:
        """The first step with the prefix, then windows of the rest: early steps read few slots."""
        phases, length = [Phase(0, 1, 0, 1, PREFIX)], self.layout.length
        for first in range(1, length, self.window):
            steps = min(self.window, length - first)
            phases.append(Phase(first, steps, first, 1, PREFIX - 1 + first + steps))
        return tuple(phases)

    def start(self, cond, codec: Quantizer | None = None, *, keys_B, given) -> DecodeState:
        """The state before the first step."""
        tokens_BLG, given_BLG = given
        return DecodeState(
            tokens_BLG=tokens_BLG,
            given_BLG=given_BLG,
            order_BL=self.orders(keys_B),
            cond=cond,
            keys_B=keys_B,
            cache=self.transformer.cache(len(keys_B)),
        )

    def step(self, state: DecodeState, phase: Phase, index, codec, draw) -> DecodeState:
        """Draw the token of one place."""
        place = phase.place(index)
        if phase.first == 0:
            inputs_BlD, slots_l = self.labels(state.cond)[:, None], jnp.arange(PREFIX)
        else:
            before_B1 = jax.lax.dynamic_slice_in_dim(state.order_BL, place - 1, 1, axis=1)
            inputs_BlD = self.symbols(state.read(before_B1))
            slots_l = PREFIX - 1 + place + jnp.arange(1)
        hidden_BlD, cache = self._hidden(
            inputs_BlD, state.order_BL, slots_l, slots=phase.slots, cache=state.cache
        )
        tokens_B1G, _ = draw(self.head(hidden_BlD[:, -1:]))
        position_B1 = jax.lax.dynamic_slice_in_dim(state.order_BL, place, 1, axis=1)
        return state.write(position_B1, tokens_B1G).replace(cache=cache)

    def _hidden(self, inputs_BlD, order_BL, slots_l, *, slots, cache=None, key=None):
        """Through the transformer: a slot sees itself and the slots before it."""
        added_BlD, rotary = self.places(order_BL, slots_l)
        inputs_BlD = inputs_BlD if added_BlD is None else inputs_BlD + added_BlD
        mask_lS = jnp.arange(slots)[None, :] <= slots_l[:, None]
        return self.transformer(
            inputs_BlD, rotary=rotary, mask=mask_lS[None, None], cache=cache, at=slots_l[0], key=key
        )
