"""A folder of images: one folder per class, or one flat folder without classes.

    flowers/daisy/*.jpg            classes ("daisy", "rose"), the held-out part chosen by hash
    flowers/rose/2019/07/*.jpg     whatever lies below a class belongs to it
    flowers/*.jpg                  no classes: an unconditional model, every label is 0
    flowers/train/..., val/...     folders named after splits are read as such
    flowers/flowers/...            a lone folder that holds no images itself is stepped into

What cannot be understood for certain is an error that says what was understood, never a guess:
class folders that hold only folders, splits beside each other in other numbers, images beside
their masks. Class folders that are numbers are in the order of numbers.

The held-out part of a folder without splits is chosen file by file, by a hash of the path below
the folder. A file that is added moves no other one, and two machines agree without a word. Every
class keeps an image to be trained on.
"""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from tokgen import interfaces, ranges
from tokgen.data import classes as names_, pixels, sources

EXTENSIONS = pixels.EXTENSIONS
SPLITS = ("train", "held_out", "all")
# The names of held-out folders; where there are several, the first of this list is read. `test`
# comes last: many sets keep images without classes in it.
HELD_OUT = (
    *("held_out", "validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"),
)
TRAIN = ("train", "training", "trainval")
UNLABELED = ("unlabeled",)  # images for other methods (STL-10): passed over, and said
OTHER = ("extra",)  # named as a part of a set, without a meaning that is certain
LABELS = ("folders", "outer", "none")
DOUBTFUL = ("refuse", "drop")
_HASHED, _BLOCK, _READERS = 2**16, 4096, 16  # files of a fingerprint, bytes of a block, threads
# As parts of sets are called: train2017, train_64x64, test-images, valSet
_PART = re.compile(
    r"(held_?out|validation|valid|val|dev|evaluation|eval|testing|test|train_?val|training|train|"
    r"unlabell?ed|extra)(_?(set|images?|imgs|data|split|part|\d{1,4}(x\d{1,4})?))*"
)
# Folders beside images that hold no images to learn from, or pictures of another kind.
_PICTURES = frozenset(
    "images image imgs img jpegimages jpgs jpeg jpg png photos photo pictures pics rgb".split()
)
_BESIDE = frozenset(
    "masks mask annotations annotation annots labels label segmentation segmentations "
    "segmentationclass segmentationobject imagesets gt ground_truth groundtruth depth bbox bboxes "
    "boxes keypoints trimaps xml xmls json metadata meta captions targets lists attributes".split()
)
# What systems and programs leave behind, thumbnails among it.
_JUNK_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir $recycle.bin #recycle lost+found".split()
    + ["system volume information"]
)
_JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))


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

    def _look(self, split: str, held_out: float, labels: str, order, doubtful: str):
        """(files, what is to be said) of the folder; sets the classes."""
        self.path, split_folders, notes = _understood(self.path, labels)
        if split_folders:
            classes, labels, told = self._agreed(split_folders, labels, order, doubtful)
            self.classes, files, more = self._read_splits(split_folders, split, labels, classes)
            return files, [*notes, *told, *more]
        self.classes, files, told = _read(self.path, labels, order, self.unread)
        files, aside = _share(files, split, held_out, self.path, len(self.classes))
        return files, [*notes, *told, *aside]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of classes, names, labels, sizes, and blocks of the contents."""
        # The largest sets are sampled: reading a little of a million files takes minutes.
        count = min(len(self), _HASHED)
        index_n = np.arange(count) * len(self) // max(count, 1)
        digest = hashlib.sha256(self.earlier[0].encode())
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            for block in pool.map(self._blocks, np.array_split(index_n, max(1, count // 64))):
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

    def _agreed(self, split_folders, labels: str, order, doubtful: str):
        """(classes of the splits, how their labels are to be read, what is to be said)."""
        train, held_out = (
            _unwrapped(os.path.join(self.path, name), labels)[0] for name in split_folders
        )
        if labels == "none":
            return (), labels, []
        classes = names_.recorded(names_.ordered(_folders(train)), order)
        if doubtful == "refuse" or _agree(_folders(held_out), classes):
            return classes, labels, []
        return (
            (),
            "none",
            [
                f"{' and '.join(split_folders)} of {self.path} do not have the same classes: the "
                "images are read without any"
            ],
        )

    def _read_splits(self, split_folders, split: str, labels: str, classes: tuple[str, ...]):
        """(classes, files, what is to be said) of folders that are splits."""
        train, held_out = split_folders
        notes, files = [], []
        for name in {"train": (train,), "held_out": (held_out,), "all": split_folders}[split]:
            there, told = _unwrapped(os.path.join(self.path, name), labels)
            inner = os.path.relpath(there, self.path).replace(os.sep, "/")
            found, part, more = _read(there, labels, classes, self.unread)
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


def _agree(found: Sequence[str], known: Sequence[str]) -> bool:
    """Whether held-out classes are among those of training, or neither has any."""
    if not found or not known:
        return not found and not known
    folded = {names_.folded(name) for name in known}
    return all(names_.folded(name) in folded for name in found)


def part_of(name: str) -> str:
    """What part of a set a folder's name stands for, of TRAIN, HELD_OUT and others; or ""."""
    text = re.sub(r"[-\s.]+", "_", name.strip().lower())
    found = _PART.fullmatch(text)
    if found is None:
        return ""
    plain = {"heldout": "held_out", "train_val": "trainval", "unlabelled": "unlabeled"}
    return plain.get(found[1], found[1])


