"""TrainState: what one optimizer step does to parameters, average, statistics and sharding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import interfaces, parameters, sharding
from tokgen.quantizers import vq
from tokgen.training import optimizer as optimizers, train_state


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


@functools.cache
def plain():
    """(structure, state, optimizer, a compiled step): Adam, warm-up and cosine."""
    optimizer = optimizers.optimizer(6, learning_rate=0.1, warmup=3, clip=0.0, b1=0.9)
    return _compiled(optimizer, ema=0.0)


@functools.cache
def full():
    """A training state with clipping, weight decay and an average."""
    optimizer = optimizers.optimizer(
        100, learning_rate=0.1, decay="constant", clip=1.0, weight_decay=0.5
    )
    return _compiled(optimizer, ema=0.3)


def _compiled(optimizer, ema):
    graph, state = train_state.create(make, optimizer, mesh=sharding.make_mesh(), ema=ema)
    step = functools.partial(train_state.apply_gradients, optimizer=optimizer, ema=ema)
    return graph, state, optimizer, jax.jit(step)


def gradients_of(state, key, scale=1.0):
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(key, len(leaves))
    drawn = [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- the learning rate


def test_schedule_end_points():
    rate = optimizers.schedule(0.4, 100, warmup=10, final=0.25)
    found = np.array([float(rate(step)) for step in range(101)])
    np.testing.assert_allclose(found[:10], 0.4 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(found[[10, 55, 100]], [0.4, 0.4 * (0.25 + 0.75 / 2), 0.1], rtol=1e-5)
    quarter = 0.4 * (0.25 + 0.75 * (1 + math.cos(math.pi / 2 * 0.5)) / 2)
    np.testing.assert_allclose(rate(10 + 22.5), quarter, rtol=1e-5)
    assert (np.diff(found[10:]) < 0).all()
    np.testing.assert_allclose(rate(1000), 0.1, rtol=1e-5)  # a run that goes on stays there
    constant = optimizers.schedule(0.4, 100, warmup=4, decay="constant")
    np.testing.assert_allclose([constant(s) for s in (0, 3, 99)], [0.1, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_allclose(optimizers.schedule(0.4, 10)(0), 0.4, rtol=1e-6)  # without warm-up
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        optimizers.schedule(0.1, 10, decay="exponential")


def published_lin0(step, warmup, steps, final, hold=0.05, start=0.005):
    """VAR's schedule as its fact sheet states it (section 5), in float64."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    p = (step - warmup) / (steps - 1 - warmup)
    return 1.0 if p < hold else final + (1 - final) * (1 - p) / (1 - hold)


def test_the_linear_decay_is_vars_lin0():
    steps, warmup = 2011, 10  # 2,000 steps from the end of the warm-up to the last one
    rate = optimizers.schedule(
        3e-4, steps, warmup=warmup, start=0.005, decay="linear", hold=0.05, final=0.01
    )
    # section 10: p = 0.04, 0.05, 0.5, 1
    found = [rate(warmup + p) / 3e-4 for p in (80, 100, 1000, 2000)]
    np.testing.assert_allclose(found, [1, 1, 0.531053, 0.01], atol=1e-6)
    every = np.concatenate([np.arange(30), np.arange(30, steps, 97), [steps - 1]])
    expected = [3e-4 * published_lin0(s, warmup, steps, 0.01) for s in every]
    np.testing.assert_allclose(jax.vmap(rate)(jnp.asarray(every)), expected, rtol=1e-5)
    np.testing.assert_allclose(rate(0), 3e-4 * 0.005, rtol=1e-6)
    np.testing.assert_allclose(rate(5 * steps), 3e-6, rtol=1e-5)


