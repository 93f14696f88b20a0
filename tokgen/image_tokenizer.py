"""A tokenizer as a library user holds it: images in and out, loaded once, asked often."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import ml_collections
import numpy as np

from tokgen import parameters, storage, tokens as arrays
from tokgen.checkpoints import loading
from tokgen.data import datasets, pictures
from tokgen.interfaces import TokenLayout


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageTokenizer:
    """A tokenizer: images into tokens and back. `tokgen.load` makes it.

    Attributes:
        encoder: the tokenizer as it encodes: in float32, unless it was loaded otherwise.
        decoder: the same as it decodes: of a generator, as samples are decoded.
        name: of a published model; "" of any other.

    Examples:
        >>> tokenizer = tokgen.load("runs/tokenizer")
        >>> tokenizer
        ImageTokenizer of conv and fsq: 14,051 parameters, float32, step 0 in runs/tokenizer
        8 x 8 tokens of 240; images of 32 x 32 pixels
        >>> image_NHW3 = tokenizer.fit("photo.png")
        >>> tokens_NLG = tokenizer.encode(image_NHW3)
        >>> tokens_NLG.shape, tokens_NLG.dtype
        ((1, 64, 1), dtype('int32'))
        >>> tokenizer.decode(tokens_NLG).shape
        (1, 32, 32, 3)
    """

    encoder: loading.Loaded
    decoder: loading.Loaded
    name: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of its images."""
        return datasets.view_of(self.encoder.config).size

    @property
    def layout(self) -> TokenLayout | None:
        """Alphabets and grids of its tokens; None of a continuous one, which has no tokens."""
        return self.encoder.layout

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The whole config that it was trained or imported with."""
        return self.encoder.config

    @property
    def step(self) -> os.PathLike:
        """Where its checkpoint lies."""
        return self.encoder.step

    @property
    def fingerprint(self) -> str:
        """A hash of weights and form: equal where tokens mean the same."""
        return self.encoder.fingerprint

    def fit(self, images: pictures.Pictures) -> np.ndarray:
        """Images of any size as the model sees them: cut in the middle and resized (ADM's crop).

        Args:
            images: a file's path, a PIL image, an array of uint8 [H, W, 3] or [N, H, W, 3] or of
                floats in [0, 1], or a list of these. What alpha, orientation and 16 bits become is
                told in docs/data.md; `tokgen reconstruct` sees the same of a file.

        Returns:
            uint8 [N, rows, columns, 3].

        Examples:
            >>> tokgen.load("runs/tokenizer").fit(["photo.png", PIL.Image.new("L", (99, 50))]).shape
            (2, 32, 32, 3)
        """
        return pictures.fitted(images, datasets.view_of(self.encoder.config))

    def encode(self, images: pictures.Pictures, *, batch: int = 32) -> np.ndarray:
        """Tokens of images, as pretokenizing makes them.

        Args:
            images: of the model's size: a PIL image, a list of them, or an array, uint8 or floats
                in [0, 1], [H, W, 3] or [N, H, W, 3]; others go through `fit` first.
            batch: images at a time.

        Returns:
            int32 [N, L, G].

        Raises:
            UserError: images of another size, type or range; a continuous tokenizer.

        Examples:
            >>> tokenizer = tokgen.load("runs/tokenizer")
            >>> tokenizer.encode(PIL.Image.new("RGB", (32, 32), "red")).shape
            (1, 64, 1)
            >>> tokenizer.encode(PIL.Image.new("RGB", (640, 480)))
            Traceback (most recent call last):
            tokgen.errors.UserError: images must be 32 x 32 pixels (rows x columns), ...
        """
        return arrays.encode(self.encoder, self._exact(images), batch=batch)

    def decode(self, tokens: np.ndarray, *, batch: int = 32) -> np.ndarray:
        """Images of tokens.

        Args:
            tokens: integers [N, L, G] of its layout.
            batch: images at a time.

        Returns:
            uint8 [N, rows, columns, 3]; `tokgen.to_pil` makes PIL images of them.

        Raises:
            UserError: tokens that its layout does not have.

        Examples:
            >>> tokenizer = tokgen.load("runs/tokenizer")
            >>> images = tokgen.to_pil(tokenizer.decode(np.zeros((2, 64, 1), int)))
            >>> images[0].size
            (32, 32)
        """
        return arrays.decode(self.decoder, tokens, batch=batch)

    def reconstruct(self, images: pictures.Pictures, *, batch: int = 32) -> np.ndarray:
        """Images through the tokenizer and back; also of one without tokens.

        Args:
            images: as of `encode`.
            batch: images at a time.

        Returns:
            uint8 [N, rows, columns, 3].

        Raises:
            UserError: images of another size, type or range.

        Examples:
            >>> tokgen.load("runs/tokenizer").reconstruct(np.zeros((2, 32, 32, 3))).dtype
            dtype('uint8')
        """
        return arrays.reconstruct(self.encoder, self._exact(images), batch=batch)

    def _exact(self, images: pictures.Pictures) -> np.ndarray:
        return pictures.exact(images, datasets.view_of(self.encoder.config))

    def __getattr__(self, name: str) -> Any:
        if name in (
            "sample",
            "edit",
            "trace",
            "log_likelihood",
            "log_likelihood_bound",
            "classes",
            "tokenizer",
        ):
            raise AttributeError(
                f"a tokenizer has no {name}, which is a generator's; it has encode, decode, "
                "reconstruct, fit, layout, size, config, fingerprint, step"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        rows, columns = self.size
        tokens = told_of(self.layout) if self.layout else "no tokens: continuous"
        told = f"{tokens}; images of {rows} x {columns} pixels"
        return f"{headline(self, self.name, self.encoder)}\n{told}"


def headline(handle: object, name: str, loaded: loading.Loaded) -> str:
    """What it is, how large, how it computes, and where it lies."""
    config, source = loaded.config, loaded.meta.get("source") or {}
    made = config.generator.name if "generator" in config else None
    made = made or f"{config.encoder.name} and {config.quantizer.name}"
    what = name or source.get("system", "") or made
    count = parameters.count(parameters.split(loaded.module)[1])
    run = loaded.step.parent.parent if loaded.step.name.isdigit() else loaded.step
    run = run if storage.is_remote(run) else os.path.normpath(run)
    return (
        f"{type(handle).__name__} of {what}: {count:,} parameters, "
        f"{config.precision.compute}, step {loaded.meta['step']} in {run}"
    )


def told_of(layout: TokenLayout) -> str:
    """`16 x 16 tokens of 1024`; of several grids the first and the last."""
    alphabets = " and ".join(map(str, layout.vocab))
    first, last = (f"{rows} x {columns}" for rows, columns in (layout.grids[0], layout.grids[-1]))
    if len(layout.grids) == 1:
        return f"{last} tokens of {alphabets}"
    return f"{layout.length} tokens of {alphabets} on {len(layout.grids)} grids, {first} to {last}"
