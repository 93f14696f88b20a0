"""The critic's side of training: when it plays, how loud, what it descends, who moves first."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import interfaces, losses, parameters
from tokgen.config import building, reading
from tokgen.discriminators import augment, feature_heads, patchgan, stylegan
from tokgen.training import gan, optimizer as optimizers, stages, tokenizer_step, train_state

RATE = 0.1
# Gradients as they are.
PLAIN = optimizers.Optimizer(optax.identity(), lambda step: jnp.float32(RATE))


# ---------------------------------------------------------------- when, and how loud


@pytest.mark.parametrize(
    ("game", "total", "expected"),
    [
        (dict(weight=1.0), 100, (0, 0)),
        (dict(weight=1.0, start=0.5, warmup=0.05), 1000, (500, 550)),
        (dict(weight=1.0, start=1 / 3, warmup=1 / 3), 10, (3, 6)),
        (dict(weight=0.0, start=0.5), 100, (100, 100)),  # nobody plays
    ],
)
def test_when_critic_and_painter_begin(game, total, expected):
    assert gan.Game(**game).steps(total) == expected


def weight(game, step, total=100):
    faithful, pleasing = jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)
    return float(gan.weight(game, faithful, pleasing, jnp.asarray(step), total))


def test_the_weight_of_the_painters_term():
    constant = gan.Game(weight=0.3, limit=0.0, start=0.4, warmup=0.1)
    found = [weight(constant, step) for step in (0, 49, 50, 99)]
    np.testing.assert_allclose(found, [0, 0, 0.3, 0.3], rtol=1e-6)
    # |6| / (|1| + epsilon), then its limits; both are norms over all entries
    for options, ratio in (
        (dict(), 6 / (1 + 1e-4)),
        (dict(epsilon=0.5), 6 / 1.5),
        (dict(limit=2.0), 2.0),
        (dict(floor=7.0), 7.0),
    ):
        game = gan.Game(weight=0.3, **options)
        np.testing.assert_allclose(weight(game, 50), 0.3 * ratio, rtol=1e-6)
    ramp = gan.Game(weight=1.0, limit=0.0, start=0.2, ramp=0.1)
    found = [weight(ramp, step) for step in (19, 20, 24, 29, 30, 99)]
    np.testing.assert_allclose(found, [0, 0.1, 0.5, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(loss="hing"), "critic.loss must be one of hinge.*'hing'"),
        (dict(painter="wgan"), "critic.painter must be one of.*'wgan'"),
        (dict(lecam_form="mean"), "critic.lecam_form must be one of.*'mean'"),
        (dict(first="tokenizer"), "critic.first must be painter or critic; found 'tokenizer'"),
    ],
)
def test_names_in_the_game(section, words):
    with pytest.raises(interfaces.UserError, match=words):
        gan.Game(**section)


# ---------------------------------------------------------------- which critic


def settings_of(size=(16, 16), channels=3):
    return ml_collections.ConfigDict(dict(view=dict(size=size, channels=channels)))


def built(network, settings=None, **game):
    game = gan.Game(weight=1.0, network=network, **game)
    return nnx.eval_shape(lambda: gan.build(game, settings or settings_of(), rngs=nnx.Rngs(0)))


def test_the_critic_is_the_one_that_is_named(capfd):
    assert isinstance(built(dict(name="patchgan", width=4)), patchgan.Discriminator)
    small = built(dict(name="stylegan", widths=(4, 4, 4)), settings_of((16, 16), 1))
    assert isinstance(small, stylegan.Discriminator)
    assert (small.size, small.channels) == (16, 1)
    assert capfd.readouterr().err == ""
    # a frozen feature network without weights would judge by noise
    fallback = built(dict(name="feature_heads"))
    assert isinstance(fallback, patchgan.Discriminator)
    assert "PatchGAN, since config.critic.features names no weights" in capfd.readouterr().err
    with pytest.raises(interfaces.UserError, match="did you mean 'patchgan'"):
        built(dict(name="patchgam"))
    with pytest.raises(interfaces.UserError, match="no argument 'widths'"):
        built(dict(name="patchgan", widths=(4,)))
    for wrong in (True, "color", ("colour",), ("color", "color")):
        with pytest.raises(interfaces.UserError, match="augmented must be"):
            gan.Game(augmented=wrong)


# ---------------------------------------------------------------- the critic's step


class Linear(nnx.Module):
    """A critic whose gradients one can write down: a weight per colour and pixel."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.linspace(-1, 1, 4 * 4 * 3).reshape(4, 4, 3))
        self.bias = nnx.Param(jnp.asarray(0.1))

    def __call__(self, image_BHW3):
        return jnp.einsum("BHWC,HWC->B", image_BHW3, self.kernel[...]) + self.bias[...]


