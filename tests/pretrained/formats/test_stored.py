"""Arrays that lie in files: read when they are wanted, each once, and never past what is there."""

import os

import numpy as np
import pytest

from tokgen.errors import UserError
from tokgen.pretrained.formats import reader, stored, writer

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int64),
    "c": np.float16([[1.5]]),
}
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt", "flax": ".msgpack"}


@pytest.fixture(params=SUFFIXES)
def file(request, tmp_path):
    path = tmp_path / f"weights{SUFFIXES[request.param]}"
    writer.write(path, ARRAYS, form=request.param)
    return path


def test_what_is_known_of_an_array_before_it_is_read(file):
    for name, found in reader.lying(file).items():
        wanted = ARRAYS[name]
        assert (found.shape, found.dtype, found.ndim) == (wanted.shape, wanted.dtype, wanted.ndim)
        assert (found.size, found.nbytes, len(found)) == (wanted.size, wanted.nbytes, len(wanted))
        np.testing.assert_array_equal(found.read(), wanted)
        np.testing.assert_array_equal(found[0], wanted[0])
        assert np.asarray(found, np.float64).dtype == np.float64


def test_an_array_is_read_when_it_is_asked_for_and_no_other(file, monkeypatch):
    taken = []
    filled = stored.filled

    def counted(file, array):
        taken.append(len(array))
        return filled(file, array)

    monkeypatch.setattr(stored, "filled", counted)
    found = reader.lying(file)
    taken.clear()  # headers
    found["a"].read()
    assert taken == [ARRAYS["a"].nbytes]


@pytest.mark.parametrize("keep", [0, 100])
def test_a_file_that_is_cut_off_while_it_is_in_use_is_told(file, keep):
    found = reader.lying(file)
    os.truncate(file, keep)
    with pytest.raises(UserError, match=f"weight file {file}"):
        found["a"].read()


def test_a_file_that_is_written_to_while_it_is_in_use_is_told(file):
    found = reader.lying(file)
    found["a"].read()
    data = bytearray(file.read_bytes())
    place = data.index(ARRAYS["a"].tobytes())
    data[place] ^= 1
    with open(file, "r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(0, 0))
    with pytest.raises(UserError, match="altered|damaged"):
        found["a"].read()


def test_a_file_that_is_replaced_is_read_as_it_was(file):
    found = reader.lying(file)
    (file.parent / "other").write_bytes(b"something else")
    os.replace(file.parent / "other", file)
    np.testing.assert_array_equal(found["a"].read(), ARRAYS["a"])


def test_arrays_are_written_when_they_are_made(tmp_path, file):
    """One after the other: a file may be larger than memory."""
    alive = [0]

    def make(array):
        alive[0] += 1
        return array.copy()

    lazy = {
        name: stored.Stored(array.dtype, array.shape, lambda array=array: make(array))
        for name, array in ARRAYS.items()
    }
    form = next(form for form, suffix in SUFFIXES.items() if suffix == file.suffix)
    writer.write(tmp_path / f"again{file.suffix}", lazy, form=form)
    assert alive == [len(ARRAYS)]
    assert (tmp_path / f"again{file.suffix}").read_bytes() == file.read_bytes()
    wrong = stored.Stored(np.dtype("f4"), (2, 2), lambda: np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="became"):
        wrong.read()
