"""What `flax.serialization` writes, its arrays left where they lie.

The file is walked once and nothing is made of its arrays but descriptions: the package `msgpack`
would first make a list as long as the file claims, and copy every array. Flax keeps an array as
an extension of kind 1, itself a message of shape, dtype name and bytes; a large one as a dict of
chunks.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

from tokgen import interfaces
from tokgen.pretrained.formats import stored

DEEPEST = 64  # containers within containers
MOST_ENTRIES = 10**6
WINDOW = 2**12  # bytes that are read at once: numbers and names are short
CHUNKED = "__msgpack_chunked_array__"
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extensions

DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in """
        float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64
        complex128
        """.split()
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

# A number's code: how struct reads it.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    **dict(zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# A code: what follows, and in how many bytes its length is written.
_SIZED = {
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xD9 + i: ("text", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("dict", 2 << i) for i in range(2)},
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of the file that were stepped over."""

    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Packed:
    """An array as it lies in the file, whole or in chunks one after the other."""

    source: stored.Source
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """What the array takes."""
        return sum(chunk.size for chunk in self.chunks)

    def array(self) -> np.ndarray:
        """Read it."""
        parts = [
            self.source.read(chunk.start, chunk.size).view(self.dtype) for chunk in self.chunks
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(self.shape)


def looks_so(start: bytes) -> bool:
    """Whether a file that begins so may be a message: a dict that is not empty."""
    return bool(start) and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF))


def read(source: stored.Source) -> Any:
    """The value of a file, its arrays as `Packed`."""
    walk = _Walk(source, 0, source.size)
    value = walk.value(0)
    if walk.place != walk.end:
        raise interfaces.UserError(
            f"its message ends at byte {walk.place} of {walk.end}: it is not Flax's, or damaged"
        )
    return value


class _Walk:
    """A place in the bytes from a start to an end, and what was met so far."""

    def __init__(self, source: stored.Source, start: int, end: int):
        self.source = source
        self.place, self.end = start, end
        self.entries = 0
        self.window, self.first = b"", 0  # bytes read ahead, and where they begin

    def skip(self, count: int) -> Span:
        """The next `count` bytes, not read."""
        if count > self.end - self.place:
            raise interfaces.UserError(
                f"it is damaged, or cut off: at byte {self.place} it claims {count} more, and has "
                f"{self.end - self.place}"
            )
        self.place += count
        return Span(self.place - count, count)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self.skip(count).start
        if not self.first <= start <= start + count <= self.first + len(self.window):
            ahead = min(max(count, WINDOW), self.end - start)
            self.window, self.first = self.source.read(start, ahead).tobytes(), start
        return self.window[start - self.first : start - self.first + count]

    def value(self, depth: int) -> Any:
        """The next value."""
        self.entries += 1
        if self.entries > MOST_ENTRIES or depth > DEEPEST:
            raise interfaces.UserError(
                f"it has more than {MOST_ENTRIES} entries, or is nested more than {DEEPEST} deep"
            )
        code = self.take(1)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code <= 0xBF:
            kind = "dict" if code <= 0x8F else "list" if code <= 0x9F else "text"
            return self._sized(kind, code & (0x1F if kind == "text" else 0x0F), depth)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            form = _NUMBERS[code]
            return struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if 0xD4 <= code <= 0xD8:
            return self._sized("extension", 1 << (code - 0xD4), depth)
        if code not in _SIZED:
            raise interfaces.UserError(f"it has the code {code:#x}, which msgpack does not use")
        kind, width = _SIZED[code]
        return self._sized(kind, int.from_bytes(self.take(width), "big"), depth)

    def _sized(self, kind: str, size: int, depth: int) -> Any:
        if kind == "list":
            return [self.value(depth + 1) for _ in range(size)]
        if kind == "dict":
            return self._dict(size, depth)
        if kind == "extension":
            code = struct.unpack("b", self.take(1))[0]
            return self._extension(code, self.skip(size))
        return str(self.take(size), "utf-8") if kind == "text" else self.skip(size)

    def _dict(self, size: int, depth: int) -> Any:
        found = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if type(key) not in (str, int):
                raise interfaces.UserError(f"one of its keys is a {type(key).__name__}")
            if key in found:
                raise interfaces.UserError(f"two of its entries are called {key!r:.100}")
            found[key] = self.value(depth + 1)
        return _joined(found) if CHUNKED in found else found

    def _extension(self, code: int, data: Span) -> Packed:
        if code == COMPLEX:
            raise interfaces.UserError("it holds a complex number, which no weight is")
        if code not in (ARRAY, SCALAR):
            raise interfaces.UserError(f"it holds an extension of kind {code}, not one of Flax's")
        walk = _Walk(self.source, data.start, data.start + data.size)
        parts = walk.value(DEEPEST - 2)  # a list of a list, and no deeper
        if not isinstance(parts, list) or len(parts) != 3 or walk.place != walk.end:
            raise interfaces.UserError("an array is not made of a shape, a dtype and bytes")
        self.entries += walk.entries
        shape, name, content = parts
        if not isinstance(shape, list) or not isinstance(content, Span):
            raise interfaces.UserError("an array is not made of a shape, a dtype and bytes")
        if not isinstance(name, str) or name not in DTYPES:
            raise interfaces.UserError(
                f"an array has the dtype {name!r:.50}; those read are {', '.join(DTYPES)}"
            )
        return _checked(Packed(self.source, DTYPES[name], tuple(shape), (content,)))


def _joined(found: dict) -> Packed:
    """The array whose chunks `found` holds, each under its number."""
    sizes, chunks = (_numbered(found.get(name)) for name in ("shape", "chunks"))
    if not chunks or any(not isinstance(chunk, Packed) for chunk in chunks):
        raise interfaces.UserError("the chunks of a large array are none")
    if len({chunk.dtype for chunk in chunks}) > 1:
        raise interfaces.UserError("the chunks of a large array have several dtypes")
    content = tuple(data for chunk in chunks for data in chunk.chunks)
    return _checked(Packed(chunks[0].source, chunks[0].dtype, tuple(sizes), content))


def _numbered(values: Any) -> list:
    """A list that Flax wrote as a dict of "0", "1" and so on."""
    if not isinstance(values, dict) or set(values) != {str(i) for i in range(len(values))}:
        raise interfaces.UserError("the shape or the chunks of a large array are not numbered")
    return [values[str(i)] for i in range(len(values))]


def _checked(packed: Packed) -> Packed:
    shape = packed.shape
    # 32 axes are what numpy has at least; anything longer is no array.
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise interfaces.UserError("the shape of an array is not made of up to 32 sizes")
    need = math.prod(shape) * packed.dtype.itemsize
    if need != packed.nbytes:
        raise interfaces.UserError(
            f"an array of shape {shape} and dtype {packed.dtype} takes {need} bytes, it has "
            f"{packed.nbytes}"
        )
    return packed
