"""Pictures that a library user holds, as bytes: files, PIL images, arrays.

What a PIL image or a file becomes is told in docs/data.md. Everything else that is no image of
bytes, or of floating numbers in [0, 1], is refused here, before a device sees it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from tokgen import boundary
from tokgen.data import pixels, views
from tokgen.errors import UserError
from tokgen.metrics import reconstruction

# One picture, a sequence of them, or an array: [H, W, C] or [N, H, W, C]
Pictures = Image.Image | np.ndarray | str | os.PathLike | Sequence


def exact(pictures: Pictures, view: views.View) -> np.ndarray:
    """uint8 [N, rows, columns, channels] of pictures that have the size of the view; no files."""
    return _stacked(_read(pictures, view.channels, files=False), view)


def fitted(pictures: Pictures, view: views.View) -> np.ndarray:
    """uint8 [N, rows, columns, channels] of pictures of any size, or their files, by the view."""
    found = _read(pictures, view.channels, files=True)
    return _stacked([view(picture_HWC, np.random.default_rng(0)) for picture_HWC in found], view)


def _stacked(found: Sequence[np.ndarray], view: views.View) -> np.ndarray:
    for number, picture_HWC in enumerate(found):
        if picture_HWC.shape[:2] != view.size:
            which = f" in image {number} of {len(found)}" if len(found) > 1 else ""
            raise UserError(
                f"images must be {_sides(view.size)} pixels (rows x columns), the size that the "
                f"model was trained on; found {_sides(picture_HWC.shape)}{which}: its fit(images) "
                "cuts and resizes them to it, as tokgen reconstruct does"
            )
    return found if isinstance(found, np.ndarray) else np.stack(found)


def _read(pictures: Pictures, channels: int, *, files: bool) -> Sequence[np.ndarray]:
    """uint8 [H, W, channels] of every picture, of any size; as one array where they came so."""
    if isinstance(pictures, list | tuple):
        if not pictures:
            raise UserError("at least one image is needed; found an empty list")
        if any(isinstance(picture, int | float | list | tuple) for picture in pictures):
            raise UserError(
                f"images must be {_needed(channels)}; found lists of numbers: np.array(images, "
                "np.uint8)"
            )
        return [_one(picture, channels, files, number) for number, picture in enumerate(pictures)]
    if isinstance(pictures, Image.Image | str | os.PathLike):
        return [_one(pictures, channels, files, 0)]
    found = _array(pictures, channels)
    return found if found.ndim == 4 else found[None]


def _one(picture: Any, channels: int, files: bool, number: int) -> np.ndarray:
    if isinstance(picture, str | os.PathLike):
        if not files:
            raise UserError(
                f"images must be {_needed(channels)}; found the path {os.fspath(picture)!r}: "
                "fit(path) reads it, and cuts and resizes it to the size of the model"
            )
        path = pathlib.Path(picture)
        if not path.is_file():
            raise UserError(
                f"no image file {os.fspath(picture)}: give the path of one, or a list of paths"
            )
        try:
            return pixels.decode(path.read_bytes(), channels)
        except pixels.BrokenImage as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error
    if isinstance(picture, Image.Image):
        try:
            return pixels.of_image(picture, channels)
        except pixels.BrokenImage as error:
            raise UserError(
                f"image {number}, of PIL mode {picture.mode}, cannot be read: {error}; give its "
                "file to fit, or an array of uint8"
            ) from error
    found = _array(picture, channels)
    if found.ndim == 4:
        raise UserError(
            f"a list of images holds one image an entry; found an array of {len(found)} in entry "
            f"{number}: np.concatenate(images)"
        )
    return found


def _array(picture: Any, channels: int) -> np.ndarray:
    """uint8 [H, W, channels], or [N, H, W, channels], of bytes or floating numbers in [0, 1]."""
    if picture is None or not hasattr(picture, "__array__"):
        raise UserError(f"images must be {_needed(channels)}; found {type(picture).__name__}")
    try:
        found = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor elsewhere, or with a gradient
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"images must be {_needed(channels)}; found {type(picture).__name__}, which numpy "
            f"cannot read ({said}): x.detach().cpu().numpy() brings a tensor to the host"
        ) from error
    shape = "x".join(map(str, found.shape)) or "no axes"
    if found.ndim not in (3, 4) or found.shape[-1] != channels:
        hint = ""
        if found.ndim in (3, 4) and found.shape[-3] == channels:
            hint = ": channels come last, x.transpose(0, 2, 3, 1)"
            if found.ndim == 3:
                hint = ": channels come last, x.transpose(1, 2, 0)"
        elif found.ndim == 2 and channels == 3:
            hint = ": of a gray image np.repeat(x[..., None], 3, axis=-1)"
        raise UserError(f"images must be {_needed(channels)}; found {found.dtype} {shape}{hint}")
    if not found.size:
        raise UserError(f"at least one image is needed; found an array of {shape}")
    if found.dtype == np.uint8:
        return found
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise UserError(
            f"images must be {_needed(channels)}; found {found.dtype}: x.astype(np.uint8) of "
            "numbers from 0 to 255"
        )
    if not np.isfinite(found).all():
        raise UserError("images must be finite; found NaN or infinity among their numbers")
    boundary.images(found if found.ndim == 4 else found[None])
    return np.asarray(reconstruction.to_uint8(found))


def _needed(channels: int) -> str:
    return (
        f"PIL images, or arrays [H, W, {channels}] or [N, H, W, {channels}] of uint8, or of floats "
        "in [0, 1]"
    )


def _sides(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"
