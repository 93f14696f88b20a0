"""Where results go: reserved before any work, written beside, and in their place only when whole.

A folder of results is one result. It is filled in a hidden folder beside its place (`.NAME.part`)
and renamed into it: a process that is killed at any moment leaves what was there before, or the new
result. What an unfinished one is of stands in a record inside it, so that the same command goes on
with it. Folders that grow (`growing`: token shards, scores, samples by the ten thousand) are filled
in place, and say themselves whether they are finished. `file` is for a single file, `lines` for one
that lines are added to, `workdir` for the work directory of a run: callers need these five. They
are made of places, locks, leases and failures, the files of this folder. A work directory, and a
folder of token shards, may also lie in a bucket (`tokgen.storage`); other results are local files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from tokgen import records as records_, report, storage
from tokgen.errors import UserError
from tokgen.output import failures, leases, locks, places


def arguments(parser: argparse.ArgumentParser) -> None:
    """The option of every command that writes a result."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result at --out, as a whole"
    )


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

    def claim(self, identity: Mapping, beside: Mapping = types.MappingProxyType({})) -> bool:
        """Make the folder that of one result; whether an unfinished one of the same is there.

        An error where it is another one's, with what differs. `beside` stands in the record as
        well, and may differ. Of several processes that begin at once, one makes the record.
        """
        file = self.path / self.record
        text = json.dumps({**identity, **beside}, indent=2, sort_keys=True)
        self.continued = True
        if not file.exists() and self._begun(text):
            return False
        try:
            before = self.migrated(records_.load(file))
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}; use another {self.option}") from error
        now = _flat({n: value for n, value in json.loads(text).items() if n not in beside})
        if isinstance(before, dict):
            before = {n: value for n, value in before.items() if n not in beside}
        before = _flat(before)
        changed = [
            f"{name}: {before.get(name, 'absent')} there, {now.get(name, 'absent')} here"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if not changed:
            return True
        if self.replaces:
            places.empty(self.path)
            self._write(text)
            return False
        raise UserError(
            f"{self.path} holds {self.what}; use another {self.option}, or its values, or "
            "--overwrite, which replaces it:\n  " + "\n  ".join(line[:300] for line in changed)
        )

    def _begun(self, text: str) -> bool:
        """Make the record, unless another process was faster; whether this one did."""
        if self.staged:
            self._write(text)
            return True
        file = self.path / self.record
        made = records_.save(places.beside(file), text + "\n")
        try:
            os.link(made, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            made.replace(file)
        finally:
            made.unlink(missing_ok=True)
        return True

    def _write(self, text: str) -> None:
        for name in {self.record, places.RECORD} if self.staged else {self.record}:
            records_.save(self.path / name, text + "\n")


def check_folder(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    option: str = "--out",
    overwrite: bool = False,
) -> None:
    """What `folder` would refuse of its place, sooner: before a model is fetched for it."""
    with failures.reserved(path, option):
        places.check_free(places.target_of(path, option, ()), records, option, overwrite)


def check_growing(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    option: str = "--out",
    overwrite: bool = False,
) -> None:
    """What `growing` would refuse of its place, sooner, but for what `claim` does."""
    with failures.reserved(path, option):
        target = places.target_of(path, option, ())
        names = places.strangers(target, option)
        if overwrite and names:
            places.check_free(target, records, option, overwrite)
    _check_own(path, names, records, option)


def _check_own(
    path: str | os.PathLike, names: Sequence[str], records: Collection[str], option: str
) -> None:
    """An error where a folder holds names, and no record of what they are."""
    if names and not set(names) & set(records):
        raise UserError(
            f"{option} {path} is not empty: it holds {places.few(names)} of something else, and "
            f"no {' or '.join(records)} that says of what; use another {option}"
        )


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
        with failures.reserved(path, option):
            target = places.target_of(path, option, inputs)
            places.restored(target)
            places.check_free(target, records, option, overwrite)
            beside = places.staging(target, records, option, stack)
        what = "an unfinished result of another command line"
        found = Folder(
            pathlib.Path(path), beside, option, places.RECORD, what, staged=True, replaces=overwrite
        )
        try:
            yield found
            places.put(beside, target)
        except BaseException as error:
            kept = f"what was made lies in {beside}, and the same command goes on with it"
            if not found.continued:
                shutil.rmtree(beside, ignore_errors=True)
                kept = "what was written of it was removed"
            if isinstance(error, OSError) and error.errno in failures.ENVIRONMENT:
                raise UserError(f"{failures.described(error, path, option)}; {kept}") from error
            if found.continued and not isinstance(error, UserError):
                report.say(kept)
            raise


@contextlib.contextmanager
def growing(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    record: str = places.RECORD,
    what: str = "another result",
    lock: str = places.LOCK,
    option: str = "--out",
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike] = (),
    migrated: Callable[[dict], dict] = dict,
) -> Iterator[Folder]:
    """A folder that is filled in place, and gone on with after a kill.

    By one process at a time; or by one for each `lock`, of names that match places.LOCKS.
    `migrated` puts what earlier versions wrote into `record` into today's words. With `overwrite`
    an earlier result is replaced whole, as in `folder`, by what is made beside it.
    """
    with failures.reserved(path, option):
        target = places.target_of(path, option, inputs)
        names = places.strangers(target, option)
    with contextlib.ExitStack() as stack:
        if overwrite and names:
            given = dict(records=records, option=option, overwrite=True, inputs=inputs)
            found = stack.enter_context(folder(path, **given))
            found.record = record
        else:
            _check_own(path, names, records, option)
            found = Folder(pathlib.Path(path), target, option, record, what, staged=False)
        found.migrated = migrated
        with failures.reserved(path, option):
            places.made(target, stack)
            stack.enter_context(locks.passing(target / lock, locks.in_use(target, option)))
        with failures.told(path, option):
            yield found


@contextlib.contextmanager
def growing_in_bucket(
    path: str | os.PathLike,
    *,
    records: Mapping[str, Sequence[str]],
    lock: str = places.LOCK,
    option: str = "--out",
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike] = (),
) -> Iterator[Folder]:
    """As `growing`, of `gs://BUCKET/FOLDER`; nothing that is there is replaced: no folder of a
    bucket takes the place of another.
    """
    target = places.in_bucket(path, option, inputs)
    with storage.reached(target):
        names = sorted(set(storage.names(target)) - places.OWN - {lock})
    if overwrite and names:
        raise UserError(
            f"--overwrite replaces no result in a bucket; {path} holds {places.few(names)}: remove "
            f"it (gcloud storage rm -r {target}), or name another {option}"
        )
    _check_own(path, names, records, option)
    with leases.hold(target / lock, locks.in_use(target, option)):
        yield Folder(target, target, option, places.RECORD, "another result", staged=False)


