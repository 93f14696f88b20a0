import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.extend import core

from tokgen import interfaces, sharding
from tokgen.sampling import sampler as samplers

V = 64
GRID = list(
    itertools.product((0.5, 1.0, 2.0), (0, 1, 7, V, V + 9), (1e-50, 0.2, 0.9, 1.0))
)  # 60 settings: temperature, top-k, top-p

draw = functools.partial(jax.jit, static_argnums=0)(
    lambda sampler, logits, keys, step: sampler.draw(logits, keys_B=keys, step=step)[:2]
)
masses = jax.jit(
    lambda logits, temperature, top_k, top_p: samplers.filtered(
        logits, temperature=temperature, top_k=top_k, top_p=top_p
    )[0]
)


def _reference(logits_V, temperature, top_k, top_p) -> np.ndarray:
    """Probabilities in float64 after sorting; ties at either threshold are kept together."""
    logits_V = np.asarray(logits_V, np.float64)
    falling = sorted(logits_V, reverse=True)
    kept = np.isfinite(logits_V)
    if top_k > 0:
        kept &= logits_V >= falling[min(top_k, len(falling)) - 1]
    probability = np.where(kept, np.exp((logits_V - falling[0]) / temperature), 0)
    probability /= probability.sum()
    if top_p < 1:
        mass = 0.0
        for value in sorted(set(logits_V[kept]), reverse=True):
            mass += probability[logits_V == value].sum()
            if mass >= top_p:
                break
        probability = np.where(logits_V >= value, probability, 0)
        probability /= probability.sum()
    return probability


def _rows() -> np.ndarray:
    """[B, l, G, V] logits of several kinds: distinct, tied, padded, all equal, all negative."""
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(3, V)) * 3
    tied = np.round(rng.normal(size=(3, V)) * 2) / 2
    padded = rng.normal(size=(3, V))
    padded[0, 5:], padded[1, ::2], padded[2, 1:] = -np.inf, -np.inf, -np.inf
    equal = np.stack([np.zeros(V), np.where(np.arange(V) % 2, 0.0, -0.0), np.full(V, -7.25)])
    return np.stack([distinct, tied, padded, equal, distinct - 50])[:, :, None].astype(np.float32)


def _spread(keys_B, step, symbol, shape):
    """Uniforms without random numbers, which take longest to compile."""
    del keys_B, step, symbol
    return jnp.linspace(0, 0.999, shape[0] * shape[1] * shape[2]).reshape(shape)


def _chi_square(tokens, probability) -> float:
    """The p-value of drawn tokens; outcomes expected less than five times are counted together."""
    counts = np.bincount(np.ravel(tokens), minlength=len(probability))
    assert np.all(counts[probability == 0] == 0), "a token of probability 0 was drawn"
    expected = probability * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    present = expected > 0
    return scipy.stats.chisquare(counts[present], expected[present]).pvalue


def _primitives(jaxpr) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in core.jaxprs_in_params(equation.params):
            names |= _primitives(inner)
    return names


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_60_settings_keep_what_a_sort_keeps(dtype):
    logits = jnp.asarray(_rows(), dtype)
    for temperature, top_k, top_p in GRID:
        found = np.asarray(masses(logits, temperature, top_k, top_p), np.float64)
        for row, mass_V in zip(logits.reshape(-1, V), found.reshape(-1, V), strict=True):
            expected = _reference(row, temperature, top_k, top_p)
            message = f"temperature {temperature}, top-k {top_k}, top-p {top_p}"
            np.testing.assert_array_equal(mass_V > 0, expected > 0, err_msg=message)
            np.testing.assert_allclose(mass_V / mass_V.sum(), expected, rtol=5e-5, err_msg=message)


def test_numbers_known_to_the_compiler_filter_like_traced_ones():
    logits = jnp.asarray(_rows())
    for temperature, top_k, top_p in GRID[::7]:
        static = jax.jit(
            functools.partial(samplers.filtered, temperature=temperature, top_k=top_k, top_p=top_p)
        )
        traced = masses(logits, temperature, top_k, top_p)
        np.testing.assert_allclose(static(logits)[0], traced, rtol=1e-6)


def test_every_k_of_floats_of_every_size():
    rng = np.random.default_rng(1)
    sizes = 10.0 ** rng.uniform(-37, 38, V) * rng.choice([-1, 1], V)
    sizes[:6] = 0.0, -0.0, 1.6e38, -1.6e38, 1.0, np.nextafter(np.float32(1), np.float32(2))
    logits = sizes.astype(np.float32)
    # so hot that every finite logit keeps some mass: what is 0 was filtered out
    for k in range(1, V + 1):
        found = masses(jnp.asarray(logits)[None, None, None], 3e38, k, 1.0)[0, 0, 0]
        np.testing.assert_array_equal(found > 0, logits >= np.sort(logits)[-k], err_msg=f"k={k}")


