"""Out-painting: an image on a larger canvas, filled window by window.

A window has the size that the generator draws. Each lies over a part that is there already, its
overlap, and one that is not yet, which it draws; then comes the next, from the image outwards.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from tokgen.editing import redrawing
from tokgen.errors import UserError
from tokgen.interfaces import PyTree

DRAWS = 2**20  # numbers of draws lie below: each window of a draw has its own
MOST = 2**12 - 2  # windows, for keys are numbered by 32 bits


class Margins(NamedTuple):
    """Pixels that are added at each side."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def margins(text: str) -> Margins:
    """Of `right=128` or `left=64,right=64`; UserError for anything else."""
    sides = r"(?:^|,)(top|bottom|left|right)=(\d{1,5})(?=,|$)"
    found = dict(re.findall(sides, text)) if isinstance(text, str) else {}
    told = ",".join(f"{side}={pixels}" for side, pixels in found.items())
    if told != text or not any(int(pixels) for pixels in found.values()):
        raise UserError(
            "--grow is the pixels that are added at each side, as right=128 or top=64,left=64; "
            f"found {text!r:.100}"
        )
    return Margins(**{side: int(pixels) for side, pixels in found.items()})


def grow(
    model: redrawing.Model,
    image_NHW3: np.ndarray,
    added: Margins,
    cond: PyTree,
    index_N: np.ndarray,
    how: redrawing.How,
    *,
    overlap: float,
    feather: float,
) -> np.ndarray:
    """uint8 [N, H + top + bottom, W + left + right, 3]; the image's own bytes stand in them."""
    places = windows(image_NHW3.shape[1:3], added, overlap)
    around = (added[:2], added[2:])
    canvas = np.pad(image_NHW3, ((0, 0), *around, (0, 0)))
    empty = np.pad(np.zeros(image_NHW3.shape[1:3], bool), around, constant_values=True)
    for number, (rows, columns) in enumerate(places):
        mask_HW = empty[rows, columns]
        _, canvas[:, rows, columns] = redrawing.redraw(
            *(model, canvas[:, rows, columns], np.repeat(mask_HW[None], len(canvas), axis=0)),
            *(np.arange(len(canvas)), cond, index_N + (1 + number) * DRAWS, how),
            feather=feather,
        )
        empty[rows, columns] = False
    return canvas


def windows(size: tuple[int, int], added: Margins, overlap: float) -> list[tuple[slice, slice]]:
    """(rows, columns) on the canvas, in the order in which they are drawn.

    The share `overlap` of each side lies over the one before: first come those beside the image,
    then those beside these, so that each has neighbours that are there.
    """
    starts = []
    for side, before, after in zip(size, added[::2], added[1::2], strict=True):
        step = max(round(side * (1 - overlap)), 1)
        steps = [-min(n, before) for n in range(step, before + step, step)]
        steps += [min(n, after) for n in range(step, after + step, step)]
        starts.append([(0, before), *((n, before + n) for n in steps)])
    count = len(starts[0]) * len(starts[1]) - 1
    if count > MOST:
        raise UserError(
            f"--grow takes at most {MOST:,} windows of {size[0]} x {size[1]} pixels; found "
            f"{count:,}: add fewer pixels, or a smaller --overlap"
        )
    found = [
        (max(abs(y) / size[0], abs(x) / size[1]), abs(y) / size[0] + abs(x) / size[1], row, column)
        for y, row in starts[0]
        for x, column in starts[1]
        if y or x
    ]
    return [
        (slice(row, row + size[0]), slice(column, column + size[1]))
        for *_, row, column in sorted(found)
    ]
