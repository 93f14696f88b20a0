"""What is offered of a model: names, sliders, and what departs from a preset."""

import math

import pytest

from tests.app import made
from tokgen.app import offers
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


def test_small_pictures_are_enlarged_to_be_painted_on():
    assert made.offer().enlarged == 16
    assert made.offer(size=(512, 512)).enlarged == made.offer(size=(768, 1024)).enlarged == 1