def test_top_p_of_a_large_alphabet():
    logits = np.random.default_rng(2).normal(size=16384).astype(np.float32) * 2
    for top_p in (0.01, 0.5, 0.95, 0.999):
        found = np.asarray(masses(jnp.asarray(logits)[None, None, None], 0.8, 0, top_p))[0, 0, 0]
        # sums of 16,384 float32 numbers are right to about 1e-5, so is the p of the threshold
        fewest = _reference(logits, 0.8, 0, top_p * (1 - 1e-5)) > 0
        most = _reference(logits, 0.8, 0, min(top_p * (1 + 1e-5), 0.999999)) > 0
        assert np.all(found[fewest] > 0) and np.all(found[~most] == 0)
        assert fewest.sum() <= np.sum(found > 0) <= most.sum() < 16384


def test_extreme_temperatures():
    logits = jnp.asarray(_rows()[:1])
    cold, hot = masses(logits, 1e-6, 0, 1.0), masses(logits, 1e6, 0, 1.0)
    np.testing.assert_array_equal(cold > 0, logits == logits.max(-1, keepdims=True))
    np.testing.assert_allclose(hot, 1, rtol=1e-4)


@pytest.mark.parametrize("largest", [1e4, 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.1, 1.0])
def test_huge_logits(largest, temperature):
    logits = jnp.asarray([-largest, 0.0, largest, -np.inf, largest / 2], jnp.float32)
    logits = jnp.broadcast_to(logits, (3, 2, 1, 5))
    assert not np.any(samplers.invalid(logits))
    sampler = samplers.Sampler(temperature=temperature, top_k=3, top_p=0.99, noise=_spread)
    tokens, confidence = draw(sampler, logits, jax.random.split(jax.random.key(0), 3), 0)
    np.testing.assert_array_equal(tokens, 2)
    np.testing.assert_array_equal(confidence, 0)


LOGITS_V = np.random.default_rng(3).normal(size=24).astype(np.float32) * 1.5
LOGITS_V[20:] = -np.inf  # beyond a smaller alphabet


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 12, 0.9), (2.0, 1, 1.0)],
)
def test_draws_have_the_distribution_of_the_reference(temperature, top_k, top_p):
    sampler = samplers.Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    keys = jax.random.split(jax.random.key(4), 1000)
    tokens, _ = draw(sampler, jnp.broadcast_to(jnp.asarray(LOGITS_V), (1000, 20, 1, 24)), keys, 3)
    expected = _reference(LOGITS_V, temperature, top_k, top_p)
    if top_k == 1:
        assert np.all(tokens == np.argmax(LOGITS_V))
    else:
        assert _chi_square(tokens, expected) > 1e-4


def test_the_test_of_the_distribution_can_fail():
    keys = jax.random.split(jax.random.key(5), 1000)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS_V), (1000, 20, 1, 24))
    tokens, _ = draw(samplers.Sampler(temperature=1.1, top_k=5), logits, keys, 0)
    assert _chi_square(tokens, _reference(LOGITS_V, 1.1, 5, 1.0)) > 1e-4
    assert _chi_square(tokens, _reference(LOGITS_V, 1.0, 5, 1.0)) < 1e-4  # another temperature
    assert _chi_square(tokens, _reference(LOGITS_V, 1.1, 6, 1.0)) < 1e-4  # one token more
    with pytest.raises(AssertionError, match="probability 0"):
        _chi_square(tokens, _reference(LOGITS_V, 1.1, 4, 1.0))


def test_symbols_places_steps_and_images_are_drawn_independently():
    logits_V = np.log(np.array([0.5, 0.25, 0.15, 0.1])).astype(np.float32)
    keys = jax.random.split(jax.random.key(6), 10001)
    logits = jnp.broadcast_to(jnp.asarray(logits_V), (10001, 2, 2, 4))
    now, later = (np.asarray(draw(samplers.Sampler(), logits, keys, step)[0]) for step in (0, 1))
    pairs = {
        "symbols": (now[:, 0, 0], now[:, 0, 1]),
        "places": (now[:, 0, 0], now[:, 1, 0]),
        "steps": (now[:, 0, 0], later[:, 0, 0]),
        "a symbol and the next step": (now[:, 0, 1], later[:, 0, 0]),
        "images": (now[1:, 0, 0], now[:-1, 0, 0]),
    }
    probability = _reference(logits_V, 1.0, 0, 1.0)
    for name, (a, b) in pairs.items():
        assert _chi_square(4 * a + b, np.outer(probability, probability).ravel()) > 1e-4, name


def test_uniforms_are_the_same_for_symbols_drawn_in_turn_or_at_once():
    keys = jax.random.split(jax.random.key(7), 3)
    at_once = samplers.per_image_uniform(keys, 5, 0, (3, 4, 3))
    assert at_once.shape == (3, 4, 3) and len(np.unique(at_once)) == at_once.size
    for symbol in range(3):
        in_turn = samplers.per_image_uniform(keys, 5, symbol, (3, 4, 1))
        np.testing.assert_array_equal(in_turn[..., 0], at_once[..., symbol])


