"""Linear maps, and the deviations with which they start."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.nn.precision import Precision

Std = Callable[[int], float]  # the standard deviation with which a map starts, of its fan in


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

    CAST = ("kernel", "bias")  # to the compute dtype, before anything is done with them

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        bias: bool = False,
        std: Std | None = published,
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
