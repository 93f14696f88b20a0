"""What is offered of a model: names, sliders, and what departs from a preset."""

import math
import types

import ml_collections
import pytest

from tests.app import made
from tokgen.app import bounds, offers
from tokgen.interfaces import UserError


def test_titles_are_names_and_no_two_alike():
    paths = ["rar-b", "runs/generator", "other/generator/", "runs/generator/checkpoints/300"]
    assert offers.titles(paths) == ["rar-b", "generator", "generator (2)", "generator 300"]
    assert len(set(offers.titles(["a/x", "b/x", "c/x"]))) == 3


def test_only_what_was_moved_departs_from_a_preset():
    offer = made.offer()
    assert offer.departures("default", {"temperature": 0.7, "top_k": 0}) == {}
    assert offer.departures("default", {"temperature": 0.8, "top_k": 2.0}) == {
        "temperature": 0.8,
        "top_k": 2,
    }
    # a value by step is no slider's to move
    assert offer.departures("by step", {"temperature": 0.1, "top_k": 4}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 3, "0.5", [], True, 10**30])
def test_a_setting_that_no_slider_has_is_refused(value):
    with pytest.raises(UserError, match="temperature must lie from 0 to 2"):
        made.offer().departures("default", {"temperature": value})


@pytest.mark.parametrize("preset", ["nothing", None, 3, ["default"], {}])
def test_an_unknown_preset_is_refused(preset):
    with pytest.raises(UserError, match="the preset must be one of default, by step"):
        made.offer().departures(preset, {})


def model(steps: int):
    """Of a generator what its sliders are made from: a preset of so many steps."""
    preset = ml_collections.ConfigDict({"default": {"steps": 8}, "long": {"steps": steps}})
    module = types.SimpleNamespace(layout=made.offer().layout, knobs=("steps",))
    return types.SimpleNamespace(
        config=types.SimpleNamespace(presets=preset),
        presets=tuple(preset),
        classes=made.CLASSES,
        loaded=types.SimpleNamespace(module=module),
    )


@pytest.mark.parametrize("steps", [16, 64, 256])
def test_a_slider_reaches_the_steps_of_every_preset(steps):
    (found,) = [each for each in offers._settings(model(steps)) if each.name == "steps"]
    assert found.high == max(bounds.STEPS, steps)


def test_side_by_side_classes_are_those_that_both_know():
    free, one = made.offer(classes=()), made.offer(classes=("disc", "ring", "square"))
    other = made.offer(classes=("star", "square", "disc"))
    assert offers.shared([free, free]) == ()
    assert offers.shared([free, one]) == offers.shared([one, free]) == one.classes
    known = offers.shared([one, other])
    assert known == ("disc", "square")
    assert [offers.label_in(known, one, label) for label in (0, 1)] == [0, 2]
    assert [offers.label_in(known, other, label) for label in (0, 1)] == [2, 1]
    assert offers.label_in(known, free, 1) == 0
    with pytest.raises(UserError, match="the class must lie from 0 to 1"):
        offers.label_in(known, one, 2)
    stranger = made.offer(classes=("cat",))
    assert offers.shared([one, stranger]) == one.classes
    with pytest.raises(UserError, match="has no class ring; it has"):
        offers.label_in(one.classes, stranger, 1)


def test_small_pictures_are_enlarged_to_be_painted_on():
    assert made.offer().enlarged == 16
    assert made.offer(size=(512, 512)).enlarged == made.offer(size=(768, 1024)).enlarged == 1
