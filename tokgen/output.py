"""Where results go: reserved before any work, written beside, and in their place only when whole.

A folder of results is one result. It is filled in a hidden folder beside its place (`.NAME.part`)
and renamed into it: a process that is killed at any moment leaves what was there before, or the new
result. What an unfinished one is of stands in a record inside it, so that the same command goes on
with it. Folders that grow (`growing`: token shards, scores) are filled in place, and say themselves
whether they are finished. `file` is for a single file, `lines` for one that lines are added to.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tokgen import records as records_, report
from tokgen.errors import UserError

RECORD = ".record.json"  # of an unfinished result: what it is of
MARK = ".unfinished"
LOCK = "lock"
OWN = {LOCK, ".lock", ".part"}  # what may lie in an empty folder
RUN = "checkpoints"  # what makes a folder a work directory
# What the system says when the place is at fault, and no program of ours
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ETXTBSY),
}
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of a lock that is held
_LONGEST = 200  # bytes of a name that leave room for what is added to it
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_unlocked: set[int] = set()  # file systems without locks, each told of once


def arguments(parser: argparse.ArgumentParser) -> None:
    """The option of every command that writes a result."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result at --out, as a whole"
    )


# ---------------------------------------------------------------- folders


@dataclasses.dataclass
class Folder:
    """A folder that is being filled.

    Attributes:
        target: the place of the finished result, as the user wrote it.
        path: where to write now.
        what: a result of another command line, in words.
        staged: whether `path` takes the place of `target` when it is whole.
        replaces: whether what is there, unfinished ones of others too, may go.
        continued: whether the same command can go on with what is there.
        migrated: what earlier versions wrote into `record`, in today's words.
    """

    target: pathlib.Path
    path: pathlib.Path
    option: str
    record: str
    what: str
    staged: bool
    replaces: bool = False
    continued: bool = False
    migrated: Callable[[dict], dict] = dict

    def claim(self, identity: Mapping) -> bool:
        """Make the folder that of one result; whether an unfinished one of the same is there.

        An error where it is another one's, with what differs.
        """
        file, text = self.path / self.record, json.dumps(identity, indent=2, sort_keys=True)
        self.continued = True
        if not file.exists():
            self._write(text)
            return False
        try:
            before = self.migrated(records_.load(file))
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}; use another {self.option}") from error
        now, before = _flat(json.loads(text)), _flat(before)
        changed = [
            f"{name}: {before.get(name, 'absent')} there, {now.get(name, 'absent')} here"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if not changed:
            return True
        if self.replaces:
            _empty(self.path)
            self._write(text)
            return False
        raise UserError(
            f"{self.path} holds {self.what}; use another {self.option}, or its values, or "
            "--overwrite, which replaces it:\n  " + "\n  ".join(line[:300] for line in changed)
        )

    def _write(self, text: str) -> None:
        for name in {self.record, RECORD} if self.staged else {self.record}:
            records_.save(self.path / name, text + "\n")


@contextlib.contextmanager
def folder(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    option: str = "--out",
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike] = (),
) -> Iterator[Folder]:
    """A new result, whole when the block ends without an error; else what was there stays.

    `records` tells a result of this command by its files: {name: keys of the JSON inside}.
    `inputs` are what the command reads: a result lies in none of them and takes the place of none.
    """
    with contextlib.ExitStack() as stack:
        with _reserved(path, option):
            target = _place(path, option, inputs)
            _restored(target)
            _check_free(target, records, option, overwrite)
            beside = _staging(target, records, option, stack)
        what = "an unfinished result of another command line"
        found = Folder(
            pathlib.Path(path), beside, option, RECORD, what, staged=True, replaces=overwrite
        )
        try:
            yield found
            _put(beside, target)
        except BaseException as error:
            kept = f"what was made lies in {beside}, and the same command goes on with it"
            if not found.continued:
                shutil.rmtree(beside, ignore_errors=True)
                kept = "what was written of it was removed"
            if isinstance(error, OSError) and error.errno in ENVIRONMENT:
                raise UserError(f"{described(error, path, option)}; {kept}") from error
            if found.continued and not isinstance(error, UserError):
                report.say(kept)
            raise


