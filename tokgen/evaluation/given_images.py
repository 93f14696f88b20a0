"""Images to be scored that are given: an .npz archive or a folder; what is wrong with them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tokgen import options, records
from tokgen.data import folder, npz, pixels, scan, sources
from tokgen.interfaces import UserError
from tokgen.output import places

LOSSY = tuple(
    ending for form in ("JPEG", "WEBP", "GIF", "AVIF") for ending in pixels.ENDINGS.get(form, ())
)
# What is scored all the same where it is asked for: see `check`, Pictures, and score.check_enough
ACCEPTED = ("duplicates", "constant", "few", "lossy")
SHARE = 0.01  # of images that may be equal to another one, or of one colour, without a word


class Images(Protocol):
    """Images to be scored, part by part.

    Attributes:
        size: (rows, columns) of every image.
        classes: the names of the labels; () where there are no labels, or none of their names.
        identity: which images these are, in plain JSON: a score goes on with no others.
    """

    size: tuple[int, int]
    classes: tuple[str, ...]
    identity: dict

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [N, H, W, 3]}, and where they are known {"label": int32 [N]}.

        A part is a function of its bounds: whoever is stopped may ask again.
        """
        ...


class Pictures:
    """The images of a folder, lossless and of one size; class folders are labels."""

    def __init__(self, path: str | pathlib.Path, accepted: Sequence[str] = (), labels: str = ""):
        self.source = folder.Source(path, split="all", labels=labels or "folders")
        self.classes, self.lossy = self.source.classes, "lossy" in accepted
        names = [self.source.name(index) for index in range(len(self.source))]
        lossy = [name for name in names if name.lower().endswith(LOSSY)]
        if lossy and not self.lossy:
            raise UserError(self._is_lossy(lossy))
        scan.headers(self.source)
        if broken := self.source.unreadable.files():  # before anything is measured
            name, why = next(iter(broken.items()))
            more = f"; and {len(broken) - 1} others ({', '.join(broken)})" * (len(broken) > 1)
            raise UserError(f"cannot read {name} of {self.source.path}: {why}{more[:500]}")
        self.size = self._seen(0)[0].shape[:2]
        place = pathlib.Path(self.source.path).resolve()
        # other bytes under the same names, and as many of them, are other samples
        changed = max((place / name).stat().st_mtime_ns for name in names)
        self.identity = {
            "samples": str(place),
            "fingerprint": self.source.earlier[0],  # of names and sizes: `changed` is of contents
            "changed": changed,
        }

    def __len__(self) -> int:
        return len(self.source)

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images and labels `start` to `stop`, in the order of their paths."""
        found, labels = [], []
        for index in range(start, stop):
            name, image_HW3, label = self.source.name(index), *self._seen(index)
            if image_HW3.shape[:2] != self.size:
                raise UserError(
                    f"the images of {self.source.path} must be of one size: "
                    f"{self.source.name(0)} is {_by(self.size)}, {name} is "
                    f"{_by(image_HW3.shape[:2])}; resizing samples would change what is measured"
                )
            found.append(image_HW3)
            labels.append(label)
        part = {"image": np.stack(found)}
        return part | {"label": np.asarray(labels, np.int32)} if self.classes else part

    def _seen(self, index: int) -> tuple[np.ndarray, int]:
        """Pixels and label of one image."""
        name = self.source.name(index)
        try:
            if not self.lossy and sources.header(self.source, index)[0] == "JPEG":
                raise UserError(self._is_lossy([name]))
            record = sources.read(self.source, index, 3)
        except pixels.BrokenImage as error:
            raise UserError(f"cannot read {name} of {self.source.path}: {error}") from error
        return record["image"], record["label"]

    def _is_lossy(self, names: Sequence[str]) -> str:
        return (
            f"{self.source.path} holds {len(names)} images in a lossy form ({names[0]}, ...), "
            "which changes every distance though no eye sees it; score samples as they were "
            "drawn, PNG or .npz; --accept lossy is for photographs that never were anything else"
        )


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def given(
    path: str | pathlib.Path, accepted: Sequence[str] = (), labels: str = ""
) -> npz.Archive | Pictures:
    """The images of a path: an .npz, a folder with `samples.npz` inside, or one of images."""
    path = pathlib.Path(path)
    inside = path / "samples.npz"
    if labels and (path.suffix == ".npz" or inside.exists()):
        options.refuse({"labels": "folders of images"})
    if path.is_dir():
        if inside.exists():
            return npz.Archive(inside, _names(path / "samples.json"))
        return Pictures(path, accepted, labels)
    if not path.exists():
        raise UserError(f"no samples at {path}: there is no such path")
    if path.suffix != ".npz":
        raise UserError(f"samples are an .npz or a folder of images; found {path}")
    return npz.Archive(path)


def _names(record: pathlib.Path) -> tuple[str, ...]:
    """The names of the classes that `tokgen sample` wrote beside its images."""
    try:
        found = records.checked(records.load(record), names=list)["names"]
    except (OSError, ValueError):
        return ()
    named = all(isinstance(name, str) for name in found)
    return tuple(found) if named else ()


class Spread:
    """So many of given images, evenly over them: they may be sorted by class."""

    def __init__(self, images: Images, count: int):
        self.images, self.size = images, images.size
        self.index_N = sources.evenly(len(images), count)
        self.classes = images.classes
        self.identity = {**images.identity, "spread": [count, len(images)]}

    def __len__(self) -> int:
        return len(self.index_N)

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images and labels `start` to `stop`; of an archive, read from the first to the last."""
        found = [self.images.part(int(n), int(n) + 1) for n in self.index_N[start:stop]]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


