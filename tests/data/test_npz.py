"""An .npz of images as a source."""

import numpy as np
import pytest

from tokgen.data import datasets, npz
from tokgen.interfaces import UserError


def pictures(count: int) -> np.ndarray:
    """uint8 [count, 8, 12, 3]"""
    return np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), np.uint8)


def test_an_archive_is_a_source_in_any_order(tmp_path):
    image_NHW3 = pictures(30)
    np.savez(tmp_path / "a.npz", arr_0=image_NHW3, arr_1=np.arange(30) % 4)
    source = npz.Source(str(tmp_path / "a.npz"))
    assert len(source) == 30 and source.classes == ("0", "1", "2", "3")
    for indices in ([3, 1, 2], [0, 29], np.arange(5, 20), [7]):
        records = source.__getitems__(indices)
        for index, record in zip(indices, records, strict=True):
            np.testing.assert_array_equal(record["image"], image_NHW3[index])
            assert record["label"] == index % 4
    np.testing.assert_array_equal(source[11]["image"], image_NHW3[11])


def test_an_archive_is_no_set_with_parts(tmp_path):
    """Named on a command line it is all there is; a config that asks for a part is told."""
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pictures(3))
    source = datasets.from_path(path, "held_out", labels="none")
    assert len(source) == 3 and source.classes == () and source.name(2) == f"{path}[2]"
    with pytest.raises(UserError, match="one set, without parts"):
        npz.Source(path, split="train")
    with pytest.raises(UserError, match="an image folder is needed"):
        datasets.from_path(tmp_path / "none.npz", "train")