@contextlib.contextmanager
def growing(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    record: str = RECORD,
    what: str = "another result",
    lock: str = LOCK,
    option: str = "--out",
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike] = (),
    migrated: Callable[[dict], dict] = dict,
) -> Iterator[Folder]:
    """A folder that is filled in place, by one process at a time, and gone on with after a kill.

    `migrated` puts what earlier versions wrote into `record` into today's words. With `overwrite`
    an earlier result is replaced whole, as in `folder`, by what is made beside it.
    """
    with _reserved(path, option):
        target = _place(path, option, inputs)
        names = _names(target, option)
    with contextlib.ExitStack() as stack:
        if overwrite and names:
            given = dict(records=records, option=option, overwrite=True, inputs=inputs)
            found = stack.enter_context(folder(path, **given))
            found.record = record
        else:
            if names and not set(names) & set(records):
                raise UserError(
                    f"{option} {path} is not empty: it holds {_some(names)} of something else, and "
                    f"no {' or '.join(records)} that says of what; use another {option}"
                )
            found = Folder(pathlib.Path(path), target, option, record, what, staged=False)
        found.migrated = migrated
        with _reserved(path, option):
            _made(target, stack)
            stack.enter_context(_passing(target / lock, _in_use(target, option)))
        with told(path, option):
            yield found


@contextlib.contextmanager
def workdir(
    path: str | os.PathLike, inputs: Sequence[str | os.PathLike] = ()
) -> Iterator[pathlib.Path]:
    """The work directory of a run, held while it lasts; what is in it is the run's own affair."""
    option = "--workdir"
    with contextlib.ExitStack() as stack:
        with _reserved(path, option):
            target = _place(path, option, inputs)
            _names(target, option)
            _made(target, stack)
            stack.callback(_unlink_alone, target)
            stack.enter_context(hold(target / LOCK, _in_use(f"the work directory {path}", option)))
        yield target


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def file(
    path: str | os.PathLike,
    *,
    option: str = "--out",
    overwrite: bool = False,
    own: Callable[[pathlib.Path], bool] = lambda file: True,
    inputs: Sequence[str | os.PathLike] = (),
) -> Iterator[pathlib.Path]:
    """Where to write a single file; it takes its place when the block ends without an error.

    With `overwrite` it replaces an earlier one, which `own` tells from other files.
    """
    with contextlib.ExitStack() as stack:
        with _reserved(path, option):
            target = _place(path, option, inputs)
            if target.is_dir():
                raise UserError(f"{option} names a file; {path} is a folder: name one inside it")
            if target.exists() and not overwrite:
                raise UserError(f"{option} {path} is there already; name another, or --overwrite")
            if target.exists() and not (target.is_file() and own(target)):
                raise UserError(
                    f"--overwrite replaces an earlier result; {path} is none: name another {option}"
                )
            beside = _staging(target, {}, option, stack)
            stack.callback(shutil.rmtree, beside, ignore_errors=True)
            made = beside / target.name
        with told(path, option):
            yield made
            with open(made, "rb") as opened:
                os.fsync(opened.fileno())
            made.replace(target)