def _understood(path: str, labels: str) -> tuple[str, tuple[str, str] | None, list[str]]:
    """(the folder that is read, its folders of training and held-out images, what is to be said).

    Splits in any other combination than a training folder, held-out ones and unlabeled images are
    an error.
    """
    root, notes = _unwrapped(path, labels)
    folders = _folders(root)
    parts = {name: part for name in folders if (part := part_of(name))}
    others = [name for name in folders if name not in parts]
    if len(parts) > 1:  # boxes or captions of the splits
        aside = [name for name in others if _is_beside(root, name)]
        notes += [f"{name} of {root} is not read: it holds no images" for name in aside]
        others = [name for name in others if name not in aside]
    if not parts or (len(parts) == 1 and not others):
        return root, None, notes
    only = next(iter(parts))
    if len(parts) == 1 and not _holds_only_folders(root, only) and not _all_beside(others):
        return root, None, [*notes, f"{only} of {root} is read as a class, not as a split"]
    train = [name for name, part in parts.items() if part in TRAIN]
    held_out = sorted(
        (HELD_OUT.index(part), name) for name, part in parts.items() if part in HELD_OUT
    )
    unlabeled = [name for name, part in parts.items() if part in UNLABELED]
    strange = [name for name, part in parts.items() if part in OTHER] + others
    twice = len({place for place, _ in held_out}) < len(held_out)
    if len(train) != 1 or strange or twice:
        understood = [f"{name} as training images" for name in train]
        understood += [f"{name} as held-out images" for _, name in held_out]
        understood += [f"{name} as images without classes" for name in unlabeled]
        first = (train or [held_out[0][1] if held_out else only])[0]
        raise interfaces.UserError(
            f"{root} holds folders named after parts of a set beside each other, which are never "
            f"classes; understood: {', '.join(understood) or 'nothing'}; "
            + (f"not understood: {names_.listed(strange)}; " if strange else "")
            + "need one folder of training images (train) and at most one of each name of held-out "
            f"images (val, test, ...), and nothing else: move or rename the others, or give one "
            f"folder, as {os.path.join(root, first)}"
        )
    notes += [f"{name} of {root} is not read: images for other methods" for name in unlabeled]
    if not held_out:
        below, more = _unwrapped(os.path.join(root, train[0]), labels)
        return below, None, notes + more
    chosen = held_out[0][1]
    spare = [name for _, name in held_out[1:]]
    if spare:
        notes.append(f"{chosen} of {root} is what is held out; {', '.join(spare)} is not read")
    return root, (train[0], chosen), notes


