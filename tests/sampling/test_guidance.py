import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces
from tokgen.sampling import guidance, sampler

STEPS = 8


def _logits(seed: int, shape: tuple[int, ...] = (2, 3, 2, 16)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 4


def _half_cosine(ratio: float) -> float:
    return (1 - math.cos(math.pi * ratio)) / 2


# Each system as it is published, in its own convention, and the weights that say the same here.
def _llamagen(c, u, i):
    return u + 4.0 * (c - u)


def _titok_linear(c, u, i):
    return c + 3.0 * (i / STEPS) * (c - u)


def _rar(c, u, i):
    return u + (1 + 5.0 * _half_cosine((i / STEPS) ** 2.75)) * (c - u)


def _maskgen(c, u, i):
    return c + (1 + (3.0 - 1) * _half_cosine((i + 1) / STEPS)) * (c - u)


def _maskbit(c, u, i):
    return c + 7.1 * _half_cosine((i / STEPS) ** 3) * (c - u)


def _mage(c, u, i):
    return c + 6.0 * (i + 1) / STEPS * (c - u)


def _var(c, u, i):
    t = 1.5 * i / (STEPS - 1)
    return (1 + t) * c - t * u


def _limited(c, u, i):
    return u + 2.0 * (c - u) if i in (2, 3, 4) else c


@pytest.mark.parametrize(
    "published, weights",
    [
        (_llamagen, guidance.constant(4.0, STEPS)),
        (_titok_linear, guidance.linear(1 + 3.0, STEPS)),
        (_rar, guidance.power_cosine(6.0, STEPS, 2.75)),
        (_maskgen, tuple(1 + s for s in guidance.cosine(3.0, STEPS))),
        (_maskbit, guidance.power_cosine(1 + 7.1, STEPS, 3)),
        (_mage, guidance.linear(1 + 6.0, STEPS)[1:] + (1 + 6.0,)),
        (_var, guidance.per_scale(1.5, STEPS)),
        (_limited, guidance.interval(2.0, STEPS, 2, 4)),
    ],
)
def test_weights_say_what_the_published_systems_do(published, weights):
    assert len(weights) == STEPS
    c, u = _logits(0), _logits(1)
    for i, weight in enumerate(weights):
        expected = published(c.astype(np.float64), u.astype(np.float64), i)
        merged = guidance.merge(jnp.asarray(c), jnp.asarray(u), weight)
        np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-4)


def test_schedules_begin_and_end_where_they_say():
    # first, middle, last of n = 4 by hand; cos(pi/4) = sqrt(1/2)
    corner = (1 - math.sqrt(0.5)) / 2
    np.testing.assert_allclose(guidance.linear(5, 4), [1, 2, 3, 4])
    np.testing.assert_allclose(guidance.cosine(5, 4), [1 + 4 * corner, 3, 5 - 4 * corner, 5])
    np.testing.assert_allclose(guidance.power_cosine(5, 4), [1, 1 + 4 * corner, 3, 5 - 4 * corner])
    np.testing.assert_allclose(guidance.power_cosine(5, 4, 0.5)[1], 3)  # (1/4)^(1/2) = 1/2
    np.testing.assert_allclose(guidance.per_scale(1.5, 4), [1, 1.5, 2, 2.5])
    assert guidance.interval(3, 5, 1, 2) == (1, 3, 3, 1, 1)
    assert guidance.interval(3, 2, 0, 1) == (3, 3)


def test_every_schedule_of_weight_1_is_unguided():
    for name, settings in [
        ("constant", {}),
        ("linear", {}),
        ("cosine", {}),
        ("power_cosine", {"power": 2.5}),
        ("interval", {"first": 1, "last": 3}),
    ]:
        assert guidance.schedule(name, 1.0, STEPS, **settings) == (1.0,) * STEPS
    assert guidance.schedule("per_scale", 0.0, STEPS) == (1.0,) * STEPS  # VAR's own number