def test_cosines_of_rar_and_maskbit():
    """The known answers of their sheets, sections 10 and 7; their ramps count from 0."""
    rar = optimizers.schedule(4e-4, 250_000, warmup=62_500, final=1e-5 / 4e-4)
    steps = (31_250 - 1, 62_500, 125_000, 187_500, 250_000)
    found = [rar(step) for step in steps]
    np.testing.assert_allclose(found, [2e-4, 4e-4, 3.025e-4, 1.075e-4, 1e-5], rtol=1e-5)
    np.testing.assert_allclose(rar(31_250), 2e-4, rtol=5e-5)  # to the digits of the sheet
    maskbit = optimizers.schedule(1e-4, 1_350_000, warmup=5000, final=0.1)
    found = [maskbit(step) for step in (5000, 677_500, 1_350_000)]
    np.testing.assert_allclose(found, [1e-4, 5.5e-5, 1e-5], rtol=1e-5)


def test_a_schedule_begins_anew_at_its_restarts():
    """NPP: two stages, each with a warm-up, 80 % of the rest at the full rate, down to a tenth."""
    options = dict(warmup=10, decay="linear", hold=0.8, final=0.1)
    whole = optimizers.schedule(1e-4, 311, restarts=(0.5,), **options)
    first, second = (optimizers.schedule(1e-4, steps, **options) for steps in (156, 155))
    steps = jnp.arange(311)
    expected = np.concatenate([jax.vmap(first)(steps[:156]), jax.vmap(second)(steps[:155])])
    np.testing.assert_allclose(jax.vmap(whole)(steps), expected, rtol=1e-6)
    shares = expected[[0, 9, 100, 155, 156, 310]] / 1e-4
    np.testing.assert_allclose(shares, [0.1, 1, 1, 0.1, 0.1, 0.1], rtol=1e-5)
    three = optimizers.schedule(1.0, 300, warmup=4, start=0.5, restarts=(0.2, 0.6), begin=50)
    found = [three(50 + step) for step in (0, 59, 60, 62, 64, 180, 300)]
    last = 0.5 * (1 + math.cos(math.pi * 55 / 56))
    np.testing.assert_allclose(found, [0.5, last, 0.5, 0.75 * 1, 1, 0.5, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(hold=0.1),
        dict(decay="linear", hold=1.0),
        dict(start=-0.1),
        dict(restarts=(0.5, 0.5)),
        dict(restarts=(1.0,)),
    ],
)
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="start must lie|restarts must be"):
        optimizers.schedule(0.1, 10, **wrong)


def test_drops_fall_to_a_tenth_each_and_a_schedule_counts_from_its_begin():
    rate = optimizers.schedule(0.4, 50, decay="constant", drops=(0.5, 0.8), begin=100)
    found = [float(rate(100 + step)) for step in (0, 24, 25, 39, 40, 49)]
    np.testing.assert_allclose(found, [0.4, 0.4, 0.04, 0.04, 0.004, 0.004], rtol=1e-5)
    # the same curve, later; also its warm-up
    first = optimizers.schedule(0.4, 50, warmup=5, final=0.1, drops=(0.9,))
    later = optimizers.schedule(0.4, 50, warmup=5, final=0.1, drops=(0.9,), begin=70)
    for step in (0, 3, 5, 20, 44, 45, 60):
        np.testing.assert_allclose(later(70 + step), first(step), rtol=1e-6)
    cosine = optimizers.schedule(0.4, 50, warmup=5, final=0.1)
    np.testing.assert_allclose(first(45), 0.1 * cosine(45), rtol=1e-6)
    np.testing.assert_allclose(first(44), cosine(44), rtol=1e-6)


def test_paths_that_a_pattern_matches_whole():
    tree = {"a": {"kernel": 1, "bias": 2}, "b": {"a": {"kernel": 3}}, "kernel": 4}

    def found(pattern):
        matched = parameters.paths(parameters.matching(tree, pattern))
        return {path for path, matches in matched.items() if matches}

    assert found(optimizers.KERNELS) == {"a/kernel", "b/a/kernel", "kernel"}
    assert found("a/.*") == {"a/kernel", "a/bias"}
    assert found("(?!b/).*") == {"a/kernel", "a/bias", "kernel"}
    assert found("kern") == found("a") == set() and len(found(".*")) == 4


