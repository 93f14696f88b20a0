"""How pictures came to be, as a slider."""

import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from tokgen import traces
from tokgen.app import films
from tokgen.interfaces import TokenLayout


def trace(after, side=4, count=2) -> traces.Trace:
    shape = (len(after), count, side, side, 3)
    return traces.Trace(
        np.arange(len(after), dtype=np.uint8)[:, None, None, None, None] * np.ones(shape, np.uint8),
        np.array(after),
    )


def test_a_sheet_has_the_frames_below_each_other():
    data, ending, (rows, columns) = films.sheet(trace([0, 1, 2]))
    sheet = np.asarray(Image.open(io.BytesIO(data)))
    assert (ending, sheet.shape) == ("png", (3 * rows, columns, 3))
    assert [int(sheet[rows * n + rows // 2, 2, 0]) for n in range(3)] == [0, 1, 2]


def test_a_large_sheet_is_a_jpeg_and_a_tall_one_is_cut(monkeypatch):
    data, ending, (rows, _) = films.sheet(trace(list(range(25)), side=256))
    assert ending == "jpg" and Image.open(io.BytesIO(data)).height == 25 * rows
    monkeypatch.setattr(films, "SIDE", 1000)
    data, _, (rows, _) = films.sheet(trace(list(range(25)), side=256))
    assert Image.open(io.BytesIO(data)).height == 3 * rows


@pytest.mark.parametrize(
    ("layout", "after", "told"),
    [
        (TokenLayout((16,), ((8, 8),)), [0, 24, 64], "Token 24 of 64, row 3 of 8."),
        (TokenLayout((16,), ((1, 32),)), [0, 8, 32], "Token 8 of 32."),
        (TokenLayout((16,), ((8, 8),)), [0, 3, 12], "Step 3 of 12."),
        (TokenLayout((16,), ((1, 1), (2, 2))), [0, 1, 2], "Scale 1 of 2: 1 x 1 tokens."),
    ],
)
def test_frames_say_what_they_show(layout, after, told):
    words = films.told(trace(after), layout)
    assert words[0] == "Nothing is drawn yet." and words[1] == told and len(words) == 3


def test_the_slider_begins_at_the_end_and_quotes_what_it_is_given():
    found = films.document('a".png', (10, 20), ['<b>"', "end"], small=True)
    assert 'max="1" value="1"' in found and "top:-100%" in found and "pixelated" in found
    assert "<b>" not in found and 'src="a&quot;.png"' in found
    assert re.search(r"<output>end</output>", found)
    assert html.escape(films.PLAY) in found