def test_an_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(8)
    logits = jnp.asarray(rng.normal(size=(7, 5, 2, 300)) * 3, jnp.float32)
    keys = jax.random.split(jax.random.key(9), 7)
    sampler = samplers.Sampler(temperature=0.9, top_k=50, top_p=0.9)
    tokens, confidence = draw(sampler, logits, keys, 2)
    assert len(np.unique(tokens)) > 20
    for rows in ([3], [6, 0, 3]):
        rows = np.array(rows)
        some, sure = draw(sampler, logits[rows], keys[rows], 2)
        np.testing.assert_array_equal(some, tokens[rows])
        np.testing.assert_allclose(sure, confidence[rows], rtol=1e-5)


def test_settings_per_step_in_a_scan_equal_one_number_at_a_time():
    steps = {
        "temperature": (0.0, 0.5, 1.0, 2.0),
        "top_k": (0, 3, 0, 100),
        "top_p": (1.0, 0.9, 0.5, 1.0),
    }
    logits = jnp.asarray(np.random.default_rng(10).normal(size=(5, 6, 1, 40)) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(11), 5)
    varied = samplers.Sampler(**steps)
    assert varied.steps == 4

    @jax.jit
    def scan(logits, keys):
        def body(carry, step):
            return carry, varied.draw(logits, keys_B=keys, step=step)[0]

        return jax.lax.scan(body, None, jnp.arange(4))[1]

    in_scan = scan(logits, keys)
    for step in range(4):
        fixed = samplers.Sampler(**{name: values[step] for name, values in steps.items()})
        assert fixed.steps is None
        expected, _ = draw(fixed, logits, keys, step)
        np.testing.assert_array_equal(in_scan[step], expected)
    eager, *_ = varied.draw(logits, keys_B=keys, step=3)  # outside jit, by a Python number
    np.testing.assert_array_equal(eager, in_scan[3])
    np.testing.assert_array_equal(in_scan[0], np.argmax(logits, -1))
    assert len(np.unique(np.asarray(in_scan[1:]))) > 10


def test_a_step_beyond_the_settings_is_refused():
    sampler = samplers.Sampler(temperature=(1.0, 0.5))
    with pytest.raises(interfaces.UserError, match="step 2 .* 2 entries"):
        sampler.draw(jnp.zeros((1, 1, 1, 4)), keys_B=jax.random.split(jax.random.key(0), 1), step=2)


def test_greedy_is_the_first_of_the_largest_and_cold_is_greedy():
    def no_noise(*_):
        raise AssertionError("greedy needs no randomness")

    logits = _rows()
    keys = jax.random.split(jax.random.key(12), len(logits))
    greedy, _ = draw(samplers.Sampler(temperature=0, noise=no_noise), jnp.asarray(logits), keys, 0)
    np.testing.assert_array_equal(greedy, np.argmax(logits, -1))
    cold, _ = draw(samplers.Sampler(temperature=1e-6), jnp.asarray(logits[:1]), keys[:1], 0)
    np.testing.assert_array_equal(cold, greedy[:1])


def test_asked_for_one_token_there_is_nothing_to_draw():
    """Temperature 0, one token and hardly any probability: one answer, also among equal logits."""
    logits = np.random.default_rng(0).integers(-2, 3, (4, 3, 2, 8)).astype(np.float32)
    logits[:, :, 1, 6:] = -np.inf  # a smaller alphabet
    logits, keys_B = jnp.asarray(logits), jax.random.split(jax.random.key(3), 4)
    weights = (3.0, 1.0)
    greedy, sure = samplers.Sampler(temperature=0.0, jitter=2.0).draw(
        logits, keys_B=keys_B, step=1
    )[:2]
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, -1))
    for options in (
        dict(top_k=1),
        dict(top_p=1 / 8),
        dict(top_p=1e-30),
        dict(top_k=1, temperature=(5.0, 0.1)),
        dict(top_k=(3, 1)),
        dict(top_p=(1.0, 1e-6)),
        dict(temperature=(1.0, 0.0)),
        dict(temperature=((0.0, 0.0), (0.0, 0.0)), guidance=weights),
    ):
        sampler = samplers.Sampler(jitter=2.0, **options)
        for step in (1, jnp.asarray(1)):
            tokens, confidence, *_ = sampler.draw(logits, keys_B=keys_B, step=step)
            np.testing.assert_array_equal(tokens, greedy, err_msg=str(options))
            np.testing.assert_array_equal(confidence, sure, err_msg=str(options))


def test_half_precision_logits_are_drawn_in_float32():
    logits = jnp.asarray(_rows(), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(13), len(logits))
    sampler = samplers.Sampler(temperature=0.8, top_k=20, top_p=0.95, noise=_spread)
    half, wide = draw(sampler, logits, keys, 0), draw(sampler, logits.astype(jnp.float32), keys, 0)
    np.testing.assert_array_equal(half[0], wide[0])
    np.testing.assert_array_equal(half[1], wide[1])
    assert half[0].dtype == jnp.int32 and half[1].dtype == jnp.float32