def test_the_rate_applied_is_the_one_reported(key):
    """A constant gradient: each of Adam's steps is the rate times its sign."""
    _, state, _, step = plain()
    gradients = gradients_of(state, key)
    for number in range(6):
        before = state.params
        state, scalars = step(state, gradients)
        expected = optimizers.schedule(0.1, 6, warmup=3)(number)
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
    _, state, _, step = full()
    gradients = gradients_of(state, key, scale=3.0)
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    norm = math.sqrt(sum((g**2).sum() for g in leaves))
    after, scalars = step(state, gradients)
    np.testing.assert_allclose(scalars["gradient_norm"], norm, rtol=1e-5)
    # the first moment is a tenth of the clipped gradient
    moments = parameters.paths(after.opt_state)
    (first,) = [leaf for path, leaf in moments.items() if path.endswith("mu/conv_in/bias")]
    np.testing.assert_allclose(first, gradients["conv_in"]["bias"] * 0.1 / norm, rtol=1e-4)


# ---------------------------------------------------------------- steps that cannot be taken


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison, key):
    _, state, _, step = full()
    gradients = gradients_of(state, key)
    state, _ = step(state, gradients)
    broken = jax.tree.map(lambda g: g, gradients)
    broken["norm"]["scale"] = broken["norm"]["scale"].at[3].set(poison)
    after = state
    for times in (1, 2):
        after, scalars = step(after, broken)
        assert scalars["skipped"] == after.skipped == times
    assert after.step == state.step + 2 and scalars["skips"] == after.skips == 2
    equal(after.replace(step=0, skipped=0, skips=0), state.replace(step=0, skipped=0, skips=0))
    after, _ = step(after, gradients)  # and the run goes on, with the rate of its global step
    assert after.skipped == 0 and after.skips == 2 and after.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert np.abs(after.params["conv_in"]["bias"] - state.params["conv_in"]["bias"]).min() > 0


