"""Weight files that mean harm, or claim what they do not hold.

Each is read in both ways. None may run anything, take memory that the file does not account for,
or end in anything but one message that names the file.
"""

import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import msgpack
import numpy as np
import pytest
import safetensors.numpy

from tokgen import interfaces
from tokgen.pretrained.formats import inspection, reader

LARGEST = 2**20  # bytes that reading may take: every file here is far below

# Pickles, assembled by hand. What they would run makes the file {canary}.

COMMAND = b"X\x0e\0\0\0touch {canary}"  # replaced by a text of the right length
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpuK\x01tQ"


def _text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _global(module, name):
    return f"c{module}\n{name}\n".encode()


def _long(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tensor(size=b"K\x01", offset=b"K\x00", shape=b"K\x01\x85", strides=b"K\x01\x85", hooks=b"N"):
    storage = STORAGE.replace(b"K\x01t", size + b"t")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + offset + shape + strides + b"\x89" + hooks)
        + b"tR"
    )


def _weights(**others):
    """The program of a dict that holds a tensor, and others beside it."""
    pairs = {"w": _tensor()} | others
    return b"}(" + b"".join(_text(key) + value for key, value in pairs.items()) + b"u"


SYSTEM = _global("os", "system") + COMMAND + b"\x85R"
NAMESPACE = _global("argparse", "Namespace") + b")\x81"

PROGRAMS = {
    "call of os.system": SYSTEM,
    "eval": _global("builtins", "eval") + COMMAND + b"\x85R",
    "exec as Python 2 calls it": _global("__builtin__", "execfile") + COMMAND + b"\x85R",
    "nested global": b"\x8c\x05torch\x8c\x18storage._load_from_bytes\x93" + COMMAND + b"\x85R",
    "nested module": b"\x8c\x05numpy\x8c\x09os.system\x93" + COMMAND + b"\x85R",
    "global within torch": _global("torch.hub", "os.system") + COMMAND + b"\x85R",
    "global of an allowed name": (
        _global("collections", "OrderedDict.__init__.__globals__") + COMMAND + b"\x85R"
    ),
    "chain of getattr": (
        _global("builtins", "getattr")
        + (_global("builtins", "__import__") + _text("os") + b"\x85R" + _text("system") + b"\x86R")
        + (COMMAND + b"\x85R")
    ),
    "constructor of a process": _global("subprocess", "Popen") + COMMAND + b"\x85\x81",
    "call of what a call made": _global("functools", "partial") + COMMAND + b"\x85R)R",
    "state that sets __setstate__": (
        NAMESPACE
        + (b"}" + _text("__setstate__") + _global("os", "system") + b"sb")
        + (COMMAND + b"b")
    ),
    "state that sets __reduce__ in slots": (
        NAMESPACE + b"N}" + _text("__class__") + _global("os", "system") + b"s\x86b"
    ),
    "state of a class": _global("argparse", "Namespace") + b"}" + _text("x") + SYSTEM + b"sb",
    "state of a name": (
        _global("collections", "OrderedDict")
        + (b"}" + _text("call") + _global("os", "system") + b"sb)R")
    ),
    "items of an allowed class": (_global("collections", "OrderedDict") + COMMAND + SYSTEM + b"s"),
    "persistent id of a program": COMMAND + b"Q",
    "persistent id of a module": (
        b"(" + _text("module") + _global("os", "system") + COMMAND + COMMAND + b"tQ)R"
    ),
    "storage whose type is a call": (
        b"(" + _text("storage") + SYSTEM + _text("a") + _text("cpu") + b"K\x01tQ"
    ),
    "dtype that is called": _global("torch", "float32") + COMMAND + b"\x85R",
    "old opcode for a call": b"(" + COMMAND + b"ios\nsystem\n",
    "registered extension": b"\x82\x01" + COMMAND + b"\x85R",
    "hash of a deep tuple": b")" + b"\x85" * 60_000 + b"}q\x00h\x00N0",
    "a thousand hashes of a wide tuple": (
        b")"
        + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(18))
        + (b"q\x32}" + b"h\x32Ns" * 1000)
    ),
    "keys that all have one hash": (
        b"}(" + b"".join(_long(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u"
    ),
    "places in an endless memo": b"Nr\xff\xff\xff\x7f",
}

TENSORS = {
    "storage of 2**60 elements": dict(size=_long(2**60)),
    "storage of 2**200 elements": dict(size=_long(2**200)),
    "negative storage": dict(size=_long(-1)),
    "shape of 2**60": dict(shape=_long(2**60) + b"\x85"),
    "expanded view of 2**60": dict(shape=_long(2**60) + b"\x85", strides=b"K\x00\x85"),
    "sizes that wrap around": dict(
        shape=_long(2**32) * 2 + b"\x86", strides=_long(2**32) + b"K\x01\x86"
    ),
    "sizes of 600 digits": dict(shape=_long(2**2000) + b"\x85"),
    "shape of 5,000 such": dict(shape=b"(" + _long(2**2000) * 5000 + b"t"),
    "negative size": dict(shape=_long(-1) + b"\x85"),
    "negative stride": dict(strides=_long(-1) + b"\x85"),
    "negative offset": dict(offset=_long(-4)),
    "stride beyond the storage": dict(shape=b"K\x02\x85", strides=_long(2**62) + b"\x85"),
    "offset beyond the storage": dict(offset=b"K\x01"),
    "more axes than numpy has": dict(shape=b"(" + b"K\x01" * 70 + b"t", strides=b")"),
    "size that is a truth value": dict(shape=b"\x88\x85"),
    "size that is a NaN": dict(shape=b"G\x7f\xf8\0\0\0\0\0\0\x85"),
    "size that is an object": dict(shape=NAMESPACE + b"\x85"),
}


def _program(value, canary):
    """A whole pickle; COMMAND with the name of the canary."""
    return b"\x80\x02" + value.replace(COMMAND, _text(f"touch {canary}")) + b"."


def _zip(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def _torch(value, canary="", data=b"\0\0\x80?"):
    return _zip([("net/data.pkl", _program(value, canary)), ("net/data/a", data)])


def _legacy(value, canary=""):
    head = _long(0x1950A86A20F9469CFC6C), b"M\xe9\x03", b"}", value, b"]" + _text("a") + b"a"
    return b"".join(_program(part, canary) for part in head) + struct.pack("<qf", 1, 1.0)


def _safetensors(header, data=b"\0" * 8):
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header)) + header + data


