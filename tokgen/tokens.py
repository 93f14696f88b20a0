"""Images into tokens and back by a tokenizer of a checkpoint: arrays, and whole sets of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from tokgen import boundary, ranges, runtime, sharding
from tokgen.checkpoints import loading
from tokgen.data import online_tokens, pretokenization
from tokgen.interfaces import PyTree, UserError
from tokgen.metrics import reconstruction
from tokgen.sampling import drawing


def encode(tokenizer: loading.Loaded, image_NHW3: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """Tokens of images by a tokenizer that `load_tokenizer` gave.

    Args:
        tokenizer: what `load_tokenizer` gives.
        image_NHW3: uint8 [N, H, W, 3], of the size that it was trained on.
        batch: images at a time.

    Returns:
        int32 [N, L, G].

    Raises:
        UserError: images of another type or size; a continuous tokenizer, which writes no tokens;
            where the encoder gives something that is not finite, with the images' numbers.

    Examples:
        >>> tokenizer = tokgen.load_tokenizer("runs/tokenizer")
        >>> tokgen.encode(tokenizer, np.zeros((3, 32, 32, 3), np.uint8)).shape
        (3, 64, 1)
    """
    if tokenizer.layout is None:
        raise UserError(
            f"{tokenizer.step} holds a continuous tokenizer, which writes no tokens; reconstruct "
            "takes it"
        )
    _check(tokenizer, image_NHW3)
    found = []
    for tokens_BLG, rows in _made(online_tokens.encode, tokenizer.module, image_NHW3, batch):
        found.append(np.asarray(tokens_BLG)[:rows])
    tokens_NLG = np.concatenate(found)
    boundary.refuse((tokens_NLG < 0).any((1, 2)), "what the encoder sees in an image")
    return tokens_NLG


def latents(tokenizer: loading.Loaded, image_NHW3: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """What the encoder sees in images, float32 [N, P, C], before it is made tokens of.

    Args, Raises: as of `encode`.
    """
    _check(tokenizer, image_NHW3)
    parts = _made(_latents, tokenizer.module, image_NHW3, batch)
    latents_NPC = np.concatenate([np.asarray(latents_BPC)[:rows] for latents_BPC, rows in parts])
    boundary.refuse(~np.isfinite(latents_NPC).all((1, 2)), "what the encoder sees in an image")
    return latents_NPC


def decode(tokenizer: loading.Loaded, tokens_NLG: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """Images of tokens by a tokenizer that `load_tokenizer` gave.

    Args:
        tokenizer: what `load_tokenizer` gives.
        tokens_NLG: integers [N, L, G].
        batch: images at a time.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: tokens that the tokenizer's layout does not have; where a pixel is not finite,
            with the images' numbers.

    Examples:
        >>> tokenizer = tokgen.load_tokenizer("runs/tokenizer")
        >>> tokgen.decode(tokenizer, np.zeros((3, 64, 1), int)).shape
        (3, 32, 32, 3)
    """
    _check_text(tokenizer)
    if tokenizer.layout is None:
        raise UserError(
            f"{tokenizer.step} holds a continuous tokenizer, which reads no tokens; reconstruct "
            "takes it"
        )
    tokens_NLG = np.asarray(boundary.tokens(array(tokens_NLG), tokenizer.layout))
    return _images(_made(drawing.decode_pixels, tokenizer.module, tokens_NLG, batch))


def reconstruct(
    tokenizer: loading.Loaded, image_NHW3: np.ndarray, *, batch: int = 32
) -> np.ndarray:
    """Images through the tokenizer and back: what `decode` makes of `encode`, to rounding.

    Args:
        tokenizer: what `load_tokenizer` gives; also one without tokens.
        image_NHW3: uint8 [N, H, W, 3], of the size that it was trained on.
        batch: images at a time.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        UserError: as of `encode` and `decode`.

    Examples:
        >>> tokenizer = tokgen.load_tokenizer("runs/tokenizer")
        >>> tokgen.reconstruct(tokenizer, np.zeros((3, 32, 32, 3), np.uint8)).shape
        (3, 32, 32, 3)
    """
    _check_text(tokenizer)
    _check(tokenizer, image_NHW3)
    return _images(_made(_reconstructed, tokenizer.module, image_NHW3, batch))


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

    Args:
        tokenizer: its checkpoint: a work directory, or one step of it.
        out: the folder of what is written.
        data: a folder of images, or what a config's `data` names; "": what it was trained on.
        labels: what class folders mean: folders, outer or none; "": as its config says.
        views: what is stored of each image, of data.views.STORED.
        batch: images at a time.
        max_bad: share of the images that may be unreadable; they are left out and told.
        precision: of the network, float32 or bfloat16.
        overwrite: replace an earlier set of tokens.

    Raises:
        UserError: `out` holds other tokens and is not to be replaced, or more images than `max_bad`
            of them cannot be read.

    Examples:
        >>> tokgen.pretokenize("runs/tokenizer", "tokens", data="photographs", batch=8)
        >>> pathlib.Path("tokens", "layout.json").exists()
        True
    """
    pretokenization.check(batch=batch, max_bad=max_bad)
    with pretokenization.folder(out, overwrite=overwrite, inputs=(tokenizer, data)) as place:
        runtime.devices(batch)
        loaded = loading.load_to_code(tokenizer, compute=precision)
        given = dict(data=data, labels=labels, views=views, batch=batch, max_bad=max_bad)
        pretokenization.pretokenize(loaded, place, **given)


