"""A folder of images: one folder per class, or one flat folder without classes.

    flowers/daisy/*.jpg            classes ("daisy", "rose"), the held-out part chosen by hash
    flowers/rose/2019/07/*.jpg     whatever lies below a class belongs to it
    flowers/*.jpg                  no classes: an unconditional model, every label is 0
    flowers/train/..., val/...     folders named after splits are read as such

The held-out part of a folder without splits is chosen file by file, by a hash of the path below
the folder. A file that is added moves no other one, and two machines agree without a word.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from tokgen import interfaces

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
SPLITS = ("train", "held_out", "all")
# The names of held-out folders; where there are several, the first of this list is read. `test`
# comes last: many sets keep images without classes in it.
HELD_OUT = ("held_out", "validation", "valid", "val", "test")


class Source:
    """Random access to the image files below a folder: `{"image": bytes, "label": int}`.

    Args:
      split: `train`, `held_out` or `all`.
      held_out: the share of the files that is held out where the folder has no split folders.
    """

    classes: tuple[str, ...]

    def __init__(self, path: str | os.PathLike, *, split: str = "train", held_out: float = 0.02):
        self.path = os.fspath(path)
        self.split = split
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if not 0.0 <= held_out < 1.0:
            raise interfaces.UserError(
                f"held_out is the share of the images that is kept aside, at least 0 and below 1; "
                f"found {held_out}"
            )
        if not self.path:
            raise interfaces.UserError(
                "an image folder is needed, and data.path names none; give the folder that holds "
                "your class folders or images: --config.data.path=DIR in training, --data DIR in "
                "commands"
            )
        if not os.path.isdir(self.path):
            found = "a file" if os.path.exists(self.path) else "nothing"
            raise interfaces.UserError(
                f"an image folder is needed at {self.path}; found {found} there; "
                "give the folder that holds your class folders or images"
            )
        split_folders = _split_folders(self.path)
        if split_folders:
            self.classes, files = _read_splits(self.path, split_folders, split)
        else:
            self.classes, files = _read(self.path)
            files = _share(files, split, held_out, self.path)
        files.sort()
        self._names = [name for name, _, _ in files]
        self._label_B = np.array([label for _, label, _ in files], np.int32)
        self.fingerprint = _fingerprint(self.classes, files)

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


def _split_folders(path: str) -> tuple[str, str] | None:
    """The names of the train and the held-out folder, where these are all there is."""
    names = {name.lower(): name for name in _folders(path)}
    if "train" not in names or not set(names) <= {"train", *HELD_OUT} or len(names) < 2:
        return None
    return names["train"], next(names[name] for name in HELD_OUT if name in names)


def _read_splits(path: str, split_folders: tuple[str, str], split: str):
    train, held_out = split_folders
    classes = tuple(_folders(os.path.join(path, train)))
    files = []
    for name in {"train": (train,), "held_out": (held_out,), "all": split_folders}[split]:
        there = os.path.join(path, name)
        found, part = _read(there)
        unknown = sorted(set(found) - set(classes))
        if unknown or (classes and not found):
            raise interfaces.UserError(
                f"the class folders of {there} must be among those of {train}; found "
                f"{', '.join(unknown) or 'images without classes'}, and {train} has "
                f"{', '.join(classes) or 'no classes'}; rename or remove them"
            )
        number = {name: label for label, name in enumerate(classes)}
        relabel = {label: number[name] for label, name in enumerate(found)} or {0: 0}
        files += [(f"{name}/{file}", relabel[label], size) for file, label, size in part]
    return classes, files


def _read(path: str) -> tuple[tuple[str, ...], list[tuple[str, int, int]]]:
    """Classes, and (path below `path`, label, bytes) of every image."""
    classes = tuple(_folders(path))
    loose = list(_images(path, "", nested=False))
    if not classes:
        if not loose:
            raise interfaces.UserError(
                f"no images in {path}: it needs class folders, or files that end in "
                f"{' '.join(EXTENSIONS)}"
            )
        return (), [(name, 0, size) for name, size in loose]
    if loose:
        raise interfaces.UserError(
            f"{path} holds class folders ({classes[0]}, ...) and images beside them "
            f"({loose[0][0]}, ...): move the images into a class folder, or the folders away"
        )
    files, empty = [], []
    for label, name in enumerate(classes):
        before = len(files)
        files += [(file, label, size) for file, size in _images(path, name, nested=True)]
        if len(files) == before:
            empty.append(name)
    if empty:
        raise interfaces.UserError(
            f"no images below {len(empty)} class folder(s): "
            f"{', '.join(os.path.join(path, name) for name in empty[:5])}"
            f"{' ...' if len(empty) > 5 else ''}; fill or remove what is empty"
        )
    return classes, files


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def _images(root: str, below: str, *, nested: bool) -> Iterator[tuple[str, int]]:
    """(path below `root`, bytes) of the images of a folder, and of the folders inside it."""
    top = os.path.join(root, below) if below else root
    pending = [(below, frozenset([_identity(top)]))]
    while pending:
        below, ancestors = pending.pop()
        with os.scandir(os.path.join(root, below) if below else root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    yield name, entry.stat().st_size
                elif nested and entry.is_dir():
                    # A link that leads back up would never end; one that leads aside is followed.
                    identity = _identity(entry.path)
                    if identity not in ancestors:
                        pending.append((name, ancestors | {identity}))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _share(files: list, split: str, held_out: float, path: str) -> list:
    if split == "all":
        return files
    place = {name: _place(name) for name, _, _ in files}
    aside = {name for name, where in place.items() if where < held_out}
    if held_out > 0 and len(files) >= 2:
        # Neither part may be empty: the smallest hash is always held out, the largest never.
        aside.add(min(place, key=place.get))
        aside.discard(max(place, key=place.get))
    if split == "train":
        return [file for file in files if file[0] not in aside]
    if not aside:
        raise interfaces.UserError(
            f"nothing is held out of {path}: it has {len(files)} image(s) and held_out={held_out}; "
            "two images and a share above 0 are needed"
        )
    return [file for file in files if file[0] in aside]


def _place(name: str) -> float:
    """Where in [0, 1) a path falls."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _fingerprint(classes: tuple[str, ...], files: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for name, label, size in files:
        digest.update(os.fsencode(name) + f"\0{label}\0{size}\n".encode())
    return digest.hexdigest()