def test_weight_1_gives_the_conditional_logits_bit_for_bit():
    c, u = jnp.asarray(_logits(2)), jnp.asarray(_logits(3))
    assert not np.array_equal(u + 1 * (c - u), c), "these logits cannot tell: rounding never bites"
    traced = jax.jit(guidance.merge)
    np.testing.assert_array_equal(guidance.merge(c, u, 1.0), c)
    np.testing.assert_array_equal(traced(c, u, jnp.float32(1)), c)
    np.testing.assert_array_equal(guidance.merge(c, u, 0.0), u)
    np.testing.assert_allclose(traced(c, u, jnp.float32(2.5)), guidance.merge(c, u, 2.5), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5, -1.0])
def test_padding_beyond_a_smaller_alphabet_stays_padding(weight):
    c, u = _logits(4), _logits(5)
    c[..., 1, 10:] = u[..., 1, 10:] = -np.inf
    merged = np.asarray(guidance.merge(jnp.asarray(c), jnp.asarray(u), weight))
    assert np.all(np.isneginf(merged[..., 1, 10:]))
    assert np.all(np.isfinite(merged[..., 0, :])) and np.all(np.isfinite(merged[..., 1, :10]))


def test_a_broken_half_is_not_hidden():
    c, u = _logits(6), _logits(7)
    for half, place, value in [(c, 0, np.nan), (u, 1, np.inf), (u, 1, np.nan)]:
        kept = half[place, 0, 0, 0]
        half[place, 0, 0, 0] = value
        merged = guidance.merge(jnp.asarray(c), jnp.asarray(u), 3.0)
        half[place, 0, 0, 0] = kept
        flags = np.asarray(sampler.invalid(merged))
        # u = +inf makes the guided logit -inf + inf
        np.testing.assert_array_equal(flags, np.arange(2) == place)


def test_merge_is_float32_whatever_the_logits_are():
    c, u = (jnp.asarray(_logits(seed), jnp.bfloat16) for seed in (8, 9))
    merged = guidance.merge(c, u, 7.5)
    assert merged.dtype == jnp.float32
    wide = guidance.merge(c.astype(jnp.float32), u.astype(jnp.float32), 7.5)
    np.testing.assert_array_equal(merged, wide)


def test_a_config_names_a_schedule():
    assert guidance.schedule("power_cosine", 4.0, STEPS, power=2.0) == guidance.power_cosine(
        4.0, STEPS, 2.0
    )


@pytest.mark.parametrize(
    "name", ["cosin", "merge", "schedule", "_ramp", "_check", "math", "jnp", "__name__", "", None]
)
def test_what_is_no_schedule_is_refused_with_the_names_of_those_that_are(name):
    with pytest.raises(interfaces.UserError) as error:
        guidance.schedule(name, 2.0, STEPS)
    for valid in ("constant", "cosine", "interval", "linear", "per_scale", "power_cosine"):
        assert valid in str(error.value)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: guidance.schedule("constant", 2.0, STEPS, power=2), "power"),
        (lambda: guidance.schedule("interval", 2.0, STEPS, first=1), "last"),
        (lambda: guidance.constant(math.nan, STEPS), "nan"),
        (lambda: guidance.linear("4", STEPS), "'4'"),
        (lambda: guidance.cosine(math.inf, STEPS), "inf"),
        (lambda: guidance.constant(2.0, 0), "0"),
        (lambda: guidance.constant(2.0, 2.5), "2.5"),
        (lambda: guidance.per_scale(2.0, 1), "constant"),
        (lambda: guidance.power_cosine(2.0, STEPS, 0.0), "0.0"),
        (lambda: guidance.interval(2.0, STEPS, 3, 2), "first=3"),
        (lambda: guidance.interval(2.0, STEPS, 0, STEPS), "last=8"),
        (lambda: guidance.interval(2.0, STEPS, -1, 2), "first=-1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(call, word):
    with pytest.raises(interfaces.UserError) as error:
        call()
    assert word in str(error.value)
