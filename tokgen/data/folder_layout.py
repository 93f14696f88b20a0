"""How the structure of an image folder is understood: its splits, its classes, what is passed over.

What cannot be understood for certain is an error that says what was understood, never a guess:
class folders that hold only folders, splits beside each other in other numbers, images beside
their masks. Class folders that are numbers are in the order of numbers.
"""

import os
import re
from collections.abc import Sequence

from tokgen import interfaces
from tokgen.data import classes as names_, folder_listing

# The names of held-out folders; where there are several, the first of this list is read. `test`
# comes last: many sets keep images without classes in it.
HELD_OUT = (
    *("held_out", "validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"),
)
TRAIN = ("train", "training", "trainval")
UNLABELED = ("unlabeled",)  # images for other methods (STL-10): passed over, and said
OTHER = ("extra",)  # named as a part of a set, without a meaning that is certain
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


def part_of(name: str) -> str:
    """What part of a set a folder's name stands for, of TRAIN, HELD_OUT and others; or ""."""
    text = re.sub(r"[-\s.]+", "_", name.strip().lower())
    found = _PART.fullmatch(text)
    if found is None:
        return ""
    plain = {"heldout": "held_out", "train_val": "trainval", "unlabelled": "unlabeled"}
    return plain.get(found[1], found[1])


def understood(path: str, labels: str) -> tuple[str, tuple[str, str] | None, list[str]]:
    """(the folder that is read, its folders of training and held-out images, what is to be said).

    Splits in any other combination than a training folder, held-out ones and unlabeled images are
    an error.
    """
    root, notes = unwrapped(path, labels)
    folders = folder_listing.folders(root)
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
        below, more = unwrapped(os.path.join(root, train[0]), labels)
        return below, None, notes + more
    chosen = held_out[0][1]
    spare = [name for _, name in held_out[1:]]
    if spare:
        notes.append(f"{chosen} of {root} is what is held out; {', '.join(spare)} is not read")
    return root, (train[0], chosen), notes


def unwrapped(path: str, labels: str) -> tuple[str, list[str]]:
    """(the folder below `path` that holds more than one folder, or images; what is to be said).

    A lone folder named after a split is stepped into, whatever it holds.
    """
    root, seen = path, {folder_listing.identity(path)}
    while True:
        folders = folder_listing.folders(root)
        if len(folders) != 1 or any(folder_listing.images(root, "", nested=False)):
            break
        (only,) = folders
        part = part_of(only)
        if not part and (labels == "outer" or not _holds_only_folders(root, only)):
            break
        inner = os.path.join(root, only)
        if folder_listing.identity(inner) in seen:
            break
        seen.add(folder_listing.identity(inner))
        root = inner
    return root, [f"{path} is read from {root} on"] if root != path else []


def _holds_only_folders(root: str, name: str) -> bool:
    return bool(folder_listing.folders(os.path.join(root, name))) and not any(
        folder_listing.images(root, name, nested=False)
    )


def _all_beside(names: Sequence[str]) -> bool:
    return bool(names) and all(name.lower() in _BESIDE | _PICTURES for name in names)


def _is_beside(root: str, name: str) -> bool:
    """Whether a folder holds what belongs to images, and none itself."""
    return name.lower() in _BESIDE and not any(folder_listing.images(root, name, nested=True))


def read(
    path: str, labels: str, order: Sequence[str], unread: dict
) -> tuple[tuple[str, ...], list[tuple[str, int, int]], list[str]]:
    """Classes, (path below `path`, label, bytes) of every image, and what is to be said."""
    folders, passed = folder_listing.folders(path), unread.setdefault(path, {})
    pictures = [name for name in folders if name.lower() in _PICTURES]
    beside = [name for name in folders if name.lower() in _BESIDE]
    if pictures and beside:
        raise _belonging(path, folders, beside, pictures[0])
    if labels == "none":
        files = [
            (name, 0, size)
            for name, size in folder_listing.images(path, "", nested=True, passed=passed)
        ]
        if not files:
            raise _no_images(path, passed)
        return (), files, []
    loose = list(folder_listing.images(path, "", nested=False, passed=passed))
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
        found = list(folder_listing.images(path, name, nested=True, passed=passed))
        files += [(file, label, size) for file, size in found]
        if not found:
            empty.append(name)
        elif all(file.count("/") > 1 for file, _ in found):
            inside = folder_listing.folders(os.path.join(path, name))
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
            f"{name}: {names_.listed(folder_listing.folders(os.path.join(path, name)), 3)}"
            for name in deep
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
        f"{' '.join(folder_listing.EXTENSIONS)}{found}"
    )


def agree(found: Sequence[str], known: Sequence[str]) -> bool:
    """Whether held-out classes are among those of training, or neither has any."""
    if not found or not known:
        return not found and not known
    folded = {names_.folded(name) for name in known}
    return all(names_.folded(name) in folded for name in found)
