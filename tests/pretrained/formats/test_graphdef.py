"""Frozen TensorFlow graphs, written here byte by byte; and what no damaged one may do."""

import struct

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.pretrained.formats import graphdef, reader

FLOAT, DOUBLE, INT, STRING = 1, 2, 3, 7  # TensorFlow's numbers of dtypes


def varint(number):
    number, out = number % 2**64, bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def sized(number, content):
    """A field of bytes, of text, or of a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def plain(number, value):
    """A field of an integer."""
    return varint(number << 3) + varint(value)


def shape(*sizes):
    return sized(2, b"".join(sized(2, plain(1, size)) for size in sizes))


def constant(name, dtype, sizes, values, kind=b"Const"):
    tensor = plain(1, dtype) + shape(*sizes) + values
    attributes = (
        sized(1, b"dtype") + sized(2, plain(6, dtype)),
        sized(1, b"value") + sized(2, sized(8, tensor)),
    )
    node = sized(1, name) + sized(2, kind) + sized(3, b"^input") + sized(4, b"/cpu:0")
    return sized(1, node + b"".join(sized(5, attribute) for attribute in attributes))


def raw(array):
    return sized(4, array.astype(array.dtype.newbyteorder("<")).tobytes())


KERNEL = np.random.default_rng(0).normal(size=(3, 2, 1, 4)).astype(np.float32)
PARTS = {
    "conv/conv2d_params": constant(b"conv/conv2d_params", FLOAT, KERNEL.shape, raw(KERNEL)),
    "packed": constant(b"packed", FLOAT, (2,), sized(5, struct.pack("<2f", 1.5, -2))),
    "alone": constant(
        b"alone", FLOAT, (2,), b"".join(b"\x2d" + struct.pack("<f", x) for x in (0.5, 8))
    ),
    "one": constant(b"one", FLOAT, (2, 3), sized(5, struct.pack("<f", 7))),
    "nothing": constant(b"nothing", FLOAT, (2,), b""),
    "scalar": constant(b"scalar", FLOAT, (), sized(5, struct.pack("<f", 128))),
    "empty": constant(b"empty", FLOAT, (0, 3), b""),
    "size": constant(b"size", INT, (2,), raw(np.array([299, -5], np.int32))),
    "list": constant(b"list", INT, (3,), sized(7, varint(299) + varint(-5) + varint(2**31 - 1))),
    "numbers": constant(b"numbers", INT, (2,), plain(7, 3) + plain(7, -1)),
}
WANTED = {
    "conv/conv2d_params": KERNEL,
    "packed": np.float32([1.5, -2]),
    "alone": np.float32([0.5, 8]),
    "one": np.full((2, 3), 7, np.float32),
    "nothing": np.zeros(2, np.float32),
    "scalar": np.float32(128),
    "empty": np.zeros((0, 3), np.float32),
    "size": np.int32([299, -5]),
    "list": np.int32([299, -5, 2**31 - 1]),
    "numbers": np.int32([3, -1]),
}
ASIDE = (  # no constants, and constants of other kinds
    sized(1, sized(1, b"conv") + sized(2, b"Conv2D")),
    sized(4, plain(1, 21)),
    plain(3, 8),
    constant(b"DecodeJpeg/contents", STRING, (), sized(8, b"\xff\xd8")),
    constant(b"wide", DOUBLE, (1,), sized(6, struct.pack("<d", 1))),
    constant(b"variable", FLOAT, (2,), raw(np.float32([1, 2])), kind=b"Variable"),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "classify_image_graph_def.pb"


def _refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(interfaces.UserError, match=message) as caught:
        reader.read(path)
    assert str(path) in str(caught.value)


def test_constants_in_all_their_forms(path):
    path.write_bytes(b"".join((*PARTS.values(), *ASIDE)))
    found = reader.read(path)
    assert list(found) == list(WANTED)
    for name, wanted in WANTED.items():
        assert found[name].dtype == wanted.dtype and found[name].flags.writeable
        np.testing.assert_array_equal(found[name], wanted, strict=True)
    np.testing.assert_array_equal(graphdef.read(str(path))["one"], WANTED["one"])


def test_the_form_is_told_by_the_name_and_the_first_byte(tmp_path):
    graph = PARTS["packed"]
    path = tmp_path / "weights.bin"
    path.write_bytes(graph)
    with pytest.raises(interfaces.UserError, match=r"nor a TensorFlow graph \(.pb\)"):
        reader.read(path)
    _refused(tmp_path / "page.pb", b"\n\n<html><body>not found", "web page")
    _refused(tmp_path / "other.pb", b"\x08\x01" + graph, "neither safetensors")


def test_a_file_that_is_cut_off_is_refused_or_holds_the_constants_before_the_cut(path):
    whole = b"".join((PARTS["packed"], PARTS["size"], *ASIDE[:1]))
    ends = {len(PARTS["packed"]), len(PARTS["packed"] + PARTS["size"])}
    for length in range(1, len(whole)):
        if length not in ends:
            _refused(path, whole[:length], "damaged")
    for length in ends:
        path.write_bytes(whole[:length])
        assert 1 <= len(reader.read(path)) <= 2


def test_damaged_bytes_are_refused_or_change_numbers(path):
    """Nothing but a UserError comes out, and no array that is larger than the file may hold."""
    whole = b"".join(PARTS[name] for name in ("packed", "one", "list"))
    refused = 0
    for place in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            data = bytearray(whole)
            data[place] ^= mask
            path.write_bytes(data)
            try:
                arrays = reader.read(path)
            except interfaces.UserError:
                refused += 1
            else:
                assert sum(a.nbytes for a in arrays.values()) <= reader.OVERLAP * len(whole)
    assert refused > len(whole)


HUGE = sized(5, struct.pack("<f", 7))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (constant(b"a", FLOAT, (2**20, 2**20), HUGE), "its tensors claim 4398046511104 bytes"),
        (constant(b"a", FLOAT, (2**40, 2**40), HUGE), "no shape"),
        (constant(b"a", FLOAT, (0, 2**62), b""), "no shape"),
        (constant(b"a", FLOAT, (-1,), HUGE), "no shape"),
        (constant(b"a", FLOAT, (1,) * 33, HUGE), "no shape"),
        (constant(b"a", FLOAT, (3,), raw(np.float32([1, 2]))), r"\(3,\) has 2 values"),
        (constant(b"a", FLOAT, (3,), sized(5, struct.pack("<2f", 1, 2))), r"\(3,\) has 2 values"),
        (constant(b"a", FLOAT, (0,), HUGE), r"\(0,\) has 1 values"),
        (constant(b"a", FLOAT, (1,), sized(4, b"12345")), "within a number"),
        (constant(b"a", FLOAT, (1,), plain(5, 1)), "number stands where a message"),
        (constant(b"a", INT, (1,), plain(7, 2**31)), "more than 32 bits"),
        (constant(b"a", FLOAT, (1,), HUGE) * 2, "two of its nodes are called 'a'"),
        (constant(b"\xff", FLOAT, (1,), HUGE), "no text"),
        (sized(1, sized(1, b"a") + sized(2, b"Const")), "constant 'a' has no value"),
        (b"\n" + b"\xff" * 11, "damaged, or cut off within a number"),
        (sized(1, b"\x0b"), "no protobuf"),  # a group, which protobufs no longer have
        (sized(1, b"\x02\x00"), "no protobuf"),  # the field 0
        (sized(1, sized(1, b"a")), "holds no array"),
        (sized(1, b"\x18\x01" * (graphdef.MOST_FIELDS + 1)), "more than 1000000 fields"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files(path, data, message):
    _refused(path, data, message)
