"""What a library user may give as images, and what is refused before a device sees it."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tokgen.data import pictures, pixels, views
from tokgen.errors import UserError

VIEW, GRAY = views.View((4, 6)), views.View((4, 6), channels=1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


IMAGE_NHW3 = noise(2, 4, 6, 3)


class Tensor:
    """What torch's tensors are to numpy: an array, or an error where they lie elsewhere."""

    def __init__(self, array, error=None):
        self.array, self.error = array, error

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise self.error
        return self.array


@pytest.mark.parametrize(
    "given",
    [
        IMAGE_NHW3,
        list(IMAGE_NHW3),
        tuple(map(Image.fromarray, IMAGE_NHW3)),
        [IMAGE_NHW3[0], Image.fromarray(IMAGE_NHW3[1])],
        IMAGE_NHW3 / 255,
        IMAGE_NHW3.astype(np.float32) / np.float32(255),
        jnp.asarray(IMAGE_NHW3),
        jnp.asarray(IMAGE_NHW3) / 255,
        Tensor(IMAGE_NHW3),
        Tensor(IMAGE_NHW3 / 255),
    ],
    ids=lambda given: type(given).__name__,
)
def test_all_forms_of_the_same_images_are_the_same_bytes(given):
    found = pictures.exact(given, VIEW)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IMAGE_NHW3)


def test_one_image_is_a_batch_of_one():
    for given in (IMAGE_NHW3[0], Image.fromarray(IMAGE_NHW3[0]), [IMAGE_NHW3[0]]):
        np.testing.assert_array_equal(pictures.exact(given, VIEW), IMAGE_NHW3[:1])
    gray = noise(4, 6, 1)
    np.testing.assert_array_equal(pictures.exact(gray, GRAY), gray[None])
    found = pictures.exact(Image.fromarray(gray[..., 0]), GRAY)
    np.testing.assert_array_equal(found, gray[None])


REFUSED = {
    "another size": (noise(5, 6, 3), r"must be 4 x 6 pixels \(rows x columns\).*found 5 x 6.*fit"),
    "columns first": (Image.new("RGB", (4, 6)), "found 6 x 4"),
    "one of several": ([noise(4, 6, 3), noise(4, 7, 3)], "found 4 x 7 in image 1 of 2"),
    "rank 2": (noise(4, 6), r"uint8 4x6: of a gray image np.repeat"),
    "rank 5": (noise(1, 1, 4, 6, 3), "found uint8 1x1x4x6x3"),
    "a number": (np.float32(1), "found float32 no axes"),
    "channels first": (noise(2, 3, 4, 6), r"channels come last, x.transpose\(0, 2, 3, 1\)"),
    "channels first, alone": (noise(3, 4, 6), r"channels come last, x.transpose\(1, 2, 0\)"),
    "four channels": (noise(4, 6, 4), "found uint8 4x6x4"),
    "integers": (noise(4, 6, 3).astype(int), r"found int64: x.astype\(np.uint8\)"),
    "bools": (noise(4, 6, 3) > 9, "found bool"),
    "words": (np.full((4, 6, 3), "a"), "found <U1"),
    "objects": (np.full((4, 6, 3), None), "found object"),
    "above 1": (noise(4, 6, 3) / 1.0, r"must lie in \[0, 1\]; found .* divide by 255"),
    "below 0": (noise(4, 6, 3) / 127.5 - 1, r"must lie in \[0, 1\]"),
    "NaN": (np.full((4, 6, 3), np.nan), "must be finite; found NaN"),
    "infinity": (np.full((4, 6, 3), np.inf, np.float32), "must be finite"),
    "nothing": ([], "at least one image is needed; found an empty list"),
    "an empty array": (noise(0, 4, 6, 3), "at least one image is needed; found an array of 0x4"),
    "numbers": ([[0, 1], [2, 3]], "lists of numbers"),
    "none": (None, "found NoneType"),
    "one of none": ([None], "found NoneType"),
    "a word": ("photo.png", r"found the path 'photo.png': fit\(path\) reads it"),
    "a batch in a list": ([IMAGE_NHW3], "an array of 2 in entry 0: np.concatenate"),
    "a tensor elsewhere": (
        Tensor(None, TypeError("can't convert cuda:0 device type tensor to numpy.\nUse more")),
        r"numpy cannot read \(can't convert cuda:0.*\): x.detach\(\).cpu\(\)",
    ),
    "32 bits": (
        Image.new("I", (6, 4)),
        "image 0, of PIL mode I, cannot be read: .*no stated range",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_refused_in_one_message(case):
    given, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as caught:
        pictures.exact(given, VIEW)
    assert len(str(caught.value).splitlines()) == 1


def test_files_and_images_of_any_size_are_fitted_as_their_files_are_reconstructed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, file = Image.fromarray(noise(40, 30, 3)), io.BytesIO()
    photo.save(file, "PNG", exif=exif)
    (tmp_path / "photo.png").write_bytes(file.getvalue())
    wanted = views.centre(pixels.decode(file.getvalue(), 3), (4, 6))
    with Image.open(tmp_path / "photo.png") as image:
        for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), image):
            found = pictures.fitted(given, VIEW)
            np.testing.assert_array_equal(found, wanted[None])
    several = [tmp_path / "photo.png", noise(9, 9, 3), Image.new("LA", (50, 20))]
    assert pictures.fitted(several, VIEW).shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(pictures.fitted(IMAGE_NHW3, VIEW), IMAGE_NHW3)


def test_files_that_cannot_be_read_are_told_by_their_path(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png cannot be read as an image"):
        pictures.fitted(tmp_path / "broken.png", VIEW)
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match="no image file"):
            pictures.fitted(missing, VIEW)
