"""Files whose arrays are missing, of another rank, empty or huge: one message, whatever the system.

What is changed are the arrays that the sizes of a model are read from; all others meet the key
table, which compares their shapes.
"""

import pathlib

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.pretrained import parity, system, transfer

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
SYSTEMS = sorted(name for name, found in system.known().items() if found.settings is not None)


class Watched(dict):
    """A dict that remembers which of its values were looked at."""

    def __init__(self, *pairs):
        super().__init__(*pairs)
        self.seen = {}

    def __getitem__(self, key):
        self.seen[key] = None
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


def changes(array):
    """Arrays that may stand in the place of another one, by what is wrong with them."""
    shape = array.shape
    yield "flat", array.reshape(-1)
    yield "scalar", np.float32(0)
    yield "deeper", array[None]
    yield "turned", array.T
    yield "empty", array[:0]
    yield "empty within", np.zeros((*shape[:-1], 0), np.float32)
    yield "one", array[:1]
    yield "longer", np.zeros((shape[0] + 1, *shape[1:]), np.float32)
    yield "huge and empty", np.zeros((2**40, *shape[1:-1], 0), np.float32)


def fitted(weights, name, published, overrides=()):
    """Whether it fits; anything but one message is raised."""
    try:
        transfer.fit(dict(weights), name, published, source="here", overrides=overrides)
    except UserError as error:
        assert str(error)
        return False
    return True


def told_sizes(name, published, weights):
    """The arrays that the sizes are read from."""
    found, watched = system.named(name), Watched(weights)
    found.settings(published, watched)
    if found.tokens is not None:
        found.tokens(published, watched)
    return [key for key in watched.seen if key in weights]


@pytest.fixture(scope="module")
def folder_of(request):
    def of(name):
        path = HERE / name
        if not path.is_dir():
            path = request.getfixturevalue("shared") / "parity" / name
        if not path.is_dir():
            pytest.skip(f"there is no fixture of {name}")
        return parity.Folder(path, name)

    return of


@pytest.mark.parametrize("name", SYSTEMS)
def test_sizes_are_read_with_care(name, folder_of):
    """Up to the network, which the other test makes."""
    folder = folder_of(name)
    weights, published = folder.weights(), folder.config
    keys = told_sizes(name, published, weights)
    found = system.named(name)

    def sizes(weights, published):
        try:
            transfer.sizes(weights, found, name, published, source="here")
        except UserError:
            return

    sizes({}, published)
    for key in keys:
        others = {k: a for k, a in weights.items() if k != key}
        sizes(others, published)
        sizes(others | {f"{key}x": weights[key]}, published)
        for _, array in changes(weights[key]):
            sizes(weights | {key: array}, published)
            sizes(weights | {key: array}, {})


@pytest.mark.long
@pytest.mark.parametrize("name", SYSTEMS)
def test_no_shape_ends_in_a_traceback(name, folder_of):
    folder = folder_of(name)
    weights, published = folder.weights(), folder.config
    for key in told_sizes(name, published, weights):
        others = {k: a for k, a in weights.items() if k != key}
        assert not fitted(others, name, published)
        for what, array in changes(weights[key]):
            fits = fitted(weights | {key: array}, name, published)
            # more codes or no classes are another network of the same system
            assert not fits or what in ("longer", "one") or array.shape == weights[key].shape, key


@pytest.mark.parametrize("value", [None, 0, -1, 10**12, "64", [], {}, [[1]], 1.5, True])
def test_odd_sizes_of_images_in_a_configuration(value, folder_of):
    folder = folder_of("taming_vqgan")
    with pytest.raises(UserError, match="view|do not look like"):
        transfer.fit(
            folder.weights(), "taming_vqgan", folder.config | {"resolution": value}, source="here"
        )
