"""The operations of a program, counted as it is written, before anything is compiled or run."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.extend import core as extended
from jax.interpreters import partial_eval

# Scopes of a training step whose operations are no model's: what a backward pass computes again
# (jax's name for it), the optimizer's own products, a quantizer's or discriminator's upkeep.
BESIDE = ("rematted_computation", "optimizer", "upkeep")


def of(function: Callable, *shapes) -> float:
    """Operations of the products and convolutions of a function; arrays may be shapes.

    A multiplication and an addition are two. A scan's body counts as often as it runs, and of
    branches the dearest: where a platform has a cheaper form of its own, the plain one. A `while`
    of unknown length counts once.
    """
    return products(jax.make_jaxpr(function)(*shapes).jaxpr)


def of_training(step: jax.stages.Wrapped, *arguments) -> float:
    """Those of a step's model, forwards and backwards, as `of` counts them.

    Without what stands in a scope of `BESIDE`: the same step under another policy of remat has the
    same. `step` is traced, and not again when it is called with the same.
    """
    return products(live(step.trace(*arguments).jaxpr.jaxpr), BESIDE)


def live(jaxpr: extended.Jaxpr) -> extended.Jaxpr:
    """A jaxpr of the same arguments without what nothing reads, which a compiler drops."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def products(jaxpr: extended.Jaxpr, beside: Sequence[str] = ()) -> float:
    """Those of a jaxpr, but for what stands in a scope of `beside`."""
    total = 0.0
    for equation in jaxpr.eqns:
        if beside and not set(beside).isdisjoint(_scopes(equation)):
            continue
        out = equation.outvars[0].aval if equation.outvars else None
        inside = [extended.jaxprs_in_params(equation.params)]
        parts = [products(part, beside) for parts in inside for part in parts]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval
            total += 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += 2 * _multiplied(equation)
        elif equation.primitive.name == "cond":
            total += max(parts)
        else:
            total += sum(parts) * equation.params.get("length", 1)
    return total


def _multiplied(equation) -> float:
    """How many pairs a convolution multiplies: not the zeros that padding or dilation put there."""
    image, kernel, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    told = equation.params
    numbers = told["dimension_numbers"]
    # batch times channels that an output channel sees, times output channels
    total = out[numbers.out_spec[0]] * kernel[numbers.rhs_spec[1]] * kernel[numbers.rhs_spec[0]]
    windows = zip(
        *(told["window_strides"], told["padding"], told["lhs_dilation"], told["rhs_dilation"]),
        strict=True,
    )
    for axis, (stride, (before, _), spread, dilation) in enumerate(windows, 2):
        sizes = (
            shape[spec[axis]] for shape, spec in zip((image, kernel, out), numbers, strict=True)
        )
        total *= _pairs(*sizes, stride, before, spread, dilation)
    return total


@functools.lru_cache(maxsize=1024)
def _pairs(
    size: int, window: int, outputs: int, stride: int, before: int, spread: int, dilation: int
) -> int:
    """Along one axis, pairs of an output and an entry of the window that falls on the image."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window) * dilation - before
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def _scopes(equation) -> list[str]:
    """The names of the scopes in which an equation was traced: `transpose(jvp(upkeep))` is one."""
    return re.findall(r"\w+", str(equation.source_info.name_stack))
