"""The held-out part of a folder without splits, chosen file by file.

By a hash of the path below the folder: a file that is added moves no other one, and two machines
agree without a word. Every class keeps an image to be trained on.
"""

import hashlib
import os

from tokgen import interfaces


def share(
    files: list[tuple[str, int, int]], split: str, held_out: float, path: str, classes: int
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(the files of a split, what is to be said); a file is (name, label, bytes)."""
    if split == "all":
        return files, []
    place = {name: place_of(name) for name, _, _ in files}
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
            "data.held_out=0 (--config.data.held_out=0) to train without held-out metrics"
        )
    return [file for file in files if file[0] in aside], []


def _keep_classes(
    aside: set[str], files: list[tuple[str, int, int]], place: dict[str, float]
) -> None:
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


def place_of(name: str) -> float:
    """Where in [0, 1) a path falls."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
