"""TrainState: parameters, statistics, optimizer, average; and the one place that updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from tokgen import choices, parameters, rng, sharding
from tokgen.interfaces import Array, PyTree, UserError
from tokgen.training import optimizer as optimizers

# How an average begins: its decay at step s, from 0, until that is `ema`. The first step copies, as
# in open-muse; VAR's trainer counts in pairs of steps and begins at a tenth.
AVERAGES: dict[str, Callable[[Array], Array]] = {
    "muse": lambda step: step / (9.0 + step),
    "var": lambda step: (step / 2.0 + 1) / (step / 2.0 + 10),
}
PATIENCE = 10  # non-finite steps in a row after which a run stops


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


def average_of(name: str) -> Callable[[Array], Array]:
    """How an average begins, by the name that a config gives as `average`."""
    return choices.named(AVERAGES, name, "config.average")


def create(
    make: Callable[[], nnx.Module],
    optimizer: optimizers.Optimizer,
    *,
    mesh: jax.sharding.Mesh,
    strategy: str = "data",
    ema: float = 0.0,
) -> tuple[nnx.GraphDef, TrainState]:
    """(structure, state), born sharded: no device ever holds the whole of a large model."""
    graph = parameters.split(nnx.eval_shape(make))[0]

    def init() -> TrainState:
        _, params, stats = parameters.split(make())
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
    state: TrainState,
    optimizer: optimizers.Optimizer,
    *,
    mesh: jax.sharding.Mesh,
    strategy: str = "data",
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
        return sharding.of_parameter(
            "/".join(map(parameters.entry, path)), leaf.shape, strategy, mesh
        )

    return jax.tree_util.tree_map_with_path(of, state)


def laid(state: PyTree, strategy: str) -> PyTree:
    """A step's state as `shardings` has it: the compiler would leave it as the step computed it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    specs = jax.tree.map(lambda placed: placed.spec, shardings(state, mesh, strategy))
    return jax.lax.with_sharding_constraint(state, specs)


def learner(graph: nnx.GraphDef, state: TrainState, params: PyTree) -> nnx.Module:
    """The module of a step's loss, of the parameters by which it is differentiated."""

    def read(path, leaf):
        return sharding.looked_up("/".join(map(parameters.entry, path)), leaf)

    params = jax.tree_util.tree_map_with_path(read, params)
    return parameters.merge(graph, params, state.stats)


@jax.named_scope("optimizer")
def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    optimizer: optimizers.Optimizer,
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
    moving = parameters.matching(state.params, trained)
    gradients = jax.tree.map(
        lambda g, moves: g if moves else jnp.zeros_like(g), _float32(gradients), moving
    )
    norm = optax.tree.norm(gradients)
    rate = optimizer.rate(state.step)

    def change(gradients: PyTree, state: TrainState) -> tuple[PyTree, optax.OptState]:
        float32 = _float32(state.params)
        updates, opt_state = optimizer.chain.update(gradients, state.opt_state, float32)
        if optimizer.weight_decay is not None:
            updates = _decayed(updates, state, optimizer)
        return jax.tree.map(
            lambda u, moves: rate * u if moves else jnp.zeros_like(u), updates, moving
        ), opt_state

    changes, opt_state = change(gradients, state)
    # of a relu's gradient a NaN is gone, of an Adam whose moments overflowed the gradient is fine
    finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(changes))
    if loss is not None:
        finite &= jnp.isfinite(loss)

    def moved(gradients: PyTree, state: TrainState, made: tuple | None = None) -> TrainState:
        changes, opt_state = change(gradients, state) if made is None else made
        params = jax.tree.map(
            lambda p, c, moves: (p.astype(jnp.float32) - c).astype(p.dtype) if moves else p,
            state.params,
            changes,
            moving,
        )
        averages = state.ema
        if averages is not None:
            decay = jnp.minimum(ema, average_of(average)(state.step))
            averages = jax.tree.map(
                lambda e, p: e + (1 - decay) * (p - e), averages, _float32(params)
            )
        return state.replace(params=params, opt_state=opt_state, ema=averages)

    after = optimizer.after(moved, (gradients, state), (changes, opt_state), finite).replace(
        step=state.step + 1,
        skipped=jnp.where(finite, 0, state.skipped + 1),
        skips=None if state.skips is None else state.skips + jnp.where(finite, 0, 1),
    )
    scalars = {"gradient_norm": norm, "learning_rate": rate, "skipped": after.skipped}
    return after, scalars | ({} if after.skips is None else {"skips": after.skips})


def give_up(figures: Mapping[str, float], step: int) -> None:
    """Stop a run that computes nothing any more; `figures` are scalars of its last step."""
    for name, whose in (("skipped", ""), ("discriminator_skipped", "discriminator's ")):
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


def _decayed(updates: PyTree, state: TrainState, optimizer: optimizers.Optimizer) -> PyTree:
    """The updates with the decay of this step's parameters."""
    shrink = optimizer.weight_decay(state.step)
    return jax.tree.map(
        lambda u, p, matches: u + shrink * p if matches else u,
        updates,
        state.params,
        parameters.matching(state.params, optimizer.decayed),
    )


@jax.named_scope("upkeep")
def maintained(
    graph: nnx.GraphDef, state: TrainState, latents_BPC: Array, *, key: Array
) -> TrainState:
    """The state after its quantizer's upkeep: statistics counted, dead codes revived.

    What upkeep overwrites in the parameters it overwrites in their average too, which would
    otherwise hold the dead code for thousands of steps. A skipped step is not counted.
    """
    module = parameters.merge(graph, state.params, state.stats)
    key = rng.use(key, rng.MAINTAIN)
    module.quantizer.maintain(jax.lax.stop_gradient(latents_BPC), key=key)
    _, params, stats = parameters.split(module)
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

    In the dtype of the parameters, as `loading.load` reads it.
    """
    if state.ema is None:
        return state.params
    same = jax.tree.map(lambda e, p: e.dtype == p.dtype, state.ema, state.params)
    if all(jax.tree.leaves(same)):
        return state.ema
    return jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, state.params)


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
