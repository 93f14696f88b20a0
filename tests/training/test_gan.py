"""A tokenizer as a GAN: when its terms begin, their weight, what each descends, who moves first."""

import types
import warnings

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import flops, interfaces, losses, parameters, rng
from tokgen.config import building, reading
from tokgen.discriminators import augment, feature_heads, patchgan, stylegan
from tokgen.training import (
    gan as gans,
    optimizer as optimizers,
    stages,
    tokenizer_step,
    train_state,
)

RATE = 0.1
# Gradients as they are.
PLAIN = optimizers.Optimizer(optax.identity(), lambda step: jnp.float32(RATE))


# ---------------------------------------------------------------- when, and how loud


@pytest.mark.parametrize(
    ("gan", "total", "expected"),
    [
        (dict(weight=1.0), 100, (0, 0)),
        (dict(weight=1.0, start=0.5, warmup=0.05), 1000, (500, 550)),
        (dict(weight=1.0, start=1 / 3, warmup=1 / 3), 10, (3, 6)),
        (dict(weight=0.0, start=0.5), 100, (100, 100)),  # there is none
    ],
)
def test_when_discriminator_and_adversarial_term_begin(gan, total, expected):
    assert gans.GAN(**gan).steps(total) == expected


def weight(gan, step, total=100):
    gradients = jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)

    def pull(factors):
        kernel = sum(factor * each for factor, each in zip(factors, gradients, strict=True))
        return ({"decoder": {"conv_out": {"kernel": kernel}}},)

    ramp = gans.ramp(gan, 1.0, jnp.asarray(step), total)
    image = jnp.float32(1)
    value = gans.adaptive(gan, ramp, pull, image)
    kernel = gans.pulled(pull, value, image)["decoder"]["conv_out"]["kernel"]
    np.testing.assert_allclose(kernel, gradients[0] + value * gradients[1], rtol=1e-6)
    return float(value)


def test_the_weight_of_the_adversarial_term():
    constant = gans.GAN(weight=0.3, limit=0.0, start=0.4, warmup=0.1)
    found = [weight(constant, step) for step in (0, 49, 50, 99)]
    np.testing.assert_allclose(found, [0, 0, 0.3, 0.3], rtol=1e-6)
    # |6| / (|1| + epsilon), then its limits; both are norms over all entries
    for options, ratio in (
        (dict(), 6 / (1 + 1e-4)),
        (dict(epsilon=0.5), 6 / 1.5),
        (dict(limit=2.0), 2.0),
        (dict(floor=7.0), 7.0),
    ):
        gan = gans.GAN(weight=0.3, **options)
        np.testing.assert_allclose(weight(gan, 50), 0.3 * ratio, rtol=1e-6)
    ramp = gans.GAN(weight=1.0, limit=0.0, start=0.2, ramp=0.1)
    found = [weight(ramp, step) for step in (19, 20, 24, 29, 30, 99)]
    np.testing.assert_allclose(found, [0, 0.1, 0.5, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(loss="hing"), "discriminator.loss must be one of hinge.*'hing'"),
        (dict(generator_loss="wgan"), "discriminator.generator_loss must be one of.*'wgan'"),
        (dict(lecam_form="mean"), "discriminator.lecam_form must be one of.*'mean'"),
        (
            dict(first="critic"),
            "discriminator.first must be one of tokenizer, discriminator; found 'critic'",
        ),
    ],
)
def test_names_in_the_section(section, words):
    with pytest.raises(interfaces.UserError, match=words):
        gans.GAN(**section)


# ---------------------------------------------------------------- which discriminator


def settings_of(size=(16, 16), channels=3):
    return ml_collections.ConfigDict(dict(view=dict(size=size, channels=channels)))


def built(network, settings=None, **gan):
    gan = gans.GAN(weight=1.0, network=network, **gan)
    return nnx.eval_shape(lambda: gans.build(gan, settings or settings_of(), rngs=rng.rngs(0)))