def state_of(module):
    graph, params, stats = parameters.split(module)
    zero = jnp.zeros((), jnp.int32)
    return graph, train_state.TrainState(zero, zero, params, stats, PLAIN.chain.init(params), None)


def pair(key, shape=(3, 4, 4, 3)):
    return [jax.random.uniform(jax.random.fold_in(key, i), shape) for i in range(2)]


def stepped(key, **game):
    graph, critic = state_of(Linear())
    game = gan.Game(weight=1.0, **game)
    averages = {"real": jnp.asarray(0.5), "fake": jnp.asarray(-0.25)}
    step = gan.critic_step(game, graph, PLAIN)
    after, moved, seen = jax.jit(step)(critic, averages, *pair(key), key)
    kernel = np.asarray(critic.params["kernel"], np.float64)
    change = (kernel - np.asarray(after.params["kernel"], np.float64)) / RATE
    return kernel, change, moved, seen, after


def wide(key):
    """(real, painted) on [-1, 1] in float64."""
    return [2 * np.asarray(image, np.float64) - 1 for image in pair(key)]


def test_the_critic_descends_the_loss_that_is_named(key):
    real, fake = wide(key)
    for name, factor in (("hinge", 0.5), ("hinge_sum", 1.0)):
        kernel, change, moved, seen, after = stepped(key, loss=name, critic_weight=2.0)
        logits = [np.einsum("bhwc,hwc->b", image, kernel) + 0.1 for image in (real, fake)]
        wrong = [logits[0] < 1, logits[1] > -1]
        gradient = np.einsum("bhwc,b->hwc", fake, wrong[1]) - np.einsum(
            "bhwc,b->hwc", real, wrong[0]
        )
        np.testing.assert_allclose(change, 2 * factor * gradient / 3, atol=2e-5)
        np.testing.assert_allclose(
            [seen["critic_real"], seen["critic_fake"]],
            [logit.mean() for logit in logits],
            atol=1e-5,
        )
        expected = [0.999 * 0.5 + 1e-3 * logits[0].mean(), 0.999 * -0.25 + 1e-3 * logits[1].mean()]
        np.testing.assert_allclose([moved["real"], moved["fake"]], expected, rtol=1e-5)
        assert after.step == 1


