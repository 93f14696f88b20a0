"""A folder of images: one folder per class, or one flat folder without classes.

    flowers/daisy/*.jpg            classes ("daisy", "rose"), the held-out part chosen by hash
    flowers/rose/2019/07/*.jpg     whatever lies below a class belongs to it
    flowers/*.jpg                  no classes: an unconditional model, every label is 0
    flowers/train/..., val/...     folders named after splits are read as such
    flowers/flowers/...            a lone folder that holds no images itself is stepped into

How a folder is understood is told in `folder_layout`, what is held out of one without splits in
`folder_split`.
"""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from tokgen import interfaces, ranges, storage
from tokgen.data import (
    classes as names_,
    folder_layout,
    folder_listing,
    folder_split,
    sources,
)

SPLITS = ("train", "held_out", "all")
LABELS = ("folders", "outer", "none")
DOUBTFUL = ("refuse", "drop")
_HASHED, _BLOCK, _READERS = 2**16, 4096, 16  # files of a fingerprint, bytes of a block, threads


class Source(sources.RandomAccess):
    """Random access to the image files below a folder: `{"image": bytes, "label": int}`.

    Args:
      split: `train`, `held_out` or `all`.
      held_out: the share of the files that is held out where the folder has no split folders; of 0
        the held-out part is empty.
      labels: `folders`; `outer`, and whatever lies below an outer folder is of that class; or
        `none`.
      doubtful: classes in which the splits do not agree: `refuse` or `drop` all of them.
      order: of the classes, as it was recorded; used where it is one of the same classes.
    """

    holds = "files"

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str = "train",
        held_out: ranges.Rate = 0.02,
        labels: str = "folders",
        order: Sequence[str] = (),
        doubtful: str = "refuse",
    ):
        self.path = os.fspath(path)
        self.split = split
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if not 0.0 <= held_out < 1.0:
            raise interfaces.UserError(
                f"held_out is the share of the images that is kept aside, at least 0 and below 1; "
                f"found {held_out}"
            )
        if labels not in LABELS or doubtful not in DOUBTFUL:
            raise interfaces.UserError(
                f"labels must be one of {', '.join(LABELS)}, doubtful one of "
                f"{', '.join(DOUBTFUL)}; found {labels!r}, {doubtful!r}"
            )
        if not self.path:
            raise interfaces.UserError(
                "an image folder is needed, and data.path names none; give the folder that holds "
                "your class folders or images: --config.data.path=DIR in training, --data DIR in "
                "commands"
            )
        storage.local(self.path, "the images of a folder")
        if not os.path.isdir(self.path):
            found = "a file" if os.path.exists(self.path) else "nothing"
            raise interfaces.UserError(
                f"an image folder is needed at {self.path}; found {found} there; "
                "give the folder that holds your class folders or images"
            )
        self.unread: dict[str, dict[str, int]] = {}  # where, and by ending: files passed over
        try:
            files, notes = self._look(split, held_out, labels, order, doubtful)
        except OSError as error:  # not allowed, or gone while it was walked through
            raise interfaces.UserError(
                f"{error.filename or self.path} below {self.path} cannot be read: "
                f"{error.strerror or error}; mend its permissions, or move it away"
            ) from error
        files.sort()
        if list(self.classes) != names_.ordered(self.classes):
            notes.append(f"classes keep their recorded order: {names_.listed(self.classes)}")
        self.notes = tuple(notes)
        self._names = [name for name, _, _ in files]
        self._label_B = np.array([label for _, label, _ in files], np.int32)
        # as earlier versions had it, without contents: what was written then is known by it
        self.earlier = (_fingerprint(self.classes, files),)

    def _look(
        self, split: str, held_out: float, labels: str, order: Sequence[str], doubtful: str
    ) -> tuple[list[tuple[str, int, int]], list[str]]:
        """(files, what is to be said) of the folder; sets the classes."""
        self.path, split_folders, notes = folder_layout.understood(self.path, labels)
        if split_folders:
            classes, labels, told = self._agreed(split_folders, labels, order, doubtful)
            self.classes, files, more = self._read_splits(split_folders, split, labels, classes)
            return files, [*notes, *told, *more]
        self.classes, files, told = folder_layout.read(self.path, labels, order, self.unread)
        files, aside = folder_split.share(files, split, held_out, self.path, len(self.classes))
        return files, [*notes, *told, *aside]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of classes, names, labels, sizes, and blocks of the contents."""
        # The largest sets are sampled: reading a little of a million files takes minutes.
        index_n = sources.evenly(len(self), _HASHED)
        digest = hashlib.sha256(self.earlier[0].encode())
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            for block in pool.map(
                self._blocks, np.array_split(index_n, max(1, len(index_n) // 64))
            ):
                digest.update(block)
        return digest.hexdigest()

    def _blocks(self, index_n: np.ndarray) -> bytes:
        """A hash of the first, the middle and the last block of some files."""
        digest = hashlib.sha256()
        for index in index_n.tolist():
            try:
                with self.open(index) as file:
                    size = os.fstat(file.fileno()).st_size
                    for start in sorted(
                        {0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)}
                    ):
                        file.seek(start)
                        digest.update(file.read(_BLOCK))
            except OSError:  # it is told when it is read
                digest.update(b"unreadable")
        return digest.digest()

    @functools.cached_property
    def changed(self) -> int:
        """When one of the files changed last, in nanoseconds: its contents or its permissions."""
        places = (os.path.join(self.path, name) for name in self._names)
        return max(
            (os.stat(place).st_ctime_ns for place in places if os.path.exists(place)), default=0
        )

    @property
    def counts(self) -> np.ndarray:
        """How many images each class has."""
        return np.bincount(self._label_B, minlength=max(1, len(self.classes)))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        with self.open(index) as file:
            return {"image": file.read(), "label": int(self._label_B[index])}

    def open(self, index: int) -> BinaryIO:
        """The file of an image, for its header: to be closed."""
        return open(os.path.join(self.path, self._names[index]), "rb")

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self._names[index]

    def _agreed(
        self, split_folders: tuple[str, str], labels: str, order: Sequence[str], doubtful: str
    ) -> tuple[tuple[str, ...], str, list[str]]:
        """(classes of the splits, how their labels are to be read, what is to be said)."""
        train, held_out = (
            folder_layout.unwrapped(os.path.join(self.path, name), labels)[0]
            for name in split_folders
        )
        if labels == "none":
            return (), labels, []
        classes = names_.recorded(names_.ordered(folder_listing.folders(train)), order)
        if doubtful == "refuse" or folder_layout.agree(folder_listing.folders(held_out), classes):
            return classes, labels, []
        told = (
            f"{' and '.join(split_folders)} of {self.path} do not have the same classes: the "
            "images are read without any"
        )
        return (), "none", [told]

    def _read_splits(
        self, split_folders: tuple[str, str], split: str, labels: str, classes: tuple[str, ...]
    ) -> tuple[tuple[str, ...], list[tuple[str, int, int]], list[str]]:
        """(classes, files, what is to be said) of folders that are splits."""
        train, held_out = split_folders
        notes, files = [], []
        for name in {"train": (train,), "held_out": (held_out,), "all": split_folders}[split]:
            there, told = folder_layout.unwrapped(os.path.join(self.path, name), labels)
            inner = os.path.relpath(there, self.path).replace(os.sep, "/")
            found, part, more = folder_layout.read(there, labels, classes, self.unread)
            if classes and not found:
                raise interfaces.UserError(
                    f"the class folders of {there} must be among those of {train}; found images "
                    f"without classes, and {train} has {names_.listed(classes)}; sort them into "
                    f"class folders, or give {os.path.join(self.path, train)} alone, of which a "
                    "part is then held out; or leave classes out, data.labels=none (in "
                    "commands --labels none)"
                )
            label_C, said = names_.matched(found, classes, there, train)
            notes += [*told, *more, *([said] if said else [])]
            files += [(f"{inner}/{file}", int(label_C[label]), size) for file, label, size in part]
        return classes, files, notes


class OneImage(sources.RandomAccess):
    """A single file as a source."""

    def __init__(self, path: pathlib.Path):
        self.path = self.fingerprint = str(path)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, bytes | int]:
        return {"image": pathlib.Path(self.path).read_bytes(), "label": 0}

    def name(self, index: int) -> str:
        """Its path."""
        return self.path


def _fingerprint(classes: tuple[str, ...], files: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for name, label, size in files:
        digest.update(os.fsencode(name) + f"\0{label}\0{size}\n".encode())
    return digest.hexdigest()