@pytest.mark.parametrize(
    ("rate", "b2", "scale", "loss"),
    [
        *((math.inf, 0.9, 1.0, 0.0), (math.nan, 0.9, 1.0, 0.0), (1e38, 0.9, 1.0, 0.0)),
        *((0.1, math.inf, 1.0, 0.0), (0.1, math.nan, 1.0, 0.0)),
        *((0.1, 0.9, 1e30, 0.0), (0.1, 0.9, 1.0, math.nan), (0.1, 0.9, 1.0, math.inf)),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_and_counted(rate, b2, scale, loss):
    """Gradients are finite here: the rate, the moments, the loss, or a square is not."""
    chain = optax.scale_by_adam(b2=b2)
    optimizer = optimizers.Optimizer(chain, lambda step: jnp.float32(rate))
    params, zero = {"kernel": jnp.ones((3, 2))}, jnp.zeros((), jnp.int32)
    state = train_state.TrainState(zero, zero, params, {}, chain.init(params), params, zero)
    gradients = {"kernel": jnp.full((3, 2), scale)}
    after, scalars = train_state.apply_gradients(
        state, gradients, optimizer, ema=0.5, loss=jnp.float32(loss)
    )
    assert after.skipped == after.skips == scalars["skipped"] == 1 and after.step == 1
    equal((after.params, after.ema, after.opt_state), (state.params, state.ema, state.opt_state))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_and_average_are_float32_whatever_the_parameters_are(name):
    """And stay so: a state whose dtypes move is compiled twice, and cannot be resumed."""

    class Half(nnx.Module):
        def __init__(self):
            kernel = nnx.Param(jnp.ones((2, 3, 4), jnp.bfloat16))
            self.blocks = nnx.Dict(mlp=nnx.Dict(up=nnx.Dict(kernel=kernel)))
            self.bias = nnx.Param(jnp.ones(4, jnp.bfloat16))

    optimizer = optimizers.optimizer(9, name=name, learning_rate=0.1, weight_decay=0.1)
    _, state = train_state.create(Half, optimizer, mesh=sharding.make_mesh(), ema=0.9)
    kinds = lambda state: {p: leaf.dtype for p, leaf in parameters.paths(state).items()}  # noqa: E731
    first = kinds(state)
    for path, kind in first.items():
        whole = jnp.issubdtype(kind, jnp.integer)
        assert whole or kind == ("bfloat16" if path.startswith("params/") else "float32"), path
    for _ in range(2):
        gradients = jax.tree.map(jnp.ones_like, state.params)
        state, _ = train_state.apply_gradients(state, gradients, optimizer, ema=0.9)
        assert kinds(state) == first and state.skipped == 0
    assert kinds(train_state.restarted(state, optimizer, mesh=sharding.make_mesh())) == first
    used = train_state.averaged(state)  # as a checkpoint of it is loaded
    assert {leaf.dtype for leaf in jax.tree.leaves(used)} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------- average, decay, Muon


def test_the_average_follows_its_formula(key):
    """min(decay, s / (9 + s)), written out in float64; the first step copies."""
    _, state, _, step = full()
    average = np.asarray(state.params["conv_in"]["kernel"], np.float64)
    np.testing.assert_array_equal(state.ema["conv_in"]["kernel"], average)
    for number in range(5):
        state, _ = step(state, gradients_of(state, jax.random.fold_in(key, number)))
        decay = min(0.3, number / (9 + number))
        kernel = np.asarray(state.params["conv_in"]["kernel"], np.float64)
        average = decay * average + (1 - decay) * kernel
        np.testing.assert_allclose(state.ema["conv_in"]["kernel"], average, rtol=1e-4, atol=1e-6)
    assert 4 / (9 + 4) > 0.3 > 3 / (9 + 3)  # both sides of the minimum were taken
    assert train_state.averaged(state) is state.ema
    assert train_state.averaged(state.replace(ema=None)) is state.params


@pytest.mark.parametrize(
    ("name", "decays"), [("muse", (0, 1 / 10, 2 / 11)), ("var", (1 / 10, 1.5 / 10.5, 2 / 11))]
)
def test_averages_begin_as_their_systems_do(name, decays):
    """Of a parameter that is 1, then 0: what is left is the decay of that step."""
    one, plain = (
        {"kernel": jnp.ones(())},
        optimizers.optimizer(steps=9, learning_rate=1.0, clip=0.0),
    )
    state = train_state.TrainState(
        jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), one, {}, plain.chain.init(one), one
    )
    for step, decay in enumerate(decays):
        begun = state.replace(step=jnp.asarray(step, jnp.int32))
        after, _ = train_state.apply_gradients(begun, one, plain, ema=0.9999, average=name)
        moved = 1 - after.params["kernel"]
        np.testing.assert_allclose(after.ema["kernel"], 1 - (1 - decay) * moved, rtol=1e-5)
    after, _ = train_state.apply_gradients(begun, one, plain, ema=0.05, average=name)
    np.testing.assert_allclose(after.ema["kernel"], 1 - 0.95 * (1 - after.params["kernel"]))
    with pytest.raises(interfaces.UserError, match="config.average must be one of muse, var"):
        train_state.average_of("mean")


def test_weight_decay_is_for_kernels_only():
    _, state, _, step = full()
    after, _ = step(state, jax.tree.map(jnp.zeros_like, state.params))
    old, new = parameters.paths(state.params), parameters.paths(after.params)
    assert set(old) == {
        *("conv_in/kernel", "conv_in/bias", "norm/scale", "labels/table", "quantizer/codebook")
    }
    for path in old:
        factor = 1 - 0.1 * 0.5 if path.endswith("/kernel") else 1
        np.testing.assert_allclose(new[path], factor * old[path], rtol=1e-6, err_msg=path)


def test_weight_decay_follows_a_half_cosine_of_the_global_step():
    """VAR's 0.05 to 0.08; a step that is skipped counts."""
    value = optimizers.half_cosine(0.05, 0.08, 101)
    expected = [0.08 - 0.03 * (0.5 + 0.5 * math.cos(math.pi * s / 100)) for s in (0, 25, 50, 100)]
    np.testing.assert_allclose([value(s) for s in (0, 25, 50, 100)], expected, rtol=1e-6)
    np.testing.assert_allclose(expected, [0.05, 0.0543934, 0.065, 0.08], atol=1e-7)
    _, state, *_ = plain()
    optimizer = optimizers.optimizer(
        *(5,), learning_rate=0.1, decay="constant", weight_decay=0.5, weight_decay_end=0.1
    )
    step = jax.jit(functools.partial(train_state.apply_gradients, optimizer=optimizer))
    state = state.replace(opt_state=optimizer.chain.init(state.params))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, zeros)
    factor = 1.0
    for number in range(5):
        after, _ = step(state, broken if number == 2 else zeros)
        shrink = 0.1 + 0.4 * (0.5 + 0.5 * math.cos(math.pi * number / 4))
        factor *= 1.0 if number == 2 else 1 - 0.1 * shrink
        old, state = state, after
        moved = parameters.paths(after.params)["conv_in/kernel"]
        np.testing.assert_allclose(moved, factor * make().conv_in.kernel[...], rtol=1e-5)
        equal(old.params["norm"], after.params["norm"])
    with pytest.raises(ValueError, match="weight_decay_end must be .*-1.0"):
        optimizers.optimizer(5, learning_rate=1.0, weight_decay_end=-1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_beside_the_chain_is_that_inside_it_to_the_bit(name, key):
    """As it was before: the last link of the chain, whose state has no leaves."""
    shapes = {"attention": (2, 32, 4, 8), "mlp": (2, 32, 96)}
    params = {
        "blocks": {n: {"kernel": jnp.ones(s)} for n, s in shapes.items()},
        "head": {"kernel": jax.random.normal(key, (32, 64)), "bias": jnp.ones(64)},
    }
    new = optimizers.optimizer(9, learning_rate=0.1, name=name, weight_decay=0.3)
    link = optax.add_decayed_weights(
        0.3, mask=lambda tree: parameters.matching(tree, optimizers.KERNELS)
    )
    moments = {"adamw": optimizers._adam, "muon": optimizers._muon}[name](0.9, 0.95)
    old = optax.chain(optax.clip_by_global_norm(1.0), moments, link)
    old = optimizers.Optimizer(old, new.rate)
    zero, found, kept = jnp.zeros((), jnp.int32), [], []
    for optimizer in (new, old):
        state = train_state.TrainState(zero, zero, params, {}, optimizer.chain.init(params), None)
        step = jax.jit(functools.partial(train_state.apply_gradients, optimizer=optimizer))
        for number in range(3):
            state, _ = step(state, gradients_of(state, jax.random.fold_in(key, number)))
        found.append(state.params)
        kept.append(list(parameters.paths(state)))  # what a checkpoint calls its arrays
    equal(*found)
    assert kept[0] == kept[1]


def test_decay_is_for_what_the_pattern_names():
    """As published systems have it: everything but norms and biases, or everything."""
    _, state, *_ = plain()
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    for pattern, decayed in (
        (".*", set(parameters.paths(state.params))),
        (r"(?!norm/|.*bias).*", {"conv_in/kernel", "labels/table", "quantizer/codebook"}),
    ):
        optimizer = optimizers.optimizer(
            *(10,), learning_rate=0.1, decay="constant", weight_decay=0.5, decayed=pattern
        )
        begun = state.replace(opt_state=optimizer.chain.init(state.params))
        after, _ = jax.jit(functools.partial(train_state.apply_gradients, optimizer=optimizer))(
            begun, zeros
        )
        old, new = parameters.paths(state.params), parameters.paths(after.params)
        for path in old:
            factor = 0.95 if path in decayed else 1.0
            np.testing.assert_allclose(new[path], factor * old[path], rtol=1e-6, err_msg=path)


def test_what_is_not_trained_stays_and_is_not_in_the_norm(key):
    """Decay does not move it either; the average goes on towards it."""
    _, state, optimizer, _ = full()
    ema = jax.tree.map(lambda leaf: leaf + 1, state.ema)
    state = state.replace(step=jnp.asarray(9, jnp.int32), ema=ema)  # 9 / (9 + 9) is over 0.3
    gradients = gradients_of(state, key)
    after, scalars = jax.jit(
        functools.partial(
            train_state.apply_gradients, optimizer=optimizer, ema=0.3, trained="(conv_in|labels)/.*"
        )
    )(state, gradients)
    moving = {"conv_in/kernel", "conv_in/bias", "labels/table"}
    squares = [
        (np.asarray(leaf, np.float64) ** 2).sum()
        for path, leaf in parameters.paths(gradients).items()
        if path in moving
    ]
    np.testing.assert_allclose(scalars["gradient_norm"], math.sqrt(sum(squares)), rtol=1e-5)
    old, new, average = (parameters.paths(tree) for tree in (state.params, after.params, after.ema))
    for path in old:
        if path in moving:
            assert (np.asarray(old[path]) != np.asarray(new[path])).any(), path
        else:
            np.testing.assert_array_equal(old[path], new[path], err_msg=path)
            np.testing.assert_allclose(average[path], old[path] + 0.3, rtol=1e-5, err_msg=path)
    broken = jax.tree.map(lambda leaf: leaf, gradients)
    broken["norm"]["scale"] = broken["norm"]["scale"].at[0].set(jnp.nan)
    _, scalars = jax.jit(
        functools.partial(train_state.apply_gradients, optimizer=optimizer, trained="conv_in/.*")
    )(state, broken)
    assert scalars["skipped"] == 0  # what is not trained cannot spoil a step


def test_a_restarted_state_keeps_all_but_its_moments(key):
    _, state, _, step = plain()
    for number in range(2):
        state, _ = step(state, gradients_of(state, jax.random.fold_in(key, number)))
    other = optimizers.optimizer(9, learning_rate=0.1, weight_decay=0.1, clip=0.5)
    after = train_state.restarted(state, other, mesh=sharding.make_mesh())
    equal(after.replace(opt_state=()), state.replace(opt_state=()))
    equal(after.opt_state, other.chain.init(state.params))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(after.opt_state))


