"""Locks of places where results are written: one process at a time, gone when it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from tokgen import report
from tokgen.errors import UserError

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of a lock that is held
WAIT = 0.5  # seconds between looks at a lock that is waited for
_unlocked: set[int] = set()  # file systems without locks, each told of once


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
def passing(file: pathlib.Path, refusal: str) -> Iterator[None]:
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


@contextlib.contextmanager
def waiting(file: pathlib.Path, told: str) -> Iterator[None]:
    """Hold a lock file as `passing` does, once whoever has it is done.

    `told` is said of the process that is waited for, which is {} in it.
    """
    with contextlib.ExitStack() as stack:
        said = False
        while True:
            try:
                stack.enter_context(passing(file, told))
                break
            except UserError as held:
                if not said:
                    report.say(str(held))
                said = True
                time.sleep(WAIT)
        yield


def in_use(target: str | os.PathLike, option: str) -> str:
    return f"{plain(target)} is in use by {{}}; wait for it, stop it, or use another {option}"


def plain(words: str | os.PathLike) -> str:
    """Words as they stand in a refusal, where braces mean who holds the lock."""
    return str(words).replace("{", "{{").replace("}", "}}")
