"""Losses in closed form, and an adversarial pair in which neither side leaks into the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces, losses


def pair(key):
    image, reconstructed = jax.random.uniform(key, (2, 3, 8, 8, 3))
    return image, 1.5 * reconstructed - 0.25


def test_reconstruction_is_measured_between_minus_one_and_one(key):
    image, reconstructed = pair(key)
    a, b = (2 * np.asarray(x, np.float64) - 1 for x in (image, reconstructed))
    found = losses.reconstruction(image, reconstructed)
    np.testing.assert_allclose(found["l1"], np.abs(a - b).mean(), rtol=1e-6)
    np.testing.assert_allclose(found["l2"], ((a - b) ** 2).mean(), rtol=1e-6)
    half = losses.reconstruction(image.astype(jnp.bfloat16), reconstructed)
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
    discriminator = {
        "hinge": hinge / 2,
        "hinge_sum": hinge,
        "vanilla": entropies / 2,
        "non_saturating": entropies,
    }
    tokenizer = {
        "hinge": 0.375,  # -(-3 + 1 + 0 + 0.5) / 4
        "non_saturating": entropy(-FAKE).mean(),
        "pooled": entropy([1.0, -0.25]).mean(),  # of the images' means -1 and 0.25
    }
    assert losses.DISCRIMINATOR.keys() == discriminator.keys()
    assert losses.GENERATOR.keys() == tokenizer.keys()
    for name, wanted in discriminator.items():
        np.testing.assert_allclose(losses.DISCRIMINATOR[name](REAL, FAKE), wanted, rtol=1e-6)
    for name, wanted in tokenizer.items():
        np.testing.assert_allclose(losses.GENERATOR[name](FAKE), wanted, rtol=1e-6)
    patches = FAKE.reshape(2, 1, 2, 1)  # a map of logits is pooled too
    np.testing.assert_allclose(losses.GENERATOR["pooled"](patches), tokenizer["pooled"], rtol=1e-6)


@pytest.mark.parametrize("name", losses.GENERATOR)
def test_every_generator_loss_wants_larger_logits(name):
    gradient = jax.grad(losses.GENERATOR[name])(FAKE)
    assert np.all(np.asarray(gradient) < 0)


def test_averages_move_towards_the_means():
    averages = losses.averages()
    for _ in range(3):
        averages = losses.moved(averages, REAL, FAKE, decay=0.9)
    kept = 1 - 0.9**3
    np.testing.assert_allclose(averages["real"], kept * 0.375, rtol=1e-5)
    np.testing.assert_allclose(averages["fake"], kept * -0.375, rtol=1e-5)
    # the means, which discriminator_loss reports, serve as well as the logits
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


def test_r1_is_the_squared_slope_of_the_discriminator(key):
    image, _ = pair(key)
    params = np.asarray([0.2, -0.4, 0.3], np.float64)
    values = (2 * np.asarray(image, np.float64) - 1) @ params - 0.3
    # d sum(tanh) / d image of one image, the image in [0, 1]
    slopes = (1 - np.tanh(values) ** 2)[..., None] * 2 * params
    wanted = (slopes**2).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(
        losses.r1(linear(jnp.asarray(params, "f4")), image), wanted, rtol=1e-4
    )


def test_the_discriminator_loss_is_the_sum_of_its_terms(key):
    image, reconstructed = pair(key)
    discriminator = linear(jnp.asarray([0.2, -0.4, 0.3]))
    real, fake = discriminator(2 * image - 1), discriminator(2 * reconstructed - 1)
    averages = {"real": jnp.asarray(0.2), "fake": jnp.asarray(-0.1)}
    total, seen = losses.discriminator_loss(
        discriminator,
        image,
        reconstructed,
        averages,
        loss="non_saturating",
        lecam="logits",
        lecam_weight=0.05,
        r1_weight=10.0,
    )
    wanted = losses.non_saturating_discriminator(real, fake)
    wanted += 0.05 * losses.lecam_logits(real, fake, averages) + 10 * losses.r1(
        discriminator, image
    )
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert seen.keys() == {"discriminator_loss", "logits_real", "logits_fake", "lecam", "r1"}
    plain, seen = losses.discriminator_loss(
        discriminator, image, reconstructed, averages, loss="non_saturating"
    )
    np.testing.assert_allclose(plain, losses.non_saturating_discriminator(real, fake), rtol=1e-6)
    assert seen.keys() == {"discriminator_loss", "logits_real", "logits_fake"}
    tokenizer = losses.adversarial(discriminator, reconstructed, loss="pooled")
    np.testing.assert_allclose(tokenizer, losses.pooled_generator(fake), rtol=1e-6)


def test_penalties_train_the_discriminator(key):
    image, reconstructed = pair(key)
    params, averages = jnp.asarray([0.2, -0.4, 0.3]), losses.averages()

    def loss(params, **weights):
        return losses.discriminator_loss(linear(params), image, reconstructed, averages, **weights)[
            0
        ]

    plain = jax.grad(loss)(params)
    for weights in (dict(lecam_weight=1.0), dict(r1_weight=1.0)):
        gradient = jax.grad(lambda p, weights=weights: loss(p, **weights))(params)
        assert np.all(np.isfinite(gradient)) and np.abs(gradient - plain).max() > 1e-3


def test_wrong_names_are_named(key):
    image, reconstructed = pair(key)
    discriminator = linear(jnp.asarray([0.2, -0.4, 0.3]))
    with pytest.raises(
        interfaces.UserError, match="discriminator.*hinge, hinge_sum, vanilla.*wgan"
    ):
        losses.discriminator_loss(discriminator, image, reconstructed, loss="wgan")
    with pytest.raises(
        interfaces.UserError, match="generator loss.*hinge, non_saturating, pooled.*wgan"
    ):
        losses.adversarial(discriminator, reconstructed, loss="wgan")
    with pytest.raises(interfaces.UserError, match="LeCam.*means, logits.*both"):
        averages = losses.averages()
        losses.discriminator_loss(
            discriminator, image, reconstructed, averages, lecam="both", lecam_weight=1.0
        )
    with pytest.raises(ValueError, match="pass losses.averages"):
        losses.discriminator_loss(discriminator, image, reconstructed, lecam_weight=1.0)


def test_consistency_is_a_mean_square():
    np.testing.assert_allclose(losses.consistency(REAL, FAKE), np.square(REAL - FAKE).mean())


def test_consistency_asks_for_no_look_twice(key):
    """Each image is seen once in each of its two ways, and trains by both."""
    image, reconstructed = pair(key)
    asked = []

    def look(name, factor):
        def seen(image_BHW3):
            asked.append(name)
            return factor * image_BHW3.mean(-1)

        return seen

    once = look("real", 1.0), look("fake", 2.0)
    again = look("real again", 1.5), look("fake again", 3.0)
    total, seen = losses.discriminator_loss(
        *(once[0], image, reconstructed),
        on_fake=once[1],
        again=again,
        consistency_weight=4.0,
    )
    assert sorted(asked) == ["fake", "fake again", "real", "real again"]
    real, fake = ((2 * each - 1).mean(-1) for each in (image, reconstructed))
    wanted = jnp.mean((0.5 * real) ** 2) + jnp.mean(fake**2)
    np.testing.assert_allclose(seen["consistency"], wanted, rtol=1e-5)
    np.testing.assert_allclose(total, seen["discriminator_loss"] + 4 * wanted, rtol=1e-5)


def linear(params):
    return lambda image_BHW3: jnp.tanh(jnp.einsum("BHWC,C->BHW", image_BHW3, params) - 0.3)


def test_the_discriminator_loss_stops_at_the_tokenizer(key):
    image, reconstructed = pair(key)
    params = jnp.asarray([0.2, -0.4, 0.3])

    def loss(params, reconstructed):
        return losses.discriminator_loss(linear(params), image, reconstructed)[0]

    to_params, to_reconstructed = jax.grad(loss, (0, 1))(params, reconstructed)
    assert np.abs(to_params).min() > 0
    np.testing.assert_array_equal(to_reconstructed, 0)
    total, seen = losses.discriminator_loss(linear(params), image, reconstructed)
    real, fake = linear(params)(2 * image - 1), linear(params)(2 * reconstructed - 1)
    np.testing.assert_allclose(total, losses.hinge_discriminator(real, fake))
    np.testing.assert_allclose(seen["logits_real"], real.mean())
    np.testing.assert_allclose(seen["logits_fake"], fake.mean())
    assert seen["discriminator_loss"] == total


def test_the_adversarial_loss_reaches_the_tokenizer_and_not_the_discriminator(key):
    _, reconstructed = pair(key)
    scale, params = jnp.asarray(0.7), jnp.asarray([0.2, -0.4, 0.3])
    # as train_tokenizer calls it: the tokenizer's parameters are differentiated, the discriminator
    # is closed over; its own gradient exists only for whoever asks for it by name
    gradient = jax.grad(
        lambda s: losses.adversarial(linear(params), s * reconstructed, loss="hinge")
    )(scale)
    values = (
        np.asarray(2 * 0.7 * reconstructed - 1, np.float64) @ np.asarray(params, np.float64) - 0.3
    )
    slope = (1 - np.tanh(values) ** 2) * (
        2 * np.asarray(reconstructed, np.float64) @ np.asarray(params)
    )
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
