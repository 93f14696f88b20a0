import pytest

from tokgen.interfaces import UserError
from tokgen.sampling import filters, guidance, presets

PUBLISHED = {
    "default": {"temperature": 0.7, "guidance": "constant", "weight": 2.0},
    "paper": {"top_k": 5, "top_p": 0.9, "guidance": "power_cosine", "weight": 4.0, "power": 2.5},
}


def test_a_preset_becomes_the_sampler_it_says():
    plain = presets.sampler({}, 8)
    assert plain == filters.Sampler() and plain.guidance == ()  # weight 1 costs nothing
    full = presets.sampler(PUBLISHED["paper"], 8)
    weights = guidance.power_cosine(4.0, 8, 2.5)
    assert full == filters.Sampler(top_k=5, top_p=0.9, guidance=weights)
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
    assert presets.sampler(none, 8) == filters.Sampler()
    assert presets.named({}, "no_guidance") == presets.PLAIN
    own = {"no_guidance": {"temperature": 0.5}}  # a checkpoint's own comes first
    assert presets.named(own, "no_guidance")["temperature"] == 0.5
    paper["weight"] = 9.0
    assert presets.PLAIN["weight"] == 1.0 and PUBLISHED["paper"]["weight"] == 4.0


def test_an_unknown_preset_is_refused_with_the_names_of_those_that_are():
    with pytest.raises(UserError, match="default, no_guidance, paper; found 'papr'"):
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
