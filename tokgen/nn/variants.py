"""What published transformers disagree about: one named constant each.

A config holds the name, so that it can be saved. To port a system, add a constant here; nobody
edits the transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import rng, sharding
from tokgen.interfaces import UserError
from tokgen.nn import attention, linear
from tokgen.nn.precision import Precision

# ---------------------------------------------------------------- widths and activations


def swiglu_hidden(width: int) -> int:
    """Hidden width of Llama's MLP: 8/3 of the width, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // 256) * 256


def swiglu_hidden_narrow(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: 256 would double a narrow network."""
    return -(-int(8 * width / 3) // 32) * 32


def four_times(width: int) -> int:
    """Hidden width of the MLP of GPT-2, BERT and the vision transformers."""
    return 4 * width


def exact_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x: jax.Array) -> jax.Array:
    """The approximation by tanh, JAX's default and PyTorch's option."""
    return jax.nn.gelu(x, approximate=True)


# ---------------------------------------------------------------- MLPs


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, std, precision: Precision, rngs: nnx.Rngs):
        options = dict(std=std, precision=precision, rngs=rngs)
        self.gate = linear.Linear(width, hidden, **options)
        self.up = linear.Linear(width, hidden, **options)
        self.down = linear.Linear(hidden, width, **options)

    def __call__(self, x_BlD: jax.Array, *, rate: float = 0.0, key=None) -> jax.Array:
        """[B, l, D] -> [B, l, D]; `rate` drops hidden values."""
        hidden_BlF = jax.nn.silu(self.gate(x_BlD)) * self.up(x_BlD)
        hidden_BlF = attention.dropout(hidden_BlF, rate, key)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


class GeluMLP(nnx.Module):
    """down(gelu(up(x))) with biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Callable = exact_gelu,
        std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(bias=True, std=std, precision=precision, rngs=rngs)
        self.up = linear.Linear(width, hidden, **options)
        self.down = linear.Linear(hidden, width, **options)
        self.activation = activation

    def __call__(self, x_BlD: jax.Array, *, rate: float = 0.0, key=None) -> jax.Array:
        """[B, l, D] -> [B, l, D]; `rate` drops hidden values."""
        hidden_BlF = attention.dropout(self.activation(self.up(x_BlD)), rate, key)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


def tanh_mlp(width: int, hidden: int, **options) -> GeluMLP:
    """The same with GELU's approximation."""
    return GeluMLP(width, hidden, activation=tanh_gelu, **options)


# ---------------------------------------------------------------- norms


def torch_norm(width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
    """LayerNorm with the eps of PyTorch, 1e-5."""
    return linear.LayerNorm(width, eps=1e-5, precision=precision, rngs=rngs)


def bert_norm(width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
    """LayerNorm with the eps of BERT, 1e-12."""
    return linear.LayerNorm(width, eps=1e-12, precision=precision, rngs=rngs)


# ---------------------------------------------------------------- blocks


class PreNorm(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, parts: Parts, *, precision, rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            width, heads, hidden, parts, precision=precision, rngs=rngs
        )

    def __call__(self, x_BlD, *, rates, path=0.0, key=None, cache=None, **context):
        """(outputs [B, l, D], cache)."""
        after, keys = _branches(rates, path, key)
        y_BlD, cache = self.attention(
            self.attention_norm(x_BlD), cache=cache, rate=rates.attention, key=keys[0], **context
        )
        x_BlD = x_BlD + after(y_BlD, keys[1])
        y_BlD = self.mlp(self.mlp_norm(x_BlD), rate=rates.hidden, key=keys[2])
        return x_BlD + after(y_BlD, keys[3]), cache


class PostNorm(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), as BERT has it (arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int, hidden: int, parts: Parts, *, precision, rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            width, heads, hidden, parts, precision=precision, rngs=rngs
        )

    def __call__(self, x_BlD, *, rates, path=0.0, key=None, cache=None, **context):
        """(outputs [B, l, D], cache)."""
        after, keys = _branches(rates, path, key)
        y_BlD, cache = self.attention(
            x_BlD, cache=cache, rate=rates.attention, key=keys[0], **context
        )
        x_BlD = self.attention_norm(x_BlD + after(y_BlD, keys[1]))
        y_BlD = self.mlp(x_BlD, rate=rates.hidden, key=keys[2])
        return self.mlp_norm(x_BlD + after(y_BlD, keys[3])), cache


class Adaptive(nnx.Module):
    """A PreNorm block whose norms and branches are shifted, scaled and gated by a condition.

    adaLN-zero of DiT (arXiv:2212.09748). The six vectors are, in this order, shift, scale and gate
    of the attention, then of the MLP. They come from a linear map of the block's own.
    """

    def __init__(self, width: int, heads: int, hidden: int, parts: Parts, *, precision, rngs):
        options = dict(precision=precision, rngs=rngs)
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            width, heads, hidden, parts, **options
        )
        self.modulation = linear.Linear(width, (6, width), bias=True, std=None, **options)
        if parts.starts:
            kernel = self.modulation.kernel
            starts_161 = jnp.asarray(parts.starts)[None, :, None]
            draw = starts_161 * jax.random.normal(rngs.params(), kernel.shape)
            kernel[...] = draw.astype(precision.params_dtype)

    def modulate(self, cond_BlD: jax.Array) -> jax.Array:
        """The six vectors [B, l, 6, D] of a condition."""
        return self.modulation(jax.nn.silu(cond_BlD))

    def __call__(self, x_BlD, *, rates, modulation, path=0.0, key=None, cache=None, **context):
        """(outputs [B, l, D], cache)."""
        return _adapted(self, x_BlD, modulation, rates, path, key, cache, context)


class SharedAdaptive(nnx.Module):
    """The same, with six vectors that all blocks share, and six learned ones added (VAR d36)."""

    def __init__(self, width: int, heads: int, hidden: int, parts: Parts, *, precision, rngs):
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = _layers(
            width, heads, hidden, parts, precision=precision, rngs=rngs
        )
        # N(0, 1) / sqrt(D), as published
        draw = jax.random.normal(rngs.params(), (6, width), precision.params_dtype)
        self.table = nnx.Param(draw * width**-0.5)

    def modulate(self, shared_Bl6D: jax.Array) -> jax.Array:
        """The six vectors [B, l, 6, D] of this block."""
        return shared_Bl6D + self.table[...].astype(shared_Bl6D.dtype)[None, None]

    def __call__(self, x_BlD, *, rates, modulation, path=0.0, key=None, cache=None, **context):
        """(outputs [B, l, D], cache)."""
        return _adapted(self, x_BlD, modulation, rates, path, key, cache, context)


class Shared(nnx.Module):
    """The six vectors that all blocks share, of a condition."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.modulation = linear.Linear(
            width, (6, width), bias=True, precision=precision, rngs=rngs
        )

    def __call__(self, cond_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, 6, D]."""
        return self.modulation(jax.nn.silu(cond_BlD))


def _layers(width: int, heads: int, hidden: int, parts: Parts, **options) -> tuple:
    """What every block is made of: norm, attention, norm, MLP."""
    return (
        parts.norm(width, **options),
        attention.Attention(
            width,
            heads,
            biased=parts.biased,
            similarity=parts.similarity,
            std=parts.std,
            **options,
        ),
        parts.norm(width, **options),
        parts.mlp(width, hidden, std=parts.std, **options),
    )


def _branches(rates, path, key) -> tuple[Callable, tuple]:
    """(what becomes of a residual branch, keys of attention, its branch, MLP, its branch)."""
    uses = (rng.ATTENTION, rng.ATTENDED, rng.HIDDEN, rng.MAPPED)
    keys = tuple(rng.use(key, what) for what in uses)

    def after(y_BlD, key):
        y_BlD = attention.dropout(y_BlD, rates.residual, rng.use(key, rng.RESIDUAL))
        if rates.path == 0.0 or key is None:
            return y_BlD
        return attention.drop_path(y_BlD, path, rng.use(key, rng.PATH))

    return after, keys


def _adapted(block, x_BlD, modulation_Bl6D, rates, path, key, cache, context):
    """(outputs, cache) of an adaptive block, from its six vectors."""
    after, keys = _branches(rates, path, key)
    six = (modulation_Bl6D[..., i, :].astype(x_BlD.dtype) for i in range(6))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = six
    y_BlD = block.attention_norm(x_BlD) * (1 + scale) + shift
    y_BlD, cache = block.attention(y_BlD, cache=cache, rate=rates.attention, key=keys[0], **context)
    x_BlD = x_BlD + after(gate * y_BlD, keys[1])
    y_BlD = block.mlp_norm(x_BlD) * (1 + mlp_scale) + mlp_shift
    y_BlD = block.mlp(y_BlD, rate=rates.hidden, key=keys[2])
    return x_BlD + after(mlp_gate * y_BlD, keys[3]), cache


@dataclasses.dataclass(frozen=True)
class Parts:
    """The module factories and functions of which a transformer is assembled."""

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
        return self.block in (Adaptive, SharedAdaptive)


# LlamaGen, arXiv:2406.06525: RMSNorm with eps 1e-5, no biases, SwiGLU, normal(0.02)
LLAMA = Parts(PreNorm, linear.RMSNorm, SwiGLU, swiglu_hidden, linear.published)

# The same for widths under 512: the MLP is not rounded up to 256, starts scale with fan in
LLAMA_NARROW = Parts(PreNorm, linear.RMSNorm, SwiGLU, swiglu_hidden_narrow, linear.fan_in)

# The vision transformer of TiTok, arXiv:2406.07550: LayerNorm with eps 1e-5, biases, exact GELU
VIT = Parts(PreNorm, torch_norm, GeluMLP, four_times, linear.published, attention.ALL)

# TiTok's U-ViT generator: no bias of query, key and value
UVIT = Parts(PreNorm, torch_norm, GeluMLP, four_times, linear.published, ("out",))

# BERT as TiTok and MaskBit have it: LayerNorm after the sum, eps 1e-12, exact GELU
BERT = Parts(PostNorm, bert_norm, GeluMLP, four_times, linear.published, attention.ALL)

# MaskBit's token-embedding variant: the norm before the branch
BERT_PRENORM = dataclasses.replace(BERT, block=PreNorm, closing=bert_norm)

# MaskGIT, arXiv:2202.04200: BERT with the GELU of JAX
MASKGIT = Parts(PostNorm, bert_norm, tanh_mlp, four_times, linear.published, attention.ALL)

# RAR, arXiv:2411.00776: adaptive norms that have a scale and a bias, normed queries and keys
RAR = Parts(
    Adaptive,
    linear.LayerNorm,
    GeluMLP,
    four_times,
    linear.published,
    attention.ALL,
    attention.HeadNorm,
)

# VAR, arXiv:2404.02905: adaptive norms, cosine attention, keys without a bias, tanh GELU
VAR = Parts(
    Adaptive,
    linear.Standardized,
    tanh_mlp,
    four_times,
    linear.third,
    ("query", "value", "out"),
    attention.Cosine,
)

# VAR d36: six vectors for all blocks
VAR_SHARED = dataclasses.replace(VAR, block=SharedAdaptive, shared=Shared)

# VAR's code with its cosine attention off: no published weights
VAR_PLAIN = dataclasses.replace(VAR, similarity=attention.Quartered)
VAR_SHARED_PLAIN = dataclasses.replace(VAR_SHARED, similarity=attention.Quartered)

# IBQ, arXiv:2412.02692, by its code: LlamaGen's parts in adaptive blocks, whose gates start the
# lower the deeper the model (B and L; XL; XXL)
IBQ = Parts(
    Adaptive,
    linear.RMSNorm,
    SwiGLU,
    swiglu_hidden,
    linear.published,
    starts=(0.01, 0.01, 2e-5) * 2,
)
IBQ_XL = dataclasses.replace(IBQ, starts=(0.01, 0.01, 2e-6) * 2)
IBQ_XXL = dataclasses.replace(IBQ, starts=(0.01, 0.01, 2e-7) * 2)


def named(name: str) -> Parts:
    """The constant of this file that a config names, in lower case."""
    found = {key.lower(): value for key, value in globals().items() if isinstance(value, Parts)}
    if name not in found:
        raise UserError(f"parts must be one of {sorted(found)}; found {name!r}")
    return found[name]
