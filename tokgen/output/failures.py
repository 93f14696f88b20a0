"""What the system refuses where results are written, as one message with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from tokgen.errors import UserError

# What the system says when the place is at fault, and no program of ours
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ETXTBSY),
}


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
def reserved(path: str | os.PathLike, option: str) -> Iterator[None]:
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
    return f"{cannot(where, option) if option else f'cannot use {where}'}: {why}; {remedy}"


def cannot(path: str | os.PathLike, option: str) -> str:
    what = "to the work directory " if option == "--workdir" else ""
    return f"cannot write {what}{path}"
