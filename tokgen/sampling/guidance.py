"""Classifier-free guidance (arXiv:2207.12598): the merge, and schedules of its weight.

One convention throughout, `uncond + w (cond - uncond)`: w = 1 is no guidance, w = 0 the
unconditional model. A schedule is a function that returns one weight per decoding step.
Published settings in another convention are converted where they are imported:

    c + s (c - u)           w = 1 + s           TiTok constant and linear, MaskGen, MaskBit, MAGE
    (1 + t) c - t u         w = 1 + t           VAR; `per_scale` takes VAR's own number
    MaskGen                 w = 1 + s           for s in cosine(published weight, steps)
    MaskBit                 power_cosine(1 + published scale, steps, power)
    MAGE                    linear(w, steps)[1:] + (w,)  with w = 1 + published scale
"""

from __future__ import annotations

import inspect
import math
import numbers

import jax.numpy as jnp

from tokgen import choices, interfaces


def merge(
    cond_BlGV: interfaces.Array, uncond_BlGV: interfaces.Array, weight: interfaces.Array | float
) -> interfaces.Array:
    """Guided logits_BlGV in float32: uncond + weight (cond - uncond).

    One weight for all of them, or one per symbol as [1, 1, G, 1].
    Weight 1 gives cond bit for bit. A symbol that is -inf in both, beyond a smaller alphabet,
    stays -inf; one that is -inf in one of them only comes out as it may, and is not hidden.
    """
    cond_BlGV, uncond_BlGV = cond_BlGV.astype(jnp.float32), uncond_BlGV.astype(jnp.float32)
    padding_BlGV = jnp.isneginf(cond_BlGV) & jnp.isneginf(uncond_BlGV)
    guided_BlGV = uncond_BlGV + weight * (cond_BlGV - uncond_BlGV)
    # u + (c - u) is not c in floating point, and inf - inf is no number
    return jnp.where(padding_BlGV | (weight == 1), cond_BlGV, guided_BlGV)


def schedule(name: str, weight: float, steps: int, **settings) -> tuple[float, ...]:
    """Weights of the schedule that a config names; `settings` are what it takes beyond the two."""
    function = choices.named(SCHEDULES, name, "guidance")
    signature = inspect.signature(function)
    try:
        signature.bind(weight, steps, **settings)
    except TypeError as error:
        raise interfaces.UserError(
            f"guidance schedule {name} takes {', '.join(signature.parameters)}; found "
            f"{', '.join(['weight', 'steps', *settings])}: {error}"
        ) from None
    return function(weight, steps, **settings)


def constant(weight: float, steps: int) -> tuple[float, ...]:
    """The same weight at every step (LlamaGen, arXiv:2406.06525)."""
    _check(weight, steps)
    return (float(weight),) * steps


def linear(weight: float, steps: int) -> tuple[float, ...]:
    """w_i = 1 + (weight - 1) i / n: the first step is unguided (TiTok, arXiv:2406.07550)."""
    _check(weight, steps)
    return tuple(1 + (weight - 1) * i / steps for i in range(steps))


def cosine(weight: float, steps: int) -> tuple[float, ...]:
    """w_i = 1 + (weight - 1) (1 - cos(pi (i + 1) / n)) / 2: the last step has the full weight.

    The ratio (i + 1) / n is MaskGen's (arXiv:2501.07730); `power_cosine` starts from i / n.
    """
    _check(weight, steps)
    return tuple(_ramp(weight, (i + 1) / steps) for i in range(steps))


def power_cosine(weight: float, steps: int, power: float = 1.0) -> tuple[float, ...]:
    """w_i = 1 + (weight - 1) (1 - cos(pi (i / n)^power)) / 2 (RAR, arXiv:2411.00776; TiTok)."""
    _check(weight, steps)
    if not _is_number(power) or power <= 0:
        raise interfaces.UserError(
            f"power_cosine needs a positive power; found {power!r}; try 1.0, a plain cosine"
        )
    return tuple(_ramp(weight, (i / steps) ** power) for i in range(steps))


def per_scale(weight: float, steps: int) -> tuple[float, ...]:
    """w_k = 1 + weight k / (K - 1) over the K = `steps` scales of a pyramid (VAR, 2404.02905).

    `weight` is VAR's own number t of (1 + t) cond - t uncond: the last scale has 1 + weight.
    """
    _check(weight, steps)
    if steps < 2:
        raise interfaces.UserError(
            "per_scale needs at least 2 scales to rise over; found 1; use constant instead"
        )
    return tuple(1 + weight * k / (steps - 1) for k in range(steps))


def interval(weight: float, steps: int, first: int, last: int) -> tuple[float, ...]:
    """`weight` from step `first` to step `last`, both included, and 1 elsewhere (2404.07724)."""
    _check(weight, steps)
    if not (_is_count(first) and _is_count(last) and 0 <= first <= last < steps):
        raise interfaces.UserError(
            f"interval needs integers 0 <= first <= last < {steps}, the number of steps; "
            f"found first={first!r}, last={last!r}"
        )
    return tuple(float(weight) if first <= i <= last else 1.0 for i in range(steps))


SCHEDULES = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "power_cosine": power_cosine,
    "per_scale": per_scale,
    "interval": interval,
}


def _ramp(weight: float, ratio: float) -> float:
    return 1 + (weight - 1) * (1 - math.cos(math.pi * ratio)) / 2


def _check(weight: float, steps: int) -> None:
    if not _is_number(weight):
        raise interfaces.UserError(
            f"a guidance weight must be a finite number; found {weight!r}; 1.0 is no guidance"
        )
    if not _is_count(steps) or steps < 1:
        raise interfaces.UserError(
            f"a guidance schedule needs a whole number of steps, at least 1; found {steps!r}"
        )


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
