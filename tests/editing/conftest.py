"""A tiny model of each family, and images for it."""

import functools
import pathlib

import numpy as np
import pytest

import tokgen
from tests import recipes
from tests.editing.families import FAMILIES
from tokgen import image_generator, runtime


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("editing")
    recipes.tiny(folder, *FAMILIES)
    return folder / "runs"


@pytest.fixture
def model(runs, monkeypatch):
    """A family's model by name, loaded once."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    return functools.partial(loaded, runs)


@functools.cache
def loaded(runs: pathlib.Path, family: str) -> image_generator.ImageGenerator:
    return tokgen.load(runs / ("generator" if family == "raster" else family))


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