def _array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb([shape, dtype, data]))


def _flax(value):
    return msgpack.packb({"params": value})


def _chunked(shape, chunks, mark=True):
    return {
        "__msgpack_chunked_array__": mark,
        "shape": shape,
        "chunks": chunks,
    }


ONE = _array([2], "float32", bytes(8))
WHOLE = _torch(_weights())
CENTRAL = WHOLE.index(b"PK\x01\x02")  # the first record of its directory


def _patched(place, form, *values):
    """WHOLE with numbers written over one place of the first record of its directory."""
    data = bytearray(WHOLE)
    struct.pack_into(form, data, CENTRAL + place, *values)
    return bytes(data)


FILES = {
    "empty file": b"",
    "web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "web page with a mark of its order": b"\xef\xbb\xbf<HTML lang=en>",
    "pointer of git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n"
    ),
    "error in JSON": b'{"error":{"message":"denied"}}',
    # zip files
    "zip cut within a member": WHOLE[: CENTRAL - 5],
    "zip cut within its directory": WHOLE[: CENTRAL + 30],
    "zip with another's directory": WHOLE[:40] + WHOLE[60:],
    "zip whose member claims 4 gigabytes": _patched(20, "<II", 2**32 - 2, 2**32 - 2),
    "zip whose member lies beyond the file": _patched(42, "<I", 2**31),
    "zip whose member lies within another": _patched(42, "<I", 7),
    "zip with a false checksum": _patched(16, "<I", 12345),
    "zip with an encrypted member": _patched(8, "<H", 1),
    "zip with an unknown compression": _patched(10, "<H", 99),
    "compressed members": _zip(
        [("net/data.pkl", _program(_weights(), "")), ("net/data/a", bytes(10**6))],
        zipfile.ZIP_DEFLATED,
    ),
    "two members of one name": _zip(
        [("net/data.pkl", _program(b"}", "")), ("net/data.pk_", _program(_weights(), ""))]
    ).replace(b"data.pk_", b"data.pkl"),
    "names that lead out": _zip(
        [
            ("../data.pkl", _program(_weights(), "").replace(_text("a"), _text("../../a"))),
            ("../../a", b"\0\0\x80?"),
        ]
    ),
    "absolute names": _zip([("/data.pkl", _program(_weights(), "")), ("/etc/hosts", b"")]),
    "dict within itself": _torch(b"}q\x00" + _text("x") + b"h\x00s"),
    "storage that is too short": _torch(_weights(), data=b"\0\0"),
    "storage that is missing": _zip([("net/data.pkl", _program(_weights(), ""))]),
    # safetensors
    "header of 2**62 bytes": struct.pack("<Q", 2**62) + b'{"a":1}' + b" " * 99,
    "header of the largest length": struct.pack("<Q", 2**64 - 1) + b'{"a":1}' + b" " * 99,
    "header of a hundred megabytes": struct.pack("<Q", 99_999_999) + b"{" + b" " * 99,
    "safetensors beyond their data": _safetensors(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ),
    "safetensors of 2**62 numbers": _safetensors(
        '{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}'
    ),
    "safetensors whose size wraps around": _safetensors(
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}', b""
    ),
    "safetensors of a negative size": _safetensors(
        '{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'
    ),
    "safetensors that overlap": _safetensors(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ),
    "safetensors without text": _safetensors(b'{"\xff\xfe":1}'),
    "safetensors nested deeply": _safetensors(b'{"a":' * 5000),
    "safetensors of nothing": _safetensors("{}", b""),
    # Flax
    "dict of 2**32 entries": b"\xdf\xff\xff\xff\xff\xa1a\x01",
    "list of 2**32 entries": b"\x81\xa6params\xdd\xff\xff\xff\xff\x01",
    "lists of 2**32 within one another": b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 2000,
    "bytes of 2**32": b"\x81\xa1a\xc6\xff\xff\xff\xff\0",
    "text of 2**32": b"\x81\xdb\xff\xff\xff\xff\0",
    "extension of 2**32": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "deep dicts": b"\x81\xa1a" * 50_000 + b"\x01",
    "deep lists in an array": _flax(msgpack.ExtType(1, b"\x91" * 50_000 + b"\x01")),
    "code that is never used": b"\x81\xa1a\xc1",
    "keys that are lists": b"\x81\x91\x01\x01",
    "text that is none": b"\x81\xa2\xff\xfe\x01",
    "two entries of one name": b"\x82\xa1a\x01\xa1a\x02",
    "more behind the end": _flax(ONE) + b"\x01",
    "array of 2**60": _flax(_array([2**60], "float32", bytes(8))),
    "array whose size wraps around": _flax(_array([2**32, 2**32], "float32", b"")),
    "array of a negative size": _flax(_array([-2], "float32", bytes(8))),
    "array of minus times minus": _flax(_array([-1, -2], "float32", bytes(8))),
    "array whose size is a NaN": _flax(_array([float("nan")], "float32", bytes(8))),
    "array of 100 axes": _flax(_array([1] * 100, "float32", bytes(4))),
    "array of huge empty axes": _flax(_array([0, 2**62, 2**62], "float32", b"")),
    "array of objects": _flax(_array([1], "object", bytes(8))),
    "array of structures": _flax(_array([1], "O,O", bytes(16))),
    "array of dates": _flax(_array([1], "datetime64[ns]", bytes(8))),
    "array without a dtype": _flax(_array([1], None, bytes(8))),
    "array of one part": _flax(msgpack.ExtType(1, b"\x91\x01")),
    "array of bytes that are text": _flax(_array([4], "uint8", "abcd")),
    "complex number": _flax(msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))),
    "extension of another kind": _flax(msgpack.ExtType(42, b"calc")),
    "date of msgpack": _flax(msgpack.Timestamp(0, 0)),
    "chunks of an absurd shape": _flax(_chunked({"0": 2**60, "1": 2**60}, {"0": ONE})),
    "chunks of an endless shape": _flax(_chunked({str(i): 1 for i in range(900)}, {"0": ONE})),
    "chunks without numbers": _flax(_chunked({"0": 2}, {"x": ONE})),
    "chunks of two dtypes": _flax(
        _chunked({"0": 3}, {"0": ONE, "1": _array([1], "float64", bytes(8))})
    ),
    "no chunks": _flax(_chunked({"0": 0}, {})),
    "chunks that are a number": _flax(_chunked({"0": 0}, 5)),
    "chunks that are numbers": _flax(_chunked({"0": 1}, {"0": 1})),
    "nothing but its mark": _flax({"__msgpack_chunked_array__": True}),
    "program in a message": _flax(b"\x80\x02cos\nsystem\n."),
}
MESSAGES = {
    "empty file": "it is empty",
    "web page": "it is a web page",
    "web page with a mark of its order": "it is a web page",
    "pointer of git-lfs": "git-lfs pointer.*fetch the real file",
    "compressed members": "compressed",
    "zip whose member claims 4 gigabytes": "claim more bytes than the file has",
    "list of 2**32 entries": "it claims 1 more, and has 0",
    "bytes of 2**32": "it claims 4294967295 more, and has 1",
    "array of 2**60": "takes 4611686018427387904 bytes, it has 8",
    "array of objects": "dtype 'object'; those read are float64",
    "complex number": "complex number",
    "extension of another kind": "extension of kind 42",
    "chunks of an absurd shape": "it has 8",
    "deep dicts": "nested more than 64 deep",
}