def _unwrapped(path: str, labels: str) -> tuple[str, list[str]]:
    """(the folder below `path` that holds more than one folder, or images; what is to be said).

    A lone folder named after a split is stepped into, whatever it holds.
    """
    root, seen = path, {_identity(path)}
    while True:
        folders = _folders(root)
        if len(folders) != 1 or any(_images(root, "", nested=False)):
            break
        (only,) = folders
        part = part_of(only)
        if not part and (labels == "outer" or not _holds_only_folders(root, only)):
            break
        inner = os.path.join(root, only)
        if _identity(inner) in seen:
            break
        seen.add(_identity(inner))
        root = inner
    return root, [f"{path} is read from {root} on"] if root != path else []


def _holds_only_folders(root: str, name: str) -> bool:
    return bool(_folders(os.path.join(root, name))) and not any(_images(root, name, nested=False))


def _all_beside(names: Sequence[str]) -> bool:
    return bool(names) and all(name.lower() in _BESIDE | _PICTURES for name in names)


def _is_beside(root: str, name: str) -> bool:
    """Whether a folder holds what belongs to images, and none itself."""
    return name.lower() in _BESIDE and not any(_images(root, name, nested=True))


def _read(
    path: str, labels: str, order: Sequence[str], unread: dict
) -> tuple[tuple[str, ...], list[tuple[str, int, int]], list[str]]:
    """Classes, (path below `path`, label, bytes) of every image, and what is to be said."""
    folders, passed = _folders(path), unread.setdefault(path, {})
    pictures = [name for name in folders if name.lower() in _PICTURES]
    beside = [name for name in folders if name.lower() in _BESIDE]
    if pictures and beside:
        raise _belonging(path, folders, beside, pictures[0])
    if labels == "none":
        files = [(name, 0, size) for name, size in _images(path, "", nested=True, passed=passed)]
        if not files:
            raise _no_images(path, passed)
        return (), files, []
    loose = list(_images(path, "", nested=False, passed=passed))
    if not folders:
        if not loose:
            raise _no_images(path, passed)
        return (), [(name, 0, size) for name, size in loose], []
    classes = names_.recorded(names_.ordered(folders), order)
    if loose:
        raise interfaces.UserError(
            f"{path} holds class folders ({classes[0]}, ...) and images beside them "
            f"({loose[0][0]}, ...): move the images into a class folder, or the folders away"
        )
    files, empty, deep = [], [], []
    for label, name in enumerate(classes):
        found = list(_images(path, name, nested=True, passed=passed))
        files += [(file, label, size) for file, size in found]
        if not found:
            empty.append(name)
        elif all(file.count("/") > 1 for file, _ in found):
            inside = _folders(os.path.join(path, name))
            # each class with its `images` inside it (Tiny ImageNet) has no other meaning
            if len(inside) > 1 or inside[0].lower() not in _PICTURES:
                deep.append(name)
    rest = [name for name in classes if name not in empty]
    if empty and len(rest) == 1 and set(empty) <= set(beside):
        raise _belonging(path, folders, empty, rest[0])
    if empty:
        raise interfaces.UserError(
            f"no images below {len(empty)} class folder(s): "
            f"{', '.join(os.path.join(path, name) for name in empty[:5])}"
            f"{' ...' if len(empty) > 5 else ''}; fill or remove what is empty"
            f"{f' ({names_.unread_files(passed)})' if passed else ''}"
        )
    notes = []
    if labels != "outer":
        inside = [
            f"{name}: {names_.listed(_folders(os.path.join(path, name)), 3)}" for name in deep
        ]
        if len(deep) == len(classes):
            raise interfaces.UserError(
                f"the {len(classes)} folders of {path} hold no images but only folders "
                f"({'; '.join(inside[:3])}{' ...' if len(deep) > 3 else ''}): understood as the "
                f"classes {names_.listed(classes)}, which may not be meant; give the folder that "
                f"holds the class folders, as {os.path.join(path, deep[0])}; or say "
                "data.labels=outer if whatever lies below each of them is of one class, "
                "data.labels=none if classes do not matter (--config.data.labels=outer in "
                "training, --labels outer in commands)"
            )
        if deep:
            notes.append(f"classes that hold only folders: {'; '.join(inside[:3])}")
    return classes, files, notes