@jax.jit
def _reconstructed(tokenizer, image_BHW3):
    """(uint8 images, [B] true where a pixel is not finite) of uint8 images."""

    def of(tokenizer, image_BHW3):
        image_BHW3 = reconstruction.from_uint8(image_BHW3)
        return reconstruction.bytes_of(tokenizer.reconstruct(image_BHW3)[0])

    return sharding.by_rows(of, (tokenizer,), (image_BHW3,))


@jax.jit
def _latents(tokenizer, image_BHW3):
    def of(tokenizer, image_BHW3):
        return tokenizer.latents(reconstruction.from_uint8(image_BHW3)).astype(jnp.float32)

    return sharding.by_rows(of, (tokenizer,), (image_BHW3,))


def array(tokens: ArrayLike) -> np.ndarray:
    """Tokens as an array of numpy's, or an error where they are none."""
    try:
        return np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:  # uneven lists, a tensor elsewhere
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tokens must be an array of integers [images, positions, symbols]; found "
            f"{type(tokens).__name__}, which numpy cannot read: {said}"
        ) from error


def _check_text(tokenizer: loading.Loaded) -> None:
    if tokenizer.config.decoder.get("text"):
        raise UserError(
            f"the decoder of {tokenizer.step} reads text, which is given with its images: use "
            "tokgen reconstruct --text"
        )


def _check(tokenizer: loading.Loaded, image_NHW3: np.ndarray) -> None:
    image_NHW3 = np.asarray(image_NHW3)
    view = tokenizer.config.view
    size = (*view.size, view.channels)
    if image_NHW3.dtype != np.uint8 or image_NHW3.shape[1:] != size or not len(image_NHW3):
        raise UserError(
            f"images must be uint8 [N, {', '.join(map(str, size))}]; found {image_NHW3.dtype} "
            f"{list(image_NHW3.shape)}: tokgen.load(tokenizer).fit(images) cuts and resizes them"
        )


def _made(
    program: Callable[..., PyTree], network: nnx.Module, array_N: np.ndarray, batch: int
) -> Iterator[tuple[PyTree, int]]:
    """(what a program makes of a part over the devices, how many of its rows are meant)."""
    if wrong := ranges.problem("batch", batch, ranges.Batch):
        raise UserError(wrong)
    if not len(array_N):
        raise UserError("at least one image is needed, or the tokens of one; found none")
    mesh = sharding.current()
    batch = drawing.even(len(array_N), batch, sharding.ways(mesh))
    for start in range(0, len(array_N), batch):
        part = np.asarray(array_N[start : start + batch])
        with jax.set_mesh(mesh):
            made = program(network, sharding.filled(part, batch, mesh))
        yield made, len(part)


def _images(parts: Iterator[tuple[tuple[jax.Array, jax.Array], int]]) -> np.ndarray:
    """All images of some parts; an error where pixels are not finite."""
    images, invalid = [], []
    for (image_BHW3, invalid_B), rows in parts:
        images.append(np.asarray(image_BHW3)[:rows])
        invalid.append(np.asarray(invalid_B)[:rows])
    boundary.refuse(np.concatenate(invalid), "what the decoder gives")
    return np.concatenate(images)
