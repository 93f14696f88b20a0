"""Pictures that come from a browser: files as a model sees them, and what was painted over them."""

from __future__ import annotations

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
    file = pathlib.Path(path)
    size = file.stat().st_size if file.is_file() else 0
    if size > bounds.UPLOAD:
        raise UserError(
            f"a picture has at most {bounds.UPLOAD // 2**20} MB; found {size / 2**20:.1f} MB"
        )
    try:
        data = file.read_bytes() if size else b""
        image = pixels.picture(data, 3, max_pixels=bounds.PIXELS)
    except pixels.BrokenImage as error:
        raise UserError(f"the file cannot be read as a picture: {error}") from error
    return model.fit(image)[0]


def enlarged(image_HW3: np.ndarray, times: int) -> np.ndarray:
    """Every pixel `times` x `times`."""
    return image_HW3.repeat(times, 0).repeat(times, 1)


def painted(layers: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of layers [h, w, 4], of the picture enlarged or in any size: where any is opaque.

    A pixel is painted where most of what lies over it is: a brush has soft edges.
    """
    mask_HW = np.zeros(size, bool)
    for layer_hw4 in layers:
        if layer_hw4 is None or layer_hw4.ndim != 3 or layer_hw4.shape[-1] != 4:
            continue
        alpha = Image.fromarray(np.ascontiguousarray(layer_hw4[..., 3]))
        mask_HW |= np.asarray(alpha.resize(size[::-1], Image.Resampling.BOX)) > 127
    return mask_HW
