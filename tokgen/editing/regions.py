"""Regions: the pixels that are drawn anew, [H, W], true where they are; and the tokens of these."""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np
from PIL import Image
from scipy import ndimage

from tokgen.data import pixels
from tokgen.errors import UserError
from tokgen.interfaces import TokenLayout

NAMES = ("left", "right", "top", "bottom", "center", "centre", "all")
BOX = r"box=(\d+),(\d+),(\d+),(\d+)"
FORMS = "left, right, top, bottom, center, all, box=ROW,COLUMN,HEIGHT,WIDTH, or the file of a mask"

Region = str | os.PathLike | np.ndarray | Image.Image


def region(mask: Region, size: tuple[int, int]) -> np.ndarray:
    """[H, W] bool, true where pixels are drawn anew.

    Args:
        mask: left, right, top, bottom (a half), center (the middle half of rows and columns), all;
            `box=R,C,H,W` in pixels, from row R and column C; a file or a PIL image, white where
            pixels are drawn anew; or an array [H, W], bool, or of uint8 as a file's.
        size: (rows, columns) of the image.

    Raises:
        UserError: none of these, another size, or a box that leaves the image.
    """
    mask = plain(mask)
    if isinstance(mask, np.ndarray | Image.Image):
        return _array(mask, size, "the mask")
    if not isinstance(mask, str | os.PathLike):
        raise UserError(
            f"a mask is {FORMS}, a PIL image, or an array of bool; found {type(mask).__name__}"
        )
    check(mask)
    text = os.fspath(mask)
    rows, columns = size
    named = {
        "left": (0, 0, rows, columns // 2),
        "right": (0, columns // 2, rows, columns - columns // 2),
        "top": (0, 0, rows // 2, columns),
        "bottom": (rows // 2, 0, rows - rows // 2, columns),
        "center": (rows // 4, columns // 4, rows // 2, columns // 2),
        "all": (0, 0, rows, columns),
    }
    named["centre"] = named["center"]
    if text in named:
        return _box(named[text], size)
    if text.startswith("box="):
        row, column, height, width = box = tuple(map(int, re.fullmatch(BOX, text).groups()))
        if not (height and width) or row + height > rows or column + width > columns:
            raise UserError(
                f"a box must lie in the image, {rows} x {columns} pixels (rows x columns), and "
                f"hold at least one; found rows {row} to {row + height}, columns {column} to "
                f"{column + width}"
            )
        return _box(box, size)
    return _sized(read(text), size, text)


def check(mask: object) -> None:
    """UserError where a word is no region, whatever the image; of a file whether it is there."""
    if not isinstance(mask, str | os.PathLike) or os.fspath(mask) in NAMES:
        return
    text = os.fspath(mask)
    if text.startswith("box=") or text == "box":
        if not re.fullmatch(BOX, text):
            raise UserError(
                f"a box is box=ROW,COLUMN,HEIGHT,WIDTH in pixels, as box=8,8,16,16; found {text!r}"
            )
    elif not os.path.isfile(text):
        raise UserError(f"a mask is {FORMS}; found {text!r}, which is no file")


def plain(mask: object) -> object:
    """An array of another library as one of numpy; anything else as it is."""
    foreign = hasattr(mask, "__array__") and not isinstance(mask, np.ndarray | Image.Image)
    return np.asarray(mask) if foreign else mask


def read(path: str | os.PathLike) -> np.ndarray:
    """[H, W] bool of a mask's file, of any size: half of white is white."""
    check(path)
    path = pathlib.Path(path)
    try:
        with Image.open(path) as image:
            hides = _hides(image)
        bright_HW1 = pixels.decode(path.read_bytes(), 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return _opaque(bright_HW1, hides, str(path))


def _box(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    row, column, height, width = box
    mask_HW = np.zeros(size, bool)
    mask_HW[row : row + height, column : column + width] = True
    return mask_HW


def _array(mask: np.ndarray | Image.Image, size: tuple[int, int], what: str) -> np.ndarray:
    if isinstance(mask, Image.Image):
        try:
            bright_HW1 = pixels.of_image(mask, 1)
        except pixels.BrokenImage as error:
            raise UserError(f"{what}, of PIL mode {mask.mode}, cannot be read: {error}") from error
        return _sized(_opaque(bright_HW1, _hides(mask), what), size, what)
    if mask.shape != size or mask.dtype not in (np.bool_, np.uint8):
        raise UserError(
            f"a mask must be bool or uint8 [{size[0]}, {size[1]}], as its image; found "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if mask.dtype == np.uint8 and mask.max() == 1:
        raise UserError(
            "a mask of uint8 has 255 where pixels are drawn anew; found 0 and 1: mask.astype(bool)"
        )
    return mask if mask.dtype == bool else mask > 127


def _sized(mask_HW: np.ndarray, size: tuple[int, int], what: str) -> np.ndarray:
    if mask_HW.shape != size:
        raise UserError(
            f"a mask must have the size of its image, {size[0]} x {size[1]} pixels (rows x "
            f"columns); found {mask_HW.shape[0]} x {mask_HW.shape[1]} in {what}"
        )
    return mask_HW


def _opaque(bright_HW1: np.ndarray, hides: bool, what: str) -> np.ndarray:
    """Where an image is bright; UserError where its alpha hides some of it."""
    if hides:
        raise UserError(
            "a mask is white where pixels are drawn anew and black where they stay; found an "
            f"image with transparency in {what}: save it without"
        )
    return bright_HW1[..., 0] > 127


def _hides(image: Image.Image) -> bool:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255


def free(mask_NHW: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """[N, L] true for tokens that are drawn anew: those of whose cells any pixel is.

    A grid divides the image into cells; where a side is no multiple, neighbours share pixels.
    """
    _, H, W = mask_NHW.shape
    found = []
    for rows, columns in layout.grids:
        bands = [mask_NHW[:, a:b].any(1) for a, b in _cells(H, rows)]
        cells = [np.stack(bands, 1)[:, :, a:b].any(2) for a, b in _cells(W, columns)]
        found.append(np.stack(cells, -1).reshape(len(mask_NHW), -1))
    return np.concatenate(found, axis=1)


def _cells(pixels: int, count: int) -> list[tuple[int, int]]:
    return [(i * pixels // count, -(-(i + 1) * pixels // count)) for i in range(count)]


def filled(image_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The image with each masked pixel as the nearest of the others; gray where all are masked.

    So that an encoder sees nothing of what is to go, and no edge that is not there.
    """
    if mask_HW.all():
        return np.full_like(image_HW3, 128)
    nearest_2HW = ndimage.distance_transform_edt(
        mask_HW, return_distances=False, return_indices=True
    )
    return image_HW3[tuple(nearest_2HW)]


def joined(
    image_HW3: np.ndarray, drawn_HW3: np.ndarray, mask_HW: np.ndarray, feather: float
) -> np.ndarray:
    """The image with what was drawn in the mask; outside of it every byte is the image's.

    What a decoder makes of kept tokens is not quite what was kept. By how much, is carried over the
    edge into the mask, less with every pixel and nothing after `feather` of them: no seam, and
    nothing of what the image had there.
    """
    if not mask_HW.any():
        return image_HW3.copy()
    if mask_HW.all() or not feather:
        return np.where(mask_HW[..., None], drawn_HW3, image_HW3)
    kept_HW = (~mask_HW).astype(np.float32)
    off_HW3 = (image_HW3.astype(np.float32) - drawn_HW3) * kept_HW[..., None]
    spread = dict(sigma=max(feather / 2, 0.5), mode="constant", truncate=6.0)
    weight_HW = ndimage.gaussian_filter(kept_HW, **spread)
    sums_HW3 = np.stack([ndimage.gaussian_filter(c, **spread) for c in off_HW3.transpose(2, 0, 1)])
    off_HW3 = sums_HW3.transpose(1, 2, 0) / np.maximum(weight_HW, 1e-6)[..., None]
    distance_HW = ndimage.distance_transform_edt(mask_HW)
    share_HW1 = np.clip(1 - distance_HW / (feather + 1), 0, 1)[..., None]
    blended_HW3 = np.rint(np.clip(drawn_HW3 + share_HW1 * off_HW3, 0, 255)).astype(np.uint8)
    return np.where(mask_HW[..., None], blended_HW3, image_HW3)
