import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.interfaces import UserError
from tokgen.sampling import decode, guidance, presets, sampler as samplers

PUBLISHED = {
    "default": {"temperature": 0.7, "guidance": "constant", "weight": 2.0},
    "paper": {"top_k": 5, "top_p": 0.9, "guidance": "power_cosine", "weight": 4.0, "power": 2.5},
}


def test_a_preset_becomes_the_sampler_it_says():
    plain = presets.sampler({}, 8)
    assert plain == samplers.Sampler() and plain.guidance == ()  # weight 1 costs nothing
    full = presets.sampler(PUBLISHED["paper"], 8)
    weights = guidance.power_cosine(4.0, 8, 2.5)
    assert full == samplers.Sampler(top_k=5, top_p=0.9, guidance=weights)
    part = presets.sampler({"guidance": "interval", "weight": 3, "first": 2, "last": 4}, 6)
    assert part.guidance == (1, 1, 3, 3, 3, 1)
    # without a schedule's name the weight is constant
    assert presets.sampler({"weight": 0.0}, 3).guidance == (0, 0, 0)


def test_what_is_no_guidance_is_for_the_schedule_to_say():
    # VAR's own number: 0 is none, 1 rises to a weight of 2
    assert presets.sampler({"guidance": "per_scale", "weight": 1.0}, 3).guidance == (1, 1.5, 2)
    assert presets.sampler({"guidance": "per_scale", "weight": 0.0}, 3).guidance == ()
    for name in ("constant", "linear", "cosine", "power_cosine"):
        assert presets.sampler({"guidance": name, "weight": 1}, 3).guidance == ()


def test_settings_per_step_pass_through_lists():
    listed = presets.sampler({"temperature": [1.0, 0.5], "top_k": [0, 3]}, 2)  # as JSON has them
    assert listed.temperature == (1.0, 0.5) and listed.top_k == (0, 3)


def test_names_are_those_of_the_checkpoint_and_no_guidance():
    assert presets.named(PUBLISHED, "default") == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "guidance": "constant",
        "weight": 2.0,
    }
    paper = presets.named(PUBLISHED, "paper")
    assert presets.sampler(paper, 8) == presets.sampler(PUBLISHED["paper"], 8)
    none = presets.named(PUBLISHED, "no_guidance")
    assert presets.sampler(none, 8) == samplers.Sampler()
    assert presets.named({}, "no_guidance") == presets.PLAIN
    own = {"no_guidance": {"temperature": 0.5}}  # a checkpoint's own comes first
    assert presets.named(own, "no_guidance")["temperature"] == 0.5
    paper["weight"] = 9.0
    assert presets.PLAIN["weight"] == 1.0 and PUBLISHED["paper"]["weight"] == 4.0


def test_an_unknown_preset_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(UserError, match="default, paper; found 'papr'; did you mean 'paper'"):
        presets.named(PUBLISHED, "papr")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temprature": 1.0}, "'temprature'.*temperature"),
        ({"guidance": "cosin", "weight": 2.0}, "cosine.*'cosin'"),
        ({"weight": 2.0, "power": 2.0}, "constant takes weight, steps.*power"),
        ({"top_k": -1}, "top_k.*-1"),
        ({"temperature": "hot"}, "temperature.*'hot'"),
        ({"weight": float("nan")}, "nan"),
        ({"temperature": (1.0, 0.5), "weight": 2.0}, "temperature has 2, guidance has 8"),
    ],
)
def test_settings_that_cannot_be_are_told_to_the_user(settings, words):
    with pytest.raises(UserError, match=words):
        presets.sampler(settings, 8)


@pytest.mark.parametrize("weight", ["much", None, [2.0]])
def test_a_weight_that_is_no_number_is_told_to_the_user(weight):
    with pytest.raises(UserError, match="weight"):
        presets.sampler({"weight": weight}, 8)


class Masked(nnx.Module):
    """What a preset sees of a masked generator."""

    layout = interfaces.TokenLayout((64,), ((1, 32),))
    knobs = ("steps", "schedule", "exponent")

    def __init__(self):
        self.steps, self.schedule, self.exponent = 12, "cosine", 2.0

    def plan(self):
        return (interfaces.Phase(0, self.steps, 0, 32),)


class Factored(nnx.Module):
    """What a preset sees of a generator of two symbols and nothing to choose."""

    layout = interfaces.TokenLayout((64, 4096), ((2, 2),))
    knobs = ()

    def plan(self):
        return (interfaces.Phase(0, 4, 0, 1),)


