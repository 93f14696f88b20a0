"""What is told of images and of token shards, without a command line."""

import pytest
from PIL import Image

from tests.data import test_token_shards
from tokgen.data import description
from tokgen.interfaces import UserError


def test_images_are_described_line_by_line(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    assert description.kind_of(tmp_path) == "folder"
    first, *rest = description.lines(tmp_path, held_out=0.0)
    assert first.startswith(f"{tmp_path}: 2 classes (cat 2, dog 2); train 4")
    assert "train     4 images, 0 unreadable" in rest
    assert any("rows x columns: 6 x 8 (4)" in line for line in rest)
    with pytest.raises(UserError, match="one of headers, full; found 'some'"):
        description.lines(tmp_path, scanned="some")


def test_token_shards_are_described(tmp_path):
    path = test_token_shards.write(tmp_path / "tokens")
    assert description.kind_of(path) == "tokens"
    assert "held_out  3 images in 2 views, 0 without tokens" in list(description.lines(path))


def test_pixels_have_no_parts_to_describe(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(UserError, match="holds pixels"):
        description.lines(tmp_path / "a.npz")
