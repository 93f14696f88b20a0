"""Pictures from a browser: bounded, fitted, painted over."""

import io

import numpy as np
import pytest
from PIL import Image

from tokgen.app import bounds, uploads
from tokgen.interfaces import UserError


class Fitting:
    """A model that takes pictures of any size."""

    def fit(self, image):
        return np.asarray(image.resize((8, 8)))[None]


def png(size=(20, 10), mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def test_a_file_is_fitted(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(mode="RGBA"))
    assert uploads.fitted(Fitting(), str(path)).shape == (8, 8, 3)


@pytest.mark.parametrize("data", [b"", b"no picture", png()[:40], b"%!PS-Adobe", b"\0" * 1000])
def test_what_is_no_picture_is_refused(tmp_path, data):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        uploads.fitted(Fitting(), path)


def test_what_is_not_there_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="upload one"):
        uploads.fitted(Fitting(), None)
    path = tmp_path / "a.png"
    path.write_bytes(png())
    monkeypatch.setattr(bounds, "PIXELS", 199)
    with pytest.raises(UserError, match="20 x 10 pixels, more than the 199"):
        uploads.fitted(Fitting(), path)
    monkeypatch.setattr(bounds, "UPLOAD", 10)
    with pytest.raises(UserError, match="at most"):
        uploads.fitted(Fitting(), path)


def test_a_pixel_is_painted_where_most_of_what_lies_over_it_is():
    layer = np.zeros((64, 64), np.uint8)
    layer[:16, :16] = 255  # all of two by two pixels of eight
    layer[16:20, 16:24] = 255  # half of one, and then a little less
    layer[24:27, 16:24] = 255
    mask_HW = uploads.painted([layer, np.zeros((9, 9), np.uint8)], (8, 8))
    assert mask_HW.sum() == 5 and mask_HW[:2, :2].all() and mask_HW[2, 2]
    assert uploads.painted([], (8, 8)).sum() == 0


def test_enlarged_pixels_are_squares():
    image_HW3 = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = uploads.enlarged(image_HW3, 3)
    assert large.shape == (6, 6, 3) and (large[::3, ::3] == image_HW3).all()


def test_a_layer_is_its_opacity_and_bounded(monkeypatch):
    assert uploads.opacity(png(mode="RGBA")).shape == (10, 20)
    assert (uploads.opacity(png()) == 255).all()
    for data in (b"", b"no picture", png()[:50]):
        with pytest.raises(UserError, match="what was painted cannot be read"):
            uploads.opacity(data)
    monkeypatch.setattr(bounds, "PAINTED", 199)
    with pytest.raises(UserError, match="more than the 199"):
        uploads.opacity(png())