def test_a_recorded_draw_is_replayed():
    mass = jnp.asarray([1.0, 1.0, 0.0, 2.0, 0.0])
    uniforms = jnp.asarray([0.0, 0.2499999, 0.25, 0.5, 0.9999999, 1.0])
    sampler = samplers.Sampler(noise=lambda keys, step, symbol, shape: uniforms.reshape(shape))
    logits = jnp.broadcast_to(jnp.log(mass), (1, 6, 1, 5))
    tokens, *_ = sampler.draw(logits, keys_B=jax.random.split(jax.random.key(0), 1), step=0)
    np.testing.assert_array_equal(tokens.ravel(), [0, 0, 1, 3, 3, 3])


def test_the_draw_never_leaves_what_is_kept():
    rng = np.random.default_rng(14)
    # masses of all sizes, most of them 0, the last bins among them: rounding has every chance
    mass = (10.0 ** rng.uniform(-8, 0, 16384)).astype(np.float32)
    mass[rng.uniform(size=16384) < 0.9] = 0
    mass[-100:] = 0
    total = np.asarray(jnp.cumsum(jnp.asarray(mass)))
    rises = np.flatnonzero((np.diff(total) > 0) & (mass[1:] == 0))
    assert len(rises) > 10, "the sum never rises at a mass of 0: nothing is put to the test"
    edges = total[rises[:500]] / total[-1]
    uniforms = np.concatenate([rng.uniform(size=500), edges, [0.0, 1.0]]).astype(np.float32)
    inverse = jax.jit(jax.vmap(samplers.inverse_cdf, in_axes=(None, 0)))
    tokens = np.asarray(inverse(jnp.asarray(mass), jnp.asarray(uniforms))[0])
    assert np.all(mass[tokens] > 0)
    cumulative = np.cumsum(mass, dtype=np.float64) / mass.sum(dtype=np.float64)
    below = cumulative[tokens] - mass[tokens] / mass.sum(dtype=np.float64)
    assert np.all(below <= uniforms + 1e-6) and np.all(uniforms <= cumulative[tokens] + 1e-6)
    assert tokens[-2] == np.flatnonzero(mass)[0] and tokens[-1] == np.flatnonzero(mass)[-1]


@pytest.mark.parametrize(
    "row, expected",
    [
        ([0.0, 1.0, -np.inf], False),
        ([-np.inf, -np.inf, -3e38], False),
        ([0.0, np.nan, 1.0], True),
        ([0.0, np.inf, 1.0], True),
        ([-np.inf, np.inf, -np.inf], True),
        ([-np.inf, -np.inf, -np.inf], True),
        ([np.nan, np.nan, np.nan], True),
        ([0.0, 4e38, 1.0], True),  # float32 holds no 4e38
    ],
)
def test_only_the_broken_image_is_flagged_and_its_token_is_in_range(row, expected):
    with np.errstate(over="ignore"):
        row = np.asarray(row).astype(np.float32)
    logits = np.random.default_rng(15).normal(size=(3, 2, 2, 3)).astype(np.float32)
    sound = jnp.asarray(logits)
    logits[1, 1, 0] = row
    logits = jnp.asarray(logits)
    np.testing.assert_array_equal(samplers.invalid(logits), [False, expected, False])
    keys = jax.random.split(jax.random.key(16), 3)
    for sampler in (samplers.Sampler(top_k=2, noise=_spread), samplers.Sampler(temperature=0)):
        tokens, _ = draw(sampler, logits, keys, 0)
        assert np.all((tokens >= 0) & (tokens < 3))
        others, _ = draw(sampler, sound, keys, 0)
        np.testing.assert_array_equal(tokens[::2], others[::2])


def test_one_bad_number_among_many_flags_its_image():
    logits = np.random.default_rng(23).normal(size=(6, 5, 2, 4096)).astype(np.float32)
    logits[1, 4, 1, 4095], logits[3, 0, 0, 17], logits[4, 2, 1] = np.nan, np.inf, -np.inf
    logits[5, 1, 1, 1:] = -np.inf
    found = jax.jit(samplers.invalid)(jnp.asarray(logits))
    np.testing.assert_array_equal(found, [False, True, False, True, True, False])


def test_confidence_knows_neither_temperature_nor_filters():
    logits = _rows()[:2]
    keys = jax.random.split(jax.random.key(17), 2)
    settings = {"temperature": 2.0, "top_k": 9, "top_p": 0.7, "noise": _spread}
    tokens, sure = draw(samplers.Sampler(**settings), jnp.asarray(logits), keys, 0)
    norm = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    drawn = np.take_along_axis(logits, np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sure, drawn - norm, rtol=1e-5, atol=1e-6)
    raw = samplers.Sampler(**settings, confidence=samplers.raw_logit)
    again, sure = draw(raw, jnp.asarray(logits), keys, 0)
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(sure, drawn)


