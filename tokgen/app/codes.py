"""Tokens to look at: each grid as a map of colours, a colour and a number for each token."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from tokgen.app import offers
from tokgen.interfaces import TokenLayout

GOLDEN = (
    0.618033988749895  # turns of the colour circle from one token to the next: neighbours differ
)
SIDE = 384  # pixels of a map, about
READABLE = 22  # pixels of a cell that holds a number
SYMBOLS = 4  # of a position of which a map is shown
NUMBERS = 1024  # tokens that are written out


@dataclasses.dataclass(frozen=True, eq=False)
class Looked:
    """A picture through a tokenizer and back.

    Attributes:
        image_HW3, back_HW3: as it went in, and as it came out.
        maps: (picture, its name) of every grid of its tokens.
        told: what is to be said of it.
        tokens_LG: None of a tokenizer without tokens.
    """

    image_HW3: np.ndarray
    back_HW3: np.ndarray
    maps: list[tuple[Image.Image, str]]
    told: str
    tokens_LG: np.ndarray | None


def look(model: offers.Model, image_HW3: np.ndarray) -> Looked:
    """A picture of the model's size as tokens, and what its decoder makes of them."""
    if model.layout is None:
        back_HW3 = model.reconstruct(image_HW3)[0]
        told = f"{fidelity(image_HW3, back_HW3)} This tokenizer is continuous: it has no tokens."
        return Looked(image_HW3, back_HW3, [], told, None)
    tokens_NLG = model.encode(image_HW3)
    back_HW3 = model.decode(tokens_NLG)[0]
    layout, tokens_LG = model.layout, tokens_NLG[0]
    used = " and ".join(
        f"{len(np.unique(tokens_LG[:, g]))} of {size}" for g, size in enumerate(layout.vocab)
    )
    told = f"{fidelity(image_HW3, back_HW3)} {layout.length} tokens; {used} are in use."
    return Looked(image_HW3, back_HW3, maps(tokens_LG, layout), told, tokens_LG)


def fidelity(image_HW3: np.ndarray, back_HW3: np.ndarray) -> str:
    """PSNR in words."""
    error = np.mean((image_HW3.astype(np.float64) - back_HW3) ** 2)
    return f"{10 * np.log10(255**2 / error):.1f} dB PSNR." if error else "Not a byte is lost."


def maps(tokens_LG: np.ndarray, layout: TokenLayout) -> list[tuple[Image.Image, str]]:
    """A map of every grid, and of the first symbols of a position."""
    found = []
    for (start, size), (rows, columns) in zip(layout.spans, layout.grids, strict=True):
        for symbol in range(min(tokens_LG.shape[1], SYMBOLS)):
            grid = tokens_LG[start : start + size, symbol].reshape(rows, columns)
            if 1 in grid.shape and size > 16:  # a sequence: it is read in lines
                grid = _lines(grid.reshape(-1))
            name = (
                f"{rows} x {columns}"
                if tokens_LG.shape[1] == 1
                else (f"{rows} x {columns}, symbol {symbol + 1}")
            )
            found.append((coloured(grid), name))
    return found


def coloured(grid: np.ndarray) -> Image.Image:
    """A map: the same colour for the same token, and its number where there is room; -1 is none."""
    cell = max(1, SIDE // max(grid.shape))
    colour = np.array([_colour(int(token)) for token in grid.reshape(-1)], np.uint8)
    picture = colour.reshape(*grid.shape, 3).repeat(cell, 0).repeat(cell, 1)
    image = Image.fromarray(picture)
    if cell >= READABLE:
        draw = ImageDraw.Draw(image)
        for (row, column), token in np.ndenumerate(grid):
            middle = ((column + 0.5) * cell, (row + 0.5) * cell)
            if token >= 0:
                size = min(16, max(8, 2 * cell // (len(str(token)) + 2)))
                draw.text(middle, str(token), fill=(0, 0, 0), anchor="mm", font_size=size)
    return _with_room(image)


def _with_room(image: Image.Image) -> Image.Image:
    """A strip below the map, clear, for its name."""
    found = Image.new("RGBA", (image.width, image.height * 9 // 8))
    found.paste(image)
    return found


def written(tokens_LG: np.ndarray, layout: TokenLayout) -> str:
    """The numbers, a line for each row of each grid; of many the first."""
    lines, left = [], NUMBERS
    for (start, size), (rows, columns) in zip(layout.spans, layout.grids, strict=True):
        lines.append(f"# {rows} x {columns}")
        for row in tokens_LG[start : start + size].reshape(rows, columns, -1):
            if left <= 0:
                return "\n".join([*lines, "... the file has all"])
            left -= columns
            lines.append(" ".join(",".join(map(str, position)) for position in row.tolist()))
    return "\n".join(lines)


def _lines(row: np.ndarray) -> np.ndarray:
    columns = int(np.ceil(np.sqrt(len(row))))
    filled = np.full(-(-len(row) // columns) * columns, -1, int)
    filled[: len(row)] = row
    return filled.reshape(-1, columns)


def _colour(token: int) -> tuple[int, int, int]:
    if token < 0:
        return (255, 255, 255)
    light = 0.62 + 0.08 * (token % 3)
    r, g, b = colorsys.hls_to_rgb(token * GOLDEN % 1, light, 0.65)
    return round(255 * r), round(255 * g), round(255 * b)
