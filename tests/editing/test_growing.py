"""Larger canvases: windows that cover them, and the image's own bytes in the middle."""

import numpy as np
import pytest

from tests.editing.families import HOW
from tokgen.editing import growing
from tokgen.interfaces import UserError


@pytest.mark.parametrize(
    "text", ["right=8", "left=20", "top=3,bottom=40", "left=7,right=16,top=9,bottom=1"]
)
@pytest.mark.parametrize("overlap", [0.5, 0.25])
def test_windows_cover_the_canvas_each_over_what_is_there(text, overlap):
    size, added = (8, 16), growing.margins(text)
    canvas = np.zeros(
        (size[0] + added.top + added.bottom, size[1] + added.left + added.right), bool
    )
    canvas[added.top :, added.left :][: size[0], : size[1]] = True
    for rows, columns in growing.windows(size, added, overlap):
        window = canvas[rows, columns]
        assert window.shape == size
        assert window.sum() >= window.size * overlap**2  # something to go on from
        canvas[rows, columns] = True
    assert canvas.all()


@pytest.mark.parametrize("text", ["", "right", "right=-4", "right=4,", "up=3", "right=4,right=5"])
def test_what_is_no_margin_is_refused(text):
    with pytest.raises(UserError, match="right=128"):
        growing.margins(text)


def test_more_windows_than_have_keys_of_their_own_are_refused():
    assert len(growing.windows((8, 8), growing.Margins(right=4 * growing.MOST), 0.5)) <= 2**12 - 2
    for added in (growing.Margins(right=4 * growing.MOST + 4), growing.Margins(*[99_999] * 4)):
        with pytest.raises(UserError, match=r"at most 4,094 windows of 8 x 8 .* --overlap"):
            growing.windows((8, 8), added, 0.5)


@pytest.mark.parametrize("family", ["masked", "raster"])
def test_a_grown_image_has_its_own_bytes_and_each_draw_its_own_canvas(family, model, images):
    found = model(family)
    edits = found.edit(images[:2], 3, grow="right=24,top=8", number=2, **HOW)
    assert edits.image_NHW3.shape == (4, 40, 56, 3) and edits.mask_KHW.shape == (2, 40, 56)
    np.testing.assert_array_equal(edits.image_NHW3[:, 8:, :32], images[[0, 0, 1, 1]])
    np.testing.assert_array_equal(edits.mask_KHW[:, 8:, :32], False)
    assert (edits.image_NHW3[0] != edits.image_NHW3[1]).any()
    alone = found.edit(images[1], 3, grow="right=24,top=8", number=2, **HOW)
    np.testing.assert_array_equal(alone.image_NHW3, edits.image_NHW3[2:])
    assert edits.sheet().shape[2] == 3