def test_a_softened_confidence_is_that_of_divided_logits():
    logits = _rows()[:2]
    keys = jax.random.split(jax.random.key(18), 2)
    plain, _ = draw(samplers.Sampler(noise=_spread), jnp.asarray(logits), keys, 1)
    drawn = np.take_along_axis(logits, np.asarray(plain)[..., None], -1)[..., 0]
    divided = logits.astype(np.float64) / 0.7
    softened = {"noise": _spread, "confidence_temperature": (1.2, 0.7)}
    tokens, sure = draw(samplers.Sampler(**softened), jnp.asarray(logits), keys, 1)
    np.testing.assert_array_equal(tokens, plain)  # the draw does not see it
    expected = drawn / 0.7 - np.log(np.exp(divided).sum(-1))
    np.testing.assert_allclose(sure, expected, rtol=1e-5, atol=1e-5)
    raw = samplers.Sampler(**softened, confidence=samplers.raw_logit)
    _, sure = draw(raw, jnp.asarray(logits), keys, 1)
    np.testing.assert_allclose(sure, drawn / 0.7, rtol=1e-6)


def test_noise_on_the_confidence_changes_no_token_and_is_each_images_own():
    logits = jnp.asarray(np.random.default_rng(19).normal(size=(5, 6, 2, 30)), jnp.float32)
    keys = jax.random.split(jax.random.key(19), 5)
    tokens, sure = draw(samplers.Sampler(), logits, keys, 1)
    noisy = samplers.Sampler(jitter=(4.5, 2.25, 0.0))
    same, moved = draw(noisy, logits, keys, 1)
    np.testing.assert_array_equal(same, tokens)
    gumbel = samplers.per_image_gumbel(keys, 1, 0, (5, 6, 2))
    np.testing.assert_allclose(moved, sure + 2.25 * gumbel, rtol=1e-5, atol=1e-5)
    assert len(np.unique(gumbel)) == gumbel.size
    _, last = draw(noisy, logits, keys, 2)
    np.testing.assert_array_equal(last, draw(samplers.Sampler(), logits, keys, 2)[1])
    _, alone = draw(noisy, logits[3:4], keys[3:4], 1)
    np.testing.assert_allclose(alone, moved[3:4], rtol=1e-5, atol=1e-5)
    for symbol in range(2):  # in turn or at once
        in_turn = samplers.per_image_gumbel(keys, 1, symbol, (5, 6, 1))
        np.testing.assert_array_equal(in_turn[..., 0], gumbel[..., symbol])
    replayed = samplers.Sampler(
        jitter=2.0, gumbel=lambda keys, step, symbol, shape: jnp.ones(shape)
    )
    np.testing.assert_allclose(draw(replayed, logits, keys, 1)[1], sure + 2.0, rtol=1e-6)


def test_the_noise_is_gumbel_and_knows_nothing_of_the_draw(monkeypatch):
    keys, shape = jax.random.split(jax.random.key(20), 2000), (2000, 10, 1)
    gumbel = np.asarray(samplers.per_image_gumbel(keys, 4, 0, shape)).ravel()
    assert scipy.stats.kstest(gumbel, scipy.stats.gumbel_r.cdf).pvalue > 1e-4
    assert scipy.stats.kstest(gumbel, scipy.stats.gumbel_r(0.1).cdf).pvalue < 1e-4  # it can fail
    uniform = np.asarray(samplers.per_image_uniform(keys, 4, 0, shape)).ravel()
    assert abs(scipy.stats.spearmanr(gumbel, uniform).statistic) < 4 / np.sqrt(gumbel.size)
    # the least and the largest number that a uniform can be
    ends = jnp.asarray([0.0, 1 - 2.0**-23], jnp.float32).reshape(1, 2, 1)
    monkeypatch.setattr(samplers, "_uniform", lambda *_: ends)
    least, largest = np.ravel(samplers.per_image_gumbel(keys[:1], 0, 0, (1, 2, 1)))
    np.testing.assert_allclose(least, -np.log(20 * np.log(10)), rtol=1e-6)
    np.testing.assert_allclose(largest, 23 * np.log(2), rtol=1e-6)


def test_each_symbol_is_drawn_at_its_own_temperature():
    keys = jax.random.split(jax.random.key(21), 2000)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS_V), (2000, 10, 2, 24))
    # per step and symbol; step 1 is read
    sampler = samplers.Sampler(temperature=(1.0, (0.6, 1.7)), top_k=9)
    tokens, _ = draw(sampler, logits, keys, 1)
    drawn_in_turn = jax.jit(sampler.draw, static_argnames=("step", "symbol"))
    for symbol, temperature in enumerate((0.6, 1.7)):
        own, other = (_reference(LOGITS_V, t, 9, 1.0) for t in (temperature, 2.3 - temperature))
        assert _chi_square(tokens[..., symbol], own) > 1e-4
        assert _chi_square(tokens[..., symbol], other) < 1e-4
        # by Python numbers: the same tokens
        in_turn, *_ = drawn_in_turn(logits[:50, :, :1], keys_B=keys[:50], step=1, symbol=symbol)
        np.testing.assert_array_equal(in_turn[..., 0], tokens[:50, :, symbol])
    greedy, _ = draw(samplers.Sampler(temperature=((0.0, 1.7),) * 2, top_k=9), logits, keys, 1)
    np.testing.assert_array_equal(greedy[..., 0], np.argmax(LOGITS_V))
    np.testing.assert_array_equal(greedy[..., 1], tokens[..., 1])
    with pytest.raises(interfaces.UserError, match="found 2 .* 3 symbols"):
        sampler.draw(jnp.zeros((1, 1, 3, 4)), keys_B=keys[:1], step=0)


