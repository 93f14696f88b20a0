"""What lies in a folder: its folders, and the image files below it, without what systems leave."""

import os
from collections.abc import Iterator

from tokgen.data import pixels

EXTENSIONS = pixels.EXTENSIONS
# What systems and programs leave behind, thumbnails among it.
_JUNK_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir $recycle.bin #recycle lost+found".split()
    + ["system volume information"]
)
_JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))


def folders(path: str) -> list[str]:
    """The names of the folders inside a folder."""
    with os.scandir(path) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not _is_junk(entry.name)
        )


def _is_junk(folder: str) -> bool:
    return folder.startswith(".") or folder.lower() in _JUNK_FOLDERS


def images(
    root: str, below: str, *, nested: bool, passed: dict[str, int] | None = None
) -> Iterator[tuple[str, int]]:
    """(path below `root`, bytes) of the images of a folder, and of the folders inside it.

    `passed` counts the other files by how they end.
    """
    passed = {} if passed is None else passed
    top = os.path.join(root, below) if below else root
    pending = [(below, frozenset([identity(top)]))]
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
                    inner = identity(entry.path)
                    if inner not in ancestors:
                        pending.append((name, ancestors | {inner}))
                elif entry.name.lower() not in _JUNK_FILES:
                    ending = _ending(entry)
                    passed[ending] = passed.get(ending, 0) + 1


def _ending(entry: os.DirEntry) -> str:
    if not entry.is_file():
        return "broken link" if entry.is_symlink() else "special file"
    return os.path.splitext(entry.name)[1].lower() or "without an ending"


def identity(path: str) -> tuple[int, int]:
    """What a folder is by, whatever links lead to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
