"""The MLPs of transformers: their activations, hidden widths and maps."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from tokgen import sharding
from tokgen.nn import dropout, linear
from tokgen.nn.precision import Precision


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


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv:2002.05202)."""

    def __init__(
        self, width: int, hidden: int, *, std: linear.Std, precision: Precision, rngs: nnx.Rngs
    ):
        options = dict(std=std, precision=precision, rngs=rngs)
        self.gate = linear.Linear(width, hidden, **options)
        self.up = linear.Linear(width, hidden, **options)
        self.down = linear.Linear(hidden, width, **options)

    def __call__(
        self, x_BlD: jax.Array, *, rate: float = 0.0, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, l, D] -> [B, l, D]; `rate` drops hidden values."""
        hidden_BlF = jax.nn.silu(self.gate(x_BlD)) * self.up(x_BlD)
        hidden_BlF = dropout.dropout(hidden_BlF, rate, key)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


class GeluMLP(nnx.Module):
    """down(gelu(up(x))) with biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Callable = exact_gelu,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(bias=True, std=std, precision=precision, rngs=rngs)
        self.up = linear.Linear(width, hidden, **options)
        self.down = linear.Linear(hidden, width, **options)
        self.activation = activation

    def __call__(
        self, x_BlD: jax.Array, *, rate: float = 0.0, key: jax.Array | None = None
    ) -> jax.Array:
        """[B, l, D] -> [B, l, D]; `rate` drops hidden values."""
        hidden_BlF = dropout.dropout(self.activation(self.up(x_BlD)), rate, key)
        return self.down(sharding.constrain(hidden_BlF, "BLF"))


def tanh_mlp(width: int, hidden: int, **options) -> GeluMLP:
    """`GeluMLP` with GELU's approximation by tanh."""
    return GeluMLP(width, hidden, activation=tanh_gelu, **options)
