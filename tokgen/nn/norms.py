"""Norms, and the unit vectors of L2 normalisation. Statistics are float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.interfaces import UserError
from tokgen.nn.precision import Precision


class Identity(nnx.Module):
    """No norm: what it is given, whatever its axes."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
        del width, precision, rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` itself."""
        return x


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, in the dtype of x; a zero vector stays one."""
    # the gradient of a norm at zero is no number: the square is bounded from below
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (arXiv:1910.07467); statistics in float32."""

    def __init__(
        self, width: int, *, eps: float = 1e-5, precision: Precision, rngs: nnx.Rngs | None = None
    ):
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, precision.params_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the dtype stays."""
        # float32: a bfloat16 mean of squares has three significant digits
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (arXiv:1607.06450); statistics in float32."""

    def __init__(
        self, width: int, *, eps: float = 1e-6, precision: Precision, rngs: nnx.Rngs | None = None
    ):
        del rngs
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, precision.params_dtype))
        self.bias = nnx.Param(jnp.zeros(width, precision.params_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the dtype stays."""
        shape = (1,) * (x.ndim - 1) + (-1,)
        wide = standardized(x, self.eps) * self.scale[...].astype(jnp.float32).reshape(shape)
        return (wide + self.bias[...].astype(jnp.float32).reshape(shape)).astype(x.dtype)


def standardized(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean) / std along the last axis, float32: a LayerNorm that learns nothing."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class Standardized(nnx.Module):
    """A LayerNorm without scale and bias, as adaptive norms have it; the dtype stays."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
        del width, precision, rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis."""
        return standardized(x).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalisation over space and groups of channels (arXiv:1803.08494) of [B, H, W, C]."""

    def __init__(
        self,
        width: int,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        precision: Precision,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        if width % groups:
            raise UserError(f"groups must divide width: width={width}, groups={groups}")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(width, precision.params_dtype))
        self.bias = nnx.Param(jnp.zeros(width, precision.params_dtype))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Normalise; the dtype stays."""
        wide = grouped(x_BHWC, self.groups, self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape(1, 1, 1, -1)
        bias = self.bias[...].astype(jnp.float32).reshape(1, 1, 1, -1)
        return (wide * scale + bias).astype(x_BHWC.dtype)


def grouped(x_BHWC: jax.Array, groups: int = 32, eps: float = 1e-6) -> jax.Array:
    """Mean 0 and variance 1 over space and groups of channels; float32.

    Two-pass variance, as PyTorch computes it.
    """
    B, _, _, C = x_BHWC.shape

    def mean_B11C(x_BHWC):
        # sums of channels, then of groups: channels lie side by side, groups alone do not
        sums_BgC = jnp.mean(x_BHWC, axis=(1, 2)).reshape(B, groups, C // groups)
        return jnp.repeat(jnp.mean(sums_BgC, axis=2), C // groups, axis=1)[:, None, None]

    wide = x_BHWC.astype(jnp.float32)
    wide = wide - mean_B11C(wide)
    return wide * jax.lax.rsqrt(mean_B11C(wide * wide) + eps)


def torch_norm(width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
    """LayerNorm with the eps of PyTorch, 1e-5."""
    return LayerNorm(width, eps=1e-5, precision=precision, rngs=rngs)


def bert_norm(width: int, *, precision: Precision, rngs: nnx.Rngs | None = None):
    """LayerNorm with the eps of BERT, 1e-12."""
    return LayerNorm(width, eps=1e-12, precision=precision, rngs=rngs)
