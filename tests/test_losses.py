"""Losses in closed form, and an adversarial game in which neither side leaks into the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces, losses


def pair(key):
    image, painted = jax.random.uniform(key, (2, 3, 8, 8, 3))
    return image, 1.5 * painted - 0.25


def test_reconstruction_is_measured_between_minus_one_and_one(key):
    image, painted = pair(key)
    a, b = (2 * np.asarray(x, np.float64) - 1 for x in (image, painted))
    found = losses.reconstruction(image, painted)
    np.testing.assert_allclose(found["l1"], np.abs(a - b).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["l2"], ((a - b) ** 2).mean(), rtol=1e-6)
    half = losses.reconstruction(image.astype(jnp.bfloat16), painted)
    assert found.keys() == half.keys() == {"l1", "l2"} and half["l2"].dtype == jnp.float32


def test_hinge_losses():
    real, fake = jnp.asarray([2.0, 0.5, -1.0]), jnp.asarray([-3.0, 0.0, 1.0])
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    np.testing.assert_allclose(losses.hinge_discriminator(real, fake), (2.5 / 3 + 1) / 2)
    np.testing.assert_allclose(losses.hinge_generator(fake), 2 / 3)


REAL, FAKE = jnp.asarray([[2.0, -1.0], [0.5, 0.0]]), jnp.asarray([[-3.0, 1.0], [0.0, 0.5]])


def entropy(x):
    return np.log1p(np.exp(np.asarray(x, np.float64)))


def test_sides_by_name():
    hinge = np.maximum(1 - REAL, 0).mean() + np.maximum(1 + FAKE, 0).mean()
    entropies = entropy(-REAL).mean() + entropy(FAKE).mean()
    critic = {
        "hinge": hinge / 2,
        "hinge_sum": hinge,
        "vanilla": entropies / 2,
        "non_saturating": entropies,
    }
    painter = {
        "hinge": 0.375,  # -(-3 + 1 + 0 + 0.5) / 4
        "non_saturating": entropy(-FAKE).mean(),
        "pooled": entropy([1.0, -0.25]).mean(),  # of the images' means -1 and 0.25
    }
    assert losses.DISCRIMINATOR.keys() == critic.keys()
    assert losses.GENERATOR.keys() == painter.keys()
    for name, wanted in critic.items():
        np.testing.assert_allclose(losses.DISCRIMINATOR[name](REAL, FAKE), wanted, rtol=1e-6)
    for name, wanted in painter.items():
        np.testing.assert_allclose(losses.GENERATOR[name](FAKE), wanted, rtol=1e-6)
    patches = FAKE.reshape(2, 1, 2, 1)  # a map of logits is pooled too
    np.testing.assert_allclose(losses.GENERATOR["pooled"](patches), painter["pooled"], rtol=1e-6)


@pytest.mark.parametrize("name", losses.GENERATOR)
def test_every_painter_wants_larger_logits(name):
    gradient = jax.grad(losses.GENERATOR[name])(FAKE)
    assert np.all(np.asarray(gradient) < 0)


def test_averages_move_towards_the_means():
    averages = losses.averages()
    for _ in range(3):
        averages = losses.moved(averages, REAL, FAKE, decay=0.9)
    kept = 1 - 0.9**3
    np.testing.assert_allclose(averages["real"], kept * 0.375, rtol=1e-5)
    np.testing.assert_allclose(averages["fake"], kept * -0.375, rtol=1e-5)
    # the means, which critic_loss reports, serve as well as the logits
    once = losses.moved(losses.averages(), REAL.mean(), FAKE.mean())
    for name, value in losses.moved(losses.averages(), REAL, FAKE).items():
        np.testing.assert_allclose(once[name], value, rtol=1e-6)


def test_lecam_in_both_published_forms():
    averages = {"real": jnp.asarray(0.2), "fake": jnp.asarray(-0.1)}
    means = (0.375 + 0.1) ** 2 + (0.2 + 0.375) ** 2
    np.testing.assert_allclose(losses.LECAM["means"](REAL, FAKE, averages), means, rtol=1e-6)
    real, fake = 0.999 * 0.2 + 0.001 * 0.375, 0.999 * -0.1 + 0.001 * -0.375
    logits = (np.maximum(np.asarray(REAL) - fake, 0) ** 2).mean()
    logits += (np.maximum(real - np.asarray(FAKE), 0) ** 2).mean()
    np.testing.assert_allclose(losses.LECAM["logits"](REAL, FAKE, averages), logits, rtol=1e-6)
    # the averages that have seen the batch are constants: the gradient is that of the logits alone
    slope = jax.grad(losses.LECAM["logits"])(REAL, FAKE, averages)
    wanted = 2 * np.maximum(np.asarray(REAL) - fake, 0) / 4
    np.testing.assert_allclose(slope, wanted, rtol=1e-5)


def test_r1_is_the_squared_slope_of_the_critic(key):
    image, _ = pair(key)
    params = np.asarray([0.2, -0.4, 0.3], np.float64)
    values = (2 * np.asarray(image, np.float64) - 1) @ params - 0.3
    # d sum(tanh) / d image of one image, the image in [0, 1]
    slopes = (1 - np.tanh(values) ** 2)[..., None] * 2 * params
    wanted = (slopes**2).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(
        losses.r1(judge(jnp.asarray(params, "f4")), image), wanted, rtol=1e-4
    )


def test_the_critic_loss_is_the_sum_of_its_terms(key):
    image, painted = pair(key)
    critic = judge(jnp.asarray([0.2, -0.4, 0.3]))
    real, fake = critic(2 * image - 1), critic(2 * painted - 1)
    averages = {"real": jnp.asarray(0.2), "fake": jnp.asarray(-0.1)}
    total, seen = losses.critic_loss(
        critic,
        image,
        painted,
        averages,
        loss="non_saturating",
        lecam="logits",
        lecam_weight=0.05,
        r1_weight=10.0,
    )
    wanted = losses.non_saturating_discriminator(real, fake)
    wanted += 0.05 * losses.lecam_logits(real, fake, averages) + 10 * losses.r1(critic, image)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert seen.keys() == {"critic", "critic_real", "critic_fake", "lecam", "r1"}
    plain, seen = losses.critic_loss(critic, image, painted, averages, loss="non_saturating")
    np.testing.assert_allclose(plain, losses.non_saturating_discriminator(real, fake), rtol=1e-6)
    assert seen.keys() == {"critic", "critic_real", "critic_fake"}
    painter = losses.adversarial(critic, painted, loss="pooled")
    np.testing.assert_allclose(painter, losses.pooled_generator(fake), rtol=1e-6)


def test_penalties_train_the_critic(key):
    image, painted = pair(key)
    params, averages = jnp.asarray([0.2, -0.4, 0.3]), losses.averages()

    def loss(params, **weights):
        return losses.critic_loss(judge(params), image, painted, averages, **weights)[0]

    plain = jax.grad(loss)(params)
    for weights in (dict(lecam_weight=1.0), dict(r1_weight=1.0)):
        gradient = jax.grad(lambda p, weights=weights: loss(p, **weights))(params)
        assert np.all(np.isfinite(gradient)) and np.abs(gradient - plain).max() > 1e-3


def test_wrong_names_are_named(key):
    image, painted = pair(key)
    critic = judge(jnp.asarray([0.2, -0.4, 0.3]))
    with pytest.raises(interfaces.UserError, match="critic.*hinge, hinge_sum, vanilla.*wgan"):
        losses.critic_loss(critic, image, painted, loss="wgan")
    with pytest.raises(interfaces.UserError, match="painter.*hinge, non_saturating, pooled.*wgan"):
        losses.adversarial(critic, painted, loss="wgan")
    with pytest.raises(interfaces.UserError, match="LeCam.*means, logits.*both"):
        averages = losses.averages()
        losses.critic_loss(critic, image, painted, averages, lecam="both", lecam_weight=1.0)
    with pytest.raises(ValueError, match="pass losses.averages"):
        losses.critic_loss(critic, image, painted, lecam_weight=1.0)


def test_consistency_is_a_mean_square():
    np.testing.assert_allclose(losses.consistency(REAL, FAKE), np.square(REAL - FAKE).mean())


def judge(params):
    return lambda image_BHW3: jnp.tanh(jnp.einsum("BHWC,C->BHW", image_BHW3, params) - 0.3)


def test_the_critic_loss_stops_at_the_painter(key):
    image, painted = pair(key)
    params = jnp.asarray([0.2, -0.4, 0.3])

    def loss(params, painted):
        return losses.critic_loss(judge(params), image, painted)[0]

    to_params, to_painted = jax.grad(loss, (0, 1))(params, painted)
    assert np.abs(to_params).min() > 0
    np.testing.assert_array_equal(to_painted, 0)
    total, seen = losses.critic_loss(judge(params), image, painted)
    real, fake = judge(params)(2 * image - 1), judge(params)(2 * painted - 1)
    np.testing.assert_allclose(total, losses.hinge_discriminator(real, fake))
    np.testing.assert_allclose(seen["critic_real"], real.mean())
    np.testing.assert_allclose(seen["critic_fake"], fake.mean())
    assert seen["critic"] == total


def test_the_adversarial_loss_reaches_the_painter_and_not_the_critic(key):
    _, painted = pair(key)
    scale, params = jnp.asarray(0.7), jnp.asarray([0.2, -0.4, 0.3])
    # as train_tokenizer calls it: the painter's parameters are differentiated, the critic is closed
    # over; its own gradient exists only for whoever asks for it by name
    gradient = jax.grad(lambda s: losses.adversarial(judge(params), s * painted))(scale)
    values = np.asarray(2 * 0.7 * painted - 1, np.float64) @ np.asarray(params, np.float64) - 0.3
    slope = (1 - np.tanh(values) ** 2) * (2 * np.asarray(painted, np.float64) @ np.asarray(params))
    np.testing.assert_allclose(gradient, -slope.mean(), rtol=1e-4)


def test_adaptive_weight():
    a, b = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[0.0, 2.0]])
    np.testing.assert_allclose(losses.adaptive_weight(a, b), 5 / (2 + 1e-4), rtol=1e-6)
    var = dict(floor=0.015, limit=2.0, epsilon=1e-6)
    np.testing.assert_allclose(losses.adaptive_weight(b, a, **var), 2 / (5 + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(losses.adaptive_weight(0.01 * b, a, **var), 0.015)
    np.testing.assert_allclose(losses.adaptive_weight(a, 0.1 * b, **var), 2.0)
    zero = jnp.zeros_like(a)
    assert losses.adaptive_weight(zero, b) == 0
    assert losses.adaptive_weight(zero, zero) == 0
    assert losses.adaptive_weight(a, zero) == 1e4  # clamped, and no division by zero
    for left, right in ((a, b), (a, zero)):
        gradients = jax.grad(losses.adaptive_weight, (0, 1))(left, right)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_adaptive_weight_stays_finite(scale):
    weight = losses.adaptive_weight(jnp.full((4, 4), 1.0), jnp.full((4, 4), scale))
    assert np.isfinite(weight) and 0 <= weight <= 1e4