@pytest.fixture
def canary(tmp_path):
    """A file that only executed code can make; it must not be there at the end."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists()


def _refused(path, message, unknown, *unwrap):
    """The text of the one error; reading takes little time and memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(interfaces.UserError, match=message) as error:
            reader.read(path, *unwrap, flatten=True, unknown=unknown)
        assert tracemalloc.get_traced_memory()[1] < LARGEST + 20 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2
    text = str(error.value)
    assert text.count(str(path)) == 1 and text.startswith("weight file")
    assert len(text) < 1300 and text.isprintable()
    return text


both = pytest.mark.parametrize("unknown", ["refuse", "opaque"])


@both
@pytest.mark.parametrize("name", FILES)
def test_files_that_claim_what_they_do_not_hold(name, unknown, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(FILES[name])
    _refused(path, MESSAGES.get(name, "."), unknown)
    assert list(tmp_path.iterdir()) == [path]


@both
@pytest.mark.parametrize("form", [_torch, _legacy])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_do_not_run(name, form, unknown, canary, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(form(PROGRAMS[name], canary))
    _refused(path, ".", unknown)


@both
@pytest.mark.parametrize("form", [_torch, _legacy])
def test_weights_beside_a_program_are_read_without_it(form, unknown, canary, tmp_path):
    """Beside a tensor, and within what is ignored of one: refused, or left out on request."""
    path = tmp_path / "weights.bin"
    read = 0
    for program in PROGRAMS.values():
        hooked = b"}" + _text("w") + _tensor(hooks=program) + b"s"
        for value in (_weights(x=program), hooked):
            path.write_bytes(form(value, canary))
            try:
                arrays = reader.read(path, unknown=unknown)
            except interfaces.UserError:
                continue
            np.testing.assert_equal(arrays, {"w": np.ones(1, np.float32)})
            read += 1
    assert read > 16 if unknown == "opaque" else read == 0


@both
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_beyond_their_storage(name, unknown, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(_torch(b"}" + _text("w") + _tensor(**TENSORS[name]) + b"s"))
    _refused(path, ".", unknown)


class _Sub(dict):
    def __reduce__(self):
        return exec, ("open({canary!r}, 'w')",), {"x": 1}, iter([1]), iter([("k", "v")])


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_subclass_that_reduces_to_a_call(protocol, unknown, canary, tmp_path):
    path = tmp_path / "weights.bin"
    program = pickle.dumps(_Sub(), protocol)
    path.write_bytes(_zip([("net/data.pkl", program)]))
    _refused(path, ".", unknown)
    path.write_bytes(program)
    _refused(path, ".", unknown)


@both
@pytest.mark.parametrize("value", [b"N" * 2**20, b"N0" * 2**20, b"}" * 2**20, SYSTEM * 2**17])
def test_programs_without_end_are_not_followed(value, unknown, tmp_path, monkeypatch):
    """The bound is lowered, to show that it counts; a million opcodes take two seconds."""
    monkeypatch.setattr(inspection, "MOST_OPCODES", 10_000)
    path = tmp_path / "weights.bin"
    path.write_bytes(_torch(value))
    _refused(path, "endless work|opcode POP is refused", unknown)


@both
def test_names_without_end_are_not_made(unknown, tmp_path):
    """Thirty dicts that each mention the one before twice, under long names."""
    path = tmp_path / "weights.bin"
    value = _weights()
    for i in range(30):
        place = b"q" + bytes([i])
        get = b"h" + bytes([i])
        value += place + b"}(" + _text("a" * 500) + get + _text("b" * 500) + get + b"u"
    path.write_bytes(_torch(value))
    _refused(path, "1000000 entries|endless names", unknown)


@both
def test_messages_hold_no_control_characters(unknown, tmp_path):
    path = tmp_path / "weights.bin"
    text = "\x1b[2J\x07\n\u202e" + "x" * 10_000
    for value in (
        _weights(**{text: b"K\x01"}),
        _global("os", text.replace("\n", "")),
        b"}" + _text("w") + _tensor().replace(_text("a"), _text(text)) + b"s",
    ):
        path.write_bytes(_torch(value))
        _refused(path, ".", unknown)
    safetensors.numpy.save_file({text: np.ones(1)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F64"', b'"I99"'))
    _refused(path, "damaged", unknown)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(WHOLE)

    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(interfaces.UserError, match="can't be read.*Permission denied"):
        reader.read(path)


@both
def test_any_damage_to_a_message_is_one_clear_error_or_readable(unknown, tmp_path):
    path = tmp_path / "weights"
    chunked = _chunked({"0": 4}, {"0": ONE, "1": ONE})
    whole = np.frombuffer(_flax({"a": ONE, "b": {"c": chunked}}), np.uint8)
    path.write_bytes(whole.tobytes())
    assert set(reader.read(path, flatten=True)) == {"params.a", "params.b.c"}
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            reader.read(path, flatten=True, unknown=unknown)
        except interfaces.UserError:
            errors += 1
    assert errors > 150