def test_a_stage_goes_on_from_the_average(key):
    _, state, _, step = full()
    for number in range(3):
        state, _ = step(state, gradients_of(state, jax.random.fold_in(key, number)))
    after = train_state.from_average(state)
    equal(after.params, state.ema)
    equal(after.replace(params=()), state.replace(params=()))
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)
    equal(train_state.from_average(state.replace(ema=None)).params, state.params)


def test_muon_turns_the_matrices_of_the_blocks(key):
    """Every layer's update has singular values near 0.2 sqrt(larger side); Adam does the rest."""
    rate = 0.01
    shapes = {
        "query": (2, 32, 4, 8),  # [Y, D, N, K]
        "out": (2, 4, 8, 32),  # [Y, N, K, D]: heads are summed over
        "up": (2, 32, 96),
        "norm": (2, 32),
        "head": (32, 64),
    }
    keys = jax.random.split(key, len(shapes))
    drawn = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    gradients = {
        "blocks": {name: {"kernel": drawn[name]} for name in ("query", "out", "up")},
        "head": {"kernel": drawn["head"]},
    }
    gradients["blocks"]["norm"] = {"scale": drawn["norm"]}
    optimizer = optimizers.optimizer(
        10, learning_rate=rate, name="muon", decay="constant", clip=0.0
    )
    params = jax.tree.map(jnp.ones_like, gradients)
    zero = jnp.zeros((), jnp.int32)
    state = train_state.TrainState(zero, zero, params, {}, optimizer.chain.init(params), None)
    after, _ = jax.jit(functools.partial(train_state.apply_gradients, optimizer=optimizer))(
        state, gradients
    )
    moves = jax.tree.map(lambda new, old: (old - new) / rate, after.params, params)
    for name, move in moves["blocks"].items():
        for layer in np.asarray(move.get("kernel", ()), np.float64):
            matrix = layer.reshape(-1, 32) if name == "out" else layer.reshape(32, -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            values /= 0.2 * math.sqrt(max(matrix.shape))
            # five iterations bring all but the smallest of a square matrix close to one
            assert np.quantile(values, 0.1) > 0.6 and values.max() < 1.3, name
            # about the size of Adam's step, 0.2 per entry
            assert 0.1 < math.sqrt((matrix**2).mean()) < 0.3, name
    for path in ("blocks/norm/scale", "head/kernel"):
        sign = np.sign(parameters.paths(gradients)[path])
        np.testing.assert_allclose(parameters.paths(moves)[path], sign, rtol=2e-2, err_msg=path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(learning_rate=0.0), "learning_rate must be a finite number above 0"),
        (dict(learning_rate=1.0, clip=-1.0), "clip"),
        (dict(learning_rate=1.0, name="adamm"), "adamw"),
    ],
)
def test_wrong_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        optimizers.optimizer(10, **options)


