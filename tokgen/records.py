"""JSON records on disk: bounded before they are read, checked before they are used.

A record may be cut off by a kill, edited, or somebody else's file. What is read here is at most so
large and so deep, and what does not fit is one message.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from tokgen import storage
from tokgen.errors import UserError

BYTES = 64 * 2**20  # of a record, and of a line
LOG_BYTES = 512 * 2**20  # of a file of lines
DEPTH = 64  # of lists and dictionaries in each other
SAID = 200  # characters of a value in a message


def load(file: pathlib.Path, *, limit: int = BYTES) -> Any:
    """The value in a JSON file; OSError or ValueError with the reason alone."""
    with storage.opened(file) as stream:
        # a pipe has no size, and a file may grow: never more than the limit is read
        text = stream.read(limit + 1)
    if len(text) > limit:
        size = max(storage.size(file), len(text))
        raise ValueError(f"it has {size:,} bytes, a record at most {limit:,}")
    return parsed(text)


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError with the reason alone."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"its lists lie more than {DEPTH} deep") from error
    _shallow(value)
    return value


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"its lists lie more than {DEPTH} deep")


def read(
    file: pathlib.Path, what: str, remedy: str, *, limit: int = BYTES, **kinds: type | tuple
) -> Any:
    """The record in a file, with at least the fields `kinds`; UserError that says `what` it is."""
    try:
        with storage.asked(file):
            return checked(load(file, limit=limit), **kinds)
    except storage.NotReached:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as {what}: {error}; {remedy}") from error


def checked(record: Any, **kinds: type | tuple) -> dict:
    """The record, when it is a dictionary whose fields have these types; ValueError otherwise."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a dictionary; found {shown(record)}")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"it has no {name!r}")
        value, allowed = record[name], kind if isinstance(kind, tuple) else (kind,)
        # to python true is an integer, to a reader of records it is not
        odd = isinstance(value, bool) and bool not in allowed
        if odd or not isinstance(value, allowed):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise ValueError(f"{name!r} must be {names}; found {shown(value)}")
    return record


def shown(value: Any) -> str:
    """A value in a message: not its gigabytes."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:SAID]


def lines(
    file: pathlib.Path,
    what: str,
    remedy: str,
    *,
    say: Callable[[str], None],
    limit: int = LOG_BYTES,
    **kinds: type | tuple,
) -> list[dict]:
    """The records of a file of lines; a last one that was cut off is left out, and said.

    Any other line that is no such record is an error that names its number.
    """
    found = []
    try:
        with storage.asked(file), storage.opened(file) as stream:
            if (size := storage.size(file)) > limit:
                raise ValueError(f"it has {size:,} bytes, such a file at most {limit:,}")
            number, line = 0, stream.readline(BYTES + 1)
            while line:
                number, following = number + 1, stream.readline(BYTES + 1)
                try:
                    if len(line) > BYTES:
                        raise ValueError(f"it has more than {BYTES:,} bytes")
                    if line.strip():
                        found.append(checked(parsed(line), **kinds))
                except ValueError as error:
                    if following or line.endswith(b"\n"):
                        raise ValueError(f"line {number}: {error}") from error
                    say(f"{file}: the last line was cut off and is left out")
                line = following
    except storage.NotReached:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as {what}: {error}; {remedy}") from error
    return found


def text(value: Any, **style) -> str:
    """JSON that every reader accepts: numbers that are not finite become null."""
    return json.dumps(finite(value), allow_nan=False, **style)


def finite(value: Any) -> Any:
    """The value with null in the place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def save(file: pathlib.Path, text: str) -> pathlib.Path:
    """Write a text; the file appears whole or not at all, also when the machine dies."""
    if storage.is_remote(file):
        storage.save(file, text.encode())
        return file
    # a name of the process's own: others may write the same file
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file
