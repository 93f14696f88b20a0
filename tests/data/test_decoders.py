"""The faster decoder gives PIL's pixels; whatever is no plain JPEG goes through PIL."""

import io

import numpy as np
import pytest
from PIL import Image

from tokgen.data import pixels, views


def picture(mode: str, form: str, **options) -> bytes:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(37, 53, 4)), axis=1) * 8 + 128
    image = Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)[..., :3]).convert(mode)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGB", "JPEG", dict(quality=92)),
        ("RGB", "JPEG", dict(quality=60, subsampling=2)),
        ("RGB", "JPEG", dict(quality=80, progressive=True)),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
    ],
)
def test_same_pixels_as_pil(mode, form, options, channels):
    data = picture(mode, form, **options)
    found = pixels.decode(data, channels, decoder="simplejpeg")
    np.testing.assert_array_equal(found, pixels.decode(data, channels))


def test_orientation_is_applied_by_both():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture("RGB", "JPEG", exif=exif.tobytes())
    found = pixels.decode(data, 3, decoder="simplejpeg")
    assert found.shape == (53, 37, 3)
    np.testing.assert_array_equal(found, pixels.decode(data, 3))


def test_broken_metadata_break_no_image_for_either(monkeypatch):
    data = picture("RGB", "JPEG")

    def broken(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    found = pixels.decode(data, 3, decoder="simplejpeg")
    np.testing.assert_array_equal(found, pixels.decode(data, 3))


def test_broken_jpeg_is_broken_for_both():
    data = picture("RGB", "JPEG")[:200]
    for decoder in pixels.DECODERS:
        with pytest.raises(pixels.BrokenImage):
            pixels.decode(data, 3, decoder=decoder)


def test_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder must be one of pil, simplejpeg; found 'fast'"):
        views.View((8, 8), decoder="fast")