@contextlib.contextmanager
def writing(
    path: pathlib.Path, shape: Sequence[int], label_N: np.ndarray | None = None
) -> Iterator[Callable[[np.ndarray], object]]:
    """A function that adds images to a new `path`, an archive of `shape` [N, H, W, C] in the end.

    It appears whole or not at all, also when the machine dies. Equal images make equal files. One
    process at a time writes it: what those before it left unfinished is removed.
    """
    for left in path.parent.glob(f".{path.name}.*.part"):
        left.unlink(missing_ok=True)
    part = places.beside(path)
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as target:
            # a date of its own would make equal images unequal files
            with target.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
                    "fortran_order": False,
                    "shape": tuple(map(int, shape)),
                }
                np.lib.format.write_array_header_1_0(member, header)
                yield lambda image_BHWC: member.write(np.ascontiguousarray(image_BHWC).tobytes())
            if label_N is not None:
                with target.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                    np.lib.format.write_array(member, label_N.astype(np.int64), allow_pickle=False)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    except Exception:  # a full disk, a part that is damaged: it may be gigabytes
        part.unlink(missing_ok=True)
        raise


def digests(image_NHW3: np.ndarray) -> np.ndarray:
    """[N] a hash of each image's bytes, as 16 bytes."""
    found = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in image_NHW3]
    return np.array(found, "S16")


def constants(image_NHW3: np.ndarray) -> np.ndarray:
    """[N] whether an image is of one colour."""
    first_N113 = image_NHW3[:, :1, :1]
    return (image_NHW3 == first_N113).all(axis=(1, 2, 3))


def suspicious(digest_N: np.ndarray, constant_N: np.ndarray) -> dict[str, int]:
    """How many images are copies of another one, and how many of one colour."""
    return {
        "duplicates": int(len(digest_N) - len(np.unique(digest_N))),
        "constant": int(np.sum(constant_N)),
    }


def check(found: dict[str, int], count: int, accepted: Sequence[str] = ()) -> None:
    """An error where more than SHARE of the images are copies or of one colour."""
    wrong = {
        name: number
        for name, number in found.items()
        if number > SHARE * count and name not in accepted
    }
    if wrong:
        listed = " and ".join(f"{number} {name}" for name, number in wrong.items())
        words = " ".join(f"--accept {name}" for name in wrong)
        raise UserError(
            f"{listed} among {count} images: a score of them would be of a broken sampler; look "
            f"at them, and say {words} if they are meant"
        )
