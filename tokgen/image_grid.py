"""Pictures of arrays: grids of images, pairs beside each other, PNG files."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image


def grid(image_BHW3: np.ndarray, columns: int, *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Images [B, H, W, 3] in rows of `columns` on white; every pixel `scale` x `scale`."""
    image_BHW3 = np.repeat(np.repeat(np.asarray(image_BHW3), scale, axis=1), scale, axis=2)
    B, H, W, C = image_BHW3.shape
    rows = -(-B // columns)
    sheet = np.full(
        (rows * (H + gap) + gap, min(columns, B) * (W + gap) + gap, C), 255, image_BHW3.dtype
    )
    for i, image_HW3 in enumerate(image_BHW3):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image_HW3
    return sheet


def beside(left_BHW3: np.ndarray, right_BHW3: np.ndarray, pairs: int = 4, **look) -> np.ndarray:
    """A grid of pairs: the original on the left, what was made of it on the right."""
    both = np.stack([left_BHW3, right_BHW3], axis=1).reshape(-1, *np.shape(left_BHW3)[1:])
    return grid(both, 2 * pairs, **look)


def save_png(path: pathlib.Path, image_HW3: np.ndarray) -> None:
    """uint8 [H, W, 3 or 1] as PNG; the file appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    image_HW3 = image_HW3[..., 0] if image_HW3.shape[-1] == 1 else image_HW3
    Image.fromarray(image_HW3).save(part, format="PNG")
    part.replace(path)
