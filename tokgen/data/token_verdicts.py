"""Verdicts on token shards that were read whole, kept in the cache of this host.

Reading a set whole and comparing it with its checksums takes a minute at ImageNet's size. One
process of a host does it and the others wait for its verdict, which holds for later starts too, as
long as the files are the ones that were read: of the same sizes, times of change and numbers on the
disk. What changes without any of these, as under a disk that fails, is found by reading all again:
`tokgen data DIR --scan full`.
"""

from __future__ import annotations

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
    what: str, header: str, files: Sequence[str], look: Callable[[], np.ndarray], *, again: bool
) -> np.ndarray:
    """How many images each class has, as `look` found, now or when the same files were read before.

    Args:
      what: what the shards are called, for messages.
      header: a hash of what is stated of them.
      files: where they lie on this host; some may only be there once `look` has fetched them.
      look: reads them whole; raises what is wrong with them, of which nothing is kept.
      again: whether to look in any case.
    """
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
    before = folder / _state(header, files)
    found = None if again else _kept(before, what)
    if found is not None:
        return found
    with locks.waiting(before.with_suffix(".lock"), f"{what} is being read whole by {{}}"):
        found = None if again else _kept(before, what)
        if found is not None:
            return found
        begun = time.time()
        seen = look()
        # whatever was changed while it was read is not settled either
        if max(map(_changed, files), default=0.0) < begun - _SETTLED:
            records.save(folder / _state(header, files), json.dumps(seen.tolist()))
        return seen


def _kept(file: pathlib.Path, what: str) -> np.ndarray | None:
    """The counts of a verdict; None without one."""
    try:
        found = json.loads(file.read_text())
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    except (OSError, ValueError):
        return None
    report.say(
        f"{what} is unchanged since it was read whole on {at}, and not verified again; `tokgen "
        "data DIR --scan full` does that"
    )
    return np.array(found, np.int64)


def _state(header: str, files: Sequence[str]) -> str:
    """The name of a verdict: another one as soon as anything about a file is."""
    told: list = [header]
    for file in files:
        try:
            found = os.stat(file)
            times = found.st_mtime_ns, found.st_ctime_ns
            told.append((os.path.basename(file), found.st_size, *times, found.st_ino))
        except OSError:
            told.append((os.path.basename(file), None))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest() + ".json"


def _changed(file: str) -> float:
    found = os.stat(file)
    return max(found.st_mtime, found.st_ctime)