def _belonging(
    path: str, folders: list[str], beside: list[str], pictures: str
) -> interfaces.UserError:
    return interfaces.UserError(
        f"{path} holds {names_.listed(folders)}: understood as images and what belongs to them "
        f"({names_.listed(beside)}), which are no classes; give the folder of the images, "
        f"{os.path.join(path, pictures)}"
    )


def _no_images(path: str, passed: dict[str, int]) -> interfaces.UserError:
    found = f"; {names_.unread_files(passed)}" if passed else ""
    if any(ending in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") for ending in passed):
        found += ": unpack archives first"
    return interfaces.UserError(
        f"no images in {path}: it needs class folders, or files that end in "
        f"{' '.join(EXTENSIONS)}{found}"
    )


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not _is_junk(entry.name)
        )


def _is_junk(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in _JUNK_FOLDERS


def _images(
    root: str, below: str, *, nested: bool, passed: dict[str, int] | None = None
) -> Iterator[tuple[str, int]]:
    """(path below `root`, bytes) of the images of a folder, and of the folders inside it.

    `passed` counts the other files by how they end.
    """
    passed = {} if passed is None else passed
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
                elif entry.is_dir():
                    if not nested or _is_junk(entry.name):
                        continue
                    # A link that leads back up would never end; one that leads aside is followed.
                    identity = _identity(entry.path)
                    if identity not in ancestors:
                        pending.append((name, ancestors | {identity}))
                elif entry.name.lower() not in _JUNK_FILES:
                    ending = _ending(entry)
                    passed[ending] = passed.get(ending, 0) + 1


def _ending(entry: os.DirEntry) -> str:
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "special file"
    return os.path.splitext(entry.name)[1].lower() or "without an ending"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _share(
    files: list, split: str, held_out: float, path: str, classes: int
) -> tuple[list, list[str]]:
    """(the files of a split, what is to be said)."""
    if split == "all":
        return files, []
    place = {name: _place(name) for name, _, _ in files}
    aside = {name for name, where in place.items() if where < held_out}
    if held_out > 0 and len(files) >= 2:
        # Neither part may be empty: the smallest hash is always held out, the largest never.
        aside.add(min(place, key=place.get))
        aside.discard(max(place, key=place.get))
        if classes > 1:
            _keep_classes(aside, files, place)
    if split == "train":
        return [file for file in files if file[0] not in aside], []
    if not aside and held_out > 0 and len(files) == classes > 1:
        return [], [f"each of the {classes} classes of {path} has one image, to be trained on"]
    if not aside and held_out > 0:
        raise interfaces.UserError(
            f"nothing is held out of {path}: it has {len(files)} image(s) and "
            f"held_out={held_out}; two images and a share above 0 are needed; or say "
            "data.held_out=0 (--config.data.held_out=0) to train without held-out figures"
        )
    return [file for file in files if file[0] in aside], []


def _keep_classes(aside: set[str], files: list, place: dict[str, float]) -> None:
    """Give each class that is held out whole an image to be trained on: its largest hash."""
    members = {}
    for name, label, _ in files:
        members.setdefault(label, []).append(name)
    for names in members.values():
        if aside.issuperset(names):
            aside.discard(max(names, key=place.get))
    several = [name for names in members.values() if len(names) > 1 for name in names]
    if not aside and several:
        aside.add(min(several, key=place.get))


def _place(name: str) -> float:
    """Where in [0, 1) a path falls."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _fingerprint(classes: tuple[str, ...], files: list[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for name, label, size in files:
        digest.update(os.fsencode(name) + f"\0{label}\0{size}\n".encode())
    return digest.hexdigest()