# ---------------------------------------------------------------- statistics


def test_upkeep_moves_statistics_and_overwrites_the_average_where_it_revived(key):
    graph, state, _, step = full()
    upkeep = jax.jit(functools.partial(train_state.maintained, graph))
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
    after = after.replace(step=jnp.asarray(9, jnp.int32))  # the first step would copy
    later, _ = step(after, gradients_of(after, key))
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
    graph, state, *_ = full()
    state = state.replace(skipped=jnp.ones((), jnp.int32))
    after = jax.jit(functools.partial(train_state.maintained, graph))(
        state, jax.random.normal(key, (2, 16, 3)), key=key
    )
    equal(after, state)


# ---------------------------------------------------------------- sharding


class Block(nnx.Module):
    """Names and shapes of a generator's block, two layers of it."""

    def __init__(self, rngs: nnx.Rngs):
        def kernel(*shape):
            return nnx.Dict(kernel=nnx.Param(jax.random.normal(rngs.params(), shape)))

        self.attention = nnx.Dict(query=kernel(2, 32, 4, 8), out=kernel(2, 4, 8, 32))
        self.mlp = nnx.Dict(up=kernel(2, 32, 96))
        self.norm = nnx.Dict(scale=nnx.Param(jnp.ones((2, 32))))


def test_a_state_is_born_by_the_table():
    """On its devices as the table says; and the numbers do not depend on how it lies."""
    mesh, strategy = sharding.make_mesh(data=2, fsdp=2, tensor=2), "tensor"
    optimizer = optimizers.optimizer(10, learning_rate=0.1)

    def block():
        return Block(nnx.Rngs(0))

    whole = train_state.create(block, optimizer, mesh=sharding.make_mesh(), ema=0.9)[1]
    state = train_state.create(block, optimizer, mesh=mesh, strategy=strategy, ema=0.9)[1]
    equal(whole, state)
    parted = set()
    for path, leaf in parameters.paths(state).items():
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated
            continue
        expected = sharding.of_parameter(path, leaf.shape, strategy, mesh)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
        if not leaf.sharding.is_fully_replicated:
            parted.add(path.split("/")[0] + ("/mu" if "/mu/" in path else ""))
            assert leaf.addressable_shards[0].data.size < leaf.size
    # moments and average lie as their parameters
    assert {"params", "ema", "opt_state/mu"} <= parted
    query = parameters.paths(state.params)["attention/query/kernel"]
    assert query.addressable_shards[0].data.shape == (2, 16, 2, 8)  # [Y, D, N, K]
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


def test_count_and_paths():
    _, state, *_ = plain()
    assert parameters.count(state.params) == 3 * 3 * 4 * 8 + 8 + 8 + 40 + 36
    assert "quantizer/counts" in parameters.paths(state.stats)
    assert parameters.paths(state)["params/norm/scale"].shape == (8,)