def test_penalties_are_added_with_their_weights(key):
    kernel, plain, _, seen, _ = stepped(key)
    assert set(seen) == {"critic", "critic_real", "critic_fake"}
    # the image is in [0, 1], the critic sees [-1, 1]: a logit's gradient is twice the kernel
    _, change, _, found, _ = stepped(key, r1=0.1)
    np.testing.assert_allclose(found["r1"], 4 * (kernel**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(change - plain, 0.1 * 8 * kernel, atol=2e-5)
    np.testing.assert_allclose(found["critic"], seen["critic"] + 0.1 * found["r1"], rtol=1e-5)
    for form in ("logits", "means"):
        _, change, _, found, _ = stepped(key, lecam=0.1, lecam_form=form)
        assert found["lecam"] > 0 and np.abs(change - plain).max() > 1e-3
        np.testing.assert_allclose(
            found["critic"], seen["critic"] + 0.1 * found["lecam"], rtol=1e-5
        )
    real, fake = (np.einsum("bhwc,hwc->b", image, kernel).mean() + 0.1 for image in wide(key))
    expected = max(real + 0.25, 0) ** 2 + max(0.5 - fake, 0) ** 2
    np.testing.assert_allclose(found["lecam"], expected, rtol=1e-4)
    # two looks at the same images through different augmentations
    _, same, _, found, _ = stepped(key, consistency=0.5)
    assert found["consistency"] == 0
    np.testing.assert_allclose(same, plain, atol=1e-6)
    _, through, _, _, _ = stepped(key, augmented=augment.KINDS)
    _, change, _, found, _ = stepped(key, augmented=augment.KINDS, consistency=0.5)
    assert 0 < found["consistency"] < np.inf
    assert np.abs(through - plain).max() > 1e-3 and np.abs(change - through).max() > 1e-3


def test_the_painter_gets_no_gradient_from_the_critics_step(key):
    graph, critic = state_of(Linear())
    game = gan.Game(weight=1.0, lecam=0.1, r1=0.1)
    step = gan.critic_step(game, graph, PLAIN)

    def through(painted):
        after, _, seen = step(critic, losses.averages(), pair(key)[0], painted, key)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(after.params)) + seen["critic"]

    assert not np.asarray(jax.jit(jax.grad(through))(pair(key)[1])).any()


# ---------------------------------------------------------------- a frozen feature network

TINY = dict(size=8, patch=4, width=6, depth=2, heads=2, levels=(0, 1), kernel=3)


@pytest.fixture(scope="module")
def sighted():
    """(graph, state) of a critic on features, filled with numbers."""
    make = lambda: feature_heads.Discriminator(rngs=nnx.Rngs(0), **TINY)  # noqa: E731
    graph, params, stats = parameters.split(nnx.eval_shape(make))
    draw = np.random.default_rng(0).normal
    params, stats = jax.tree.map(
        lambda leaf: jnp.asarray(0.05 + 0.3 * draw(size=leaf.shape), "f4"), (params, stats)
    )
    for head in stats["heads"].values():
        for norm in head["norms"].values():
            norm["variance"] = jnp.ones_like(norm["variance"])
    zero = jnp.zeros((), jnp.int32)
    return graph, train_state.TrainState(zero, zero, params, stats, PLAIN.chain.init(params), None)


def test_heads_learn_and_the_trunk_does_not(sighted, key):
    graph, critic = sighted
    game = gan.Game(weight=1.0, network=dict(name="feature_heads"))
    step = jax.jit(gan.critic_step(game, graph, PLAIN))
    real, fake = pair(key, (2, 8, 8, 3))
    after, _, seen = step(critic, losses.averages(), real, fake, key)
    before, now = (parameters.paths({"p": s.params, "s": s.stats}) for s in (critic, after))
    assert np.isfinite(seen["critic"]) and any("trunk" in path for path in before)
    moved = {path for path in before if np.any(np.asarray(before[path]) != np.asarray(now[path]))}
    assert not [path for path in moved if "trunk" in path]
    for part in ("mean", "variance", "direction"):  # running statistics, power iterations
        paths = [path for path in before if path.startswith("s/heads") and path.endswith(part)]
        rest = [path for path in paths if path not in moved]
        # a kernel with one output has one direction
        assert paths and all(before[path].size == 1 for path in rest), rest
    kernels = [path for path in before if path.startswith("p/heads") and path.endswith("kernel")]
    assert kernels and set(kernels) <= moved
    # one pixel that is no number: nothing moves, of the averages neither
    broken, averages, seen = step(
        after, losses.averages(), real.at[0, 3, 3, 0].set(jnp.nan), fake, key
    )
    assert not np.isfinite(seen["critic"]) and broken.skipped == 1 and broken.step == 2
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same((broken.params, broken.stats, averages), (after.params, after.stats, losses.averages()))


def test_logits_that_are_infinite_move_no_average(key):
    """The hinge of an infinite logit is 0, and so is its gradient: neither tells."""
    graph, critic = state_of(Linear())
    step = gan.critic_step(gan.Game(weight=1.0), graph, PLAIN)
    real, fake = pair(key)
    huge = critic.replace(params={**critic.params, "bias": jnp.float32(jnp.inf)})
    after, averages, _ = step(huge, losses.averages(), real, -fake, key)
    assert after.skipped == 1
    assert (averages["real"], averages["fake"]) == (0, 0)


def test_the_painter_is_judged_by_running_statistics(sighted, key):
    """An image's opinion does not depend on the others of its batch; the critic's own does."""
    graph, critic = sighted
    judge = parameters.merge(graph, critic.params, critic.stats)
    image = pair(key, (3, 8, 8, 3))[0]

    @jax.jit
    def seen(judge):
        """The first image's logits, each way, among others and alone."""
        looks = gan.views(judge, gan.Game(weight=1.0), key)
        return [(look(image)[:1], look(image[:1])) for look in looks]

    learning, judging = seen(judge)
    np.testing.assert_allclose(*judging, atol=1e-5)
    assert np.abs(learning[0] - learning[1]).max() > 1e-2


# ---------------------------------------------------------------- the whole step


@pytest.fixture(scope="module")
def match(request):
    """A tokenizer, a critic and a batch, small enough for a gradient or two."""
    settings = reading.load(
        "configs/tokenizer/shapes.py:vq",
        (
            *("view.size=(8, 8)", "encoder.widths=(8,)", "decoder.widths=(8,)", "encoder.blocks=0"),
            *("decoder.blocks=0", "quantizer.codes=16", "ema=0.0", "steps=10", "loss.l1=0.5"),
        ),
    )
    with settings.unlocked():
        settings.quantizer.revive = 0.0
    network = dict(name="patchgan", width=4, layers=1, norm="none")

    def made(make):
        graph, params, stats = parameters.split(nnx.eval_shape(make))
        draw = np.random.default_rng(0).normal
        params = jax.tree.map(
            lambda leaf: jnp.asarray(0.2 * draw(size=leaf.shape), leaf.dtype), params
        )
        stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)
        zero = jnp.zeros((), jnp.int32)
        return graph, train_state.TrainState(
            zero, zero, params, stats, PLAIN.chain.init(params), None
        )

    graph, model = made(lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)))
    game = gan.Game(weight=1.0, network=network)
    judge, critic = made(lambda: gan.build(game, settings, rngs=nnx.Rngs(0)))
    batch = {"image": np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)}
    networks = {"model": model, "critic": critic, "averages": losses.averages()}
    return settings, network, {"model": graph, "critic": judge}, networks, batch


