"""Linear maps and norms."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.interfaces import UserError
from tokgen.nn.precision import Precision


def published(fan_in: int) -> float:
    """Standard deviation 0.02, as GPT-2 and nearly all published image generators start."""
    del fan_in
    return 0.02


def fan_in(fan_in: int) -> float:
    """Standard deviation 1 / sqrt(fan in): keeps the scale of narrow networks."""
    return fan_in**-0.5


def third(fan_in: int) -> float:
    """Standard deviation sqrt(1 / (3 fan in)), as VAR starts."""
    return (3 * fan_in) ** -0.5


class Linear(nnx.Module):
    """[..., D] -> [..., *out]; a kernel of shape [D, *out], or [*inputs, out] with `inputs`."""

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        bias: bool = False,
        std: Callable[[int], float] | None = published,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        inputs = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        size, dtype = 1, precision.params_dtype
        for n in inputs:
            size *= n
        draw = jax.random.normal(rngs.params(), (*inputs, *outputs), dtype)
        self.kernel = nnx.Param(jnp.zeros_like(draw) if std is None else draw * std(size))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.rank, self.precision = len(inputs), precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last axes of x with the kernel, in the compute dtype."""
        dtype = self.precision.compute_dtype
        y = jnp.tensordot(x.astype(dtype), self.kernel[...].astype(dtype), self.rank)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


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
    B, H, W, C = x_BHWC.shape
    wide = x_BHWC.astype(jnp.float32).reshape(B, H * W, groups, C // groups)
    wide = wide - jnp.mean(wide, axis=(1, 3), keepdims=True)
    variance = jnp.mean(wide * wide, axis=(1, 3), keepdims=True)
    return (wide * jax.lax.rsqrt(variance + eps)).reshape(B, H, W, C)
