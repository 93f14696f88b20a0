"""Regions: words, boxes, files; the tokens that they free; what is filled, and joined."""

import pathlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tokgen.editing import edits, regions
from tokgen.interfaces import TokenLayout, UserError


def test_halves_and_boxes_are_where_they_say():
    size = 6, 9
    for word, wanted in {
        "left": np.s_[:, :4],
        "right": np.s_[:, 4:],
        "top": np.s_[:3],
        "bottom": np.s_[3:],
        "center": np.s_[1:4, 2:6],
        "all": np.s_[:],
        "box=2,3,4,5": np.s_[2:6, 3:8],
    }.items():
        mask_HW = np.zeros(size, bool)
        mask_HW[wanted] = True
        np.testing.assert_array_equal(regions.region(word, size), mask_HW, word)


def test_a_file_an_image_and_an_array_are_the_same_mask(tmp_path):
    mask_HW = np.random.default_rng(0).random((6, 9)) < 0.4
    image = PIL.Image.fromarray(mask_HW.astype(np.uint8) * 255)
    image.save(tmp_path / "mask.png")
    image.convert("RGB").save(tmp_path / "colour.png")
    image.convert("RGBA").save(tmp_path / "opaque.png")
    wide = mask_HW * np.uint16(30000) + np.uint16(2000)  # dark and light, of 16 bits
    PIL.Image.fromarray(wide + mask_HW * np.uint16(30000)).save(tmp_path / "wide.png")
    files = [tmp_path / f"{name}.png" for name in ("mask", "colour", "opaque", "wide")]
    arrays = mask_HW, mask_HW * np.uint8(255), jnp.asarray(mask_HW)
    for mask in (*arrays, image, image.convert("RGBA"), *files, str(files[0])):
        np.testing.assert_array_equal(regions.region(mask, (6, 9)), mask_HW)


def test_what_is_wrong_with_a_mask_is_said_of_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGBA", (9, 6)).save("clear.png")
    PIL.Image.new("L", (6, 9)).save("turned.png")
    pathlib.Path("words.png").write_text("left")
    for name, words in {
        "clear.png": "a mask is white where .* with transparency in clear.png",
        "turned.png": "a mask must have the size .* found 9 x 6 in turned.png",
        "words.png": "words.png cannot be read as an image",
    }.items():
        with pytest.raises(UserError, match=f"^{words}"):
            regions.region(name, (6, 9))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("leftish", "no file"),
        ("box=1,2,3", "ROW,COLUMN,HEIGHT,WIDTH"),
        ("box=0,0,7,2", "must lie in the image, 6 x 9"),
        ("box=0,0,0,2", "at least one"),
        (np.zeros((9, 6), bool), r"\[6, 9\]"),
        (np.zeros((6, 9), np.float32), "float32"),
        (PIL.Image.new("L", (6, 9)), "found 9 x 6"),
        (PIL.Image.new("RGBA", (9, 6)), "transparency"),
    ],
)
def test_what_is_no_mask_is_refused(mask, words):
    with pytest.raises(UserError, match=words):
        regions.region(mask, (6, 9))


def test_a_token_is_free_where_any_pixel_of_its_cell_is():
    """Against a loop over cells and pixels; also of grids that do not divide the image."""
    layout = TokenLayout((4,), ((1, 1), (2, 3), (5, 7), (6, 8)))
    numbers = np.random.default_rng(1)
    mask_NHW = numbers.random((5, 12, 16)) < 0.02
    mask_NHW[0], mask_NHW[1] = False, True
    found_NL = regions.free(mask_NHW, layout)
    place = 0
    for rows, columns in layout.grids:
        for row in range(rows):
            for column in range(columns):
                # pixels whose open square meets the cell
                ys = [
                    y for y in range(12) if y * rows < (row + 1) * 12 and (y + 1) * rows > row * 12
                ]
                xs = [
                    x
                    for x in range(16)
                    if x * columns < (column + 1) * 16 and (x + 1) * columns > column * 16
                ]
                wanted_N = mask_NHW[:, ys][:, :, xs].any((1, 2))
                np.testing.assert_array_equal(found_NL[:, place], wanted_N)
                place += 1
    assert not found_NL[0].any() and found_NL[1].all()


def test_what_is_filled_shows_nothing_of_what_was_there():
    numbers = np.random.default_rng(2)
    image = numbers.integers(0, 256, (8, 8, 3), np.uint8)
    other = numbers.integers(0, 256, (8, 8, 3), np.uint8)
    mask = numbers.random((8, 8)) < 0.5
    both = np.where(mask[..., None], other, image)
    filled = regions.filled(image, mask)
    np.testing.assert_array_equal(filled, regions.filled(both, mask))
    np.testing.assert_array_equal(filled[~mask], image[~mask])
    assert {tuple(p) for p in filled.reshape(-1, 3)} <= {tuple(p) for p in image[~mask]}
    assert (regions.filled(image, np.ones((8, 8), bool)) == 128).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_kept_pixels_keep_every_byte_and_an_edge_is_carried_into_the_mask(channels):
    numbers = np.random.default_rng(3)
    image = numbers.integers(0, 256, (16, 16, channels), np.uint8)
    drawn = numbers.integers(0, 256, (16, 16, channels), np.uint8)
    for mask in (numbers.random((16, 16)) < 0.5, np.zeros((16, 16), bool)):
        for feather in (0, 3.0):
            joined = regions.joined(image, drawn, mask, feather)
            np.testing.assert_array_equal(joined[~mask], image[~mask])
            if not feather:
                np.testing.assert_array_equal(joined[mask], drawn[mask])
    # a decoder that is ten levels off everywhere: no step at the edge, all of it further in
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    level = np.full((16, 16, channels), 100, np.uint8)
    joined = regions.joined(level, level + 10, mask, 3.0)[0, :, 0].astype(int)
    np.testing.assert_array_equal(joined, [100] * 8 + [102, 105, 108] + [110] * 5)
    np.testing.assert_array_equal(regions.joined(image, drawn, np.ones((16, 16), bool), 3.0), drawn)


def test_a_word_is_judged_before_there_is_an_image(tmp_path):
    def asks(mask):
        edits.Settings(mask=mask).check()

    for mask in (*regions.NAMES, "box=9,9,3,3", np.ones((4, 4), bool), ["left", "top"]):
        asks(mask)
    assert all(regions.region(name, (6, 9)).any() for name in regions.NAMES)
    with PIL.Image.new("L", (9, 6), 255) as white:  # a file may be called as a form is
        white.save(tmp_path / "box.png")
    assert regions.region(tmp_path / "box.png", (6, 9)).all()
    for mask in ("middle", "box=1,2", tmp_path / "none.png", ["left", "middle"]):
        with pytest.raises(UserError, match="a box is box=|which is no file"):
            asks(mask)