def test_the_discriminator_is_the_one_that_is_named(capfd):
    assert isinstance(built(dict(name="patchgan", width=4)), patchgan.Discriminator)
    small = built(dict(name="stylegan", widths=(4, 4, 4)), settings_of((16, 16), 1))
    assert isinstance(small, stylegan.Discriminator)
    assert (small.size, small.channels) == (16, 1)
    assert capfd.readouterr().err == ""
    # a frozen feature network without weights would tell noise
    fallback = built(dict(name="feature_heads"))
    assert isinstance(fallback, patchgan.Discriminator)
    assert (
        "PatchGAN, since config.discriminator.features names no weights" in capfd.readouterr().err
    )
    with pytest.raises(interfaces.UserError, match="did you mean 'patchgan'"):
        built(dict(name="patchgam"))
    with pytest.raises(interfaces.UserError, match="no argument 'widths'"):
        built(dict(name="patchgan", widths=(4,)))
    for wrong in (True, "color", ("colour",), ("color", "color")):
        with pytest.raises(interfaces.UserError, match="augmented must be"):
            gans.GAN(augmented=wrong)


# ---------------------------------------------------------------- the discriminator's step


class Linear(nnx.Module):
    """A discriminator whose gradients one can write down: a weight per colour and pixel."""

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


def stepped(key, **gan):
    graph, discriminator = state_of(Linear())
    gan = gans.GAN(weight=1.0, **gan)
    averages = {"real": jnp.asarray(0.5), "fake": jnp.asarray(-0.25)}
    step = gans.discriminator_step(gan, graph, PLAIN)
    after, moved, seen = jax.jit(step)(discriminator, averages, *pair(key), key)
    kernel = np.asarray(discriminator.params["kernel"], np.float64)
    change = (kernel - np.asarray(after.params["kernel"], np.float64)) / RATE
    return kernel, change, moved, seen, after


def wide(key):
    """(real, reconstructed) on [-1, 1] in float64."""
    return [2 * np.asarray(image, np.float64) - 1 for image in pair(key)]


def test_the_discriminator_descends_the_loss_that_is_named(key):
    real, fake = wide(key)
    for name, factor in (("hinge", 0.5), ("hinge_sum", 1.0)):
        kernel, change, moved, seen, after = stepped(key, loss=name, loss_weight=2.0)
        logits = [np.einsum("bhwc,hwc->b", image, kernel) + 0.1 for image in (real, fake)]
        wrong = [logits[0] < 1, logits[1] > -1]
        gradient = np.einsum("bhwc,b->hwc", fake, wrong[1]) - np.einsum(
            "bhwc,b->hwc", real, wrong[0]
        )
        np.testing.assert_allclose(change, 2 * factor * gradient / 3, atol=2e-5)
        np.testing.assert_allclose(
            [seen["logits_real"], seen["logits_fake"]],
            [logit.mean() for logit in logits],
            atol=1e-5,
        )
        expected = [0.999 * 0.5 + 1e-3 * logits[0].mean(), 0.999 * -0.25 + 1e-3 * logits[1].mean()]
        np.testing.assert_allclose([moved["real"], moved["fake"]], expected, rtol=1e-5)
        assert after.step == 1


