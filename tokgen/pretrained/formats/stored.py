"""An array that lies in a file, read when its numbers are wanted, and the file that it lies in.

Files are read and never mapped: one that is cut off while it is in use is an error of ours and not
the end of the process, and what was read takes no memory any more once nobody holds it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from tokgen import interfaces

BLOCK = 2**24  # bytes that are asked of the system at once


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """What is known of an array before it is read: `dtype`, `shape`; `fetch` gives its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.size * self.itemsize

    def read(self) -> np.ndarray:
        """The array, anew at every call."""
        array = self.fetch()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{self.dtype} {self.shape} became {array.dtype} {array.shape}")
        return array

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # what is read is nobody else's
        return self.read().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read()[index]


class Source:
    """An open file whose bytes are read where they lie; it closes with its last user."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.path.abspath(path)
        self.file = open(self.path, "rb")  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.size, self.written = self._state()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` bytes from `start` on; UserError where the file is no longer what was opened."""
        if start < 0 or count < 0 or start + count > self.size:
            raise interfaces.UserError(
                f"it is cut off: bytes {start} to {start + count} of {self.size} are asked for"
            )
        found = np.empty(count, np.uint8)
        self.file.seek(start)
        self.check(whole=filled(self.file, found) == count)
        return found

    def check(self, *, whole: bool = True) -> None:
        """UserError where the file is no longer what was opened, or did not give the `whole`."""
        if not whole or self._state() != (self.size, self.written):
            raise interfaces.UserError(
                "it was altered or cut off while it was read; try again when nothing writes to it"
            )


def filled(file: io.BufferedIOBase, array: np.ndarray) -> int:
    """How many bytes of `array`, uint8, the next ones of a file fill: all, or what there is."""
    view, taken = memoryview(array), 0
    while taken < len(view):
        count = file.readinto(view[taken : taken + BLOCK])
        if not count:
            break
        taken += count
    return taken
