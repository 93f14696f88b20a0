"""Reconstructions as files; the metrics of real ones are held end to end."""

import pytest

from tokgen.evaluation import reconstructions
from tokgen.interfaces import UserError


@pytest.mark.parametrize("wrong", [{"count": 0}, {"shown": 0}, {"batch": -1}])
def test_numbers_without_a_meaning_are_refused_before_a_folder_is_made(tmp_path, wrong):
    with pytest.raises(UserError, match="must be at least"):
        reconstructions.reconstruct(tmp_path / "run", tmp_path, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
