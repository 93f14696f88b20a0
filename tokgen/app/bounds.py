"""How much one request may ask for. The page is open to whoever reaches it, and to hostile ones."""

from __future__ import annotations

import math
import numbers

from tokgen.errors import UserError

MODELS = 8  # on one page
NUMBERS = (1, 4, 8, 16)  # pictures of a class: each number is a program of its own, so they are few
DRAWS = (1, 2, 4)  # of one edit
PICTURES = 64  # of one request, all classes together
STEPS = 64  # of a masked generator
PARTICLES = (8, 128)  # of an edit
SEEDS = 2**32  # as of `tokgen sample`
PROGRAMS = 16  # compiled ones that stay in memory

UPLOAD = 16 * 2**20  # bytes of a picture's file
PIXELS = 32_000_000  # of its header
BODY = 64 * 2**10  # bytes of any other request
BLOB = 4 * 2**20  # bytes of a painted layer, as the browser sends it
BLOBS = 6  # requests whose layers wait for them
LAYERS = 2  # of one request
PAINTED = 2**22  # pixels of a layer
FILED = 8  # files that come in at the same time
ARRIVES = 60  # seconds until all of a body is here
SESSIONS = 128  # browsers whose picture to edit is remembered
DEEP = 16  # brackets within brackets
DISK = 2**30  # bytes of uploads and pictures that lie on the disk
FILES = 64  # of each kind that the page writes itself, the latest
WAITING = 16  # requests in the queue
CONNECTIONS = 256

SWEEP, KEPT = 300, 3600  # seconds: how often old pictures are deleted, and how old they become


def whole(value: object, what: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`, or UserError; a browser sends 3 as 3.0."""
    number = real(value, what, low, high)
    if number != int(number):
        raise UserError(f"{what} must be a whole number; found {number}")
    return int(number)


def real(value: object, what: str, low: float, high: float) -> float:
    """A finite number from `low` to `high`, or UserError."""
    right = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{what} must lie from {low:g} to {high:g}; found {value!r:.40}")
    return value


def one_of(value: object, what: str, known: tuple) -> object:
    """One of the values that are known, or UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value not in known:
        listed = ", ".join(map(str, known[:8])) + (" ..." if len(known) > 8 else "")
        raise UserError(f"{what} must be one of {listed}; found {value!r:.40}")
    return known[known.index(value)]
