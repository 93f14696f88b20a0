"""The continuous bottleneck: moments of its draws, its KL in closed form and by Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.quantizers import gaussian


def moments(key, batch=3, positions=4, channels=2):
    return jax.random.normal(key, (batch, positions, 2 * channels))


def test_draws_have_the_moments_that_the_encoder_gave(key):
    quantizer = gaussian.Quantizer(2)
    one_BPC = moments(key, 1)
    many_BPC = jnp.broadcast_to(one_BPC, (20_000, 4, 4))
    drawn = np.asarray(quantizer(many_BPC, key=key).latents_BPC)
    mean, logvar = np.split(np.asarray(one_BPC)[0], 2, -1)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(drawn.var(0), np.exp(logvar), rtol=0.05)
    assert quantizer(one_BPC).tokens_BLG is None and quantizer.layout is None
    np.testing.assert_array_equal(quantizer(one_BPC).latents_BPC[0], mean)
    np.testing.assert_array_equal(quantizer.mode(one_BPC)[0], mean)


def test_kl_is_the_expected_log_ratio(key):
    """Closed form, and log q(z) - log p(z) over draws."""
    quantizer = gaussian.Quantizer(2)
    latents_BPC = moments(key)
    mean, logvar = np.split(np.asarray(latents_BPC, np.float64), 2, -1)
    expected = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(-1)
    np.testing.assert_allclose(quantizer.divergence(latents_BPC), expected, rtol=1e-5)
    np.testing.assert_allclose(
        quantizer(latents_BPC).losses["kl"], expected.sum(-1).mean(), rtol=1e-5
    )
    draws = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=(20_000, *mean.shape))
    ratio = -0.5 * ((draws - mean) ** 2 / np.exp(logvar) + logvar) + 0.5 * draws**2
    np.testing.assert_allclose(ratio.mean(0).sum(-1), expected, atol=0.1)
    standard = jnp.zeros((1, 4, 4))
    assert not np.asarray(quantizer.divergence(standard)).any()


def test_gradient_of_a_draw_goes_to_both_moments(key):
    """z = m + exp(l / 2) e: dz/dm = 1, dz/dl = (z - m) / 2."""
    quantizer = gaussian.Quantizer(2)
    latents_BPC = moments(key)
    gradient = jax.grad(lambda x: quantizer(x, key=key).latents_BPC.sum())(latents_BPC)
    drawn = quantizer(latents_BPC, key=key).latents_BPC
    np.testing.assert_array_equal(gradient[..., :2], 1)
    np.testing.assert_allclose(gradient[..., 2:], (drawn - latents_BPC[..., :2]) / 2, atol=1e-6)


def test_wild_variances_stay_finite(key):
    quantizer = gaussian.Quantizer(1)
    wild_BPC = jnp.asarray([[[0.0, 1e9], [0.0, -1e9]]])
    np.testing.assert_array_equal(quantizer.moments(wild_BPC)[1][0, :, 0], [20.0, -30.0])
    assert np.isfinite(quantizer(wild_BPC, key=key).latents_BPC).all()
    assert np.isfinite(jax.grad(lambda x: quantizer(x).losses["kl"])(wild_BPC)).all()


def test_it_has_no_tokens():
    quantizer = gaussian.Quantizer(3)
    assert quantizer.inputs == 6 and quantizer.channels == 3
    for method in (quantizer.encode, quantizer.decode):
        with pytest.raises(UserError, match="no tokens"):
            method(jnp.zeros((1, 1, 6)))
    with pytest.raises(ValueError, match="channels must be a whole number from 1"):
        gaussian.Quantizer(0)