def test_nothing_is_sorted_and_what_is_off_is_not_compiled():
    logits = jax.ShapeDtypeStruct((1, 1, 1, 16384), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def program(sampler):
        traced = jax.make_jaxpr(lambda x, k, i: sampler.draw(x, keys_B=k, step=i))(logits, keys, 1)
        return _primitives(traced.jaxpr)

    assert "sort" in _primitives(jax.make_jaxpr(lambda x: jax.jit(jnp.sort)(x))(logits).jaxpr)
    loops = {"scan", "while"}
    full = program(samplers.Sampler(temperature=(0.0, 0.7), top_k=(100, 7), top_p=(0.9, 1.0)))
    assert not {name for name in full if "sort" in name or "top_k" in name}
    assert full & loops and "cumsum" in full
    plain = program(samplers.Sampler())
    assert "cumsum" in plain and not plain & loops
    assert not program(samplers.Sampler(top_k=16384, top_p=(1.0, 1.0))) & loops
    greedy = program(samplers.Sampler(temperature=0.0, top_k=5, top_p=0.5))
    assert "reduce_max" in greedy and not greedy & (loops | {"cumsum", "random_bits"})


def test_a_sampler_is_a_value():
    written = samplers.Sampler(temperature=[1, 0], top_k=[0, 5], guidance=[1, 4.5])
    assert written == samplers.Sampler((1.0, 0.0), (0, 5), guidance=(1.0, 4.5))
    assert len({written, samplers.Sampler((1.0, 0.0), (0, 5), guidance=(1.0, 4.5))}) == 1
    assert samplers.Sampler(np.float32(0.5), np.int64(3)) == samplers.Sampler(0.5, 3)
    mixed = samplers.Sampler(guidance=(1, (2, 3)))
    assert mixed.guidance == ((1.0, 1.0), (2.0, 3.0)) and mixed.steps == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": np.nan}, "temperature nan"),
        ({"temperature": np.inf}, "temperature inf"),
        ({"temperature": 1e-40}, "temperature 1e-40"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"temperature": True}, "temperature True"),
        ({"temperature": (1.0, -1.0)}, "temperature -1.0"),
        ({"temperature": ()}, "temperature none"),
        ({"temperature": ((1.0, 1.0), (1.0,))}, "temperature 1 and 2"),
        ({"temperature": ((1.0, -1.0),)}, "temperature -1.0"),
        ({"top_k": ([1, 2],)}, "top_k whole number"),
        ({"jitter": -1.0}, "jitter -1.0"),
        ({"jitter": (0.5, np.inf)}, "jitter inf"),
        ({"confidence_temperature": 0.0}, "confidence_temperature 0.0"),
        ({"confidence_temperature": ()}, "confidence_temperature none"),
        ({"jitter": (1.0, 0.0), "temperature": (1.0,) * 3}, "jitter 2 temperature 3"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2.5}, "top_k 2.5"),
        ({"top_k": None}, "top_k None"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"top_p": np.nan}, "top_p nan"),
        ({"top_p": (0.5, 0)}, "top_p found 0"),
        ({"guidance": 4.0}, "guidance.constant(4.0"),
        ({"guidance": (1.0, np.inf)}, "guidance inf"),
        ({"guidance": (1.0, (1.0, 2.0), (1.0, 2.0, 3.0))}, "guidance 2 and 3"),
        ({"guidance": ((), ())}, "guidance 0"),
        ({"temperature": (1.0, 1.0), "top_p": (0.9,) * 3}, "temperature 2 top_p 3"),
        ({"top_k": (5, 5), "guidance": (1.0,)}, "top_k 2 guidance 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(interfaces.UserError) as error:
        samplers.Sampler(**settings)
    for word in words.split(" ") if "(" not in words else [words.removeprefix("temperature ")]:
        assert word in str(error.value)


# ---------------------------------------------------------------- rows in turn


@pytest.mark.parametrize("images, places", [(1, 7), (3, 3), (4, 2), (5, 5)])
def test_rows_taken_in_turn_are_drawn_as_all_at_once(images, places, monkeypatch):
    """Eight rows at a time, which divide 8 rows and neither 7, 9 nor 25."""
    rng = np.random.default_rng(22)
    logits = jnp.asarray(rng.normal(size=(images, places, 1, 40)) * 3, jnp.float32)
    uniform = jnp.asarray(rng.uniform(size=(images, places, 1)), jnp.float32)
    temperature = jnp.asarray(rng.uniform(0.5, 2, (images, places, 1)), jnp.float32)
    options = dict(temperature=temperature, top_k=11, top_p=0.9)
    toward = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
    asked = (logits, uniform, toward)
    whole, _, owed = jax.jit(functools.partial(samplers.drawn, **options))(*asked)
    monkeypatch.setattr(samplers, "CACHED", 8 * 40 * 4)
    in_turn, near, again = jax.jit(functools.partial(samplers.drawn, **options))(*asked)
    np.testing.assert_array_equal(in_turn, whole)
    np.testing.assert_allclose(again, owed, rtol=1e-5, atol=1e-6)
    assert in_turn.shape == near.shape == (images, places, 1) and len(np.unique(whole)) > 4


def _lowered(platform: str) -> str:
    logits = jax.ShapeDtypeStruct((4, 64, 1, 4096), jnp.float32)
    uniform = jax.ShapeDtypeStruct((4, 64, 1), jnp.float32)
    return jax.jit(samplers.drawn).trace(logits, uniform).lower(lowering_platforms=(platform,))


def test_an_accelerator_takes_all_rows_at_once():
    assert "while" in _lowered("cpu").as_text()
    assert "while" not in _lowered("tpu").as_text() + _lowered("cuda").as_text()


def test_no_row_leaves_its_device():
    """Each of eight devices takes its own images' rows in turn, also where rows are many."""
    mesh = sharding.make_mesh()
    where = sharding.of_batch(mesh)
    shapes = ((8, 20, 1, 4096), (8, 20, 1))
    logits, uniform = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=where) for s in shapes)
    with jax.set_mesh(mesh):
        options = dict(top_k=9, top_p=0.5)
        program = jax.jit(functools.partial(samplers.drawn, **options)).lower(logits, uniform)
    text = program.compile().as_text()
    assert "while" in text and mesh.size == 8
    moved = ("all-gather", "all-to-all", "all-reduce", "permute")
    assert not [name for name in moved if name in text]
    assert "f32[1,8,4096]" in text and "f32[8,8,4096]" not in text


