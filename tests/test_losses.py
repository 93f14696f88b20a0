"""Losses in closed form, and an adversarial game in which neither side leaks into the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import losses


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
