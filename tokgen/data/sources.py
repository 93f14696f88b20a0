"""What every source of images or of tokens is, and how whoever wants pixels of one reads it.

`RandomAccess` is the protocol: records by their numbers, and what a source says of itself, each
with the value of a source that has nothing to say. A source of one's own is a class on top of it
with `__len__` and `__getitem__`; named Source, in a file of this folder, a config can name it
(docs/data.md has an example). Sources around others, such as images with text, are `Around` them.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from tokgen.data import pixels, unreadable as unreadable_, views

HOLDS = ("files", "bytes", "pixels", "tokens")


class RandomAccess:
    """Records by number, 0 to len - 1, the same each time; threads read it at once.

    A record of images is `{"image": ..., "label": int}`: bytes of an image file, or pixels uint8
    [H, W, channels]. A record of tokens is `{"tokens": [views, L, G], "label": int}`, int32 or as
    few bits without a sign as hold them. Text may stand beside either: `"text"` float32 [T, E], and
    `"mask"` bool [T].

    Attributes:
      holds: what records hold: "files", bytes that `open` gives too; "bytes" of image files from
        elsewhere; "pixels", drawn or kept as such; or "tokens". What cannot be read of the first
        two is found by decoding, of tokens it is known.
      split: the part of the set.
      path: where it lies, for messages; empty where it lies nowhere.
      classes: the names of the labels; empty where there are none, and every label is 0.
      counts: [classes] how many images each class has; None where that takes reading all.
      fingerprint: changes with what is read, and with nothing else; empty where it is unknown.
      earlier: fingerprints of the same contents by earlier versions of tokgen.
      changed: when a file changed last, in nanoseconds; 0 where there are none.
      notes: what is to be said of how the set was understood.
      unread: {folder: {ending: how many}} of files that were passed over.
      layout: of tokens, as JSON, also of images that are encoded as they come; else None.
      views: names of the stored views of each image, where tokens are of such.
      view: the view of the pixels, where the source rather than its reader says it.
      header: of token shards, what they say of themselves; else None.
      missing: {index: (name, why)} of images without tokens, which are not to be read.
      text_shape: (T, E) of the text features beside an image; None where there are none.
      inner: the source that this one is around; None where it is around none.
    """

    holds: str = "bytes"
    split: str = "all"
    path: str | os.PathLike = ""
    classes: tuple[str, ...] = ()
    counts: np.ndarray | None = None
    fingerprint: str = ""
    earlier: tuple[str, ...] = ()
    changed: int = 0
    notes: tuple[str, ...] = ()
    unread: Mapping[str, Mapping[str, int]] = types.MappingProxyType({})
    layout: dict | None = None
    views: tuple[str, ...] = ()
    view: views.View | None = None
    header: dict | None = None
    missing: Mapping[int, tuple[str, str]] = types.MappingProxyType({})
    text_shape: tuple[int, int] | None = None
    inner: RandomAccess | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records, where these are cheaper together; of the two one is given."""
        return [self[index] for index in indices]

    def one_view(self, indices: Sequence[int], view_B: Sequence[int]) -> list[dict]:
        """Many records with the tokens [L, G] of one view each, by the views' numbers.

        A source that can read one view alone does so here.
        """
        records = self.__getitems__(indices)
        return [
            record | {"tokens": record["tokens"][view]}
            for record, view in zip(records, view_B, strict=True)
        ]

    def open(self, index: int) -> BinaryIO:
        """The file of an image, where the source holds files: for its header, to be closed."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call an image."""
        return f"image {index}"

    @functools.cached_property
    def unreadable(self) -> unreadable_.Record:
        """The record of the images that could not be read; of a source around one, that one's."""
        return unreadable_.Record(self) if self.inner is None else self.inner.unreadable


class Around(RandomAccess):
    """A source that adds something to each record of another one, and says what that says."""

    def __init__(self, inner: RandomAccess):
        self.inner = inner
        self.holds, self.split, self.path = inner.holds, inner.split, inner.path
        self.classes, self.notes, self.unread = inner.classes, inner.notes, inner.unread
        self.layout, self.views, self.view = inner.layout, inner.views, inner.view
        self.header, self.missing, self.text_shape = inner.header, inner.missing, inner.text_shape

    @property
    def counts(self) -> np.ndarray | None:
        return self.inner.counts

    @property
    def changed(self) -> int:
        return self.inner.changed

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        return self.inner[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return self.inner.__getitems__(indices)

    def one_view(self, indices: Sequence[int], view_B: Sequence[int]) -> list[dict]:
        return self.inner.one_view(indices, view_B)

    def open(self, index: int) -> BinaryIO:
        return self.inner.open(index)

    def name(self, index: int) -> str:
        return self.inner.name(index)


def innermost(source: RandomAccess) -> RandomAccess:
    """The source that the others are around."""
    while source.inner is not None:
        source = source.inner
    return source


def evenly(length: int, count: int) -> np.ndarray:
    """At most `count` of so many indices, evenly over a set that may be sorted by class."""
    count = min(length, count)
    return np.arange(count) * length // max(count, 1)


class Unavailable(pixels.BrokenImage):
    """A file that cannot be read at all: gone, not allowed, a disk that fails."""


def read(source: RandomAccess, index: int, channels: int, decoder: str = "pil") -> dict:
    """The record at `index`, its image as pixels uint8 [H, W, channels]; or BrokenImage, why not.

    Images that a source holds as pixels are given as they are.
    """
    return decoded(record(source, index), channels, decoder)


def record(source: RandomAccess, index: int) -> dict:
    """The record at `index` as the source has it, its label checked; or BrokenImage."""
    try:
        found = source[index]
    except OSError as error:
        raise _unavailable(error) from error
    classes = len(source.classes)
    if classes and not 0 <= found["label"] < classes:
        raise pixels.BrokenImage(f"its label is {found['label']}, and there are {classes} classes")
    return found


def decoded(found: dict, channels: int, decoder: str = "pil") -> dict:
    """A record with pixels in the place of the bytes of its image; or BrokenImage."""
    if not isinstance(found["image"], bytes):
        return found
    return {**found, "image": pixels.decode(found["image"], channels, decoder=decoder)}


def pictured(found: dict, channels: int, decoder: str = "pil") -> dict:
    """As `decoded`, with an image of PIL's, which views take too, in the place of the bytes."""
    if not isinstance(found["image"], bytes):
        return found
    return {**found, "image": pixels.picture(found["image"], channels, decoder=decoder)}


def header(source: RandomAccess, index: int) -> tuple[str, tuple[int, int]]:
    """(format, (rows, columns)) as the header of an image says; or BrokenImage, why it does not.

    Nothing is decoded, and of a file no more is read than that takes.
    """
    try:
        if source.holds == "files":
            with source.open(index) as file:
                return pixels.header(file)
        return pixels.header(source[index]["image"])
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> Unavailable:
    return Unavailable(f"{type(error).__name__}: {error.strerror or error}")
