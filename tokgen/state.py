"""TrainState: parameters, statistics, optimizer, average; and the one place that updates them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from tokgen import rng, sharding
from tokgen.interfaces import Array, PyTree, Statistic

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
    decay: str = "cosine",
    final: float = 0.0,
    drops: tuple[float, ...] = (),
    begin: int = 0,
) -> Callable[[Array], Array]:
    """Learning rate of a global step: linear warm-up, then constant or cosine down to `final`.

    At each of `drops`, shares of the steps, it falls to a tenth. `begin` is the global step at
    which the schedule starts.
    """
    if decay not in ("cosine", "constant"):
        raise ValueError(f"decay must be cosine or constant; found {decay!r}")

    def rate(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32) - begin
        fallen = sum(jnp.where(step >= drop * steps, 1.0, 0.0) for drop in drops)
        tenths = 0.1 ** jnp.asarray(fallen, jnp.float32)
        ramp = jnp.clip((step + 1) / max(warmup, 1), 0, 1)
        if decay == "constant":
            return learning_rate * ramp * tenths
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return learning_rate * ramp * tenths * cosine

    return rate


@struct.dataclass
class Optimizer:
    """An optax chain without its learning rate, and the learning rate of a global step.

    The rate is applied outside the chain: it depends on the global step only, also when a step is
    skipped, and the one that is reported is the one that is applied.
    """

    chain: optax.GradientTransformation = struct.field(pytree_node=False)
    rate: Callable[[Array], Array] = struct.field(pytree_node=False)


def optimizer(
    steps: int,
    *,
    learning_rate: float,
    name: str = "adamw",
    warmup: int = 0,
    decay: str = "cosine",
    final: float = 0.0,
    drops: tuple[float, ...] = (),
    begin: int = 0,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.0,
    decayed: str = KERNELS,
    clip: float = 1.0,
) -> Optimizer:
    """Clip, AdamW or Muon, decay of the parameters whose path matches `decayed`.

    By default these are the matrices: no norms, biases, embeddings, codebooks.
    """
    if learning_rate <= 0 or clip < 0 or weight_decay < 0:
        raise ValueError(
            "optimizer needs learning_rate > 0, clip >= 0 (0: off) and weight_decay >= 0; found "
            f"learning_rate={learning_rate}, clip={clip}, weight_decay={weight_decay}"
        )
    moments = {"adamw": _adam, "muon": _muon}
    if name not in moments:
        raise ValueError(f"optimizer must be one of {sorted(moments)}; found {name!r}")
    try:
        re.compile(decayed)
    except re.error as error:
        raise ValueError(
            f"decayed must be a pattern of paths; found {decayed!r}: {error}"
        ) from error
    links = [optax.clip_by_global_norm(clip)] if clip else []
    links.append(moments[name](b1, b2))
    if weight_decay:
        links.append(
            optax.add_decayed_weights(weight_decay, mask=lambda params: matching(params, decayed))
        )
    options = dict(warmup=warmup, decay=decay, final=final, drops=drops, begin=begin)
    return Optimizer(optax.chain(*links), schedule(learning_rate, steps, **options))


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
            opt_state=optimizer.chain.init(params),
            ema=_float32(params) if ema else None,
        )

    layout = shardings(jax.eval_shape(init), mesh, strategy)
    return graph, jax.jit(init, out_shardings=layout)()


def from_average(state: TrainState) -> TrainState:
    """The state with its average as its parameters: what was evaluated is built on."""
    if state.ema is None:
        return state
    params = jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, state.params)
    # a copy: the training step donates both
    return state.replace(params=jax.tree.map(jnp.copy, params))


def restarted(
    state: TrainState, optimizer: Optimizer, *, mesh: jax.sharding.Mesh, strategy: str = "data"
) -> TrainState:
    """The state with the moments of a new optimizer, as a stage of training begins."""

    def init(state: TrainState) -> TrainState:
        return state.replace(opt_state=optimizer.chain.init(state.params))

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
    trained: str = ".*",
) -> tuple[TrainState, dict[str, Array]]:
    """(the next state, scalars). A step whose gradient is not finite changes nothing but `step`.

    Parameters whose path does not match `trained` stay as they are, and out of the norm.
    """
    moving = matching(state.params, trained)
    gradients = jax.tree.map(
        lambda g, moves: g if moves else jnp.zeros_like(g), _float32(gradients), moving
    )
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    rate = optimizer.rate(state.step)
    updates, opt_state = optimizer.chain.update(gradients, state.opt_state, state.params)
    params = jax.tree.map(
        lambda p, u, moves: (p.astype(jnp.float32) - rate * u).astype(p.dtype) if moves else p,
        state.params,
        updates,
        moving,
    )
    average = state.ema
    if average is not None:
        # warm-up as in open-muse: the first step copies
        decay = jnp.minimum(ema, state.step / (9.0 + state.step))
        average = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), average, _float32(params))

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    state = state.replace(
        step=state.step + 1,
        skipped=jnp.where(finite, 0, state.skipped + 1),
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        ema=None if average is None else keep(average, state.ema),
    )
    return state, {"gradient_norm": norm, "learning_rate": rate, "skipped": state.skipped}


def maintained(
    graph: nnx.GraphDef, state: TrainState, latents_BPC: Array, *, key: Array
) -> TrainState:
    """The state after its quantizer's upkeep: statistics counted, dead codes revived.

    What upkeep overwrites in the parameters it overwrites in their average too, which would
    otherwise hold the dead code for thousands of steps. A skipped step is not counted.
    """
    module = merge(graph, state.params, state.stats)
    key = jax.random.fold_in(key, rng.MAINTAIN)
    module.quantizer.maintain(jax.lax.stop_gradient(latents_BPC), key=key)
    _, params, stats = split(module)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(state.skipped == 0, n, o), new, old)

    params, stats = keep(params, state.params), keep(stats, state.stats)
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
    """The parameters to evaluate, sample and pretokenize with: the average when there is one."""
    return state.params if state.ema is None else state.ema


def count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
