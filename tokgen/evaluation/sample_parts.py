"""Samples by the ten thousand, as they lie in a folder while they are drawn: part by part.

A part is a file of EACH images, whatever the batch: whoever goes on with a folder, in other batches
or on another machine, finds the same files. It appears whole or not at all. `Growing` is what is
there so far, for a score.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tokgen import distributed, records
from tokgen.data import npz
from tokgen.evaluation import made_images
from tokgen.interfaces import UserError
from tokgen.output import places

EACH = 32  # images of a part, which a kill can cost
FOLDER, RECORD, WHOLE = "parts", "samples.json", "samples.npz"
# Fields of RECORD that say nothing of which images these are
BESIDE = ("checkpoint", "text", "near_ties", "sha256")
# Images of a folder: numbers of seven digits, all of which RECORD can list within records.BYTES
MOST = 5 * 10**6


def bounds(total: int) -> list[tuple[int, int]]:
    """The first image of each part, and the one after its last."""
    return [(start, min(start + EACH, total)) for start in range(0, total, EACH)]


def file(out: pathlib.Path, start: int) -> pathlib.Path:
    """Where the part that begins with image `start` lies."""
    return out / FOLDER / f"{start:07d}.npz"


def there(out: pathlib.Path) -> set[int]:
    """The first images of the parts that are finished."""
    try:
        names = os.listdir(out / FOLDER)
    except FileNotFoundError:
        return set()
    found = (name.removesuffix(".npz") for name in names if name.endswith(".npz"))
    return {int(name) for name in found if name.isdecimal()}


def count(starts: Iterable[int], total: int) -> int:
    """How many images the parts have that begin with these."""
    return sum(min(EACH, total - start) for start in starts)


def save(out: pathlib.Path, start: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a part; of two processes that write the same one, one does."""
    place = file(out, start)
    place.parent.mkdir(exist_ok=True)
    made = places.beside(place)
    try:
        made_images.write_part(made, arrays)
        made.replace(place)
    finally:  # a full disk
        made.unlink(missing_ok=True)


def load(out: pathlib.Path, start: int, stop: int) -> dict[str, np.ndarray] | None:
    """A part, its checksums compared; None where there is none."""
    place = file(out, start)
    part = made_images.loaded_part(place)
    if part is not None and {len(array) for array in part.values()} != {stop - start}:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in part.items())
        raise UserError(
            f"{place} is damaged: it must hold {stop - start} images; found {lengths}; remove it, "
            "and it is made again"
        )
    return part


# ---------------------------------------------------------------- for a score


def record(path: str | os.PathLike) -> dict[str, Any] | None:
    """What RECORD of a folder says, of one that `tokgen sample --total` fills or has filled."""
    try:
        found = records.load(pathlib.Path(path) / RECORD)
        records.checked(found, total=int, kinds=int, size=list, names=list)
    except (OSError, ValueError):
        return None
    return found


def identity(path: str | os.PathLike, told: Mapping) -> dict:
    """Which images a folder has, or will have: the same while it is filled and afterwards."""
    own = {name: value for name, value in told.items() if name not in BESIDE}
    digest = hashlib.sha256(records.text(own, sort_keys=True).encode()).hexdigest()
    return {"samples": str(pathlib.Path(path).resolve()), "drawn": digest[:16]}


class Growing:
    """The images that are there of a folder that is being filled, `each` by `each`.

    Image number `number(i)` of the folder is image i of these. A score of them goes on with others
    that have come in the meantime: what was seen of these is kept by their numbers.
    """

    def __init__(self, path: str | os.PathLike, told: Mapping, each: int):
        self.path, self.each, self.total = pathlib.Path(path), each, told["total"]
        self.size, self.kinds = tuple(told["size"]), told["kinds"]
        self.classes = tuple(map(str, told["names"]))
        self.identity = identity(path, told)
        starts = distributed.decided(self._whole_ones)  # more may come at any moment
        if not starts:
            raise UserError(
                f"{path} has none of its {self.total:,} images yet, or less than {each} beside "
                "each other: wait for tokgen sample, which fills it"
            )
        self.start_S = np.asarray(starts)
        self.count = sum(min(each, self.total - start) for start in starts)
        self._whole: npz.Archive | None = None

    def __len__(self) -> int:
        return self.count

    def told(self) -> str:
        """How many of how many there are, in words."""
        return f"{len(self):,} of the {self.total:,} images that {self.path} will hold are there"

    def number(self, index: int) -> int:
        """The number of an image of these."""
        return int(self.start_S[index // self.each]) + index % self.each

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images and labels `start` to `stop` of those that are there."""
        found = []
        for first in range(start // self.each * self.each, stop, self.each):
            low, high = max(start, first), min(stop, first + self.each)
            number = self.number(low)
            found.append(self._numbered(number, number + high - low))
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def _whole_ones(self) -> list[int]:
        """The first images of each `each` that are there, all of them."""
        found = there(self.path)
        return [
            n for n in range(0, self.total, self.each) if found >= set(self._parts(n, self.each))
        ]

    def _parts(self, start: int, count: int) -> range:
        """The first images of the parts in which so many images from `start` on lie."""
        return range(start // EACH * EACH, min(start + count, self.total), EACH)

    def _numbered(self, first: int, stop: int) -> dict[str, np.ndarray]:
        starts = self._parts(first, stop - first)
        parts = [load(self.path, start, min(start + EACH, self.total)) for start in starts]
        if any(part is None for part in parts):  # they are put together as soon as all are there
            # one archive, which goes on where it was: a new one reads all that is before
            self._whole = self._whole or npz.Archive(self.path / WHOLE, self.classes)
            return self._whole.part(first, stop)
        own = slice(first - starts[0], stop - starts[0])
        image_NHWC = np.concatenate([part["image"] for part in parts])[own]
        label_N = np.concatenate([part["label"] for part in parts])[own]
        return {"image": made_images.coloured(image_NHWC), "label": label_N}
