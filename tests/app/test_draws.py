"""What is asked for of a draw: bounded before anything is drawn, and told."""

import io
import json
import math
import zipfile

import numpy as np
import pytest

from tests.app import made
from tokgen.app import bounds, draws
from tokgen.interfaces import UserError


def test_what_a_model_is_asked_for_is_what_was_chosen():
    asked = draws.checked(made.offer(), made.ask(label=1, settings={"temperature": 1.0}))
    assert asked == dict(classes=1, number=4, seed=0, preset="default", temperature=1.0)
    assert draws.checked(made.offer(), made.ask(label=draws.ALL))["classes"] == "all"
    assert draws.checked(made.offer(classes=()), made.ask())["classes"] == 0


WRONG = [
    dict(seed=-1),
    dict(seed=2**32),
    dict(seed=0.5),
    dict(seed=math.nan),
    dict(seed=None),
    dict(number=3),
    dict(number=10**9),
    dict(number=[4]),
    dict(number=None),
    dict(label=3),
    dict(label=-2),
    dict(label="ring"),
    dict(label=math.inf),
    dict(label=None),
    dict(preset="x" * 10**6),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_what_cannot_be_drawn_is_refused_in_a_line(wrong):
    with pytest.raises(UserError) as caught:
        draws.checked(made.offer(), made.ask(**wrong))
    assert len(str(caught.value)) < 300


def test_pictures_of_all_classes_are_bounded_together():
    offer = made.offer(classes=tuple(map(str, range(bounds.PICTURES))))
    draws.checked(offer, made.ask(label=draws.ALL, number=1))
    with pytest.raises(UserError, match="at most 64 pictures are drawn at a time; found 256"):
        draws.checked(offer, made.ask(label=draws.ALL, number=4))


def test_departures_are_said():
    offer = made.offer()
    assert draws.said(offer, "default", {}) == "As the preset **default** has it."
    said = draws.said(offer, "default", {"temperature": 1.25, "top_k": 0})
    assert said == "**Departs from preset default:** temperature 1.25 (preset 0.7)."


def test_programs_are_dropped_once_they_are_too_many(monkeypatch):
    dropped = []
    monkeypatch.setattr(draws.jax, "clear_caches", lambda: dropped.append(1))
    programs = draws.Programs(most=2)
    for key in ("a", "b", "a", "b"):
        programs.note(key)
    assert not dropped
    programs.note("c")
    assert len(dropped) == 1
    programs.note("c")
    assert len(dropped) == 1


def test_a_program_is_known_by_all_but_the_seed_and_the_class():
    offer = made.offer()
    keys = [
        draws._static(offer, draws.checked(offer, made.ask(**own)))
        for own in ({}, dict(seed=5), dict(label=2), dict(number=8), dict(label=draws.ALL))
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_a_bundle_has_pictures_tokens_and_how_they_were_drawn():
    image_NHW3 = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    drawn = draws.Drawn(image_NHW3, np.zeros((2, 4, 1), np.int32), ["a 0", "a 1"], {"seed": 7})
    with zipfile.ZipFile(io.BytesIO(draws.bundle(drawn))) as found:
        assert found.namelist() == ["000.png", "001.png", "tokens.npy", "drawn.json"]
        assert json.loads(found.read("drawn.json")) == {"seed": 7}
        assert np.load(io.BytesIO(found.read("tokens.npy"))).shape == (2, 4, 1)
