"""The constants of a frozen TensorFlow graph (GraphDef, a protobuf), read where they lie.

A message is a sequence of fields: a number and a wire type, then a varint, 4 or 8 bytes, or a
length and as many bytes. The numbers below are those of TensorFlow's graph.proto, node_def.proto,
attr_value.proto, tensor.proto, tensor_shape.proto and types.proto. Every length is compared with
the bytes that are there before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tokgen import interfaces

MOST_FIELDS = 10**6
LONGEST_VARINT = 10  # bytes of 7 bits
VARINT, EIGHT, SIZED, FOUR = 0, 1, 2, 5  # wire types

GRAPH_NODE = 1
NODE_NAME, NODE_KIND, NODE_ATTRIBUTE = 1, 2, 5
ENTRY_KEY, ENTRY_VALUE = 1, 2  # of a map
ATTRIBUTE_TENSOR = 8
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1, 2, 4
SHAPE_AXIS, AXIS_SIZE = 2, 1
# A dtype's number: its dtype, and the field that lists its values where they are not raw bytes.
DTYPES = {1: (np.dtype("<f4"), 5), 3: (np.dtype("<i4"), 7)}

Value = int | memoryview


def read(path: str) -> dict[str, np.ndarray]:
    """The float32 and int32 constants of a file by their node's name, as views of the file.

    Constants of other dtypes, as the text that a graph may be fed through, are left out.
    """
    walk, arrays = _Walk(), {}
    for number, node in walk.fields(memoryview(np.memmap(path, np.uint8, "r"))):
        if number != GRAPH_NODE:
            continue
        name, kind, tensor = walk.node(_bytes(node))
        if kind != "Const":
            continue
        if tensor is None:
            raise interfaces.UserError(f"its constant {name!r:.100} has no value")
        if name in arrays:
            raise interfaces.UserError(f"two of its nodes are called {name!r:.100}")
        array = walk.tensor(tensor, name)
        if array is not None:
            arrays[name] = array
    return arrays


class _Walk:
    """Counts what was met so far: a field may take two bytes of a file and a round of a loop."""

    def __init__(self):
        self.met = 0

    def count(self):
        """One more field, or number of a list."""
        self.met += 1
        if self.met > MOST_FIELDS:
            raise interfaces.UserError(f"it has more than {MOST_FIELDS} fields")

    def fields(self, data: memoryview) -> Iterator[tuple[int, Value]]:
        """(number, value) of every field of a message."""
        place = 0
        while place < len(data):
            self.count()
            tag, place = _varint(data, place)
            number, wire = tag >> 3, tag & 7
            if number == 0 or wire not in (VARINT, EIGHT, SIZED, FOUR):
                raise interfaces.UserError("it is damaged, or no protobuf of a graph")
            if wire == VARINT:
                value, place = _varint(data, place)
                yield number, value
                continue
            size = 4 if wire == FOUR else 8
            if wire == SIZED:
                size, place = _varint(data, place)
            if size > len(data) - place:
                raise interfaces.UserError(
                    f"it is damaged, or cut off: a field claims {size} bytes where "
                    f"{len(data) - place} are left"
                )
            yield number, data[place : place + size]
            place += size

    def node(self, data: memoryview) -> tuple[str, str, memoryview | None]:
        """(name, operation, message of the tensor that it holds) of a node."""
        name, kind, tensor = "", "", None
        for number, value in self.fields(data):
            if number == NODE_NAME:
                name = _text(value)
            elif number == NODE_KIND:
                kind = _text(value)
            elif number == NODE_ATTRIBUTE:
                entry = dict(self.fields(_bytes(value)))
                if _text(entry.get(ENTRY_KEY, memoryview(b""))) == "value":
                    attribute = dict(self.fields(_bytes(entry.get(ENTRY_VALUE, memoryview(b"")))))
                    tensor = attribute.get(ATTRIBUTE_TENSOR)
        return name, kind, None if tensor is None else _bytes(tensor)

    def tensor(self, data: memoryview, name: str) -> np.ndarray | None:
        """The array of a message, None where its dtype is none of `DTYPES`."""
        shape: tuple[int, ...] = ()
        content, lists, code = b"", {}, 0
        for number, value in self.fields(data):
            if number == TENSOR_DTYPE:
                code = _number(value)
            elif number == TENSOR_SHAPE:
                shape = tuple(self.shape(_bytes(value)))
            elif number == TENSOR_CONTENT:
                content = _bytes(value)
            else:
                lists.setdefault(number, []).append(value)
        if code not in DTYPES:
            return None
        dtype, listed = DTYPES[code]
        # 32 axes are what numpy has at least; and it multiplies what is not 0
        most = math.prod(max(n, 1) for n in shape) * dtype.itemsize
        if len(shape) > 32 or min(shape, default=0) < 0 or most >= 2**63:
            raise interfaces.UserError(f"its constant {name!r:.100} has no shape: {shape!r:.100}")
        size = math.prod(shape)
        values = content or self.listed(lists.get(listed, []), dtype)
        if len(values) % dtype.itemsize:
            raise interfaces.UserError(f"its constant {name!r:.100} ends within a number")
        values = np.frombuffer(values, dtype)
        # a list may leave out all of its numbers but one, and that, too, where it is 0
        if len(values) != size and (content or len(values) > min(size, 1)):
            raise interfaces.UserError(
                f"its constant {name!r:.100} of the shape {shape} has {len(values)} values"
            )
        if len(values) == size:
            return values.reshape(shape)
        # a view that takes no memory, whatever the shape claims
        return np.broadcast_to(values[0] if len(values) else dtype.type(0), shape)

    def shape(self, data: memoryview) -> Iterator[int]:
        """The sizes of the axes; -1 and the like where they are unknown."""
        for number, axis in self.fields(data):
            if number == SHAPE_AXIS:
                yield _number(dict(self.fields(_bytes(axis))).get(AXIS_SIZE, 0))

    def listed(self, values: list[Value], dtype: np.dtype) -> bytes:
        """The bytes of the numbers of a list, which may be packed or stand alone."""
        if dtype.kind == "f":
            return b"".join(_bytes(value) for value in values)
        numbers = []
        for value in values:
            if isinstance(value, int):
                numbers.append(_number(value))
                continue
            place = 0
            while place < len(value):
                self.count()
                number, place = _varint(value, place)
                numbers.append(_number(number))
        if any(not -(2**31) <= number < 2**31 for number in numbers):
            raise interfaces.UserError("it is damaged: an int32 has more than 32 bits")
        return np.array(numbers, dtype).tobytes()


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """(number, place after it)."""
    number = 0
    for index in range(min(LONGEST_VARINT, len(data) - place)):
        byte = data[place + index]
        number |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return number, place + index + 1
    raise interfaces.UserError("it is damaged, or cut off within a number")


def _number(value: Value) -> int:
    """A varint as int64."""
    if not isinstance(value, int):
        raise interfaces.UserError("it is damaged: a message stands where a number belongs")
    return (value & (2**64 - 1)) - (2**64 if value >> 63 & 1 else 0)


def _bytes(value: Value) -> memoryview:
    if not isinstance(value, memoryview):
        raise interfaces.UserError("it is damaged: a number stands where a message belongs")
    return value


def _text(value: Value) -> str:
    try:
        return str(_bytes(value), "utf-8")
    except UnicodeDecodeError as error:
        raise interfaces.UserError("it is damaged: a name is no text") from error