@contextlib.contextmanager
def workdir(
    path: str | os.PathLike, inputs: Sequence[str | os.PathLike] = ()
) -> Iterator[pathlib.Path]:
    """The work directory of a run, held while it lasts; what is in it is the run's own affair."""
    option = "--workdir"
    if storage.is_remote(path):
        target = places.in_bucket(path, option, inputs)
        refusal = locks.in_use(f"the work directory {path}", option)
        with leases.hold(target / places.LOCK, refusal):
            yield target
        return
    with contextlib.ExitStack() as stack:
        with failures.reserved(path, option):
            target = places.target_of(path, option, inputs)
            places.entries(target, option)
            places.made(target, stack)
            stack.callback(_unlink_alone, target)
            stack.enter_context(
                locks.hold(target / places.LOCK, locks.in_use(f"the work directory {path}", option))
            )
        yield target


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
        with failures.reserved(path, option):
            target = places.target_of(path, option, inputs)
            if target.is_dir():
                raise UserError(f"{option} names a file; {path} is a folder: name one inside it")
            if target.exists() and not overwrite:
                raise UserError(f"{option} {path} is there already; name another, or --overwrite")
            if target.exists() and not (target.is_file() and own(target)):
                raise UserError(
                    f"--overwrite replaces an earlier result; {path} is none: name another {option}"
                )
            beside = places.staging(target, {}, option, stack)
            stack.callback(shutil.rmtree, beside, ignore_errors=True)
            made = beside / target.name
        with failures.told(path, option):
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
        with failures.reserved(path, option):
            target = places.target_of(path, option, inputs)
            if target.is_dir():
                raise UserError(f"{option} names a file to add a line to; {path} is a folder")
            if not target.exists():  # one that is there may be added to, whatever it lies in
                places.made(target.parent, stack)
                stack.callback(_unlink_empty, target)
            opened = stack.enter_context(open(target, "ab"))
            _check_lines(target, option)
        records: list[Mapping] = []
        with failures.told(path, option):
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


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(records_.parsed(line), dict)
    except ValueError:
        return False


def _flat(tree: Any, path: str = "") -> dict:
    """Every value of a tree by its path, so that a difference is named alone."""
    if not isinstance(tree, dict):
        return {path.removesuffix("."): tree}
    return {k: v for name, one in tree.items() for k, v in _flat(one, f"{path}{name}.").items()}


def _unlink_alone(target: pathlib.Path) -> None:
    """Remove the lock of a folder that holds nothing else."""
    with contextlib.suppress(OSError):
        if os.listdir(target) == [places.LOCK]:
            (target / places.LOCK).unlink()


def _unlink_empty(file: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        if not file.stat().st_size:
            file.unlink()