def test_penalties_are_added_with_their_weights(key):
    kernel, plain, _, seen, _ = stepped(key)
    assert set(seen) == {"discriminator_loss", "logits_real", "logits_fake"}
    # the image is in [0, 1], the discriminator sees [-1, 1]: a logit's gradient is twice the kernel
    _, change, _, found, _ = stepped(key, r1=0.1)
    np.testing.assert_allclose(found["r1"], 4 * (kernel**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(change - plain, 0.1 * 8 * kernel, atol=2e-5)
    np.testing.assert_allclose(
        found["discriminator_loss"], seen["discriminator_loss"] + 0.1 * found["r1"], rtol=1e-5
    )
    for form in ("logits", "means"):
        _, change, _, found, _ = stepped(key, lecam=0.1, lecam_form=form)
        assert found["lecam"] > 0 and np.abs(change - plain).max() > 1e-3
        np.testing.assert_allclose(
            found["discriminator_loss"],
            seen["discriminator_loss"] + 0.1 * found["lecam"],
            rtol=1e-5,
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


def test_the_tokenizer_gets_no_gradient_from_the_discriminators_step(key):
    graph, discriminator = state_of(Linear())
    gan = gans.GAN(weight=1.0, lecam=0.1, r1=0.1)
    step = gans.discriminator_step(gan, graph, PLAIN)

    def through(reconstructed):
        after, _, seen = step(discriminator, losses.averages(), pair(key)[0], reconstructed, key)
        return (
            sum(jnp.sum(leaf) for leaf in jax.tree.leaves(after.params))
            + seen["discriminator_loss"]
        )

    assert not np.asarray(jax.jit(jax.grad(through))(pair(key)[1])).any()


# ---------------------------------------------------------------- a frozen feature network

TINY = dict(size=8, patch=4, width=6, depth=2, heads=2, levels=(0, 1), kernel=3)


@pytest.fixture(scope="module")
def sighted():
    """(graph, state) of a discriminator on features, filled with numbers."""
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
    graph, discriminator = sighted
    gan = gans.GAN(weight=1.0, network=dict(name="feature_heads"))
    step = jax.jit(gans.discriminator_step(gan, graph, PLAIN))
    real, fake = pair(key, (2, 8, 8, 3))
    after, _, seen = step(discriminator, losses.averages(), real, fake, key)
    before, now = (parameters.paths({"p": s.params, "s": s.stats}) for s in (discriminator, after))
    assert np.isfinite(seen["discriminator_loss"]) and any("trunk" in path for path in before)
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
    assert not np.isfinite(seen["discriminator_loss"]) and broken.skipped == 1 and broken.step == 2
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same((broken.params, broken.stats, averages), (after.params, after.stats, losses.averages()))


def test_logits_that_are_infinite_move_no_average(key):
    """The hinge of an infinite logit is 0, and so is its gradient: neither tells."""
    graph, discriminator = state_of(Linear())
    step = gans.discriminator_step(gans.GAN(weight=1.0), graph, PLAIN)
    real, fake = pair(key)
    huge = discriminator.replace(params={**discriminator.params, "bias": jnp.float32(jnp.inf)})
    after, averages, _ = step(huge, losses.averages(), real, -fake, key)
    assert after.skipped == 1
    assert (averages["real"], averages["fake"]) == (0, 0)


def test_the_tokenizer_is_scored_by_running_statistics(sighted, key):
    """An image's logits do not depend on the others of its batch; in its own loss they do."""
    graph, discriminator = sighted
    network = parameters.merge(graph, discriminator.params, discriminator.stats)
    image = pair(key, (3, 8, 8, 3))[0]

    @jax.jit
    def seen(network):
        """The first image's logits, each way, among others and alone."""
        looks = gans.views(network, gans.GAN(weight=1.0), key)
        return [(look(image)[:1], look(image[:1])) for look in looks]

    learning, scoring = seen(network)
    np.testing.assert_allclose(*scoring, atol=1e-5)
    assert np.abs(learning[0] - learning[1]).max() > 1e-2


# ---------------------------------------------------------------- the whole step


@pytest.fixture(scope="module")
def match(request):
    """A tokenizer, a discriminator and a batch, small enough for a gradient or two."""
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
    gan = gans.GAN(weight=1.0, network=network)
    graph_of, discriminator = made(lambda: gans.build(gan, settings, rngs=nnx.Rngs(0)))
    batch = {"image": np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)}
    networks = {"model": model, "discriminator": discriminator, "averages": losses.averages()}
    return settings, network, {"model": graph, "discriminator": graph_of}, networks, batch


def copied(networks):
    return jax.tree.map(jnp.copy, networks)  # a step donates what it gets


def by_hand(graphs, networks, discriminator_params, batch, tokenizer_step):
    """Gradients of the loss and of its adversarial term, as the definition has them."""
    image = jnp.asarray(batch["image"], jnp.float32) / 255
    model, rival = networks["model"], networks["discriminator"]

    def terms(params):
        made = parameters.merge(graphs["model"], params, model.stats)
        quantized = made.quantizer(made.latents(image))
        reconstructed = made.decode_unclipped(quantized.latents_BPC)
        error = 2 * (reconstructed - image)
        fidelity = 0.5 * jnp.abs(error).mean() + (error**2).mean()
        fidelity += quantized.losses["codebook"] + 0.25 * quantized.losses["commitment"]
        discriminator = parameters.merge(graphs["discriminator"], discriminator_params, rival.stats)
        return fidelity, tokenizer_step(discriminator(2 * reconstructed - 1))

    return jax.jit(jax.jacrev(terms))(model.params)


@pytest.mark.parametrize(
    ("first", "limit"), [("tokenizer", 1e4), ("discriminator", 1e4), ("tokenizer", 0.0)]
)
def test_a_step_against_the_discriminator(match, first, limit, monkeypatch):
    """The tokenizer sees the discriminator of before, or the one that has just moved."""
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    gan = gans.GAN(
        weight=0.7, limit=limit, network=network, first=first, generator_loss="non_saturating"
    )
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, gan, graphs, PLAIN, stage, strength=0.5)
    given = copied(networks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a donated array that nothing reuses
        after, scalars, tokens = step(given, batch, {})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    seen = (after if first == "discriminator" else networks)["discriminator"].params
    softplus = lambda logits: jnp.logaddexp(0, -logits).mean()  # noqa: E731
    reconstruction, adversarial = by_hand(graphs, networks, seen, batch, softplus)
    sizes = [
        np.linalg.norm(tree["decoder"]["conv_out"]["kernel"])
        for tree in (reconstruction, adversarial)
    ]
    weight = 0.5 * 0.7 * (sizes[0] / (sizes[1] + 1e-4) if limit else 1.0)
    np.testing.assert_allclose(scalars["adversarial_weight"], weight, rtol=1e-4)
    start, end = networks["model"].params, after["model"].params
    for path, leaf in parameters.paths(start).items():
        gradient = (
            parameters.paths(reconstruction)[path] + weight * parameters.paths(adversarial)[path]
        )
        np.testing.assert_allclose(
            (leaf - parameters.paths(end)[path]) / RATE,
            gradient,
            rtol=1e-3,
            atol=1e-5,
            err_msg=path,
        )
    # the discriminator moves by the same gradient in both orders: the image it sees is the same
    moved = jax.jit(gans.discriminator_step(gan, graphs["discriminator"], PLAIN))
    made = parameters.merge(graphs["model"], start, networks["model"].stats)
    image = jnp.asarray(batch["image"], jnp.float32) / 255
    reconstructed = jax.jit(lambda made: made.reconstruct(image)[0])(made)
    discriminator, averages, _ = moved(
        networks["discriminator"], networks["averages"], image, reconstructed, jax.random.key(0)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (discriminator.params, averages),
        (after["discriminator"].params, after["averages"]),
    )
    assert set(scalars) >= {
        "l1",
        "l2",
        "discriminator_loss",
        "logits_real",
        "gradient_norm",
        "learning_rate",
    }
    assert all(np.isfinite(value) for value in scalars.values()) and tokens.shape == (4, 4, 1)
    assert after["model"].step == after["discriminator"].step == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_the_adaptive_weight_costs_no_second_pass_backwards(match, parts, monkeypatch):
    """But the last layer's, and of a batch in parts another pass forwards, which costs less."""
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    settings = ml_collections.ConfigDict({**settings, "accumulate": parts})
    (stage,) = stages.plan(settings)

    def operations(limit):
        gan = gans.GAN(weight=0.7, limit=limit, network=network)
        step = tokenizer_step.adversarial_step(settings, gan, graphs, PLAIN, stage, strength=1.0)
        return flops.of_training(step, networks, batch, {})

    made = parameters.merge(graphs["model"], networks["model"].params, networks["model"].stats)
    last = flops.of(
        type(made.decoder.conv_out).__call__, made.decoder.conv_out, jnp.ones((4, 2, 2, 8))
    )
    more = operations(1e4) - operations(0.0) - 2 * last
    assert more == 0 if parts == 1 else 0 < more < 0.5 * operations(0.0)


def test_of_parts_one_gradient_is_kept(match, monkeypatch):
    """The weight is that of both gradients of the whole batch, and known before they are taken."""
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    settings = ml_collections.ConfigDict({**settings, "accumulate": 2})
    (stage,) = stages.plan(settings)
    gan = gans.GAN(weight=0.7, limit=1e4, network=network)
    step = tokenizer_step.adversarial_step(settings, gan, graphs, PLAIN, stage, strength=1.0)
    (call,) = jax.make_jaxpr(step)(networks, batch, {}).eqns
    carried = [
        sum(v.aval.size for v in e.outvars[: e.params["num_carry"]])
        for e in call.params["jaxpr"].eqns
        if e.primitive.name == "scan"
    ]
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(networks[name].params))
        for name in ("model", "discriminator")
    ]
    assert sorted(carried) == sorted([0, *sizes])


