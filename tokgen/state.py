"""TrainState: parameters, statistics, optimizer, average; and the one place that updates them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from tokgen import ranges, rng, sharding
from tokgen.interfaces import Array, PyTree, Statistic, UserError

# How an average begins: its decay at step s, from 0, until that is `ema`. The first step copies, as
# in open-muse; VAR's trainer counts in pairs of steps and begins at a tenth.
AVERAGES: dict[str, Callable[[Array], Array]] = {
    "muse": lambda step: step / (9.0 + step),
    "var": lambda step: (step / 2.0 + 1) / (step / 2.0 + 10),
}
PATIENCE = 10  # non-finite steps in a row after which a run stops
KERNELS = r"(.*/)?kernel"


@struct.dataclass
class TrainState:
    """Everything of one network that training moves. A GAN is two TrainStates."""

    step: Array
    skipped: Array  # non-finite steps in a row, up to now
    params: PyTree  # nested dictionaries: everything the optimizer moves
    stats: PyTree  # everything else a module owns (codebook counts)
    opt_state: optax.OptState
    ema: PyTree | None  # float32 average of params
    skips: Array | None = None  # non-finite steps of the whole run; None: not counted


def split(module: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """(structure, parameters, statistics); the last two as plain nested dictionaries."""
    graph, params, stats = nnx.split(module, nnx.Param, Statistic)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def merge(graph: nnx.GraphDef, params: PyTree, stats: PyTree) -> nnx.Module:
    """The module again. A copy: inside `grad` it must not share variables with the outer trace."""
    return nnx.merge(graph, params, stats, copy=True)


def statistics(module: nnx.Module) -> PyTree:
    """The statistics that a merged module holds now."""
    return split(module)[2]


def paths(tree: PyTree) -> dict[str, PyTree]:
    """Leaves by path, as `params/encoder/conv_in/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(entry(key) for key in path): leaf for path, leaf in leaves}


def entry(key) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown path entry {key!r}")


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


def average_of(name: str) -> Callable[[Array], Array]:
    """How an average begins, by the name that a config gives as `average`."""
    if name not in AVERAGES:
        raise UserError(f"config.average must be one of {', '.join(AVERAGES)}; found {name!r}")
    return AVERAGES[name]


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
    moments = {"adamw": _adam, "muon": _muon}
    if name not in moments:
        raise UserError(f"optimizer must be one of {sorted(moments)}; found {name!r}")
    try:
        re.compile(decayed)
    except re.error as error:
        raise UserError(
            f"decayed must be a pattern of paths; found {decayed!r}: {error}"
        ) from error
    links = [optax.clip_by_global_norm(clip)] if clip else []
    links.append(moments[name](b1, b2))
    options = dict(warmup=warmup, start=start, decay=decay, final=final, hold=hold)
    options |= dict(drops=drops, restarts=restarts, begin=begin)
    shrink = (lambda step: weight_decay) if weight_decay else None
    if weight_decay_end is not None:
        shrink = half_cosine(weight_decay, weight_decay_end, steps, begin=begin)
    rate = schedule(learning_rate, steps, **options)
    return Optimizer(optax.chain(*links), rate, shrink, decayed)


def matching(tree: PyTree, pattern: str) -> PyTree:
    """Which leaves have a path that the pattern matches whole."""
    compiled = re.compile(pattern)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: compiled.fullmatch("/".join(map(entry, path))) is not None, tree
    )


def _adam(b1: float, b2: float) -> optax.GradientTransformation:
    # float32 moments: bfloat16 second moments stop moving near 1 - b2
    return optax.scale_by_adam(b1=b1, b2=b2, mu_dtype=jnp.float32)


def _muon(b1: float, b2: float) -> optax.GradientTransformation:
    """Orthogonalised momentum for the matrices of the blocks (arXiv:2502.16982), Adam for the rest.

    An orthogonal update is scaled by 0.2 sqrt(larger side): the size of Adam's, so that one
    learning rate serves both.
    """
    chain = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices, mu_dtype=jnp.float32),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(_adam_sized, updates)),
    )
    return optax.partition(
        {"matrix": chain, "other": _adam(b1, b2)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if _in_blocks(path) else "other", params
        ),
    )


def _in_blocks(path) -> bool:
    names = [entry(key) for key in path]
    return "blocks" in names and names[-1] == "kernel"


def _matrices(params: PyTree) -> PyTree:
    """Which axes of a stacked kernel are summed over and which are outputs; Y is a batch axis."""

    def of(path, leaf):
        axes = tuple(range(1, leaf.ndim))
        inputs = 2 if entry(path[-2]) == "out" else 1  # NK -> D, against D -> NK, F
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(of, params)


def _adam_sized(path, update: Array) -> Array:
    inputs = 2 if entry(path[-2]) == "out" else 1
    sides = math.prod(update.shape[1 : 1 + inputs]), math.prod(update.shape[1 + inputs :])
    return update * (0.2 * max(sides) ** 0.5)


def create(
    make: Callable[[], nnx.Module],
    optimizer: Optimizer,
    *,
    mesh: jax.sharding.Mesh,
    strategy: str = "data",
    ema: float = 0.0,
) -> tuple[nnx.GraphDef, TrainState]:
    """(structure, state), born sharded: no device ever holds the whole of a large model."""
    graph = split(nnx.eval_shape(make))[0]

    def init() -> TrainState:
        _, params, stats = split(make())
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            stats=stats,
            # moments are float32 whatever the parameters are: bfloat16 ones stop moving
            opt_state=optimizer.chain.init(_float32(params)),
            ema=_float32(params) if ema else None,
            skips=jnp.zeros((), jnp.int32),
        )

    layout = shardings(jax.eval_shape(init), mesh, strategy)
    return graph, jax.jit(init, out_shardings=layout)()


def from_average(state: TrainState) -> TrainState:
    """The state with its average as its parameters: what was evaluated is built on."""
    if state.ema is None:
        return state
    # a copy: the training step donates both
    return state.replace(params=jax.tree.map(jnp.copy, averaged(state)))


def restarted(
    state: TrainState, optimizer: Optimizer, *, mesh: jax.sharding.Mesh, strategy: str = "data"
) -> TrainState:
    """The state with the moments of a new optimizer, as a stage of training begins."""

    def init(state: TrainState) -> TrainState:
        return state.replace(opt_state=optimizer.chain.init(_float32(state.params)))

    layout = shardings(jax.eval_shape(init, state), mesh, strategy)
    return jax.jit(init, out_shardings=layout)(state)


def shardings(state: PyTree, mesh: jax.sharding.Mesh, strategy: str) -> PyTree:
    """The sharding of every leaf: moments and averages carry the path of their parameter."""

    def of(path, leaf):
        if leaf.ndim == 0:
            return sharding.replicated(mesh)
        return sharding.of_parameter("/".join(map(entry, path)), leaf.shape, strategy, mesh)

    return jax.tree_util.tree_map_with_path(of, state)


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    optimizer: Optimizer,
    *,
    ema: float = 0.0,
    average: str = "muse",
    trained: str = ".*",
    loss: Array | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """(the next state, scalars). A step that is not finite changes nothing but `step` and counts.

    Looked at are `loss`, the gradients, the rate, and what the parameters would move by. Parameters
    whose path does not match `trained` stay as they are, and out of the norm. `ema` is the decay of
    their average, `average` a name of `AVERAGES`: how it begins.
    """
    moving = matching(state.params, trained)
    gradients = jax.tree.map(
        lambda g, moves: g if moves else jnp.zeros_like(g), _float32(gradients), moving
    )
    norm = optax.tree.norm(gradients)
    rate = optimizer.rate(state.step)
    updates, opt_state = optimizer.chain.update(gradients, state.opt_state, _float32(state.params))
    if optimizer.weight_decay is not None:
        updates = _decayed(updates, state, optimizer)
    changes = jax.tree.map(
        lambda u, moves: rate * u if moves else jnp.zeros_like(u), updates, moving
    )
    # of a relu's gradient a NaN is gone, of an Adam whose moments overflowed the gradient is fine
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(changes))
    if loss is not None:
        finite &= jnp.isfinite(loss)
    params = jax.tree.map(
        lambda p, c, moves: (p.astype(jnp.float32) - c).astype(p.dtype) if moves else p,
        state.params,
        changes,
        moving,
    )
    averages = state.ema
    if averages is not None:
        decay = jnp.minimum(ema, average_of(average)(state.step))
        averages = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), averages, _float32(params))
    moved = state.replace(params=params, opt_state=opt_state, ema=averages)
    after = kept(finite, moved, state).replace(
        step=state.step + 1,
        skipped=jnp.where(finite, 0, state.skipped + 1),
        skips=None if state.skips is None else state.skips + jnp.where(finite, 0, 1),
    )
    scalars = {"gradient_norm": norm, "learning_rate": rate, "skipped": after.skipped}
    return after, scalars | ({} if after.skips is None else {"skips": after.skips})


def give_up(figures: Mapping[str, float], step: int) -> None:
    """Stop a run that computes nothing any more; `figures` are scalars of its last step."""
    for name, whose in (("skipped", ""), ("critic_skipped", "critic's ")):
        if figures.get(name, 0) >= PATIENCE:
            raise UserError(
                f"{int(figures[name])} steps in a row up to step {step} were skipped: the {whose}"
                "loss, gradients or update were not finite; lower config.optimizer.learning_rate "
                "in another --workdir, or go back to an earlier checkpoint with --from STEP"
            )


def kept(moved: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where a step moved something, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(moved, n, o), new, old)


def held_back(moved: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new`, or `old` with the numbers of `new`, where another network's step was not finite."""
    return kept(moved, new, old).replace(step=new.step, skipped=new.skipped, skips=new.skips)


