"""Tokens that are made while training: pixels of the views that packed shards would hold.

A drop-in for `token_shards.Source`: of it the loader draws the element and the view that it would
draw of shards of these images and views, and gives its pixels, which whoever reads them encodes.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import ml_collections
import numpy as np
from flax import nnx

from tokgen import interfaces, sharding
from tokgen.data import sources, views
from tokgen.metrics import reconstruction


class Tokenizer(Protocol):
    """A tokenizer as its checkpoint is loaded."""

    module: nnx.Module  # what encodes
    config: ml_collections.ConfigDict
    layout: interfaces.TokenLayout | None
    fingerprint: str
    step: pathlib.Path  # where it lies


@jax.jit
def encode(tokenizer, image_BHW3):
    """Tokens of uint8 images; -1 where something was not finite. Pretokenizing runs it too."""

    def of(tokenizer, image_BHW3):
        return tokenizer.encode(reconstruction.from_uint8(image_BHW3))

    return sharding.by_rows(of, (tokenizer,), (image_BHW3,))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A view drawn from several: the first without a generator, as of token shards.

    Args:
      views: of one size, one number of channels and one decoder.
    """

    views: tuple[views.View, ...]

    def __post_init__(self):
        forms = {(view.size, view.channels, view.decoder) for view in self.views}
        if len(forms) != 1:
            raise interfaces.UserError(
                f"views to draw from must be of one size, channels and decoder; found {forms}"
            )

    @property
    def size(self) -> tuple[int, int]:
        return self.views[0].size

    @property
    def channels(self) -> int:
        return self.views[0].channels

    @property
    def decoder(self) -> str:
        return self.views[0].decoder

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """uint8 [rows, columns, channels]; the one number drawn is that of `stream` for shards."""
        index = 0 if rng is None else int(rng.integers(len(self.views)))
        return self.views[index](image_HWC, rng)


class Source(sources.Around):
    """A source of images, with their view and what encodes it: `{"image": ..., "label": int}`.

    Args:
      inner: a source of images, with text or without.
      views: names of stored views, in the order in which shards would hold them.
      size, channels: of the pixels that the tokenizer reads.
      layout: that of the tokenizer's tokens, as JSON.
      tokenizer: its fingerprint.
      encode: (uint8 images [B, H, W, 3]) -> tokens [B, L, G], on the devices.
    """

    def __init__(
        self,
        inner: sources.RandomAccess,
        views: Sequence[str],
        *,
        size: tuple[int, int],
        channels: int,
        layout: dict,
        tokenizer: str,
        encode: Callable,
    ):
        if not len(inner):
            raise interfaces.UserError("the source of images is empty: there is nothing to encode")
        super().__init__(inner)
        self.views = tuple(views)
        self.view = _drawn(views, tuple(size), channels)
        self.layout, self.encode = layout, encode
        what = [self.views, list(self.view.size), channels, tokenizer]
        self.fingerprint, *earlier = (
            hashlib.sha256(json.dumps([of_images, *what]).encode()).hexdigest()
            for of_images in (inner.fingerprint, *inner.earlier)
        )
        self.earlier = tuple(earlier)


def _drawn(names: Sequence[str], size: tuple[int, int], channels: int) -> Drawn:
    return Drawn(tuple(views.fixed(name, size, channels) for name in names))
