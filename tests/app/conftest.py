"""A page of tiny models of every family, for all tests that need one."""

import pathlib

import pytest

from tests import recipes
from tests.app import served


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("app")
    recipes.tiny(folder, "raster", "masked", "next_scale")
    return folder / "runs"


@pytest.fixture(scope="session")
def page(runs) -> served.Page:
    """Models 0 to 2, of every family, and a tokenizer."""
    pytest.importorskip("gradio", reason="needs gradio: pip install --group browser")
    names = ("generator", "masked", "next_scale", "tokenizer")
    with served.page(*(runs / name for name in names)) as found:
        yield found
