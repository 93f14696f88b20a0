"""What published transformers disagree about: one named constant each.

A config holds the name, so that it can be saved. To port a system, add a constant here; nobody
edits the transformer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from tokgen import sharding
from tokgen.nn import attention, linear
from tokgen.nn.precision import Precision


def swiglu_hidden(width: int) -> int:
    """Hidden width of Llama's MLP: 8/3 of the width, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // 256) * 256


def swiglu_hidden_narrow(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: 256 would double a narrow network."""
    return -(-int(8 * width / 3) // 32) * 32


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv:2002.05202)."""

    def __init__(self, width: int, *, hidden, std, precision: Precision, rngs: nnx.Rngs):
        options = dict(std=std, precision=precision, rngs=rngs)
        self.gate = linear.Linear(width, hidden(width), **options)
        self.up = linear.Linear(width, hidden(width), **options)
        self.down = linear.Linear(hidden(width), width, **options)

    def __call__(self, x_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, D]."""
        hidden_BlF = jax.nn.silu(self.gate(x_BlD)) * self.up(x_BlD)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


def four_times(width: int) -> int:
    """Hidden width of the MLP of GPT-2, BERT and the vision transformers."""
    return 4 * width


class GeluMLP(nnx.Module):
    """down(gelu(up(x))) with biases and the exact GELU (arXiv:1606.08415)."""

    def __init__(self, width: int, *, hidden, std, precision: Precision, rngs: nnx.Rngs):
        options = dict(bias=True, std=std, precision=precision, rngs=rngs)
        self.up = linear.Linear(width, hidden(width), **options)
        self.down = linear.Linear(hidden(width), width, **options)

    def __call__(self, x_BlD: jax.Array) -> jax.Array:
        """[B, l, D] -> [B, l, D]."""
        hidden_BlF = jax.nn.gelu(self.up(x_BlD), approximate=False)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


def layer_norm(width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
    """LayerNorm with the eps of PyTorch, 1e-5."""
    return linear.LayerNorm(width, eps=1e-5, precision=precision, rngs=rngs)


class PreNorm(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, parts: Parts, *, precision, rngs):
        options = dict(precision=precision, rngs=rngs)
        self.attention_norm = parts.norm(width, **options)
        self.attention = attention.Attention(
            width, heads, bias=parts.bias, std=parts.std, **options
        )
        self.mlp_norm = parts.norm(width, **options)
        self.mlp = parts.mlp(width, hidden=parts.hidden, std=parts.std, **options)

    def __call__(self, x_BlD, *, rates, key=None, cache=None, **context):
        """(outputs [B, l, D], cache)."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        y_BlD, cache = self.attention(
            self.attention_norm(x_BlD), cache=cache, rate=rates.attention, key=keys[0], **context
        )
        x_BlD = x_BlD + attention.dropout(y_BlD, rates.residual, keys[1])
        y_BlD = self.mlp(self.mlp_norm(x_BlD))
        return x_BlD + attention.dropout(y_BlD, rates.residual, keys[2]), cache


@dataclasses.dataclass(frozen=True)
class Parts:
    """The module factories and functions of which a transformer is assembled."""

    block: Callable
    norm: Callable
    mlp: Callable
    hidden: Callable[[int], int]
    std: Callable[[int], float]
    bias: bool = False  # of the attention's maps; an MLP brings its own


# LlamaGen, arXiv:2406.06525: RMSNorm with eps 1e-5, no biases, SwiGLU, normal(0.02)
LLAMA = Parts(PreNorm, linear.RMSNorm, SwiGLU, swiglu_hidden, linear.published)

# The same for widths under 512: the MLP is not rounded up to 256, starts scale with fan in
LLAMA_NARROW = Parts(PreNorm, linear.RMSNorm, SwiGLU, swiglu_hidden_narrow, linear.fan_in)

# The vision transformer of TiTok, arXiv:2406.07550: LayerNorm with eps 1e-5, biases, exact GELU
VIT = Parts(PreNorm, layer_norm, GeluMLP, four_times, linear.published, bias=True)


def named(name: str) -> Parts:
    """The constant of this file that a config names, in lower case."""
    found = {key.lower(): value for key, value in globals().items() if isinstance(value, Parts)}
    if name not in found:
        raise ValueError(f"parts must be one of {sorted(found)}; found {name!r}")
    return found[name]
