"""Tokens as maps and as numbers."""

import numpy as np

from tokgen.app import codes
from tokgen.interfaces import TokenLayout


def test_equal_tokens_have_one_colour_and_unlike_ones_others():
    image = np.asarray(codes.coloured(np.array([[3, 4], [4, 3]])))
    cells = [tuple(image[y, x]) for y in (1, codes.SIDE - 2) for x in (1, -2)]
    assert cells[0] == cells[3] != cells[1] == cells[2]


def test_every_grid_has_a_map_and_a_sequence_is_read_in_lines():
    layout = TokenLayout((16,), ((1, 1), (2, 2), (4, 4)))
    found = codes.maps(np.arange(21)[:, None] % 16, layout)
    assert [name for _, name in found] == ["1 x 1", "2 x 2", "4 x 4"]
    ((image, _),) = codes.maps(np.arange(32)[:, None], TokenLayout((32,), ((1, 32),)))
    assert image.width < 2 * image.height


def test_symbols_have_maps_of_their_own_up_to_a_few():
    layout = TokenLayout((4,) * 6, ((2, 2),))
    found = codes.maps(np.zeros((4, 6), int), layout)
    assert [name for _, name in found] == [f"2 x 2, symbol {n}" for n in (1, 2, 3, 4)]


def test_numbers_stand_in_rows_and_many_are_cut_off():
    layout = TokenLayout((16, 16), ((1, 1), (2, 2)))
    tokens_LG = np.arange(10).reshape(5, 2)
    assert codes.written(tokens_LG, layout) == "# 1 x 1\n0,1\n# 2 x 2\n2,3 4,5\n6,7 8,9"
    large = TokenLayout((16,), ((64, 64),))
    lines = codes.written(np.zeros((4096, 1), int), large).splitlines()
    assert lines[-1] == "... the file has all" and len(lines) == 18


def test_fidelity_is_psnr():
    black = np.zeros((4, 4, 3), np.uint8)
    assert codes.fidelity(black, black) == "Not a byte is lost."
    assert codes.fidelity(black, black + 255) == "0.0 dB PSNR."
