"""TrainState: what one optimizer step does to parameters, average, statistics and sharding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, sharding
from tokgen import state as states
from tokgen.generators import autoregressive
from tokgen.nn import precision
from tokgen.quantizers import vq

LAYOUT = interfaces.TokenLayout((64,), ((4, 4),))


class Net(nnx.Module):
    """One parameter of every kind that the table tells apart, and a quantizer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_in = nnx.Dict(
            kernel=nnx.Param(jax.random.normal(rngs.params(), (3, 3, 4, 8))),
            bias=nnx.Param(jnp.ones(8)),
        )
        self.norm = nnx.Dict(scale=nnx.Param(jnp.ones(8)))
        self.labels = nnx.Dict(table=nnx.Param(jnp.ones((5, 8))))
        self.quantizer = vq.Quantizer(12, 3, grid=(4, 4), normalize=False, rngs=rngs)


def make():
    return Net(nnx.Rngs(0))


def created(*, ema=0.0, steps=100, learning_rate=0.1, **options):
    options = dict(clip=0.0, decay="constant") | options
    optimizer = states.optimizer(steps, learning_rate=learning_rate, **options)
    graph, state = states.create(make, optimizer, mesh=sharding.make_mesh(), ema=ema)
    return graph, state, optimizer


def applied(optimizer, ema=0.0):
    return jax.jit(functools.partial(states.apply_gradients, optimizer=optimizer, ema=ema))


