"""The operations of a program, counted as it is written, before anything is compiled or run."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.extend import core as extended


def of(function: Callable, *shapes) -> float:
    """Operations of the products and convolutions of a function; arrays may be shapes.

    A multiplication and an addition are two. A scan's body counts as often as it runs, and of
    branches the dearest: where a platform has a cheaper form of its own, the plain one. A `while`
    of unknown length counts once.
    """
    return _products(jax.make_jaxpr(function)(*shapes).jaxpr)


def _products(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval if equation.outvars else None
        inside = [extended.jaxprs_in_params(equation.params)]
        parts = [_products(part) for parts in inside for part in parts]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval
            total += 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
            total += 2 * out.size * kernel.size / kernel.shape[numbers.rhs_spec[0]]
        elif equation.primitive.name == "cond":
            total += max(parts)
        else:
            total += sum(parts) * equation.params.get("length", 1)
    return total
