"""Pictures that come from a browser: files as a model sees them, and what was painted over them."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tokgen.app import bounds, offers
from tokgen.data import pixels
from tokgen.errors import UserError


def fitted(model: offers.Model, path: str | os.PathLike | None) -> np.ndarray:
    """uint8 [H, W, 3] of a file of any size, cut and resized to the model's; or UserError."""
    if not path:
        raise UserError("a picture is needed: upload one; found none")
    try:
        image = pixels.picture(read(path), 3, max_pixels=bounds.PIXELS)
    except pixels.BrokenImage as error:
        raise UserError(f"the file cannot be read as a picture: {error}") from error
    return model.fit(image)[0]


def read(path: str | os.PathLike) -> bytes:
    """The bytes of an upload; none where it is gone."""
    file = pathlib.Path(path)
    size = file.stat().st_size if file.is_file() else 0
    if size > bounds.UPLOAD:
        raise UserError(
            f"a picture has at most {bounds.UPLOAD // 2**20} MB; found {size / 2**20:.1f} MB"
        )
    return file.read_bytes() if size else b""


def opacity(data: bytes) -> np.ndarray:
    """uint8 [h, w] of a painted layer's file: 255 where it hides what is below; or UserError."""
    try:
        pixels.header(data, max_pixels=bounds.PAINTED)
        with Image.open(io.BytesIO(data), formats=pixels.FORMATS) as image:
            return np.asarray(image.convert("RGBA").getchannel("A"))
    except (pixels.BrokenImage, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"what was painted cannot be read: {error}") from error


def enlarged(image_HW3: np.ndarray, times: int) -> np.ndarray:
    """Every pixel `times` x `times`."""
    return image_HW3.repeat(times, 0).repeat(times, 1)


def painted(layers: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of opacities [h, w] that lie over the picture, enlarged: where any is painted.

    A pixel is painted where most of what lies over it is: a brush has soft edges.
    """
    mask_HW = np.zeros(size, bool)
    for layer_hw in layers:
        alpha = Image.fromarray(layer_hw)
        mask_HW |= np.asarray(alpha.resize(size[::-1], Image.Resampling.BOX)) > 127
    return mask_HW