def gradients_of(state, key, scale=1.0):
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(key, len(leaves))
    drawn = [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- the learning rate


def test_schedule_end_points():
    rate = states.schedule(0.4, 100, warmup=10, final=0.25)
    found = np.array([float(rate(step)) for step in range(101)])
    np.testing.assert_allclose(found[:10], 0.4 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(found[[10, 55, 100]], [0.4, 0.4 * (0.25 + 0.75 / 2), 0.1], rtol=1e-5)
    quarter = 0.4 * (0.25 + 0.75 * (1 + math.cos(math.pi / 2 * 0.5)) / 2)
    np.testing.assert_allclose(rate(10 + 22.5), quarter, rtol=1e-5)
    assert (np.diff(found[10:]) < 0).all()
    np.testing.assert_allclose(rate(1000), 0.1, rtol=1e-5)  # a run that goes on stays there
    constant = states.schedule(0.4, 100, warmup=4, decay="constant")
    np.testing.assert_allclose([constant(s) for s in (0, 3, 99)], [0.1, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(states.schedule(0.4, 10)(0), 0.4, rtol=1e-6)  # without warm-up
    with pytest.raises(ValueError, match="cosine"):
        states.schedule(0.1, 10, decay="linear")


def test_the_rate_applied_is_the_one_reported(key):
    """A constant gradient: each of Adam's steps is the rate times its sign."""
    _, state, optimizer = created(decay="cosine", warmup=3, steps=6, b1=0.9, b2=0.95)
    gradients = gradients_of(state, key)
    step = applied(optimizer)
    for number in range(6):
        before = state.params
        state, scalars = step(state, gradients)
        expected = states.schedule(0.1, 6, warmup=3)(number)
        np.testing.assert_allclose(scalars["learning_rate"], expected, rtol=1e-6)
        jax.tree.map(
            lambda new, old, g, rate=expected: np.testing.assert_allclose(
                old - new, rate * np.sign(g), rtol=2e-3, atol=1e-5
            ),
            state.params,
            before,
            gradients,
        )
        assert state.step == number + 1 and scalars["skipped"] == 0


def test_the_norm_is_reported_before_it_is_clipped(key):
    _, state, optimizer = created(clip=0.5, b1=0.0, b2=0.0)
    gradients = gradients_of(state, key, scale=3.0)
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    norm = math.sqrt(sum((g**2).sum() for g in leaves))
    after, scalars = applied(optimizer)(state, gradients)
    np.testing.assert_allclose(scalars["gradient_norm"], norm, rtol=1e-5)
    # the moments are those of the clipped gradient
    moments = states.paths(after.opt_state)
    (first,) = [leaf for path, leaf in moments.items() if path.endswith("mu/conv_in/bias")]
    np.testing.assert_allclose(
        first, gradients["conv_in"]["bias"] * 0.5 / norm, rtol=1e-4, atol=1e-7
    )


# ---------------------------------------------------------------- steps that cannot be taken


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison, key):
    _, state, optimizer = created(ema=0.9, clip=1.0, weight_decay=0.1)
    step = applied(optimizer, ema=0.9)
    gradients = gradients_of(state, key)
    state, _ = step(state, gradients)
    broken = jax.tree.map(lambda g: g, gradients)
    broken["norm"]["scale"] = broken["norm"]["scale"].at[3].set(poison)
    after = state
    for times in (1, 2):
        after, scalars = step(after, broken)
        assert scalars["skipped"] == after.skipped == times
    assert after.step == state.step + 2
    equal(after.replace(step=0, skipped=0), state.replace(step=0, skipped=0))
    after, _ = step(after, gradients)  # and the run goes on, with the rate of its global step
    assert after.skipped == 0 and after.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert np.abs(after.params["conv_in"]["bias"] - state.params["conv_in"]["bias"]).min() > 0


# ---------------------------------------------------------------- average, decay, Muon


def test_the_average_follows_its_formula(key):
    """min(decay, (1 + s) / (10 + s)), written out in float64."""
    _, state, optimizer = created(ema=0.3)
    step = applied(optimizer, ema=0.3)
    average = np.asarray(state.params["conv_in"]["kernel"], np.float64)
    np.testing.assert_array_equal(state.ema["conv_in"]["kernel"], average)
    for number in range(5):
        state, _ = step(state, gradients_of(state, jax.random.fold_in(key, number)))
        decay = min(0.3, (1 + number) / (10 + number))
        kernel = np.asarray(state.params["conv_in"]["kernel"], np.float64)
        average = decay * average + (1 - decay) * kernel
        np.testing.assert_allclose(state.ema["conv_in"]["kernel"], average, rtol=1e-4, atol=1e-6)
    assert (1 + 3) / (10 + 3) > 0.3 > (1 + 2) / (10 + 2)  # both sides of the minimum were taken
    assert states.averaged(state) is state.ema
    assert states.averaged(state.replace(ema=None)) is state.params


def test_weight_decay_is_for_kernels_only():
    _, state, optimizer = created(weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    after, _ = applied(optimizer)(state, zeros)
    old, new = states.paths(state.params), states.paths(after.params)
    assert set(old) == {
        *("conv_in/kernel", "conv_in/bias", "norm/scale", "labels/table", "quantizer/codebook")
    }
    for path in old:
        factor = 1 - 0.1 * 0.5 if path.endswith("/kernel") else 1
        np.testing.assert_allclose(new[path], factor * old[path], rtol=1e-6, err_msg=path)


def generator(rngs_seed=0):
    return autoregressive.Generator(
        LAYOUT, 4, width=32, depth=2, heads=4, parts="llama_narrow",
        precision=precision.FLOAT32, rngs=nnx.Rngs(rngs_seed),
    )  # fmt: skip


def test_muon_turns_the_matrices_of_the_blocks(key):
    """Every layer's update has singular values near 0.2 sqrt(larger side); Adam does the rest."""
    rate = 0.01
    optimizer = states.optimizer(10, learning_rate=rate, name="muon", decay="constant", clip=0.0)
    graph, state = states.create(generator, optimizer, mesh=sharding.make_mesh())
    gradients = gradients_of(state, key)
    after, _ = applied(optimizer)(state, gradients)
    moves = jax.tree.map(lambda new, old: (old - new) / rate, after.params, state.params)
    seen = set()
    for path, move in states.paths(moves).items():
        if "/blocks/" in path and path.endswith("/kernel"):
            for layer in np.asarray(move, np.float64):
                if path.endswith("out/kernel"):  # [N, K, D]: heads are summed over
                    matrix = layer.reshape(-1, layer.shape[-1])
                else:  # [D, N, K] and [D, F]: one input
                    matrix = layer.reshape(layer.shape[0], -1)
                values = np.linalg.svd(matrix, compute_uv=False)
                values /= 0.2 * math.sqrt(max(matrix.shape))
                assert 0.5 < values.min() and values.max() < 1.3, path
                # the size of Adam's step, which is about 0.2 per entry
                assert 0.1 < math.sqrt((matrix**2).mean()) < 0.3, path
            seen.add(path.split("/blocks/")[1])
        else:
            sign = np.sign(states.paths(gradients)[path])
            np.testing.assert_allclose(move, sign, rtol=2e-2, atol=1e-3, err_msg=path)
    assert {"attention/query/kernel", "attention/out/kernel", "mlp/down/kernel"} <= seen


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(learning_rate=0.0), "learning_rate > 0"),
        (dict(learning_rate=1.0, clip=-1.0), "clip"),
        (dict(learning_rate=1.0, name="adamm"), "adamw"),
    ],
)
def test_wrong_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        states.optimizer(10, **options)


# ---------------------------------------------------------------- statistics


def test_upkeep_moves_statistics_and_overwrites_the_average_where_it_revived(key):
    graph, state, optimizer = created(ema=0.99)
    upkeep = jax.jit(functools.partial(states.maintained, graph))
    latents_BPC = 4 + jax.random.normal(key, (8, 16, 3))
    after = upkeep(state, latents_BPC, key=key)
    rows = after.params["quantizer"]["codebook"]  # all revived: the first upkeep
    among = (rows[:, None] == latents_BPC.reshape(1, -1, 3)).all(-1).any(-1)
    assert np.asarray(among).all()
    equal(after.ema["quantizer"]["codebook"], rows)
    np.testing.assert_allclose(after.stats["quantizer"]["counts"], 1 / 12)
    for name in ("conv_in", "norm", "labels"):
        equal((after.params[name], after.ema[name]), (state.params[name], state.ema[name]))
    equal((after.step, after.opt_state), (state.step, state.opt_state))
    # a row that lives keeps its own average: here all but row 5
    later, _ = applied(optimizer, ema=0.99)(after, gradients_of(after, key))
    counts = later.stats["quantizer"]["counts"].at[5].set(0.0)
    rows = later.params["quantizer"]["codebook"].at[5].set(-1e3)
    later.stats["quantizer"]["counts"] = counts
    later.params["quantizer"]["codebook"] = rows
    last = upkeep(later, latents_BPC, key=jax.random.fold_in(key, 1))
    others = np.arange(12) != 5
    new, old = (np.asarray(s.ema["quantizer"]["codebook"]) for s in (last, later))
    np.testing.assert_array_equal(new[others], old[others])
    assert (old[others] != np.asarray(rows)[others]).all()
    np.testing.assert_array_equal(new[5], last.params["quantizer"]["codebook"][5])
    assert new[5].min() > 0  # a latent of the batch


def test_upkeep_of_a_skipped_step_does_nothing(key):
    graph, state, _ = created(ema=0.99)
    state = state.replace(skipped=jnp.ones((), jnp.int32))
    after = jax.jit(functools.partial(states.maintained, graph))(
        state, jax.random.normal(key, (2, 16, 3)), key=key
    )
    equal(after, state)


# ---------------------------------------------------------------- sharding


@pytest.mark.parametrize("strategy", sorted(sharding.STRATEGIES))
def test_a_state_is_born_by_the_table(strategy):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    optimizer = states.optimizer(10, learning_rate=0.1)
    _, state = states.create(generator, optimizer, mesh=mesh, strategy=strategy, ema=0.9)
    parted = set()
    for path, leaf in states.paths(state).items():
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated
            continue
        expected = sharding.of_parameter(path, leaf.shape, strategy, mesh)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
        if not leaf.sharding.is_fully_replicated:
            parted.add(path.split("/")[0] + ("/mu" if "/mu/" in path else ""))
    if strategy == "data":
        assert not parted
    else:  # moments and average lie as their parameters
        assert {"params", "ema", "opt_state/mu"} <= parted
    query = "transformer/blocks/attention/query/kernel"
    axes = {"data": (), "fsdp": (None, "fsdp"), "tensor": (None, "fsdp", "tensor")}[strategy]
    found = tuple(states.paths(state.params)[query].sharding.spec)
    while found and found[-1] is None:
        found = found[:-1]
    assert found == axes


def test_the_numbers_do_not_depend_on_the_mesh():
    optimizer = states.optimizer(10, learning_rate=0.1)
    one = states.create(generator, optimizer, mesh=sharding.make_mesh(), ema=0.9)[1]
    other = states.create(
        generator, optimizer, mesh=sharding.make_mesh(2, 2, 2), strategy="tensor", ema=0.9
    )[1]
    equal(one, other)


def test_count_and_paths(key):
    _, state, _ = created()
    assert states.count(state.params) == 3 * 3 * 4 * 8 + 8 + 8 + 40 + 36
    assert "quantizer/counts" in states.paths(state.stats)
    assert states.paths(state)["params/norm/scale"].shape == (8,)