def copied(networks):
    return jax.tree.map(jnp.copy, networks)  # a step donates what it gets


def by_hand(graphs, networks, critic_params, batch, tokenizer_step):
    """Gradients of fidelity and of the critic's opinion, as the definition has them."""
    image = jnp.asarray(batch["image"], jnp.float32) / 255
    model, judge = networks["model"], networks["critic"]

    def terms(params):
        made = parameters.merge(graphs["model"], params, model.stats)
        quantized = made.quantizer(made.latents(image))
        painted = made.paint(quantized.latents_BPC)
        error = 2 * (painted - image)
        fidelity = 0.5 * jnp.abs(error).mean() + (error**2).mean()
        fidelity += quantized.losses["codebook"] + 0.25 * quantized.losses["commitment"]
        critic = parameters.merge(graphs["critic"], critic_params, judge.stats)
        return fidelity, tokenizer_step(critic(2 * painted - 1))

    return jax.jit(jax.jacrev(terms))(model.params)


@pytest.mark.parametrize(("first", "limit"), [("painter", 1e4), ("critic", 1e4), ("painter", 0.0)])
def test_a_step_against_the_critic(match, first, limit, monkeypatch):
    """The painter sees the critic of before, or the one that has just moved."""
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    game = gan.Game(weight=0.7, limit=limit, network=network, first=first, painter="non_saturating")
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, game, graphs, PLAIN, stage, strength=0.5)
    after, scalars, tokens = step(copied(networks), batch, {})
    seen = (after if first == "critic" else networks)["critic"].params
    softplus = lambda logits: jnp.logaddexp(0, -logits).mean()  # noqa: E731
    faithful, pleasing = by_hand(graphs, networks, seen, batch, softplus)
    sizes = [np.linalg.norm(tree["decoder"]["conv_out"]["kernel"]) for tree in (faithful, pleasing)]
    weight = 0.5 * 0.7 * (sizes[0] / (sizes[1] + 1e-4) if limit else 1.0)
    np.testing.assert_allclose(scalars["adversarial_weight"], weight, rtol=1e-4)
    start, end = networks["model"].params, after["model"].params
    for path, leaf in parameters.paths(start).items():
        gradient = parameters.paths(faithful)[path] + weight * parameters.paths(pleasing)[path]
        np.testing.assert_allclose(
            (leaf - parameters.paths(end)[path]) / RATE,
            gradient,
            rtol=1e-3,
            atol=1e-5,
            err_msg=path,
        )
    # the critic moves by the same gradient in both orders: the image it judges is the same
    moved = jax.jit(gan.critic_step(game, graphs["critic"], PLAIN))
    made = parameters.merge(graphs["model"], start, networks["model"].stats)
    image = jnp.asarray(batch["image"], jnp.float32) / 255
    painted = jax.jit(lambda made: made.reconstruct(image)[0])(made)
    critic, averages, _ = moved(
        networks["critic"], networks["averages"], image, painted, jax.random.key(0)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (critic.params, averages),
        (after["critic"].params, after["averages"]),
    )
    assert set(scalars) >= {"l1", "l2", "critic", "critic_real", "gradient_norm", "learning_rate"}
    assert all(np.isfinite(value) for value in scalars.values()) and tokens.shape == (4, 4, 1)
    assert after["model"].step == after["critic"].step == 1


