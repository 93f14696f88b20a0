"""Types and ranges of arguments: what fits, how it is told, and who asks."""

import dataclasses
import math
from typing import Annotated, Any

import ml_collections
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, ranges

PAIR = tuple[ranges.Side, ranges.Side]


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (3, int, True),
        (np.int64(3), int, True),
        (True, int, False),
        (3.0, int, False),
        ("3", int, False),
        (3, float, True),
        (np.float32(3), float, True),
        (math.inf, float, False),
        (math.nan, float, False),
        (10**400, float, True),
        (10**400, ranges.Weight, False),
        (False, float, False),
        (False, bool, True),
        (0, bool, False),
        (None, int | None, True),
        (0, ranges.Count | None, False),
        ((1, 2), PAIR, True),
        ([1, 2], PAIR, True),
        ((1, 2, 3), PAIR, False),
        ((1, 0), PAIR, False),
        (12, PAIR, False),
        ((), tuple[int, ...], True),
        ((), ranges.Widths, False),
        ((4,) * 17, ranges.Widths, False),
        ((1, (2, 3)), tuple[ranges.Side | PAIR, ...], True),
        ({"a": 1}, dict, True),
        (ml_collections.ConfigDict({"a": 1}), dict, True),
        (1, dict, False),
        ({"a": -1.0}, dict[str, ranges.Amount], False),
        (0.0, ranges.Positive, False),
        (1.0, ranges.Rate, False),
        (1.0, ranges.Share, True),
        (object(), Any, True),
        ("x", nnx.Module, False),
    ],
)
def test_what_fits(value, hint, fit):
    assert ranges.fits(value, hint) is fit
    assert bool(ranges.problem("x", value, hint)) is not fit


def test_need_and_found_are_told():
    assert ranges.problem("width", 0, ranges.Width) == (
        "width must be a whole number from 1 to 131,072; found 0"
    )
    assert ranges.problem("ema", 2.0, ranges.Rate) == (
        "ema must be a finite number from 0 and below 1; found 2.0"
    )
    told = ranges.problem("scales", ("a" * 500,), Annotated[tuple[int, ...], ranges.Length(1, 3)])
    assert "with 1 to 3 entries" in told and len(told) < 200


@dataclasses.dataclass(frozen=True)
class Record:
    """Two fields with ranges."""

    rate: ranges.Rate = 0.0
    count: ranges.Count = 1

    def __post_init__(self):
        ranges.check(self)


class Module(nnx.Module):
    """As constructors are: checked before anything is computed."""

    @ranges.checked
    def __init__(self, width: ranges.Width, *, other=None, rngs=None):
        self.width = 1 / width


def test_constructors_ask_for_themselves():
    assert Module(4, other=object()).width == 0.25 and Record(0.5, 2).count == 2
    with pytest.raises(interfaces.UserError, match="width must be"):
        Module(0)
    with pytest.raises(interfaces.UserError, match="(?s)2 problems.*rate.*count") as caught:
        Record(1.0, 0)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(TypeError):  # Python's own, of a call that has no such argument
        Module(4, depth=1)


@pytest.mark.parametrize(
    ("literal", "hint", "value"),
    [
        (1, float, 1.0),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, [2, 3]], tuple[ranges.Side | PAIR, ...], (1, (2, 3))),
        (None, ranges.Rate | None, None),
        (1, int, 1),
        (True, float, True),
    ],
)
def test_literals_take_the_type_that_is_stated(literal, hint, value):
    found = ranges.typed(literal, hint)
    assert found == value and type(found) is type(value)