@contextlib.contextmanager
def lines(
    path: str | os.PathLike, *, option: str = "--out", inputs: Sequence[str | os.PathLike] = ()
) -> Iterator[list[Mapping]]:
    """Records that are added to a file of JSON lines when the block ends without an error."""
    with contextlib.ExitStack() as stack:
        with _reserved(path, option):
            target = _place(path, option, inputs)
            if target.is_dir():
                raise UserError(f"{option} names a file to add a line to; {path} is a folder")
            if not target.exists():  # one that is there may be added to, whatever it lies in
                _made(target.parent, stack)
                stack.callback(_unlink_empty, target)
            opened = stack.enter_context(open(target, "ab"))
            _check_lines(target, option)
        records: list[Mapping] = []
        with told(path, option):
            yield records
            size = os.fstat(opened.fileno()).st_size
            try:
                opened.write("".join(json.dumps(record) + "\n" for record in records).encode())
                opened.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    opened.close()
                if target.is_file():
                    os.truncate(target, size)
                raise


def _check_lines(target: pathlib.Path, option: str) -> None:
    """An error where a line would be added to something else than lines of JSON."""
    if not target.is_file() or not target.stat().st_size:  # a device, or nothing yet
        return
    with open(target, "rb") as opened:
        opened.seek(max(0, target.stat().st_size - 2**20))
        last = opened.read()
    if not last.endswith(b"\n") or not _is_json(last.rstrip(b"\n").split(b"\n")[-1]):
        raise UserError(
            f"{option} names a file of JSON lines to add to; {target} does not end in one: mend "
            "its last line, or name another"
        )


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def hold(file: pathlib.Path, refusal: str) -> Iterator[int]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    Where another process has it, an error of `refusal`, in which {} is who. File systems without
    locks exist (some network and mounted drives): that is said once, and nothing is held. Gives
    the file's descriptor.
    """
    with open(file, "a+") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                opened.seek(0)
                who = opened.read().strip() or "a process"
                raise UserError(refusal.format(who)) from error
            _tell_unlocked(file, error)
        opened.truncate(0)
        opened.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        opened.flush()
        yield opened.fileno()


def _tell_unlocked(file: pathlib.Path, error: OSError) -> None:
    device = os.stat(file).st_dev
    if device not in _unlocked:
        _unlocked.add(device)
        report.say(
            f"the file system of {file.parent} has no locks ({error.strerror}): see to it that no "
            "other process writes there"
        )


@contextlib.contextmanager
def _passing(file: pathlib.Path, refusal: str) -> Iterator[None]:
    """Hold a lock file that is gone afterwards.

    One that another process removed in between holds nothing: it is made again.
    """
    while True:
        with hold(file, refusal) as number:
            try:
                if os.fstat(number).st_ino != os.stat(file).st_ino:
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def told(path: str | os.PathLike, option: str = "--out") -> Iterator[None]:
    """Errors of the place where results are written become one message; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        raise UserError(described(error, path, option)) from error


@contextlib.contextmanager
def _reserved(path: str | os.PathLike, option: str) -> Iterator[None]:
    """Whatever the system refuses while a place is reserved is the place's fault."""
    try:
        yield
    except OSError as error:
        plain = OSError(error.errno, error.strerror or str(error))
        raise UserError(described(plain, path, option)) from error


def described(error: OSError, path: str | os.PathLike = "", option: str = "--out") -> str:
    """What went wrong with a place, and what mends it."""
    inner = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    where = os.fspath(path) or inner or "what it says"
    if inner and pathlib.Path(where).name not in inner:
        where, option = inner, ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room there, or name a place that has it, and run the same command again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "raise the limit of open files (ulimit -n)"
    elif error.errno in (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV):
        remedy = "look at the disk or the connection to it, and run the same command again"
    elif option:
        remedy = f"name another {option}, or see to the permissions"
    else:
        remedy = "see to its permissions"
    why = (error.strerror or str(error)).lower()
    return f"{_cannot(where, option) if option else f'cannot use {where}'}: {why}; {remedy}"


def _cannot(path: str | os.PathLike, option: str) -> str:
    what = "to the work directory " if option == "--workdir" else ""
    return f"cannot write {what}{path}"


# ---------------------------------------------------------------- places