def test_a_device_takes_rows_that_are_its_own_by_the_cacheful():
    """Also eight images of each of eight devices, which are not eight devices' anew."""
    over = []

    def program(label_B):
        over.append(samplers._devices(len(label_B)))
        return label_B

    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda label_B: sharding.by_rows(program, (), (label_B,)), jnp.arange(64))
    assert mesh.size == 8 and over == [1]


# ---------------------------------------------------------------- near ties


def near(sampler, row, uniform, wanted=None):
    """Whether a draw from a row of logits, by a uniform, is near a tie."""
    sampler = dataclasses.replace(sampler, noise=lambda *_: jnp.full((1, 1, 1), uniform))
    logits = jnp.asarray(row, jnp.float32)[None, None, None]
    keys_B = jax.random.split(jax.random.key(0), 1)
    return bool(sampler.draw(logits, keys_B=keys_B, step=0, wanted_BlG=wanted).near_B[0])


def test_a_uniform_next_to_a_boundary_is_near_a_tie():
    row, sampler = np.log([1.0, 1.0, 2.0]), samplers.Sampler()
    for boundary in (0.25, 0.5):
        for away, expected in ((4e-7, True), (5e-6, False)):
            assert near(sampler, row, boundary + away) == expected
            assert near(sampler, row, boundary - away) == expected
    unwanted = jnp.zeros((1, 1, 1), bool)
    assert not near(sampler, row, 0.25, unwanted) and near(sampler, row, 0.25, ~unwanted)


def test_a_threshold_that_rounding_may_move_is_near_a_tie():
    """Only where the mass that it brings or takes could reach the uniform."""
    row = np.asarray([3.0, 2.0, 1.0 + 2e-6, 1.0, -9.0])  # the third and the fourth, by top-k 3
    mass = np.exp(row[:3]) / np.exp(row[:3]).sum()
    for away, expected in ((0.9, True), (1.1, False)):
        uniform = mass[0] - away * mass[2]
        assert near(samplers.Sampler(top_k=3), row, uniform) == expected
        assert not near(samplers.Sampler(top_k=2), row, uniform)
        assert not near(samplers.Sampler(top_k=4), row, uniform)


def test_a_sum_that_rounding_may_lift_over_p_is_near_a_tie():
    row = np.log([8.0, 4.0, 2.0, 1.0, 1.0])
    above = 8 / 14 - 1 / 14  # of 14 kept: a mass of 2 that goes may move the boundary here
    for p, expected in ((14 / 16, True), (0.86, False), (14 / 16 + 3e-7, True), (0.80, False)):
        assert near(samplers.Sampler(top_p=p), row, above) == expected, p
    assert not near(samplers.Sampler(top_p=14 / 16), row, 0.3)


def test_two_that_are_as_good_as_equal_are_near_a_tie_where_one_is_asked_for():
    for options in (dict(temperature=0.0), dict(top_k=1), dict(temperature=(0.0, 1.0))):
        sampler = samplers.Sampler(**options)
        assert near(sampler, [1.0, 3.0, 3.0 - 1e-6], 0.3)
        assert not near(sampler, [1.0, 3.0, 2.999], 0.3)
        assert not near(sampler, [1.0, 3.0, 2.999, 1.0], 0.3)


