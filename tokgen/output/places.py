"""Where a result may lie, what is made beside it, and how it takes its place.

A result is filled in a hidden neighbour of its place, `.NAME.part`, or inside it where the place
cannot be renamed; what it replaces is there until the last moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import pathlib
import shutil
import socket
import sys
import threading
from collections.abc import Mapping, Sequence

from tokgen import records as records_, storage
from tokgen.errors import UserError
from tokgen.output import failures, locks

RECORD = ".record.json"  # of an unfinished result: what it is of
MARK = ".unfinished"
LOCK = "lock"
OWN = {LOCK, ".lock", ".part"}  # what may lie in an empty folder
LOCKS = f"{LOCK}-*"  # of a folder that several processes fill
BESIDE = ".*.part"  # what is written, and not in its place yet
RUN = "checkpoints"  # what makes a folder a work directory
_LONGEST = 200  # bytes of a name that leave room for what is added to it
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS


def target_of(
    path: str | os.PathLike, option: str, inputs: Sequence[str | os.PathLike]
) -> pathlib.Path:
    """The place that a path leads to, or an error where no result can lie there."""
    if not os.fspath(path):
        raise UserError(f"{option} is empty; name a place for the result")
    storage.local(path, f"{option}: results of this command")
    target = pathlib.Path(os.path.realpath(path))
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UserError(
                    f"{failures.cannot(path, option)}: {parent} is a file; name another {option}"
                )
            break
    for given in filter(None, map(os.fspath, inputs)):
        read = pathlib.Path(os.path.realpath(given))
        if not read.exists():
            continue
        if target == read:
            raise UserError(
                f"{option} {path} is what the command reads; name another place for the result"
            )
        if read in target.parents and not _beside_steps(read, target):
            raise UserError(
                f"{option} must not lie in what is read, where it would be taken for a part of it; "
                f"found {path} in {given}"
            )
        if target in read.parents and target.is_dir() and os.listdir(target):
            raise UserError(
                f"{option} {path} holds what the command reads, {given}; name another place"
            )
    return target


def in_bucket(
    path: str | os.PathLike, option: str, inputs: Sequence[str | os.PathLike]
) -> pathlib.Path:
    """As `target_of`, of a path that leads into a bucket."""
    target = storage.path(path, option)
    for given in filter(None, map(os.fspath, inputs)):
        if f"{target}/".startswith(f"{given.rstrip('/')}/"):
            raise UserError(
                f"{option} must not lie in what is read, where it would be taken for a part of it; "
                f"found {path} in {given}"
            )
        if given.startswith(f"{target}/"):
            raise UserError(
                f"{option} {path} holds what the command reads, {given}; name another place"
            )
    return target


def _beside_steps(read: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether a place in a work directory is outside of its checkpoints."""
    steps = read / RUN
    return steps.is_dir() and steps != target and steps not in target.parents


def entries(target: pathlib.Path, option: str) -> list[str]:
    """What is in a folder, its lock left out; nothing where there is none."""
    if not os.path.lexists(target):
        return []
    if not target.is_dir():
        raise UserError(f"{option} names a folder; {target} is a file")
    try:
        return sorted(set(os.listdir(target)) - OWN)
    except OSError as error:
        raise UserError(failures.described(error, target, option)) from error


def strangers(target: pathlib.Path, option: str) -> list[str]:
    """What is in a folder that processes may be filling already: not what they are about to."""
    names = entries(target, option)
    return [n for n in names if not any(fnmatch.fnmatch(n, own) for own in (LOCKS, BESIDE))]


def beside(file: pathlib.Path) -> pathlib.Path:
    """Where to write what is to be `file`: a name that nobody else has, on any machine."""
    own = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return file.with_name(f".{file.name}.{own}.part")