def test_before_the_painter_plays_only_the_critic_learns_of_the_game(match, monkeypatch):
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    game = gan.Game(weight=0.7, limit=0.0, network=network, warmup=0.5)
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, game, graphs, PLAIN, stage, strength=1.0)
    after, scalars, _ = step(copied(networks), batch, {})
    alone = tokenizer_step.plain_step(settings, game, graphs, None, stage)
    plain, _, _ = alone(copied(networks), batch, {})
    assert scalars["adversarial_weight"] == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        after["model"].params,
        plain["model"].params,
    )
    kernel = lambda networks: np.asarray(networks["critic"].params["first"]["kernel"])  # noqa: E731
    assert (kernel(after) != kernel(networks)).all() and (kernel(plain) == kernel(networks)).all()
    # the same program, later: now it is heard
    later = copied(networks)
    later["model"] = later["model"].replace(step=jnp.asarray(5, jnp.int32))
    np.testing.assert_allclose(step(later, batch, {})[1]["adversarial_weight"], 0.7, rtol=1e-6)


def test_a_step_that_is_not_finite_moves_nothing_of_either(match, monkeypatch):
    """A pixel that is no number; then a critic alone whose loss is none. Both are counted."""
    settings, network, graphs, networks, batch = match
    whole = tokenizer_step.reconstruction.from_uint8

    def poisoned(image_BHW3):
        image = whole(image_BHW3)
        return image.at[0, 2, 2, 0].set(
            jnp.where(image[0, 0, 0, 0] == 1, jnp.nan, image[0, 2, 2, 0])
        )

    monkeypatch.setattr(tokenizer_step.reconstruction, "from_uint8", poisoned)
    optimizer = optimizers.optimizer(10, learning_rate=0.1)
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: optimizer)
    zero = jnp.zeros((), jnp.int32)
    start = dict(networks)
    for name in ("model", "critic"):
        moments = optimizer.chain.init(networks[name].params)
        start[name] = networks[name].replace(opt_state=moments, skips=zero)
    start["model"] = start["model"].replace(ema=start["model"].params)
    game = gan.Game(weight=0.7, network=network, lecam=0.1)
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, game, graphs, optimizer, stage, strength=1.0)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    moved = lambda a, b: np.any(np.asarray(a) != np.asarray(b))  # noqa: E731

    def stepped(given, corner, averages=None):
        image = batch["image"].copy()
        image[0, 0, 0, 0] = corner
        given = given if averages is None else {**given, "averages": averages}
        return *step(copied(given), {"image": image}, {})[:2], given

    def held(after, before):
        for name in ("model", "critic"):
            numbers = dict(step=0, skipped=0, skips=0)
            same(after[name].replace(**numbers), before[name].replace(**numbers))
            assert after[name].step == before[name].step + 1
        same(after["averages"], before["averages"])

    good, scalars, _ = stepped(start, 0)
    counts = ("skipped", "skips", "critic_skipped", "critic_skips")
    assert [scalars[name] for name in counts] == [0, 0, 0, 0]
    for name in ("params", "opt_state", "stats"):
        before, after = (jax.tree.leaves(getattr(n["model"], name)) for n in (start, good))
        assert any(map(moved, before, after)), name
    assert moved(good["averages"]["real"], 0.0)
    bad, scalars, before = stepped(good, 255)
    held(bad, before)
    assert [scalars[name] for name in counts] == [1, 1, 1, 1]
    nan = {"real": jnp.float32(jnp.nan), "fake": jnp.float32(0)}
    bad, scalars, before = stepped(bad, 0, averages=nan)  # only the critic's loss looks at them
    held(bad, before)
    assert [scalars[name] for name in counts] == [0, 1, 2, 2]
    after, scalars, _ = stepped(bad, 0, averages=good["averages"])  # and the game goes on
    assert [scalars[name] for name in counts] == [0, 1, 0, 2]
    for name in ("model", "critic"):
        before, now = (jax.tree.leaves(n[name].params) for n in (bad, after))
        assert any(map(moved, before, now))
        assert all(np.isfinite(leaf).all() for leaf in now)


def test_every_return_halves_the_critic_and_the_last_leaves_it_out():
    limits = types.SimpleNamespace(returns=3)
    strengths = [
        tokenizer_step.Steps(None, None, limits, None, None, returns).strength
        for returns in range(4)
    ]
    assert strengths == [1.0, 0.5, 0.25, 0.0]