TITOK = {
    "steps": 8,
    "schedule": "arccos",
    "noise": 9.5,
    "ranking": "raw_logit",
    "annealing": "softmax",
    "drawing": "noise",
    "guidance": "linear",
    "weight": 1 + 4.5,  # published as c + s (c - u)
}
GUMBEL = [8.3125, 7.125, 5.9375, 4.75, 3.5625, 2.375, 1.1875, 0.0]
SOFTENING = [1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def test_titok_as_published():
    generator = Masked()
    changed, sampler = presets.prepare(generator, TITOK)
    assert (changed.steps, changed.schedule, decode.steps(changed)) == (8, "arccos", 8)
    assert (generator.steps, generator.schedule) == (12, "cosine")  # a copy was changed
    np.testing.assert_allclose(sampler.jitter, GUMBEL, rtol=1e-12)
    np.testing.assert_allclose(sampler.confidence_temperature, SOFTENING, rtol=1e-12)
    np.testing.assert_allclose(sampler.temperature, np.multiply(SOFTENING, GUMBEL), rtol=1e-12)
    assert sampler.temperature[-1] == 0 and sampler.jitter[-1] == 0  # greedy, not nearly so
    assert sampler.confidence is samplers.raw_logit and sampler.steps == 8
    published = [0.0, 0.5625, 1.125, 1.6875, 2.25, 2.8125, 3.375, 3.9375]
    np.testing.assert_allclose(np.subtract(sampler.guidance, 1), published, rtol=1e-12)
    # S-128: another convention, u + w (c - u)
    large = TITOK | {"steps": 64, "guidance": "power_cosine", "weight": 6.9, "power": 3.0}
    weights = presets.prepare(generator, large)[1].guidance
    published = [1.0, 1.003553, 1.224555, 3.233208, 6.869054]
    np.testing.assert_allclose([weights[i] for i in (0, 16, 32, 48, 63)], published, atol=5e-7)
    # the demo anneals nothing; without noise every step is greedy
    demo = presets.prepare(generator, TITOK | {"noise": 1.0, "annealing": "none"})[1]
    np.testing.assert_allclose(demo.temperature, np.divide(GUMBEL, 9.5), rtol=1e-12)
    assert demo.confidence_temperature == 1.0
    assert presets.prepare(generator, TITOK | {"noise": 0.0})[1].temperature == (0.0,) * 8


def test_maskbit_as_published():
    settings = {"steps": 64, "noise": 7.8, "guidance": "power_cosine", "weight": 8.1, "power": 3.0}
    _, sampler = presets.prepare(Masked(), settings | {"schedule": "arccos"})
    scales = np.subtract(sampler.guidance, 1)[[0, 16, 32, 48, 63]]
    published = [0.000000, 0.000602, 0.038060, 0.378510, 0.994755]
    np.testing.assert_allclose(scales / 7.1, published, atol=5e-7)
    np.testing.assert_allclose(sampler.jitter, [7.8 * (1 - i / 64) for i in range(1, 65)])
    assert sampler.temperature == 1.0 and sampler.confidence_temperature == 1.0
    assert sampler.confidence is samplers.log_probability
    _, annealed = presets.prepare(Masked(), {"steps": 8, "annealing": "softmax"})
    np.testing.assert_allclose(annealed.temperature, SOFTENING, rtol=1e-12)
    np.testing.assert_allclose(annealed.confidence_temperature, SOFTENING, rtol=1e-12)
    assert annealed.jitter == 0.0


def test_maskgit_as_published():
    changed, sampler = presets.prepare(Masked(), {"noise": 4.5})
    assert (changed.schedule, changed.exponent, sampler.steps) == ("cosine", 2.0, 12)
    cubic = presets.prepare(Masked(), {"schedule": "power", "exponent": 3})[0]
    assert (cubic.schedule, cubic.exponent, cubic.steps) == ("power", 3, 12)
    expected = samplers.Sampler(jitter=tuple(4.5 * (1 - i / 12) for i in range(1, 13)))
    assert sampler == expected


def test_open_magvit2_draws_its_symbols_at_temperatures_of_their_own():
    large = {"temperature": [1.1, 1.0], "weight": (1.9, 2.0)}
    generator = Factored()
    same, sampler = presets.prepare(generator, large)
    assert same is generator
    assert sampler.temperature == ((1.1, 1.0),) * 4
    assert sampler.guidance == ((1.9, 2.0),) * 4
    assert presets.prepare(generator, {"weight": [1.0, 1.0]})[1].guidance == ()
    # per step, or per step and symbol, as the sampler itself has them
    assert presets.prepare(generator, {"temperature": [1, 1, 1, 2]})[1].temperature[3] == 2.0
    nested = presets.prepare(generator, {"temperature": [1, 1, 1, [2, 3]]})[1]
    assert nested.temperature == ((1.0, 1.0),) * 3 + ((2.0, 3.0),)
    annealed = presets.prepare(generator, large | {"annealing": "softmax"})[1]
    factors = np.asarray([1.1, 0.9, 0.7, 0.5])[:, None]
    np.testing.assert_allclose(annealed.temperature, factors * [1.1, 1.0], rtol=1e-12)


def test_var_and_rar_as_published():
    weights = presets.sampler({"guidance": "per_scale", "weight": 1.5, "top_k": 900}, 10).guidance
    published = np.asarray([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) / 6  # (1 + t) c - t u
    np.testing.assert_allclose(np.subtract(weights, 1), published, rtol=1e-12)
    for weight, power, published in (
        (16.0, 2.75, (1.000000, 1.000399, 1.018065, 1.803080, 7.404397, 15.995759)),
        (15.5, 2.5, (1.000000, 1.001092, 1.034911, 2.089599, 7.957157, 15.496608)),
        (6.9, 1.5, (1.000000, 1.028387, 1.224555, 2.640153, 5.285299, 6.899501)),
        (8.0, 1.2, (1.000000, 1.116813, 1.601913, 3.793209, 6.628329, 7.999621)),
    ):
        settings = {"guidance": "power_cosine", "weight": weight, "power": power}
        weights = presets.sampler(settings, 256).guidance
        found = [weights[i] for i in (0, 32, 64, 128, 192, 255)]
        np.testing.assert_allclose(found, published, atol=5e-7)


@pytest.mark.parametrize(
    "generator, settings, words",
    [
        (Factored(), {"steps": 8}, "steps needs a generator.*leave steps at 0"),
        (Factored(), {"schedule": "arccos"}, "schedule needs.*leave schedule at ''"),
        (Factored(), {"exponent": 3.0}, "exponent needs.*leave exponent at 0.0"),
        (Masked(), {"exponent": -1}, "exponent.*-1.*own"),
        (Factored(), {"noise": 4.5}, "noise needs.*masked.*0.0"),
        (Factored(), {"weight": [1.0, 2.0, 3.0]}, "2 symbols; found 3"),
        (Factored(), {"temperature": [1.0, 2.0, 3.0], "weight": 2.0}, "temperature has 3"),
        (Masked(), {"steps": -1}, "steps.*-1"),
        (Masked(), {"steps": 2.5}, "steps.*2.5"),
        (Masked(), {"steps": True}, "steps.*True"),
        (Masked(), {"schedule": 3}, "schedule.*3"),
        (Masked(), {"noise": -1.0}, "noise.*-1.0"),
        (Masked(), {"noise": float("inf")}, "noise.*inf"),
        (Masked(), {"noise": "much"}, "noise.*'much'"),
        (Masked(), {"ranking": "merge"}, "ranking.*raw_logit.*'merge'"),
        (Masked(), {"annealing": True}, "annealing.*softmax.*True"),
        (Masked(), {"drawing": "gumbel"}, "drawing.*noise.*'gumbel'"),
        (Masked(), {"temperature": "hot", "annealing": "softmax"}, "temperature.*'hot'"),
        (Masked(), {"temperature": [1.0] * 3, "annealing": "softmax"}, "12; found 3"),
    ],
)
def test_what_a_generator_cannot_do_is_told_to_the_user(generator, settings, words):
    with pytest.raises(UserError, match=words):
        presets.prepare(generator, settings)


def test_one_list_that_could_be_two_things_is_refused():
    with pytest.raises(UserError, match="2 numbers for 2 steps and 2 symbols"):
        presets.sampler({"temperature": [1.1, 1.0]}, 2, 2)
    with pytest.raises(UserError, match="steps=8.*prepare"):
        presets.sampler({"steps": 8}, 8)


def test_no_guidance_keeps_a_masked_generators_steps_and_noise():
    none = presets.named({"default": TITOK | {"temperature": 0.5, "power": 2.0}}, "no_guidance")
    assert none["weight"] == 1.0 and none["temperature"] == 1.0 and "power" not in none
    kept = {name: value for name, value in TITOK.items() if name in presets.MASKED}
    assert none == presets.PLAIN | kept and kept["steps"] == 8
    scaled = {"guidance": "per_scale", "weight": 1.5, "top_k": 900}
    assert presets.sampler(presets.unguided(scaled), 10) == samplers.Sampler(top_k=900)
    first = {"guidance": "power_cosine", "weight": 3.0, "power": 2.0}
    assert presets.sampler(presets.unguided(first), 10) == samplers.Sampler()