def few(names: Sequence[str]) -> str:
    """Three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_free(
    target: pathlib.Path, records: Mapping[str, Sequence[str]], option: str, overwrite: bool
) -> None:
    """An error where a result would be mixed with what is there, or take its place."""
    names = entries(target, option)
    if not names:
        return
    if not overwrite:
        more = (
            ", or say --overwrite, which replaces it whole" if _is_result(target, records) else ""
        )
        raise UserError(
            f"{option} {target} is not empty: it holds {few(names)}; name a new folder{more}"
        )
    work = set(names) & {".git", RUN} - set(records)
    if not _is_result(target, records) or work:
        listed = " and ".join(sorted(work)) if work else f"{few(names)}, no result of this command"
        raise UserError(
            f"--overwrite replaces the whole of an earlier result; {target} holds {listed}: name "
            "another folder, or empty this one"
        )
    if _is_bound(target):
        raise UserError(
            f"--overwrite cannot replace {target}, which is mounted, in use as the current folder, "
            "or in a folder that cannot be written; name a folder inside it, or go elsewhere"
        )


def _is_result(target: pathlib.Path, records: Mapping[str, Sequence[str]]) -> bool:
    """Whether a folder holds a record of the command's."""
    for name, keys in records.items():
        found = target / name
        if not keys and found.exists():
            return True
        if found.is_file():
            with contextlib.suppress(OSError, ValueError):
                record = records_.load(found)
                if isinstance(record, dict) and set(keys) <= set(record):
                    return True
    return False


def _beside(target: pathlib.Path, what: str) -> pathlib.Path:
    """A hidden neighbour of a place, on the same file system."""
    name = os.fsdecode(os.fsencode(target.name)[:_LONGEST]) or "root"
    return target.with_name(f".{name}.{what}")


def staging(
    target: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    option: str,
    stack: contextlib.ExitStack,
) -> pathlib.Path:
    """The folder to write in until the result is whole: made, and locked until the stack closes."""
    # what is bound to its place is filled from within, whatever may be done around it
    within = target.is_dir() and _is_bound(target)
    made(target if within else target.parent, stack)
    beside, lock = _beside(target, "part"), _beside(target, "lock")
    if within:
        beside, lock = target / ".part", target / ".lock"
    stack.enter_context(locks.passing(lock, locks.in_use(target, option)))
    for left in (beside, _beside(target, "old")):  # by processes that were killed
        if left.is_dir() and not (left / RECORD).exists():
            if os.listdir(left) and not (left / MARK).exists() and not _is_result(left, records):
                raise UserError(f"{left} is in the way, and no unfinished result; remove it")
            shutil.rmtree(left)
    beside.mkdir(exist_ok=True)
    (beside / MARK).write_text("a result that is being made, or was not finished\n")
    return beside


def restored(target: pathlib.Path) -> None:
    """Put back what a process that was killed had taken away to make room."""
    old = _beside(target, "old")
    if old.is_dir() and not os.path.lexists(target):
        old.replace(target)


def _is_bound(target: pathlib.Path) -> bool:
    """Whether a folder cannot be replaced: mounted, in use, or in one that is not ours."""
    here = pathlib.Path.cwd()
    return (
        os.path.ismount(target)
        or target in (here, *here.parents)
        or not os.access(target.parent, os.W_OK | os.X_OK)
    )


def made(target: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Make a folder with its parents; those that stay empty go when the stack closes."""
    missing = []
    while not target.exists():
        missing.append(target)
        target = target.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        stack.callback(_remove_empty, one)
    if not os.access(target, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(target))


def _remove_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def put(beside: pathlib.Path, target: pathlib.Path) -> None:
    """A finished folder into its place; the record of the unfinished one goes last."""
    if beside.parent == target:  # filled from within
        for name in sorted(set(os.listdir(beside)) - {RECORD, MARK}):
            (beside / name).replace(target / name)
        shutil.rmtree(beside)
        return
    if target.is_dir():
        shutil.copymode(target, beside)
    if target.is_dir() and os.listdir(target):
        _exchange(beside, target)
        shutil.rmtree(beside)
    else:
        beside.replace(target)
    for name in (RECORD, MARK):
        (target / name).unlink(missing_ok=True)


def _exchange(beside: pathlib.Path, target: pathlib.Path) -> None:
    """Two folders change places at one blow; where the system cannot, by way of a third name."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(beside), os.fsencode(target)
    done = -1
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        done = library.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(_EXCHANGE))
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        done = library.renamex_np(*paths, ctypes.c_uint(_EXCHANGE))
    if done == 0:
        return
    old = _beside(target, "old")
    target.replace(old)
    beside.replace(target)
    old.replace(beside)


def empty(folder: pathlib.Path) -> None:
    """Remove what is in a folder."""
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
