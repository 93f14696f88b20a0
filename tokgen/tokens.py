"""Images into tokens and back by a tokenizer of a checkpoint: arrays, and whole sets of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from tokgen import boundary, runtime, sharding
from tokgen.checkpoints import checkpoint
from tokgen.data import online_tokens, pretokenization
from tokgen.errors import UserError
from tokgen.metrics import reconstruction
from tokgen.sampling import drawing


def encode(tokenizer: checkpoint.Loaded, image_NHW3: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """Tokens [N, L, G] of uint8 images of the size that the tokenizer was trained on.

    UserError for images of another type or size, for a continuous tokenizer, which writes no
    tokens, and where the encoder gives something that is not finite, with the images' numbers.
    """
    if tokenizer.layout is None:
        raise UserError(
            f"{tokenizer.step} holds a continuous tokenizer, which writes no tokens; reconstruct "
            "takes it"
        )
    _check(tokenizer, image_NHW3)
    found = []
    for part, rows in _parts(image_NHW3, batch):
        found.append(np.asarray(online_tokens.encode(tokenizer.module, part))[:rows])
    tokens_NLG = np.concatenate(found)
    boundary.refuse((tokens_NLG < 0).any((1, 2)), "what the encoder sees in an image")
    return tokens_NLG


def decode(tokenizer: checkpoint.Loaded, tokens_NLG: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """uint8 images [N, H, W, 3] of tokens [N, L, G].

    UserError for tokens that the tokenizer's layout does not have, and where a pixel is not finite,
    with the images' numbers.
    """
    tokens_NLG = np.asarray(tokens_NLG)
    if tokenizer.layout is not None:
        tokens_NLG = np.asarray(boundary.tokens(tokens_NLG, tokenizer.layout))
    return _images(
        drawing.decode_pixels(tokenizer.module, part) + (rows,)
        for part, rows in _parts(tokens_NLG, batch)
    )


def reconstruct(
    tokenizer: checkpoint.Loaded, image_NHW3: np.ndarray, *, batch: int = 32
) -> np.ndarray:
    """uint8 images [N, H, W, 3] of images, through the tokenizer and back.

    What `decode` makes of `encode`, to rounding; also by a tokenizer without tokens. UserError as
    in both.
    """
    _check(tokenizer, image_NHW3)
    return _images(
        _reconstructed(tokenizer.module, part) + (rows,) for part, rows in _parts(image_NHW3, batch)
    )


def pretokenize(
    tokenizer: str | os.PathLike,
    out: str | os.PathLike,
    *,
    data: str = "",
    labels: str = "",
    views: Sequence[str] = ("center", "flip"),
    batch: int = 100,
    max_bad: float = 1e-3,
    precision: str = "float32",
    overwrite: bool = False,
) -> None:
    """Token shards of a set of images, in the folder `out`; what is there of them is gone on with.

    `tokenizer` is a work directory or one step of it, loaded in `precision`. `data` to `max_bad`
    are as in pretokenization.pretokenize. UserError where `out` holds other tokens and is not to be
    replaced with `overwrite`, and where more images than `max_bad` of them cannot be read.
    """
    pretokenization.check(batch=batch, max_bad=max_bad)
    with pretokenization.folder(out, overwrite=overwrite, inputs=(tokenizer, data)) as place:
        runtime.devices(batch)
        loaded = checkpoint.load_tokenizer(tokenizer, compute=precision)
        given = dict(data=data, labels=labels, views=views, batch=batch, max_bad=max_bad)
        pretokenization.pretokenize(loaded, place, **given)


@jax.jit
def _reconstructed(tokenizer, image_BHW3):
    """(uint8 images, [B] true where a pixel is not finite) of uint8 images."""
    image_BHW3 = reconstruction.from_uint8(image_BHW3)
    return reconstruction.bytes_of(tokenizer.reconstruct(image_BHW3)[0])


def _check(tokenizer: checkpoint.Loaded, image_NHW3: np.ndarray) -> None:
    image_NHW3 = np.asarray(image_NHW3)
    view = tokenizer.config.view
    size = (*view.size, view.channels)
    if image_NHW3.dtype != np.uint8 or image_NHW3.shape[1:] != size or not len(image_NHW3):
        raise UserError(
            f"images must be uint8 [N, {', '.join(map(str, size))}]; found {image_NHW3.dtype} "
            f"{list(image_NHW3.shape)}: resize them to what the tokenizer was trained on"
        )


def _parts(array_N: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int]]:
    """(a part over the devices, filled up to the batch; how many of its rows are meant)."""
    if batch < 1:
        raise UserError(f"batch must be at least 1; found {batch}")
    if not len(array_N):
        raise UserError("at least one image is needed, or the tokens of one; found none")
    batch, mesh = drawing.even(len(array_N), batch), sharding.current()
    for start in range(0, len(array_N), batch):
        part = np.asarray(array_N[start : start + batch])
        yield sharding.filled(part, batch, mesh), len(part)


def _images(parts: Iterator[tuple[jax.Array, jax.Array, int]]) -> np.ndarray:
    """All images of some parts; an error where pixels are not finite."""
    images, invalid = [], []
    for image_BHW3, invalid_B, rows in parts:
        images.append(np.asarray(image_BHW3)[:rows])
        invalid.append(np.asarray(invalid_B)[:rows])
    boundary.refuse(np.concatenate(invalid), "what the decoder gives")
    return np.concatenate(images)
