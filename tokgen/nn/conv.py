"""Convolutions over images, and the blocks of which encoders and decoders are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.nn import linear
from tokgen.nn.precision import Precision


class Conv(nnx.Module):
    """[B, H, W, I] -> [B, H / stride, W / stride, O]; SAME padding, with a bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        gain: float = 1.0,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, inputs, outputs)
        std = gain * (size * size * inputs) ** -0.5
        self.kernel = nnx.Param(
            std * jax.random.truncated_normal(rngs.params(), -2, 2, shape, precision.params_dtype)
        )
        self.bias = nnx.Param(jnp.zeros(outputs, precision.params_dtype))
        self.stride, self.precision = stride, precision

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Convolve, in the compute dtype."""
        dtype = self.precision.compute_dtype
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC.astype(dtype),
            self.kernel[...].astype(dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y_BHWC + self.bias[...].astype(dtype).reshape(1, 1, 1, -1)


class Residual(nnx.Module):
    """x + conv3(silu(norm(conv3(silu(norm(x)))))): the block of VQGAN (arXiv:2012.09841)."""

    def __init__(self, inputs: int, outputs: int, *, norm, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.norm1, self.norm2 = norm(inputs, **options), norm(outputs, **options)
        self.conv1 = Conv(inputs, outputs, **options)
        self.conv2 = Conv(outputs, outputs, **options)
        self.conv_skip = Conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv1(jax.nn.silu(self.norm1(x_BHWC)))
        y_BHWC = self.conv2(jax.nn.silu(self.norm2(y_BHWC)))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(x_BHWC)) + y_BHWC


class LightResidual(nnx.Module):
    """x + conv1(silu(conv3(norm(x)))): half the products of `Residual`, for small budgets."""

    def __init__(self, inputs: int, outputs: int, *, norm, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.norm = norm(inputs, **options)
        self.conv1 = Conv(inputs, outputs, **options)
        # a small second gain: the block begins close to the identity
        self.conv2 = Conv(outputs, outputs, 1, gain=0.1, **options)
        self.conv_skip = Conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv2(jax.nn.silu(self.conv1(self.norm(x_BHWC))))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(x_BHWC)) + y_BHWC


class LocalResidual(nnx.Module):
    """As `LightResidual`, with a 1 x 1 convolution: every position for itself."""

    def __init__(self, inputs: int, outputs: int, *, norm, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.norm = norm(inputs, **options)
        self.conv1 = Conv(inputs, outputs, 1, **options)
        self.conv2 = Conv(outputs, outputs, 1, gain=0.1, **options)
        self.conv_skip = Conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv2(jax.nn.silu(self.conv1(self.norm(x_BHWC))))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(x_BHWC)) + y_BHWC


def space_to_depth(x_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size, W / size, size * size * C]."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size, W // size, size * size * C)


def depth_to_space(x_BHWC: jax.Array, size: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, size, size, C // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H * size, W * size, C // size**2)


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """Every pixel twice in both directions; transposed convolutions are slow on every backend."""
    return jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What published convolutional tokenizers disagree about."""

    block: Callable
    norm: Callable


VQGAN = Parts(Residual, linear.GroupNorm)
LIGHT = Parts(LightResidual, linear.RMSNorm)
LOCAL = Parts(LocalResidual, linear.RMSNorm)


def named(name: str) -> Parts:
    """The constant of this file that a config names, in lower case."""
    found = {key.lower(): value for key, value in globals().items() if isinstance(value, Parts)}
    if name not in found:
        raise ValueError(f"parts must be one of {sorted(found)}; found {name!r}")
    return found[name]
