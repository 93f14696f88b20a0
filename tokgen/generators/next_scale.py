"""One grid at a time, coarse to fine: VAR, next-scale prediction (arXiv:2404.02905).

All tokens of a scale are drawn at once, given the coarser scales. What is known of the latents when
a scale's turn comes, averaged down to its grid, is the input at its slots, so a slot's output is
the distribution of its own token; at the slots of the first scale stands the condition. A slot
sees its own scale and the coarser ones. The codec is a multiscale quantizer: `known_before` gives
the inputs of teacher forcing, `absorb` and `view` those of decoding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import boundary, ranges, rng
from tokgen.interfaces import (
    DecodeState,
    Draw,
    Given,
    Phase,
    Quantizer,
    ScaleCodec,
    TokenBatch,
    TokenLayout,
    UserError,
)
from tokgen.nn import (
    blocks,
    dropout,
    embeddings,
    heads as head_names,
    linear,
    masks,
    transformer,
    variants,
)
from tokgen.nn.precision import Precision
from tokgen.orders import raster


class Generator(nnx.Module):
    """p(tokens | label) = product over scales of p(tokens of it | label, coarser scales).

    Args:
        channels: of the codec's latents.
        gates: factor of the initial gates of the residual branches, smaller for deeper networks.
        smoothing: share of the target that is spread over the alphabet.
    """

    exact, any_order, sees_given = True, False, False
    order = staticmethod(raster.order)
    holds_latents = True  # a token of its is what coarser ones leave
    knobs = ()
    cond, text = "label", None

    @ranges.checked
    def __init__(
        self,
        layout: TokenLayout,
        classes: int,
        *,
        channels: ranges.Width,
        width: ranges.Width,
        depth: ranges.Depth,
        heads: ranges.Heads,
        hidden: ranges.Hidden | None = None,
        variant: str = "var",
        gates: ranges.Amount = 1e-3,
        smoothing: ranges.Rate = 0.0,
        label_drop: ranges.Share = 0.1,
        rates: dropout.Rates | None = None,
        remat: str = "none",
        unroll: ranges.Depth | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        _check(layout, variant)
        variant = variants.named(variant)
        options = dict(std=variant.std, precision=precision, rngs=rngs)
        self.layout, self.classes, self.channels = layout, classes, channels
        self.smoothing, self.label_drop = smoothing, label_drop
        self.labels = embeddings.Labels(classes, width, **options)
        self.token = nnx.Param(jnp.zeros((layout.spans[0][1], width), precision.params_dtype))
        self.embed = linear.Linear(channels, width, bias=True, **options)
        self.positions = embeddings.Table(layout.length, width, **options)
        self.levels = embeddings.Table(len(layout.grids), width, **options)
        self.transformer = transformer.Transformer(
            blocks.Config(
                width, depth, heads, variant, hidden, rates or dropout.Rates(), remat, unroll
            ),
            precision=precision,
            rngs=rngs,
        )
        # float32, as published: the last product decides draws and losses
        wide = dataclasses.replace(precision, compute="float32")
        self.head = head_names.Adaptive(
            head_names.Config(layout, width, variant), precision=wide, rngs=rngs
        )
        _rescale(self, width, gates, rngs)

    def check(self, label_B: jax.Array) -> None:
        """An error where a condition is none of this generator's."""
        self.labels.check(label_B)

    def null(self, label_B: jax.Array) -> jax.Array:
        """The labels that stand for no class."""
        return self.labels.null(label_B)

    def logits(
        self, batch: TokenBatch, codec: Quantizer, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Teacher-forced logits [B, L, G, V]; the order is coarse to fine, always."""
        self._check_codec(codec)
        batch = self._checked(batch)
        known_BlC = codec.known_before(batch.tokens_BLG)
        cond_B1D = self.labels(batch.cond)[:, None]
        x_BLD = jnp.concatenate([self._begin(cond_B1D), self.embed(known_BlC)], axis=1)
        x_BLD = x_BLD + self._slots(0, self.layout.length)
        rate, inputs_key = self.transformer.rates.token, rng.use(key, rng.INPUTS)
        hidden_BLD, _ = self.transformer(
            dropout.dropout(x_BLD, rate, inputs_key),
            cond=cond_B1D,
            mask=masks.Blocks(tuple(size for _, size in self.layout.spans)),
            key=rng.use(key, rng.TRUNK),
        )
        return self.head(hidden_BLD.astype(jnp.float32), cond=cond_B1D)

    def loss(
        self, batch: TokenBatch, codec: Quantizer, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(mean smoothed nats per position, scalars: without smoothing, also per scale).

        The condition is dropped with its stated rate.
        """
        del step
        batch = self._checked(batch)
        cond = dropout.conditions(
            batch.cond, self.null(batch.cond), self.label_drop, rng.use(key, rng.LABEL_DROP)
        )
        batch = batch.replace(cond=cond)
        logits_BLGV = self.logits(batch, codec, key=rng.use(key, rng.DROPOUT))
        nats_BLG, even_BLG = self._nats(logits_BLGV, batch.tokens_BLG)
        loss_BLG = (1 - self.smoothing) * nats_BLG + self.smoothing * even_BLG
        hits_BLG = head_names.likeliest(logits_BLGV) == batch.tokens_BLG
        scalars = {"nats_per_token": nats_BLG.sum(-1).mean(), "token_accuracy": hits_BLG.mean()}
        for scale, (start, size) in enumerate(self.layout.spans):
            scalars[f"nats_scale_{scale}"] = nats_BLG[:, start : start + size].sum(-1).mean()
        return loss_BLG.sum(-1).mean(), scalars

    def nats(
        self, batch: TokenBatch, codec: Quantizer, *, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, L] nats of the tokens, coarse to fine: exact, nothing dropped."""
        del key
        batch = self._checked(batch)
        return self._nats(self.logits(batch, codec), batch.tokens_BLG)[0].sum(-1)

    def unstacked(self) -> Generator:
        """A copy for decoding, with the layers of the transformer apart."""
        return transformer.unstacked(self, "transformer")

    def plan(self) -> tuple[Phase, ...]:
        """One step per scale."""
        return tuple(
            Phase(scale, 1, start, size, start + size)
            for scale, (start, size) in enumerate(self.layout.spans)
        )

    def start(
        self, cond: jax.Array, codec: Quantizer, *, keys_B: jax.Array, given: Given
    ) -> DecodeState:
        """The state before the first step."""
        self._check_codec(codec)
        self.check(cond)
        tokens_BLG, given_BLG = given
        B, L, _ = tokens_BLG.shape
        return DecodeState(
            tokens_BLG=tokens_BLG,
            given_BLG=given_BLG,
            order_BL=jnp.broadcast_to(jnp.arange(L)[None], (B, L)),
            cond=cond,
            keys_B=keys_B,
            modulation=self.transformer.modulation(self.labels(cond)[:, None]),
            cache=self.transformer.cache(B, groups=1),
            latents_BPC=codec.empty(B),
        )

    def step(
        self, state: DecodeState, phase: Phase, index: jax.Array | int, codec: Quantizer, draw: Draw
    ) -> DecodeState:
        """Draw the tokens of one scale, and add them to what is known."""
        del index  # a phase is one step
        scale, stop = phase.first, phase.start + phase.size
        cond_B1D = self.labels(state.cond)[:, None]
        if scale == 0:
            x_BlD = self._begin(cond_B1D)
        else:
            x_BlD = self.embed(codec.view(state.latents_BPC, scale))
        hidden_BlD, cache = self.transformer(
            x_BlD + self._slots(phase.start, stop),
            modulation=state.modulation,
            cache=state.cache,
            at=phase.start,
            slots=stop,
        )
        logits_BlGV = self.head(hidden_BlD.astype(jnp.float32), cond=cond_B1D)
        wanted_BlG = ~state.given_BLG[:, phase.start : stop]
        if state.kept_BPC is not None:  # upon other coarse tokens what is given stands for less
            left_BlG = codec.left(state.kept_BPC, state.latents_BPC, scale)
            left_BlG = jnp.where(wanted_BlG, self.layout.absent, left_BlG)
            tokens_BLG = state.tokens_BLG.at[:, phase.start : stop].set(left_BlG)
            state = state.replace(tokens_BLG=tokens_BLG)
        toward = {}
        tell = getattr(codec, "toward", None)
        if tell is not None and state.kept_BPC is not None and state.weight_B is not None:
            held_BP = jnp.all(state.given_BLG[:, -state.kept_BPC.shape[1] :], axis=-1)
            toward_BlGV = tell(state.kept_BPC, state.latents_BPC, held_BP, scale)
            toward = {} if toward_BlGV is None else dict(toward_BlGV=toward_BlGV)
        tokens_BlG, *_ = draw(logits_BlGV, wanted_BlG=wanted_BlG, **toward)
        positions_Bl = state.order_BL[:, phase.start : stop]
        state = state.write(positions_Bl, tokens_BlG)  # read back: some may have been given
        latents_BPC = codec.absorb(state.latents_BPC, state.read(positions_Bl), scale)
        return state.replace(cache=cache, latents_BPC=latents_BPC)

    def _begin(self, cond_B1D: jax.Array) -> jax.Array:
        """[B, l, D]: what stands at the slots of the first scale."""
        return cond_B1D + self.token[...][None]

    def _slots(self, start: int, stop: int) -> jax.Array:
        """[1, l, D]: the vectors of slots and of their scales."""
        return (self.positions(np.arange(start, stop)) + self.levels(self._scales()[start:stop]))[
            None
        ]

    def _scales(self) -> np.ndarray:
        """[L] the scale of every slot."""
        sizes = [size for _, size in self.layout.spans]
        return np.repeat(np.arange(len(sizes)), sizes)

    def _nats(self, logits_BLGV, tokens_BLG) -> tuple[jax.Array, jax.Array]:
        """[B, L, G] nats of the tokens; and of a target that is even over the alphabet."""
        logs_BLGV = jax.nn.log_softmax(logits_BLGV)
        nats_BLG = -jnp.take_along_axis(logs_BLGV, tokens_BLG[..., None], axis=-1)[..., 0]
        sizes_G1 = np.asarray(self.layout.vocab)[:, None]
        valid_GV = np.arange(self.layout.absent)[None] < sizes_G1
        shares_GV = (valid_GV / sizes_G1).astype(np.float32)
        valid_BLGV = jnp.where(valid_GV[None, None], logs_BLGV, 0)
        return nats_BLG, -jnp.sum(valid_BLGV * shares_GV[None, None], axis=-1)

    def _checked(self, batch: TokenBatch) -> TokenBatch:
        """The batch, its tokens as int32; an error where it is none of this generator's."""
        tokens_BLG = boundary.tokens(batch.tokens_BLG, self.layout)
        self.check(batch.cond)
        boundary.rows(tokens=tokens_BLG, conditions=batch.cond)
        return batch.replace(tokens_BLG=tokens_BLG)

    def _check_codec(self, codec: Quantizer | None) -> None:
        if not isinstance(codec, ScaleCodec):
            kind = "none" if codec is None else type(codec).__module__.rpartition(".")[2]
            raise UserError(
                "next-scale needs a codec that adds up scales; found the quantizer "
                f"{kind!r}: train its tokenizer with quantizer.name='multiscale'"
            )
        if codec.channels != self.channels:
            raise UserError(
                f"the generator needs latents of {self.channels} channels; found a tokenizer of "
                f"{codec.channels}: set config.generator.channels={codec.channels}"
            )


def _check(layout: TokenLayout, variant: str) -> None:
    if len(layout.grids) < 2:
        raise UserError(
            f"next-scale needs a pyramid; found one grid, {layout.grids[0]}: use a tokenizer with "
            "a multiscale quantizer, or another generator"
        )
    if not variants.named(variant).adaptive:
        raise UserError(
            "next-scale needs a variant whose norms follow a condition, as 'var' or 'var_shared'; "
            f"found {variant!r}"
        )


def _rescale(generator: Generator, width: int, gates: float, rngs: nnx.Rngs) -> None:
    """VAR's initial values: standard deviations relative to sqrt(1 / (3 D)), whatever the fan in.

    Small: the last map, the ends of the residual branches, and above all their gates.
    """
    net, head = generator.transformer, generator.head
    blocks, small = net.blocks, (2 * net.depth) ** -0.5
    six_61 = jnp.asarray((0.5, 0.5, gates) * 2)[:, None]  # shift, scale and gate, twice

    def draw(parameter: nnx.Param, factor: jax.Array | float = 1.0) -> None:
        noise = jax.random.normal(rngs.params(), parameter.shape, jnp.float32)
        factor = jnp.asarray(factor) * linear.third(width)
        factor = factor.reshape((1,) * (noise.ndim - factor.ndim) + factor.shape)
        parameter[...] = (noise * factor).astype(parameter.dtype)

    draw(generator.token)
    draw(generator.embed.kernel)
    draw(blocks.attention.out.kernel, small)
    draw(blocks.mlp.down.kernel, small)
    draw(head.head.kernel, 0.02)
    draw(head.modulation.kernel, 0.5)
    if net.shared is None:
        draw(blocks.modulation.kernel, six_61)
    else:
        draw(net.shared.modulation.kernel)
        blocks.table[...] = (blocks.table[...] * six_61[None]).astype(blocks.table.dtype)
