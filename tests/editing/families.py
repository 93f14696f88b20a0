"""The families that edits are tested with: those that compile long in the long tests."""

import pytest

FAMILIES = ("raster", "random", "masked", "next_scale")
HOW = dict(particles=4, progress=False)

each = pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.long] * (f == "next_scale")) for f in FAMILIES],
)