@pytest.mark.parametrize(
    "options", [dict(), dict(temperature=0.3), dict(temperature=0.0), dict(top_k=9, top_p=0.9)]
)
def test_rounding_changes_no_token_that_is_near_no_tie(options):
    """Guided by 16, where logits err by 1e-6 of themselves, and uniforms lie next to boundaries."""
    noise, shape = np.random.default_rng(0), (1000, 1, 1, 24)
    far = 10 ** noise.uniform(-8, -3, shape[:3])
    uncond = noise.normal(size=shape)
    cond = uncond + 0.1 * noise.normal(size=shape)
    for logits in (cond, uncond):
        logits[..., 0] = 3  # the likeliest, and one that is nearly so
        logits[..., 1] = 3 - far

    def guided(error):
        c, u = (a * (1 + error * noise.choice([-1, 1], shape)) for a in (cond, uncond))
        return jnp.asarray(u + 16 * (c - u), jnp.float32)

    keys_B = jax.random.split(jax.random.key(0), shape[0])
    sampler = samplers.Sampler(guidance=(16.0,), **options)
    mass = np.asarray(samplers.filtered(guided(0), **options)[0], np.float64)
    upto = np.cumsum(mass, -1) / mass.sum(-1, keepdims=True)
    place = noise.integers(0, 23, shape[:3])[..., None]
    uniform = np.clip(np.take_along_axis(upto, place, -1)[..., 0] + far, 0, 1 - 1e-7)
    sampler = dataclasses.replace(sampler, noise=lambda *_: jnp.asarray(uniform, jnp.float32))
    draw = jax.jit(lambda logits: sampler.draw(logits, keys_B=keys_B, step=0))
    first, near = (np.asarray(a) for a in (draw(guided(0))[0], draw(guided(0)).near_B))
    changed = sum(np.asarray(draw(guided(1e-6))[0] != first)[:, 0, 0] for _ in range(4)) > 0
    assert changed.sum() > 20 and not np.any(changed & ~near)
    assert near[far[:, 0, 0] > 5e-4].mean() < 0.5


def test_what_rounding_may_move_of_a_confidence_is_of_what_is_not_sure():
    """A logarithm near 0 stays there; a logit moves by all that logits err by."""
    weights = ((), 1), ((1.0,), 1), ((16.0,), 31), ((-2.0,), 5)
    assert all(samplers.Sampler(guidance=w).error(0, 0, 1) == error for w, error in weights)
    logits = jnp.asarray([[[[30.0, 0.0, 0.0]]], [[[1.0, 1.0, 1.0]]]])
    keys_B = jax.random.split(jax.random.key(0), 2)
    for ranking, rest in (("log_probability", [0, 4 / 3]), ("raw_logit", [1, 1])):
        sampler = samplers.Sampler(guidance=(16.0,), confidence=samplers.RANKINGS[ranking], top_k=1)
        found = jax.jit(lambda a, s=sampler: s.draw(a, keys_B=keys_B, step=0).unsure_BlG)(logits)
        np.testing.assert_allclose(found[:, 0, 0], 1e-6 + 31 * 5e-6 * np.asarray(rest), rtol=1e-3)


@pytest.mark.parametrize("options", [{}, dict(temperature=0.7, top_k=5), dict(top_p=0.8)])
def test_draws_toward_something_go_there_and_owe_what_that_made_likelier(options):
    """In equal steps of the uniform, against probabilities in float64."""
    logits_V, toward_V = np.random.default_rng(7).normal(0, 2, (2, 8))
    without_V = _reference(logits_V, **dict(temperature=1.0, top_k=0, top_p=1.0) | options)
    gain_V = np.exp(toward_V - toward_V.max())
    gain_V = 0.1 + 0.9 * gain_V / (without_V * gain_V).sum()
    draws = 4000

    def spread(keys_B, step, symbol, shape):
        return (jnp.arange(draws, dtype=jnp.float32) + 0.5).reshape(shape) / draws

    logits, toward = (
        jnp.broadcast_to(jnp.asarray(a, jnp.float32), (1, draws, 1, 8))
        for a in (logits_V, toward_V)
    )
    keys = jax.random.split(jax.random.key(0), 1)
    how = samplers.Sampler(noise=spread, **options)
    found = how.draw(logits, keys_B=keys, step=0, toward_BlGV=toward)
    shares_V = np.bincount(np.ravel(found.tokens_BlG), minlength=8) / draws
    np.testing.assert_allclose(shares_V, without_V * gain_V, atol=2 / draws)
    np.testing.assert_allclose(
        np.ravel(found.owed_BlG), -np.log(gain_V)[np.ravel(found.tokens_BlG)], rtol=1e-4, atol=1e-5
    )
    # paid back, all is as it was drawn toward nothing
    assert np.exp(found.owed_BlG).mean() == pytest.approx(1, abs=0.01)
    surest = samplers.Sampler(temperature=0.0).draw(logits, keys_B=keys, step=0, toward_BlGV=toward)
    assert (np.asarray(surest.tokens_BlG) == logits_V.argmax()).all()
    assert not np.any(surest.owed_BlG)