def _place(path: str | os.PathLike, option: str, inputs: Sequence[str | os.PathLike]):
    """The place that a path leads to, or an error where no result can lie there."""
    if not os.fspath(path):
        raise UserError(f"{option} is empty; name a place for the result")
    target = pathlib.Path(os.path.realpath(path))
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise UserError(
                    f"{_cannot(path, option)}: {parent} is a file; name another {option}"
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


def _beside_steps(read: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether a place in a work directory is outside of its checkpoints."""
    steps = read / RUN
    return steps.is_dir() and steps != target and steps not in target.parents


def _names(target: pathlib.Path, option: str) -> list[str]:
    """What is in a folder, its lock left out; nothing where there is none."""
    if not os.path.lexists(target):
        return []
    if not target.is_dir():
        raise UserError(f"{option} names a folder; {target} is a file")
    try:
        return sorted(set(os.listdir(target)) - OWN)
    except OSError as error:
        raise UserError(described(error, target, option)) from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_free(
    target: pathlib.Path, records: Mapping[str, Sequence[str]], option: str, overwrite: bool
) -> None:
    """An error where a result would be mixed with what is there, or take its place."""
    names = _names(target, option)
    if not names:
        return
    if not overwrite:
        more = (
            ", or say --overwrite, which replaces it whole" if _is_result(target, records) else ""
        )
        raise UserError(
            f"{option} {target} is not empty: it holds {_some(names)}; name a new folder{more}"
        )
    work = set(names) & {".git", RUN} - set(records)
    if not _is_result(target, records) or work:
        listed = (
            " and ".join(sorted(work)) if work else f"{_some(names)}, no result of this command"
        )
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


def _staging(
    target: pathlib.Path,
    records: Mapping[str, Sequence[str]],
    option: str,
    stack: contextlib.ExitStack,
) -> pathlib.Path:
    """The folder to write in until the result is whole: made, and locked until the stack closes."""
    # what is bound to its place is filled from within, whatever may be done around it
    within = target.is_dir() and _is_bound(target)
    _made(target if within else target.parent, stack)
    beside, lock = _beside(target, "part"), _beside(target, "lock")
    if within:
        beside, lock = target / ".part", target / ".lock"
    stack.enter_context(_passing(lock, _in_use(target, option)))
    for left in (beside, _beside(target, "old")):  # by processes that were killed
        if left.is_dir() and not (left / RECORD).exists():
            if os.listdir(left) and not (left / MARK).exists() and not _is_result(left, records):
                raise UserError(f"{left} is in the way, and no unfinished result; remove it")
            shutil.rmtree(left)
    beside.mkdir(exist_ok=True)
    (beside / MARK).write_text("a result that is being made, or was not finished\n")
    return beside


def _restored(target: pathlib.Path) -> None:
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


def _made(target: pathlib.Path, stack: contextlib.ExitStack) -> None:
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


def _unlink_alone(target: pathlib.Path) -> None:
    """Remove the lock of a folder that holds nothing else."""
    with contextlib.suppress(OSError):
        if os.listdir(target) == [LOCK]:
            (target / LOCK).unlink()


def _unlink_empty(file: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        if not file.stat().st_size:
            file.unlink()


def _in_use(target: str | os.PathLike, option: str) -> str:
    place = str(target).replace("{", "{{").replace("}", "}}")
    return f"{place} is in use by {{}}; wait for it, stop it, or use another {option}"


# ---------------------------------------------------------------- into place


def _put(beside: pathlib.Path, target: pathlib.Path) -> None:
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


def _empty(folder: pathlib.Path) -> None:
    """Remove what is in a folder."""
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()


def _flat(tree, path: str = "") -> dict:
    """Every value of a tree by its path, so that a difference is named alone."""
    if not isinstance(tree, dict):
        return {path.removesuffix("."): tree}
    return {k: v for name, one in tree.items() for k, v in _flat(one, f"{path}{name}.").items()}


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(records_.parsed(line), dict)
    except ValueError:
        return False
