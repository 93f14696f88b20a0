"""Verdicts on token shards that were read whole, kept in the cache of this host.

Reading a set whole and comparing it with its checksums takes a minute at ImageNet's size. One
process of a host does it and the others wait for its verdict, which holds for later starts too, as
long as the files are the ones that were read: of the same sizes, times of change and numbers on the
disk. What changes without any of these, as under a disk that fails, is found by reading all again:
`tokgen data DIR --scan full`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from tokgen import records, report, runtime
from tokgen.output import locks

FOLDER = "verdicts"  # of the cache
MODES = ("once", "always", "never")
# A file that is changed twice within this many seconds may have the same times after both, on file
# systems with coarse clocks: of one that was changed so lately no verdict is kept.
_SETTLED = 2.5


def counts(
    what: str,
    header: str,
    files: Sequence[str],
    labels: int,
    look: Callable[[], np.ndarray],
    *,
    again: bool,
) -> np.ndarray:
    """How many images each class has, as `look` found, now or when the same files were read before.

    Args:
      what: what the shards are called, for messages.
      header: a hash of what is stated of them, their checksums too; names the lock.
      files: where they lie on this host; some may only be there once `look` has fetched them.
      labels: how many classes are counted.
      look: reads them whole; raises what is wrong with them, of which nothing is kept.
      again: whether to look in any case.
    """
    if not files:
        return look()
    folder = runtime.cache_folder() / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        report.say(
            f"{folder} cannot be written, so each start reads {what} whole; say by TOKGEN_CACHE "
            "where verdicts can be kept"
        )
        return look()

    def kept() -> np.ndarray | None:
        return None if again else _kept(folder / _name(header, _states(files)), what, labels)

    found = kept()
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                locks.waiting(
                    folder / f"{header}.lock", f"{locks.plain(what)} is being read whole by {{}}"
                )
            )
        except OSError as error:
            report.say(
                f"{folder} cannot be written ({error.strerror}), so each process reads {what} "
                "whole; make room there, or say by TOKGEN_CACHE where verdicts can be kept"
            )
            return look()
        found = kept()  # whoever had the lock may have fetched and read the files
        if found is not None:
            return found
        before, begun = _states(files), time.time()
        seen = look()
        after = _states(files)
        reason = _unsettled(files, before, after, begun)
        if not reason:
            try:
                records.save(folder / _name(header, after), json.dumps(seen.tolist()))
            except OSError as error:
                reason = f"{folder} cannot be written ({error.strerror})"
        if reason:
            report.say(f"{what} was read whole, and the next start reads it again: {reason}")
        return seen


def _kept(file: pathlib.Path, what: str, labels: int) -> np.ndarray | None:
    """The counts of a verdict, int64 [labels]; None without one, or where it is damaged."""
    try:
        found = np.array(json.loads(file.read_text()))
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    except (OSError, ValueError):
        return None
    if found.shape != (labels,) or found.dtype != np.int64:
        return None
    report.say(
        f"{what} is unchanged since it was read whole on {at}, and not verified again; `tokgen "
        "data DIR --scan full` does that"
    )
    return found


def _states(files: Sequence[str]) -> list[tuple[int, int, int, int] | None]:
    """Size, mtime, ctime (both in ns) and inode of each file; None of one that is not there."""
    states: list = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            states.append(None)
        else:
            states.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    return states


def _name(header: str, states: Sequence) -> str:
    """The name of a verdict: another one as soon as anything about a file is."""
    return hashlib.sha256(json.dumps([header, states]).encode()).hexdigest() + ".json"


def _unsettled(files: Sequence[str], before: Sequence, after: Sequence, begun: float) -> str:
    """Why the files may not be those that were read from `begun` on; empty where they are.

    One that was not there before was fetched and compared with its checksum meanwhile. Of the times
    only ctime counts: mtime is what a program says it is, and may lie in the future.
    """
    for file, old, new in zip(files, before, after, strict=True):
        name = os.path.basename(file)
        if new is None or old not in (None, new):
            return f"{name} was changed while it was read"
        if old is not None and new[2] / 1e9 >= begun - _SETTLED:
            return f"{name} was changed just before, or the clock of its disk is ahead"
    return ""
