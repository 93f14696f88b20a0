"""Files that the page writes: how many, how old, and how much in all."""

import os
import time

import pytest

from tokgen.app import bounds, files
from tokgen.interfaces import UserError


@pytest.fixture
def made(tmp_path):
    (tmp_path / "made").mkdir()
    return files.Files(tmp_path / "made")


def test_of_each_kind_the_latest_stay(made, monkeypatch):
    monkeypatch.setattr(bounds, "FILES", 2)
    kept = [made.keep(b"x", "zip") for _ in range(4)]
    other = made.keep(b"x", "npy")
    assert [path.exists() for path in kept] == [False, False, True, True] and other.exists()


def test_old_files_go_before_work(made):
    old, new = made.keep(b"x", "zip"), made.keep(b"y", "zip")
    past = time.time() - bounds.KEPT - 60
    os.utime(old, (past, past))
    made.make_room()
    assert not old.exists() and new.exists()


def test_nothing_is_drawn_where_the_disk_is_full(made, tmp_path, monkeypatch):
    (tmp_path / "upload").write_bytes(b"x" * 100)
    made.make_room()
    monkeypatch.setattr(bounds, "DISK", 99)
    with pytest.raises(UserError, match="no room for more pictures"):
        made.make_room()
