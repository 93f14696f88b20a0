"""Vectors into logits: one module per way that published generators end.

A head gives logits [B, l, G, V] in float32; beyond a smaller alphabet they are -inf. `turns` are
the symbols before which it must be asked again: (0,) where all symbols of a position are drawn at
once. A tied head may give further columns, for what is no token (classes, the mask), which only its
loss sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, rng, sharding
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn import blocks, conditioning, linear, mlp, norms, positions, transformer
from tokgen.nn.precision import Precision


@dataclasses.dataclass(frozen=True)
class Config:
    """What every head is told of its generator; `classes` are those of its labels."""

    layout: TokenLayout
    width: int
    variant: blocks.Variant
    classes: int = 0


class Linear(nnx.Module):
    """Norm, then a linear map."""

    turns, stacks = (0,), ()

    def __init__(
        self,
        config: Config,
        *,
        norm: Callable | None = None,
        bias: bool = False,
        std: linear.Std | None = None,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        layout = config.layout
        self.norm = (norm or config.variant.norm)(config.width, precision=precision, rngs=rngs)
        # zeros unless published otherwise: the first predictions are uniform, the first loss log V
        self.head = linear.Linear(
            config.width,
            (layout.groups, layout.absent),
            bias=bias,
            std=std,
            precision=precision,
            rngs=rngs,
        )
        self.layout = layout

    def __call__(self, x_BlD: jax.Array, **_) -> jax.Array:
        """[B, l, D] -> [B, l, G, V]."""
        return finished(self.head(self.norm(x_BlD)), self.layout)


def biased(config: Config, **options) -> Linear:
    """Norm, then a linear map with a bias (TiTok's U-ViT)."""
    return Linear(config, bias=True, std=config.variant.std, **options)


def bare(config: Config, **options) -> Linear:
    """A linear map with a bias and no norm: post-norm blocks end with one (TiTok's BERT)."""
    return Linear(config, norm=norms.Identity, bias=True, std=config.variant.std, **options)


class Adaptive(nnx.Module):
    """A norm that is shifted and scaled by a condition, then a linear map (DiT, RAR, VAR)."""

    turns, stacks = (0,), ()

    def __init__(
        self,
        config: Config,
        *,
        norm: Callable = norms.Standardized,
        start: linear.Std | None = None,
        bias: bool = True,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options, layout, width = dict(precision=precision, rngs=rngs), config.layout, config.width
        self.norm = norm(width, **options)
        # shift, scale
        self.modulation = linear.Linear(width, (2, width), bias=True, std=start, **options)
        vectors = (layout.groups, layout.absent)
        self.head = linear.Linear(width, vectors, bias=bias, std=config.variant.std, **options)
        self.layout = layout

    def __call__(self, x_BlD: jax.Array, *, cond: jax.Array, **_) -> jax.Array:
        """[B, l, D] under a condition [B, l or 1, D] -> [B, l, G, V]."""
        both_Bl2D = self.modulation(jax.nn.silu(cond))
        shift, scale = (both_Bl2D[..., i, :].astype(x_BlD.dtype) for i in range(2))
        return finished(self.head(self.norm(x_BlD) * (1 + scale) + shift), self.layout)


def half_published(fan_in: int) -> float:
    """Half of the usual deviation, as IBQ's map to shift and scale starts."""
    return 0.5 * linear.published(fan_in)


def adaptive_rms(config: Config, **options) -> Adaptive:
    """`Adaptive` over an RMSNorm, with a map that starts at zero and has no bias (IBQ)."""
    norm = dict(norm=config.variant.norm, start=half_published)
    head = Adaptive(config, bias=False, **norm, **options)
    head.head.kernel[...] = jnp.zeros_like(head.head.kernel[...])
    return head


class Transformed(nnx.Module):
    """A dense layer, GELU and norm, as BERT ends (arXiv:1810.04805); a linear map (MaskBit)."""

    turns, stacks = (0,), ()

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        options, layout = dict(precision=precision, rngs=rngs), config.layout
        self.dense, self.norm = _dense(config, **options)
        vectors, std = (layout.groups, layout.absent), config.variant.std
        self.head = linear.Linear(config.width, vectors, bias=True, std=std, **options)
        self.layout = layout

    def __call__(self, x_BlD: jax.Array, **_) -> jax.Array:
        """[B, l, D] -> [B, l, G, V]."""
        x_BlD = self.norm(mlp.exact_gelu(self.dense(x_BlD)))
        return finished(self.head(x_BlD), self.layout)


class TiedPerPosition(nnx.Module):
    """A dense layer, GELU and norm, then products with the tokens' own embeddings (MaskBit's BERT).

    With a bias per position and symbol.
    """

    turns, stacks = (0,), ()

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        layout = config.layout
        self.dense, self.norm = _dense(config, precision=precision, rngs=rngs)
        shape = (layout.groups, layout.length, layout.absent)
        self.bias = nnx.Param(jnp.zeros(shape, precision.params_dtype))
        self.layout, self.precision = layout, precision

    def __call__(self, x_BlD: jax.Array, *, embeddings: jax.Array, **_) -> jax.Array:
        """[B, L, D] against rows [G, V + 1, D] -> [B, L, G, V]."""
        x_BlD = self.norm(mlp.exact_gelu(self.dense(x_BlD)))
        rows_GVD = embeddings[:, : self.layout.absent].astype(self.precision.compute_dtype)
        logits_BlGV = jnp.einsum("BlD,GVD->BlGV", x_BlD, rows_GVD)
        bias_lGV = jnp.swapaxes(self.bias[...], 0, 1).astype(jnp.float32)
        return finished(logits_BlGV.astype(jnp.float32) + bias_lGV[None], self.layout)


class TiedToAll(nnx.Module):
    """A dense layer, GELU and norm, then products with the embeddings of all words (MaskGIT).

    Words are codes, then classes, then the mask.

    The columns beyond V are no tokens; MaskGIT's loss counts them, its sampler cuts them off.
    """

    turns, stacks = (0,), ()

    def __init__(self, config: Config, *, precision: Precision, rngs: nnx.Rngs):
        layout = config.layout
        if layout.groups != 1:
            raise UserError(f"MaskGIT's head needs one symbol per position; found {layout.vocab}")
        self.dense, self.norm = _dense(config, precision=precision, rngs=rngs)
        words, self.classes = layout.absent + config.classes + 1, config.classes
        self.bias = nnx.Param(jnp.zeros(words, precision.params_dtype))
        self.layout, self.precision = layout, precision

    def __call__(
        self, x_BlD: jax.Array, *, embeddings: jax.Array, labels: jax.Array | None = None, **_
    ) -> jax.Array:
        """[B, l, D] against rows [1, V + 1, D] and [classes, D] -> [B, l, 1, V + classes + 1].

        Without labels, as for drawing, [B, l, 1, V]: the tokens alone.
        """
        x_BlD = self.norm(mlp.tanh_gelu(self.dense(x_BlD)))
        V = self.layout.absent
        rows_VD = embeddings[0, :V]
        if labels is not None:
            # not the row of "no class", where there is one
            rows_VD = jnp.concatenate([rows_VD, labels[: self.classes], embeddings[0, V:]])
        logits_BlV = jnp.einsum("BlD,VD->BlV", x_BlD, rows_VD.astype(self.precision.compute_dtype))
        bias_V = self.bias[...][: len(rows_VD)].astype(jnp.float32)
        return (logits_BlV.astype(jnp.float32) + bias_V[None, None])[..., None, :]


class Factor(nnx.Module):
    """The symbols of a position in order, by a small causal transformer (Open-MAGVIT2).

    arXiv:2409.04410, section 3.2, and its code: over [h, row of symbol 0, row of symbol 1, ...],
    the input rows of the symbols already drawn; a norm and a linear map per symbol follow. h has
    the zero rows of a prefix for its rotary position, symbol g the cell (0, g).
    """

    stacks = ("transformer",)

    def __init__(
        self,
        config: Config,
        *,
        depth: int,
        heads: int,
        precision: Precision,
        rngs: nnx.Rngs,
        **options,
    ):
        layout, width, variant = config.layout, config.width, config.variant
        G, V = layout.groups, layout.absent
        if G < 2:
            raise UserError(f"factors need two symbols per position or more; found {layout.vocab}")
        self.turns, self.layout = tuple(range(G)), layout
        row = TokenLayout(layout.vocab, ((1, G),))
        some = dict(precision=precision, rngs=rngs)
        self.positions = positions.Rotary2D(row, 1, width, heads, **some)
        self.transformer = transformer.Transformer(
            blocks.Config(width, depth, heads, variant, **options), **some
        )
        self.norm = variant.norm(width, **some)

        def make(key):
            return linear.Linear(width, V, std=None, precision=precision, rngs=rng.rngs(key))

        self.logits = jax.vmap(make)(rng.numbered(rngs.params(), G))

    def __call__(
        self,
        x_BlD: jax.Array,
        *,
        given: jax.Array,
        embeddings: jax.Array,
        key: jax.Array | None = None,
        **_,
    ) -> jax.Array:
        """[B, l, D], t symbols [B, l, t] and their rows [G, V, D] -> logits [B, l, t + 1, V]."""
        t = given.shape[-1]
        rows_BlD = [embeddings[g][given[..., g]].astype(x_BlD.dtype) for g in range(t)]
        x_BltD = jnp.stack([x_BlD, *rows_BlD], axis=2)
        x_BtD = x_BltD.reshape(-1, *x_BltD.shape[2:])  # every position by itself
        slots_t = jnp.arange(t + 1)
        _, rotary = self.positions(jnp.arange(self.layout.groups)[None], slots_t)
        mask = conditioning.causal(slots_t, t + 1)
        x_BtD, _ = self.transformer(x_BtD, rotary=rotary, mask=mask, key=key)
        x_BltD = self.norm(x_BtD).reshape(x_BltD.shape)
        logits_BltV = [
            jax.tree.map(lambda leaf, g=g: leaf[g], self.logits)(x_BltD[:, :, g])
            for g in range(t + 1)
        ]
        return finished(jnp.stack(logits_BltV, axis=2), self.layout)


def _dense(config: Config, **options) -> tuple[linear.Linear, nnx.Module]:
    """The dense layer and the norm with which BERT's head begins; GELU stands between them."""
    width, std = config.width, config.variant.std
    dense = linear.Linear(width, width, bias=True, std=std, **options)
    return dense, norms.bert_norm(width, **options)


def finished(logits_BlGV: jax.Array, layout: TokenLayout) -> jax.Array:
    """Logits in float32, -inf beyond a smaller alphabet."""
    # float32: differences of logits decide draws and losses
    logits_BlGV = sharding.constrain(logits_BlGV, "BLGV").astype(jnp.float32)
    if len(set(layout.vocab)) == 1:
        return logits_BlGV
    sizes_G1 = jnp.asarray(layout.vocab[: logits_BlGV.shape[2]])[:, None]
    valid_GV = jnp.arange(layout.absent)[None] < sizes_G1
    return jnp.where(valid_GV[None, None], logits_BlGV, -jnp.inf)


def likeliest(logits: jax.Array) -> jax.Array:
    """Indices of the largest logits along the last axis, of equal ones the first; int32.

    What argmax gives of numbers. XLA on a CPU takes an argmax entry by entry (jax 0.10.2), and a
    maximum sixteen at a time.
    """
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, number, logits.shape[-1] - 1), axis=-1)


HEADS = {
    "linear": Linear,
    "biased": biased,
    "bare": bare,
    "adaptive": Adaptive,
    "adaptive_rms": adaptive_rms,
    "factor": Factor,
    "transformed": Transformed,
    "tied_per_position": TiedPerPosition,
    "tied_to_all": TiedToAll,
}


ADAPTIVE = ("adaptive", "adaptive_rms")  # they are told a condition
TIED = ("tied_per_position", "tied_to_all")  # they read the embeddings of tokens, and of labels


def named(name: str) -> Callable:
    """The kind of head that a config names."""
    return choices.named(HEADS, name, "head")
