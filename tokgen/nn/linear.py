"""Linear maps, the deviations with which they start, and panels of them for decoding on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import parameters, sharding
from tokgen.nn import remat
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
        self.rank, self.precision, self.product = len(inputs), precision, None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last axes of x with the kernel, in the compute dtype."""
        dtype = self.precision.compute_dtype
        x, kernel, sums = x.astype(dtype), self.kernel[...].astype(dtype), self.product
        matrix = sharding.matrix(kernel, self.rank)
        x = x.reshape(*x.shape[: x.ndim - self.rank], len(matrix))
        if sums is None and sharding.platform() == "cpu":
            y = remat.product(_product(x, matrix))
        else:
            y = jnp.dot(x, matrix, preferred_element_type=sums).astype(dtype)
        y = y.reshape(*y.shape[:-1], *kernel.shape[self.rank :])
        if self.bias is None:
            return y
        bias = self.bias[...].astype(dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


@jax.custom_vjp
def _product(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x [..., D] times a matrix.

    Its derivative by the kernel is laid out as the kernel is. Left to jax it is the transpose, of
    which XLA on a CPU transposes both the operand and, for the optimizer, the result.
    """
    return jnp.dot(x, kernel_DF)


def _product_kept(x: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple]:
    return _product(x, kernel_DF), (x, kernel_DF)


def _product_slopes(kept: tuple, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_DF = kept
    x_RD, slope_RF = x.reshape(-1, len(kernel_DF)), slope.reshape(-1, kernel_DF.shape[1])
    to_x_RD = jax.lax.dot_general(slope_RF, kernel_DF, (((1,), (1,)), ((), ())))
    to_kernel_DF = jax.lax.dot_general(x_RD, slope_RF, (((0,), (0,)), ((), ())))
    return to_x_RD.reshape(x.shape), to_kernel_DF


_product.defvjp(_product_kept, _product_slopes)


PANEL, MANY = 64, 256  # outputs side by side; rows from which the kernel is read more than once
# Products that give bfloat16 take twice as long on a CPU: XLA converts the kernel at every call
WIDE = jnp.float32


class Panels(nnx.Module):
    """A `Linear` whose outputs lie in panels, J of F columns each: for products of few rows.

    Such a product reads every weight once and waits for memory. Rows of a wide kernel lie pages
    apart, where a core sees no stream to fetch ahead; a panel is one.
    """

    def __init__(self, linear: Linear):
        kernel, rank, dtype = linear.kernel[...], linear.rank, linear.precision.compute_dtype
        self.inputs, self.outputs = kernel.shape[:rank], kernel.shape[rank:]
        panels = _marked if isinstance(kernel, parameters.Mark) else _panels
        self.kernel = nnx.Param(panels(kernel, rank, dtype))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])
        self.one = nnx.Param(jnp.asarray(np.ones((), np.float32)))
        self.precision = linear.precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Linear`; the sum is rounded to the compute dtype once, with the bias in it."""
        dtype, kernel_JDF = self.precision.compute_dtype, self.kernel[...]
        batch = x.shape[: x.ndim - len(self.inputs)]
        x_RD = x.astype(dtype).reshape(-1, kernel_JDF.shape[1])
        wide = dict(preferred_element_type=WIDE)
        if len(x_RD) > MANY:
            y_RJF = jnp.einsum("RD,JDF->RJF", x_RD, kernel_JDF, **wide)
        else:
            # XLA would fuse what makes x into the broadcast, and do it once per panel; never so a
            # division, and it cannot know that this one is by one
            x_RD = x_RD / self.one[...] if dtype == jnp.float32 else x_RD
            x_JRD = jnp.broadcast_to(x_RD, (len(kernel_JDF), *x_RD.shape))
            y_RJF = jnp.swapaxes(jnp.einsum("JRD,JDF->JRF", x_JRD, kernel_JDF, **wide), 0, 1)
        y = y_RJF.reshape(*batch, *self.outputs)
        if self.bias is not None:
            bias = self.bias[...].astype(jnp.float32)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _panels(kernel: jax.Array, rank: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return _side_by_side(kernel.astype(dtype), rank)


def _side_by_side(kernel: jax.Array | np.ndarray, rank: int) -> jax.Array | np.ndarray:
    inputs = math.prod(kernel.shape[:rank])
    return kernel.reshape(inputs, -1, PANEL).swapaxes(0, 1)


def _marked(kernel: parameters.Mark, rank: int, dtype: jax.typing.DTypeLike) -> parameters.Mark:
    """Panels of what is not there yet, made as it arrives."""
    inputs, outputs = (math.prod(part) for part in (kernel.shape[:rank], kernel.shape[rank:]))
    form = functools.partial(_side_by_side, rank=rank)
    return kernel.formed(form, (outputs // PANEL, inputs, PANEL), dtype)


def panelled(module: nnx.Module, *, but: tuple[str, ...] = ()) -> None:
    """Take the maps of a module to panels, in place, where its arrays lie whole on a CPU.

    One after the other: at no time is more than one there twice. Not what is traced, nor what has
    no whole panels, nor those called as in `but`, which see many rows: they give wide products.
    """
    for name, part in list(vars(module).items()):
        if isinstance(part, Linear) and name not in but and _suits(part):
            setattr(module, name, Panels(part))
        elif isinstance(part, Linear) and on_cpu(part.kernel[...]):
            part.product = jnp.dtype(WIDE)
        elif isinstance(part, nnx.List):
            for item in part:
                panelled(item, but=but)
        elif isinstance(part, nnx.Module) and not isinstance(part, Linear | Panels):
            panelled(part, but=but)


def widened(module: nnx.Module) -> None:
    """Let the maps of a module sum in float32, in place, where its arrays lie whole on a CPU."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Linear) and on_cpu(part.kernel[...]):
            part.product = jnp.dtype(WIDE)


def on_cpu(array: jax.Array | parameters.Mark) -> bool:
    """Whether an array lies whole on every one of its devices, and they are CPUs; not if traced."""
    if isinstance(array, parameters.Mark):
        return array.on_cpu
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return False
    cpus = all(device.platform == "cpu" for device in array.devices())
    return cpus and array.is_fully_replicated


def _suits(linear: Linear) -> bool:
    kernel = linear.kernel[...]
    if not on_cpu(kernel):  # a shape alone has no place
        return False
    outputs = math.prod(kernel.shape[linear.rank :])
    return outputs % PANEL == 0 and outputs > PANEL
