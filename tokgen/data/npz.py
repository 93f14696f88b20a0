"""Images in an .npz: `arr_0` uint8 [N, H, W, 3], and `arr_1` labels [N] where it is there (ADM)."""

from __future__ import annotations

import os
import pathlib
import threading
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

from tokgen import archives
from tokgen.data import sources
from tokgen.interfaces import UserError

LABELS = 2**20  # classes that labels without names may be of
_LISTED = 5  # names of arrays that a message lists


class Archive(sources.RandomAccess):
    """The images of an .npz, in parts or by number: `{"image": uint8 [H, W, 3], "label": int}`.

    `classes` are names of the labels, if somebody says them. Read from the archive part by part:
    the published sets have ten gigabytes (ADM).
    """

    holds = "pixels"

    def __init__(self, path: str | os.PathLike, classes: Sequence[str] = ()):
        self.path = pathlib.Path(path)
        self.label_N, self._member, self._next = None, None, 0
        self._lock = threading.Lock()  # there is one place in the file, and loaders have threads
        with archives.opened(self.path) as archive:
            names = set(archives.names(archive))
            if "arr_0" not in names:
                raise UserError(_no_images(self.path, names))
            shape, fortran, dtype = archives.described(archive, "arr_0", self.path)
            if fortran and len(shape) > 1:
                raise UserError(
                    f"arr_0 of {self.path} is in column order; save it again in row order"
                )
            check_pixels(shape, dtype, str(self.path))
            if "arr_1" in names:
                self.label_N = self._labels(archive, shape[:1])
        if self.label_N is not None and not 0 <= self.label_N.min() <= self.label_N.max() < LABELS:
            raise UserError(
                f"arr_1 of {self.path} must hold a class, 0 or above and below {LABELS}, for each "
                f"image; found {self.label_N.dtype} {self.label_N.shape}, least "
                f"{self.label_N.min()}, greatest {self.label_N.max()}"
            )
        if self.label_N is not None and self.label_N.max() < len(classes):
            self.classes = tuple(classes)
        elif self.label_N is not None:
            self.notes = (f"labels 0 to {self.label_N.max()}, without names",)
        self.shape, self.size = shape, tuple(shape[1:3])
        status = self.path.stat()
        self.identity = {
            "samples": str(self.path.resolve()),
            "bytes": status.st_size,
            "changed": status.st_mtime_ns,
        }

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images and labels `start` to `stop`."""
        with self._lock:
            data = self._bytes(start, stop)
        image_NHW3 = np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
        if self.label_N is None:
            return {"image": image_NHW3}
        return {"image": image_NHW3, "label": self.label_N[start:stop].astype(np.int32)}

    def _bytes(self, start: int, stop: int) -> bytes:
        step = int(np.prod(self.shape[1:]))
        member = self._at(start, step)
        try:
            data = member.read((stop - start) * step)
        except archives.DAMAGE as error:
            self._member = None
            raise self._damaged(error) from error
        self._next = stop
        if len(data) != (stop - start) * step:
            raise self._damaged(f"it ends before image {stop}")
        return data

    def _at(self, start: int, step: int):
        """The bytes from image `start` on: where the last part ended, or found anew.

        To go anywhere in a member of an archive, all before it is read: for every part of a long
        one that would be most of it. Read to its end in one go, its checksum is compared as well.
        """
        if self._member is None or start < self._next:
            if self._member is not None:
                self._member.close()
            self._member, self._next = self._images(), 0
        if start > self._next:
            try:
                self._member.seek((start - self._next) * step, 1)
            except archives.DAMAGE as error:
                self._member = None
                raise self._damaged(error) from error
        return self._member

    def _images(self):
        """The member with the images, at the first of them."""
        try:
            member = archives.opened(self.path).open("arr_0.npy")
            version = np.lib.format.read_magic(member)
            archives.HEADERS[version](member)
        except archives.DAMAGE as error:
            raise self._damaged(error) from error
        return member

    def _labels(self, archive: zipfile.ZipFile, count: tuple[int, ...]) -> np.ndarray:
        shape, _, dtype = archives.described(archive, "arr_1", self.path)
        if shape != count or dtype.kind not in "iu":
            raise UserError(
                f"arr_1 of {self.path} must hold a class, 0 or above, for each image of arr_0, "
                f"{count}; found {dtype} {shape}"
            )
        return archives.array(archive, "arr_1", self.path)

    def _damaged(self, why) -> UserError:
        return UserError(f"{self.path} is damaged: {why}; make it again or restore a copy")

    def __getitem__(self, index: int) -> dict:
        part = self.part(int(index), int(index) + 1)
        return {"image": part["image"][0], "label": int(part.get("label", [0])[0])}

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The records of many: read in one piece where they lie beside each other."""
        first, last = int(min(indices)), int(max(indices)) + 1
        if last - first > 4 * len(indices):
            return [self[index] for index in indices]
        part = self.part(first, last)
        labels = part.get("label", np.zeros(last - first, np.int32))
        return [
            {"image": part["image"][index - first], "label": int(labels[index - first])}
            for index in indices
        ]

    def name(self, index: int) -> str:
        """Archive and number."""
        return f"{self.path}[{index}]"


class Source(Archive):
    """An archive as a data set: its fingerprint is of all bytes, its classes are numbers.

    Args:
      split: `all`: an archive does not say which of its images are held out.
    """

    def __init__(self, path: str | os.PathLike, *, split: str = "all"):
        if split != "all":
            raise UserError(
                f"{path} is one set, without parts: split must be 'all'; found {split!r}; give a "
                "folder of images, of which a part can be held out"
            )
        super().__init__(path)
        self.fingerprint = archives.sha256(path)
        if self.label_N is not None:
            self.classes = tuple(map(str, range(int(self.label_N.max()) + 1)))


def _no_images(path: pathlib.Path, names: Iterable[str]) -> str:
    there = sorted(names)
    if {"mu", "sigma"} <= set(there) or "record" in there:
        return (
            f"{path} holds reference statistics ({', '.join(there[:_LISTED])}), not samples: were "
            "samples and --reference swapped?"
        )
    return f"{path} has no array arr_0 of images; found {', '.join(there[:_LISTED]) or 'nothing'}"


def check_pixels(shape: Sequence[int], dtype: np.dtype | str, what: str) -> None:
    """An error where an array cannot be bytes of images [N, H, W, 3]."""
    if np.dtype(dtype) != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise UserError(
            f"{what} must hold images uint8 [N, H, W, 3], 0 to 255; found {np.dtype(dtype)} "
            f"{tuple(shape)}: save the bytes that a PNG would hold"
        )