def test_before_the_adversarial_term_begins_only_the_discriminator_learns(match, monkeypatch):
    settings, network, graphs, networks, batch = match
    monkeypatch.setattr(stages, "optimizer", lambda settings, stage: PLAIN)
    gan = gans.GAN(weight=0.7, limit=0.0, network=network, warmup=0.5)
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, gan, graphs, PLAIN, stage, strength=1.0)
    after, scalars, _ = step(copied(networks), batch, {})
    alone = tokenizer_step.plain_step(settings, graphs, stage)
    plain, _, _ = alone(copied(networks), batch, {})
    assert scalars["adversarial_weight"] == 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        after["model"].params,
        plain["model"].params,
    )
    kernel = lambda networks: np.asarray(networks["discriminator"].params["first"]["kernel"])  # noqa: E731
    assert (kernel(after) != kernel(networks)).all() and (kernel(plain) == kernel(networks)).all()
    # the same program, later: now the term has a weight
    later = copied(networks)
    later["model"] = later["model"].replace(step=jnp.asarray(5, jnp.int32))
    np.testing.assert_allclose(step(later, batch, {})[1]["adversarial_weight"], 0.7, rtol=1e-6)


def test_a_step_that_is_not_finite_moves_nothing_of_either(match, monkeypatch):
    """A pixel that is no number; then a discriminator's loss that is none. Both are counted."""
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
    for name in ("model", "discriminator"):
        moments = optimizer.chain.init(networks[name].params)
        start[name] = networks[name].replace(opt_state=moments, skips=zero)
    start["model"] = start["model"].replace(ema=start["model"].params)
    gan = gans.GAN(weight=0.7, network=network, lecam=0.1)
    (stage,) = stages.plan(settings)
    step = tokenizer_step.adversarial_step(settings, gan, graphs, optimizer, stage, strength=1.0)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    moved = lambda a, b: np.any(np.asarray(a) != np.asarray(b))  # noqa: E731

    def stepped(given, corner, averages=None):
        image = batch["image"].copy()
        image[0, 0, 0, 0] = corner
        given = given if averages is None else {**given, "averages": averages}
        return *step(copied(given), {"image": image}, {})[:2], given

    def held(after, before):
        for name in ("model", "discriminator"):
            numbers = dict(step=0, skipped=0, skips=0)
            same(after[name].replace(**numbers), before[name].replace(**numbers))
            assert after[name].step == before[name].step + 1
        same(after["averages"], before["averages"])

    good, scalars, _ = stepped(start, 0)
    counts = ("skipped", "skips", "discriminator_skipped", "discriminator_skips")
    assert [scalars[name] for name in counts] == [0, 0, 0, 0]
    for name in ("params", "opt_state", "stats"):
        before, after = (jax.tree.leaves(getattr(n["model"], name)) for n in (start, good))
        assert any(map(moved, before, after)), name
    assert moved(good["averages"]["real"], 0.0)
    bad, scalars, before = stepped(good, 255)
    held(bad, before)
    assert [scalars[name] for name in counts] == [1, 1, 1, 1]
    nan = {"real": jnp.float32(jnp.nan), "fake": jnp.float32(0)}
    bad, scalars, before = stepped(
        bad, 0, averages=nan
    )  # only the discriminator's loss looks at them
    held(bad, before)
    assert [scalars[name] for name in counts] == [0, 1, 2, 2]
    after, scalars, _ = stepped(bad, 0, averages=good["averages"])  # and both go on
    assert [scalars[name] for name in counts] == [0, 1, 0, 2]
    for name in ("model", "discriminator"):
        before, now = (jax.tree.leaves(n[name].params) for n in (bad, after))
        assert any(map(moved, before, now))
        assert all(np.isfinite(leaf).all() for leaf in now)


def test_every_return_halves_the_discriminator_and_the_last_leaves_it_out():
    limits = types.SimpleNamespace(returns=3)
    strengths = [
        tokenizer_step.Steps(None, None, limits, None, None, returns).strength
        for returns in range(4)
    ]
    assert strengths == [1.0, 0.5, 0.25, 0.0]
