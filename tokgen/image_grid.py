"""Pictures of arrays: grids of images, pairs beside each other, PNG files."""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image

from tokgen.errors import UserError


def grid(image_BHW3: np.ndarray, columns: int, *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Images [B, H, W, 3] in rows of `columns` on white; every pixel `scale` x `scale`.

    Args:
        image_BHW3: of any dtype in which 255 is white; arrays with one channel stay so.
        columns: images in a row.
        gap: white pixels between images and around them.
        scale: how often a pixel is repeated each way.

    Returns:
        One image [rows, columns, 3] of the same dtype.

    Examples:
        >>> image_BHW3 = np.zeros((6, 32, 32, 3), np.uint8)
        >>> tokgen.grid(image_BHW3, columns=3, scale=2).shape
        (134, 200, 3)
    """
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


def save_png(path: str | os.PathLike, image_HW3: np.ndarray) -> None:
    """uint8 [H, W, 3 or 1] as PNG; the file appears whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        image_HW3: the pixels.

    Examples:
        >>> tokgen.save_png("black.png", np.zeros((32, 32, 3), np.uint8))
    """
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.part")
    image_HW3 = image_HW3[..., 0] if image_HW3.shape[-1] == 1 else image_HW3
    Image.fromarray(image_HW3).save(part, format="PNG")
    part.replace(path)


def to_pil(image_NHW3: np.ndarray) -> list[Image.Image]:
    """Images for PIL, of uint8 [N, H, W, 3 or 1]: what `decode` and `reconstruct` give.

    Raises:
        UserError: an array of another type or rank.

    Examples:
        >>> tokgen.to_pil(np.zeros((2, 32, 48, 3), np.uint8))[0].size
        (48, 32)
    """
    image_NHW3 = np.asarray(image_NHW3)
    fits = image_NHW3.ndim == 4 and image_NHW3.shape[-1] in (1, 3)
    if not fits or image_NHW3.dtype != np.uint8:
        raise UserError(
            "images must be uint8 [N, H, W, 3 or 1]; found "
            f"{image_NHW3.dtype} {list(image_NHW3.shape)}: give one image as image[None], floats "
            "in [0, 1] as np.uint8(255 * image + 0.5)"
        )
    gray = image_NHW3.shape[-1] == 1
    return [Image.fromarray(image[..., 0] if gray else image) for image in image_NHW3]