def _decayed(updates: PyTree, state: TrainState, optimizer: Optimizer) -> PyTree:
    """The updates with the decay of this step's parameters."""
    shrink = optimizer.weight_decay(state.step)
    return jax.tree.map(
        lambda u, p, matches: u + shrink * p if matches else u,
        updates,
        state.params,
        matching(state.params, optimizer.decayed),
    )


def maintained(
    graph: nnx.GraphDef, state: TrainState, latents_BPC: Array, *, key: Array
) -> TrainState:
    """The state after its quantizer's upkeep: statistics counted, dead codes revived.

    What upkeep overwrites in the parameters it overwrites in their average too, which would
    otherwise hold the dead code for thousands of steps. A skipped step is not counted.
    """
    module = merge(graph, state.params, state.stats)
    key = rng.use(key, rng.MAINTAIN)
    module.quantizer.maintain(jax.lax.stop_gradient(latents_BPC), key=key)
    _, params, stats = split(module)
    moved = state.skipped == 0
    params, stats = kept(moved, params, state.params), kept(moved, stats, state.stats)
    average = state.ema
    if average is not None:
        average = jax.tree.map(
            lambda e, new, old: jnp.where(new == old, e, new.astype(e.dtype)),
            average,
            params,
            state.params,
        )
    return state.replace(params=params, stats=stats, ema=average)


def averaged(state: TrainState) -> PyTree:
    """The parameters to evaluate, sample and pretokenize with: the average when there is one.

    In the dtype of the parameters, as `checkpoint.load` reads it.
    """
    if state.ema is None:
        return state.params
    same = jax.tree.map(lambda e, p: e.dtype == p.dtype, state.ema, state.params)
    if all(jax.tree.leaves(same)):
        return state.ema
    return jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, state.params)


def count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
