"""Tokens that are made while training: pixels of the views that packed shards would hold.

A drop-in for `tokens.Source`: the stream draws the same element and the same view for it as from
shards of the same images and views, and gives its pixels; whoever reads the stream encodes them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from tokgen import interfaces
from tokgen.data import pixels as images


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A view drawn from several: the first without a generator, as of token shards.

    Args:
      views: of one size, one number of channels and one decoder.
    """

    views: tuple[images.View, ...]

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


class Source:
    """Random access to images, with their view: `{"image": bytes or pixels, "label": int}`.

    Args:
      pictures: a source of images, with text or without.
      views: names of stored views, in the order in which shards would hold them.
      size, channels: of the pixels that the tokenizer reads.
      layout: that of the tokenizer's tokens, as JSON.
      tokenizer: its fingerprint.
      encode: (uint8 images [B, H, W, 3]) -> tokens [B, L, G], on the devices.
    """

    classes: tuple[str, ...]

    def __init__(
        self,
        pictures,
        views: Sequence[str],
        *,
        size: tuple[int, int],
        channels: int,
        layout: dict,
        tokenizer: str,
        encode: Callable,
    ):
        if not len(pictures):
            raise interfaces.UserError("the source of images is empty: there is nothing to encode")
        self.pictures, self.classes = pictures, pictures.classes
        self.inner = pictures  # whose images they are: what cannot be read is counted there
        self.views = tuple(views)
        self.view = Drawn(tuple(images.fixed(name, tuple(size), channels) for name in views))
        self.layout, self.encode = layout, encode
        if hasattr(pictures, "__getitems__"):
            self.__getitems__ = pictures.__getitems__  # images that are drawn come in batches
        what = [self.views, list(self.view.size), channels, tokenizer]
        self.fingerprint, *earlier = (
            hashlib.sha256(json.dumps([of_images, *what]).encode()).hexdigest()
            for of_images in (pictures.fingerprint, *getattr(pictures, "earlier", ()))
        )
        self.earlier = tuple(earlier)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict:
        return self.pictures[index]

    def name(self, index: int) -> str:
        """The name of the image."""
        if hasattr(self.pictures, "name"):
            return self.pictures.name(index)
        return f"image {index}"
