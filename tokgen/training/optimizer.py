"""Optimizers and their schedules: clip, AdamW or Muon, learning rate and weight decay by step."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tokgen import choices, parameters, ranges, sharding
from tokgen.interfaces import Array, PyTree, UserError

KERNELS = r"(.*/)?kernel"


def schedule(
    learning_rate: float,
    steps: int,
    *,
    warmup: int = 0,
    start: float | None = None,
    decay: str = "cosine",
    final: float = 0.0,
    hold: float = 0.0,
    drops: tuple[float, ...] = (),
    restarts: tuple[float, ...] = (),
    begin: int = 0,
) -> Callable[[Array], Array]:
    """Learning rate of a global step, which counts from 0: linear warm-up, then `decay`.

    The ramp counts from 1: step s of the warm-up has (s + 1) / warmup of the rate, so that the
    first step moves something. With `start` the ramp counts from 0: `start` at step 0, in a line
    to 1 at step `warmup` (RAR, TiTok, MaskBit: 0; VAR, Open-MAGVIT2: 0.005).

    Then, with p from 0 to 1 over the steps after the warm-up:
    "cosine": half a cosine from 1 to `final`, which would be reached at step `steps` (RAR);
    "linear": 1 up to p = `hold`, then in a line to `final` at the last step, `steps` - 1 (VAR's
    lin0 with hold = 0.05; a stage of NPP, 0.8); "constant": 1.

    At each of `drops`, shares of the steps, it falls to a tenth; at each of `restarts` it begins
    anew, warm-up included, and ends at the next one. `begin` is the global step at which the
    schedule starts.
    """
    _check_schedule(decay, start, hold, restarts)
    bounds = (0, *(round(share * steps) for share in restarts), steps)
    inclusive = 1 if decay == "linear" else 0  # of the last step: as published
    spans = [
        (first, max(last - first - warmup - inclusive, 1))
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32) - begin
        fallen = sum(jnp.where(step >= drop * steps, 1.0, 0.0) for drop in drops)
        tenths = 0.1 ** jnp.asarray(fallen, jnp.float32)
        first, length = spans[0]
        for later, its_length in spans[1:]:
            first = jnp.where(step >= later, later, first)
            length = jnp.where(step >= later, its_length, length)
        step = step - first
        ramp = jnp.clip((step + 1) / max(warmup, 1), 0, 1)
        if start is not None and warmup:
            ramp = jnp.clip(start + (1 - start) * step / warmup, 0, 1)
        if decay == "constant":
            return learning_rate * ramp * tenths
        progress = jnp.clip((step - warmup) / length, 0, 1)
        if decay == "linear":
            factor = final + (1 - final) * jnp.minimum((1 - progress) / (1 - hold), 1)
        else:
            factor = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return learning_rate * ramp * tenths * factor

    return rate


def _check_schedule(
    decay: str, start: float | None, hold: float, restarts: tuple[float, ...]
) -> None:
    if decay not in ("cosine", "linear", "constant"):
        raise UserError(f"decay must be cosine, linear or constant; found {decay!r}")
    if not 0 <= (start or 0) <= 1 or not 0 <= hold < 1 or (hold and decay != "linear"):
        raise UserError(
            "start must lie in [0, 1], hold in [0, 1), above 0 with decay='linear' only; found "
            f"start={start}, hold={hold}, decay={decay!r}"
        )
    shares = (0, *restarts, 1)
    if any(a >= b for a, b in zip(shares[:-1], shares[1:], strict=True)):
        raise UserError(
            f"restarts must be shares of the steps between 0 and 1, rising; found {restarts}"
        )


def half_cosine(
    first: float, last: float, steps: int, *, begin: int = 0
) -> Callable[[Array], Array]:
    """A number of a global step: half a cosine from `first` at step 0 to `last` at the last one.

    VAR's weight decay (arXiv:2404.02905, its code), warm-up or not.
    """

    def value(step: Array) -> Array:
        progress = (jnp.asarray(step, jnp.float32) - begin) / max(steps - 1, 1)
        turn = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return last + (first - last) * turn

    return value


def once(moved: Callable, given: tuple, made: tuple, finite: Array) -> PyTree:
    """What `moved` gives with what was `made` to be looked at, or the old state."""
    _, state = given
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), moved(*given, made), state)


def again(moved: Callable, given: tuple, made: tuple, finite: Array) -> PyTree:
    """As `once`; on a CPU `moved` computes afresh, each number where the old one lies.

    For what is cheap. Changes and moments that wait until all are known to be finite lie beside the
    old ones, of all parameters at once: three times their memory. The compiler of TPUs takes a
    state through a condition by copies, which is more than that.
    """

    def afresh(given: tuple, made: tuple, finite: Array) -> PyTree:
        return jax.lax.cond(finite, moved, lambda gradients, state: state, *given)

    waited = functools.partial(once, moved)
    return jax.lax.platform_dependent(given, made, finite, cpu=afresh, default=waited)


@struct.dataclass
class Optimizer:
    """An optax chain without learning rate and weight decay, and these two of a global step.

    Both are applied outside the chain: they depend on the global step only, also when a step is
    skipped, and the rate that is reported is the one that is applied.
    """

    chain: optax.GradientTransformation = struct.field(pytree_node=False)
    rate: Callable[[Array], Array] = struct.field(pytree_node=False)
    # of the parameters whose path matches `decayed`; None is no decay
    weight_decay: Callable[[Array], Array | float] | None = struct.field(
        pytree_node=False, default=None
    )
    decayed: str = struct.field(pytree_node=False, default=KERNELS)
    # how a state comes by its changes once they are known to be finite: `once` or `again`
    after: Callable[..., PyTree] = struct.field(pytree_node=False, default=once)


@ranges.checked
def optimizer(
    steps: int,
    *,
    learning_rate: ranges.Positive,
    name: str = "adamw",
    warmup: ranges.Whole = 0,
    start: ranges.Share | None = None,
    decay: str = "cosine",
    final: ranges.Share = 0.0,
    hold: ranges.Rate = 0.0,
    drops: tuple[ranges.Share, ...] = (),
    restarts: tuple[ranges.Fraction, ...] = (),
    begin: int = 0,
    b1: ranges.Rate = 0.9,
    b2: ranges.Rate = 0.95,
    weight_decay: ranges.Amount = 0.0,
    weight_decay_end: ranges.Amount | None = None,
    decayed: str = KERNELS,
    clip: ranges.Amount = 1.0,
) -> Optimizer:
    """Clip, AdamW or Muon, decay of the parameters whose path matches `decayed`.

    By default these are the matrices: no norms, biases, embeddings, codebooks. With
    `weight_decay_end` the decay goes there in half a cosine over all steps.
    """
    known = {"adamw": (_adam, again), "muon": (_muon, once)}
    moments, after = choices.named(known, name, "optimizer")
    try:
        re.compile(decayed)
    except re.error as error:
        raise UserError(
            f"decayed must be a pattern of paths; found {decayed!r}: {error}"
        ) from error
    links = [optax.clip_by_global_norm(clip)] if clip else []
    links.append(moments(b1, b2))
    options = dict(warmup=warmup, start=start, decay=decay, final=final, hold=hold)
    options |= dict(drops=drops, restarts=restarts, begin=begin)
    shrink = (lambda step: weight_decay) if weight_decay else None
    if weight_decay_end is not None:
        shrink = half_cosine(weight_decay, weight_decay_end, steps, begin=begin)
    rate = schedule(learning_rate, steps, **options)
    return Optimizer(optax.chain(*links), rate, shrink, decayed, after)


def _adam(b1: float, b2: float) -> optax.GradientTransformation:
    # float32 moments: bfloat16 second moments stop moving near 1 - b2
    return optax.scale_by_adam(b1=b1, b2=b2, mu_dtype=jnp.float32)


def _muon(b1: float, b2: float) -> optax.GradientTransformation:
    """Orthogonalised momentum for the matrices of the blocks (arXiv:2502.16982), Adam for the rest.

    An orthogonal update is scaled by 0.2 sqrt(larger side): the size of Adam's, so that one
    learning rate serves both.
    """
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices, mu_dtype=jnp.float32)
    chain = optax.chain(
        optax.GradientTransformation(muon.init, functools.partial(_by_layers, muon.update)),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(_adam_sized, updates)),
    )
    return optax.partition(
        {"matrix": chain, "other": _adam(b1, b2)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if _in_blocks(path) else "other", params
        ),
    )


def _by_layers(
    update: Callable, gradients: PyTree, state: optax.OptState, params: PyTree | None = None
) -> tuple[PyTree, optax.OptState]:
    """Muon's update, the layers shared by the devices: each makes whole matrices orthogonal.

    Where matrices are split, every device would gather all of them and do all of the work.
    """
    gradients, momentum = jax.tree.map(sharding.by_layers, (gradients, state.mu))
    updates, state = update(gradients, state._replace(mu=momentum), params)
    updates, momentum = jax.tree.map(sharding.from_layers, (updates, state.mu))
    return updates, state._replace(mu=momentum)


def _in_blocks(path) -> bool:
    names = [parameters.entry(key) for key in path]
    return "blocks" in names and names[-1] == "kernel"


def _matrices(params: PyTree) -> PyTree:
    """Which axes of a stacked kernel are summed over and which are outputs; Y is a batch axis."""

    def of(path, leaf):
        axes = tuple(range(1, leaf.ndim))
        inputs = 2 if parameters.entry(path[-2]) == "out" else 1  # NK -> D, against D -> NK, F
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(of, params)


def _adam_sized(path, update: Array) -> Array:
    inputs = 2 if parameters.entry(path[-2]) == "out" else 1
    sides = math.prod(update.shape[1 : 1 + inputs]), math.prod(update.shape[1 + inputs :])
    return update * (0.2 * max(sides) ** 0.5)
