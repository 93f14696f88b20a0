import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import struct
import types
import warnings
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

from tokgen import interfaces
from tokgen.pretrained.formats import paths, pickles, reader, writer

# An assembler for the pickles of torch.save, which is not installed here.


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _int(value):
    return b"J" + struct.pack("<i", value)


def _tuple(*items):
    return b"(" + b"".join(items) + b"t"


def _name(module, name):
    return f"c{module}\n{name}\n".encode()


def _call(module, name, *arguments):
    return _name(module, name) + _tuple(*arguments) + b"R"


def _dict(**items):
    return b"}(" + b"".join(_text(key) + item for key, item in items.items()) + b"u"


def _storage(key, size, kind="FloatStorage", tail=b""):
    parts = (_text("storage"), _name("torch", kind), _text(key), _text("cpu"), _int(size), tail)
    return _tuple(*parts) + b"Q"


def _tensor(storage, offset, shape, strides):
    return _call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage,
        _int(offset),
        _tuple(*map(_int, shape)),
        _tuple(*map(_int, strides)),
        b"\x89",  # requires_grad=False
        _call("collections", "OrderedDict"),
    )


def _typed(made, arguments, state=b"N"):
    return _call(
        *("torch._tensor", "_rebuild_from_type_v2"),
        *(made, _name("torch", "Tensor"), arguments, state),
    )


def _program(value):
    return b"\x80\x02" + value + b"."


def _zip(path, value, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", _program(value))
        archive.writestr("net/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"net/data/{key}", np.asarray(data).tobytes())
    return path


def _legacy(path, value, **storages):
    magic = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    keys = b"](" + b"".join(map(_text, storages)) + b"e"
    head = (magic, _int(1001), _dict(little_endian=b"\x88"), value, keys)
    body = [struct.pack("<q", len(data)) + np.asarray(data).tobytes() for data in storages.values()]
    path.write_bytes(b"".join(map(_program, head)) + b"".join(body))
    return path


FORMS = [_zip, _legacy]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.fixture
def canary(tmp_path):
    """A file that only executed code can make; it must not be there at the end."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists()


def _refused(path, message, *unwrap, flatten=False):
    with pytest.raises(interfaces.UserError, match=message) as error:
        reader.read(path, *unwrap, flatten=flatten)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("form", FORMS)
def test_views_parameters_and_shared_storages(form, path):
    data = np.arange(12, dtype=np.float32)
    tail = b"N" if form is _legacy else b""
    storage = _storage("a", 12, tail=tail)
    transposed = _tensor(storage, 0, (4, 3), (1, 4))
    value = _dict(
        whole=_tensor(storage, 0, (3, 4), (4, 1)),
        transposed=_call(
            "torch._utils",
            "_rebuild_parameter",
            transposed,
            b"\x88",
            _call("collections", "OrderedDict"),
        ),
        corner=_tensor(storage, 5, (2, 2), (4, 1)),
        scalar=_tensor(storage, 7, (), ()),
        empty=_tensor(storage, 0, (0, 9), (9, 1)),
    )
    arrays = reader.read(form(path, value, a=data))
    grid = data.reshape(3, 4)
    wanted = {
        "whole": grid,
        "transposed": grid.T,
        "corner": grid[1:, 1:3],
        "scalar": data[7],
        "empty": np.zeros((0, 9), np.float32),
    }
    assert list(arrays) == list(wanted)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)
        assert array.dtype == np.float32
        assert array.shape == wanted[key].shape
        assert array.flags.c_contiguous and array.flags.writeable
    arrays["whole"][:] = 0  # a copy: nothing else changes
    np.testing.assert_array_equal(arrays["corner"], grid[1:, 1:3])


@pytest.mark.parametrize("form", FORMS)
def test_tensors_with_attributes(form, path):
    """As FSDP leaves them, in LlamaGen's largest files: the attributes are dropped."""
    data = np.arange(6, dtype=np.float32)
    storage = _storage("a", 6, tail=b"N" if form is _legacy else b"")
    shape, strides = _tuple(_int(2), _int(3)), _tuple(_int(3), _int(1))
    arguments = _tuple(storage, _int(0), shape, strides, b"\x89", b"N")
    made = _name("torch._utils", "_rebuild_tensor_v2")
    value = _dict(a=_typed(made, arguments, _dict(_is_flat_param=b"\x88", names=_tuple())))
    arrays = reader.read(form(path, value, a=data))
    np.testing.assert_array_equal(arrays["a"], data.reshape(2, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
        ("ComplexFloatStorage", np.complex64),
    ],
)
def test_dtypes(form, kind, dtype, path):
    data = np.array([0, 1, 3], dtype)
    value = _dict(x=_tensor(_storage("0", 3, kind), 0, (3,), (1,)))
    array = reader.read(form(path, value, **{"0": data}))["x"]
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, data)


def test_nested_dicts(path):
    one, two = (_tensor(_storage(key, 1), 0, (1,), (1,)) for key in "ab")
    ordered = _call("collections", "OrderedDict") + b"(" + _text("w.x") + two + b"u"
    ordered += _dict(_metadata=_dict(version=_int(1))) + b"b"  # BUILD, as PyTorch writes it
    value = _dict(ema=_dict(w=one), model=ordered, steps=_int(7))
    _zip(path, value, a=np.float32([1]), b=np.float32([2]))
    assert reader.read(path, "ema")["w"] == 1
    assert reader.read(path, "model")["w.x"] == 2
    _refused(path, "'ema' is a dict, not a tensor.*there is ema, model, steps")
    _refused(path, "'steps' is a int", flatten=True)
    _refused(path, "no entry 'state_dict'; there is ema, model, steps", "state_dict")
    _zip(path, _dict(model=_dict(b=one, a=_dict(c=two))), a=np.float32([1]), b=np.float32([2]))
    assert list(reader.read(path, flatten=True)) == ["model.b", "model.a.c"]
    assert list(reader.read(path, "model", flatten=True)) == ["b", "a.c"]


def test_ordered_dicts_of_python_2(path):
    pair = b"](" + _text("w") + _tensor(_storage("a", 1), 0, (1,), (1,)) + b"e"
    value = _call("collections", "OrderedDict", b"](" + pair + b"e")
    assert reader.read(_legacy(path, value, a=np.float32([5])))["w"] == 5


def test_safetensors(tmp_path):
    wanted = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones((2,), ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
        "long": np.array(2**40),
    }
    for name in ("weights.safetensors", "weights.bin"):  # told by its bytes, not its name
        safetensors.numpy.save_file(wanted, tmp_path / name)
        arrays = reader.read(tmp_path / name)
        assert set(arrays) == set(wanted)
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[key])
            assert array.dtype == wanted[key].dtype


def test_unreadable_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(100, np.float32)}, path)
    whole = path.read_bytes()
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    for data, message in (
        (whole[:-1], "damaged"),
        (whole[:5], "damaged"),
        (struct.pack("<Q", 2**60) + whole[8:], "damaged"),  # a header of an exabyte
        (whole.replace(b'"shape":[100]', b'"shape":[999]'), "damaged"),
        (whole.replace(b'"F32"', b'"F99"'), "damaged"),
        (struct.pack("<Q", len(header)) + header + b"\0\0", "a has the dtype F8_E4M3"),
    ):
        path.write_bytes(data)
        _refused(path, message)


class _Payload:
    """What pickles to a call, as an attacker writes it."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
def test_payloads_do_not_run(protocol, path, canary):
    for payload, name in (
        (_Payload(os.system, f"touch {canary}"), "system"),
        (_Payload(eval, f"open({str(canary)!r}, 'w')"), "eval"),
        (_Payload(getattr, os, "system"), "getattr|module"),
        ({"model": [{"x": _Payload(os.mkdir, str(canary))}]}, "mkdir"),
    ):
        try:
            program = pickle.dumps(payload, protocol)
        except TypeError:  # a module does not pickle
            continue
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", program)
        _refused(path, f"({name}|opcode).*refused")
        path.write_bytes(program)
        # Protocols 0 and 1 begin as text, and are not taken for a weight file at all.
        _refused(path, f"({name}|opcode).*refused" if protocol > 1 else "neither")


@pytest.mark.parametrize("form", FORMS)
def test_refused_programs(form, path, canary):
    storage = _storage("a", 1)
    command = _text(f"touch {canary}")
    table = _name("collections", "OrderedDict")
    deep = b")" + b"\x85" * 100
    twice = b")" + b"q\x00h\x00h\x00\x86" * 40  # each tuple mentions the one before twice
    for value, message in (
        (_call("os", "system", command), "os.system, which is refused"),
        (_call("posix", "system", command), "posix.system, which is refused"),
        (_call("torch._utils", "_rebuild_tensor_v2.__globals__", command), "refused"),
        (_call("torch", "storage._load_from_bytes", command), "refused"),
        (_call("numpy.core.multiarray", "_reconstruct", command), "refused"),
        (_call("functools", "partial"), "functools.partial, which is refused"),
        (_dict(a=_call("builtins", "getattr", table, _text("x"))), "builtins.getattr"),
        (_call("torch", "FloatStorage", _int(9)), "calls a dtype or a type"),
        (_call("torch", "Tensor", _int(9)), "calls a dtype or a type"),
        (_typed(table, _tuple()), "not made of a tensor"),
        (_typed(_name("torch", "Size"), _tuple(_tuple(_int(9)))), "not made of a tensor"),
        (_typed(_name("torch._tensor", "_rebuild_from_type_v2"), _tuple()), "not made of a tensor"),
        (_typed(_name("torch._utils", "_rebuild_tensor_v2"), _int(9)), "of no arguments"),
        (b"(" + command + b"ios\nsystem\n", "opcode INST is refused"),
        (b"(" + _name("os", "system") + command + b"o", "opcode OBJ is refused"),
        (table + b")\x81", "NEWOBJ class argument"),
        (b"\x82\x01", "opcode EXT1 is refused"),
        # Changing what a name stands for, or a tensor, through their attributes.
        (table + _tuple(b"N", _dict(call=_int(1))) + b"b", "changes a Name is refused"),
        (storage + _dict(size=_int(9)) + b"b", "changes a Storage is refused"),
        (_tensor(storage, 0, (1,), (1,)) + _dict(offset=_int(9)) + b"b", "changes a Tensor"),
        (b"Nr" + struct.pack("<I", 2**32 - 1), "numbers 4294967295 values"),
        (deep, "nested more than 64 deep"),
        (twice, "more than 1000000 entries"),
        (b"(\x85", "takes a mark for a value"),
        (_call("collections", "OrderedDict", _int(9)), "not made of a list of pairs"),
        (_tuple(_text("module"), _text("x")) + b"Q", "describes a storage in an unknown way"),
        (_storage("a", -1), "describes a storage in an unknown way"),
        (_tuple(storage, _storage("a", 2)), "describes the storage a in two ways"),
        (b"X" + struct.pack("<I", 2**31), "damaged"),  # a string of two gigabytes
    ):
        form(path, value, a=np.float32([1]))
        _refused(path, message)


def test_a_dict_within_itself_ends(path):
    _zip(path, b"}q\x00(" + _text("x") + b"h\x00u")
    _refused(path, "dicts more than 64 deep", flatten=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (13,), (1,)),  # longer than the storage
        (1, (12,), (1,)),
        (12, (), ()),
        (0, (3, 4), (5, 1)),
        (-1, (2,), (1,)),
        (0, (-1, 2), (1, 1)),
        (4, (2,), (-1,)),  # backwards
        (0, (3, 4), (4,)),
        (0, (2**30, 2**30), (0, 0)),  # an exabyte from one number
        (0, (4, 4), (0, 1)),
        (0, (1,) * 65, (1,) * 65),
    ],
)
def test_tensors_outside_their_storage(form, offset, shape, strides, path):
    form(path, _dict(x=_tensor(_storage("a", 12), offset, shape, strides)), a=np.zeros(12, "f4"))
    _refused(path, "does not lie within|strides are none")


@pytest.mark.parametrize("form", FORMS)
def test_many_views_of_few_bytes(form, path):
    """A thousand names of one megabyte would take a gigabyte."""
    tensor = _tensor(_storage("a", 2**18), 0, (2**18,), (1,))
    value = _dict(**{f"x{number}": tensor for number in range(1000)})
    form(path, value, a=np.zeros(2**18, np.float32))
    _refused(path, "claim 1048576000 bytes")


@pytest.mark.parametrize("form", FORMS)
def test_storages_of_another_length(form, path):
    value = _dict(x=_tensor(_storage("a", 4), 0, (2,), (1,)))
    for size in (3, 5):
        form(path, value, a=np.zeros(size, np.float32))
        _refused(path, "must have (16 bytes|4 elements)")
    form(path, value, b=np.zeros(4, np.float32))
    _refused(path, "has none|list of storages differs")


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files(form, path):
    value = _dict(x=_tensor(_storage("a", 64), 0, (64,), (1,)))
    whole = form(path, value, a=np.zeros(64, np.float32)).read_bytes()
    assert reader.read(path)["x"].size == 64
    for length in range(2, len(whole), 7):
        path.write_bytes(whole[:length])
        _refused(path, "cut off|damaged")


@pytest.mark.parametrize("form", FORMS)
def test_any_damage_is_one_clear_error_or_readable(form, path):
    value = _dict(x=_tensor(_storage("a", 4), 0, (4,), (1,)), y=_call("torch", "Size", _tuple()))
    whole = np.frombuffer(form(path, value, a=np.zeros(4, "f4")).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            reader.read(path)
        except interfaces.UserError:
            errors += 1
    assert errors > 100


def test_odd_zip_files(path):
    value = _program(b"}")
    for members, message in (
        ([("a/data.pkl", value), ("a/data.pkl", value)], "two of its members have one name"),
        ([("a/data.pkl", value), ("b/data.pkl", value)], "without one data.pkl"),
        ([("code/x.py", b"1")], "without one data.pkl"),
        ([("a/data.pkl", value), ("a/byteorder", b"big")], "big-endian"),
        ([("a/data.pkl", bytes(pickles.LARGEST + 1))], "its pickle is larger"),
    ):
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")  # of the doubled name
            for name, data in members:
                archive.writestr(name, data)
        _refused(path, message)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))  # a thousand to one
    _refused(path, "compressed")


def test_other_files(path, tmp_path):
    with pytest.raises(interfaces.UserError, match="no file"):
        reader.read(path)
    with pytest.raises(interfaces.UserError, match="no file"):
        reader.read(tmp_path)
    for data, message in (
        (b"\0" * 20, "neither safetensors, nor.*begins with b'.{1,2}x00"),
        (pickle.dumps([1, 2], 2), "not one of torch.save"),
    ):
        path.write_bytes(data)
        _refused(path, message)


def test_published_forms_are_read(shared):
    files = [
        file
        for file in (shared / "parity").rglob("*")
        if file.is_file() and file.name not in ("case.npz", "config.json", "README.md")
    ]
    assert {file.suffix for file in files} >= {"", ".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
    for file in files:
        wrap = ["state_dict"] if file.suffix == ".ckpt" else []  # beside it are numbers
        arrays = reader.read(file, *wrap, flatten=True)
        kib = sum(array.nbytes for array in arrays.values()) / 1024
        # The rest of a file is names: the arrays must account for nearly all of it.
        assert kib == pytest.approx(file.stat().st_size / 1024, rel=0.25, abs=8), file
        for key, array in arrays.items():
            assert array.dtype.kind in "fi" and not np.any(np.isnan(array)), (file, key)


def test_flax_agrees_with_its_own_reader(shared):
    for name in ("maskgit_tokenizer/tokenizer", "maskgit_transformer/maskgit"):
        file = shared / "parity" / f"{name}_imagenet_checkpoint"
        restored = serialization.msgpack_restore(file.read_bytes())
        wanted = traverse_util.flatten_dict(restored, sep=".")
        top = next(iter(restored))
        arrays = reader.read(file, top, flatten=True)
        assert {f"{top}.{key}" for key in arrays} == set(wanted)
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[f"{top}.{key}"], strict=True)


def _dtypes():
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8"
    return [jnp.dtype(name) for name in f"{names} bool complex64".split()]


@pytest.mark.parametrize("limit", [2**30, 40, 1])
def test_flax_files_of_every_dtype_whole_and_in_chunks(limit, path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    rng = np.random.default_rng(0)
    tree = {dtype.name: rng.integers(0, 2, (3, 2, 4)).astype(dtype) for dtype in _dtypes()}
    tree |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3)), "long": np.arange(700)}
    path.write_bytes(serialization.msgpack_serialize({"params": {"a": tree}, "step": 7}))
    arrays = reader.read(path, "params", flatten=True)
    assert set(arrays) == {f"a.{name}" for name in tree}
    for name, wanted in tree.items():
        found = arrays[f"a.{name}"]
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert found.flags.writeable
    _refused(path, "'params' is a dict, not a tensor.*params, step")
    _refused(path, "'step' is a int, not a tensor", flatten=True)


def test_safetensors_whose_length_begins_like_another_form(tmp_path):
    """128 is the first byte of a pickle, 129 to 143 of a message, 0x4B50 is PK."""
    path = tmp_path / "weights"
    for length in (128, 136, 384, 0x4B50):
        header = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'.ljust(length)
        path.write_bytes(struct.pack("<Q", length) + header + b"\1\2")
        np.testing.assert_array_equal(reader.read(path)["a"], [1, 2])


def _lightning(path, **others):
    """A file with what trainers put beside the weights: settings, callbacks, optimizer states."""
    tensor = _tensor(_storage("a", 2), 0, (2,), (1,))
    new = b")\x81"  # of a class: its object without arguments
    settings = _name("argparse", "Namespace") + new + _dict(lr=_int(1)) + b"b"
    config = _name("omegaconf.dictconfig", "DictConfig") + new
    config += _dict(_content=_dict(a=_name("omegaconf.nodes", "AnyNode") + new)) + b"b"
    default = _call("collections", "defaultdict", _name("__builtin__", "list"))
    default += b"(" + _text("k") + b"](" + _int(1) + b"eu"
    subclass = _name("mine", "List") + new + b"(" + _int(1) + _int(2) + b"e"
    callback = b"}(" + _name("lightning.callbacks", "Checkpoint") + _dict(best=tensor) + b"u"
    value = _dict(
        epoch=_int(3),
        state_dict=_dict(w=tensor, gone=default),
        callbacks=callback,
        hyper_parameters=_dict(settings=settings, config=config, items=subclass),
        path=_call("pathlib", "PosixPath", _text("a")),
        **others,
    )
    return _zip(path, value, a=np.float32([1, 2]))


def test_unknown_classes_are_left_out_on_request(path):
    _lightning(path)
    _refused(path, "lightning.callbacks.Checkpoint, which is refused.*--opaque", "state_dict")
    arrays = reader.read(path, "state_dict", unknown="opaque")
    assert list(arrays) == ["w"]
    np.testing.assert_array_equal(arrays["w"], np.float32([1, 2]), strict=True)
    _zip(path, _dict(w=_call("mine", "Net")))
    _refused(path, "mine.Net, which is refused.*--opaque")
    with pytest.raises(interfaces.UserError, match="holds no array"):
        reader.read(path, unknown="opaque")
    with pytest.raises(interfaces.UserError, match="give one of refuse, opaque"):
        reader.read(path, unknown="run")


def test_unknown_classes_of_the_old_form(path):
    """It also keeps the source of a network's class: nothing is done with that."""
    module = _tuple(_text("module"), _name("mine", "Net"), _text("net.py"), _text("1/0")) + b"Q"
    value = _dict(
        net=module + b")\x81" + _dict(x=_int(1)) + b"b",
        w=_dict(a=_tensor(_storage("s", 1, tail=b"N"), 0, (1,), (1,))),
    )
    _legacy(path, value, s=np.float32([5]))
    _refused(path, "mine.Net, which is refused.*--opaque", "w")
    assert reader.read(path, "w", unknown="opaque")["a"] == 5


HARMLESS = {
    "args": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("a"), size=(1, 2)),
    "set": {1, "a"},
    "frozen": frozenset({(1, 2)}),
    "default": collections.defaultdict(list, {"a": [1, 2]}),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("abba"),
    "queue": collections.deque([1, 2], 4),
    "simple": types.SimpleNamespace(x=1),
    "bytes": b"abc",
    "array": bytearray(b"abc"),
    "scalar": np.float64(0.5),
    "when": datetime.datetime(2024, 4, 3),
    "complex": 1j,
    "range": range(3),
    "none": None,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_things_beside_weights(protocol, path):
    """None of them is made; what an attacker could make of them is in test_hostile.py."""
    for name, value in HARMLESS.items():
        program = pickle.dumps(value, protocol)[2:-1]
        # without the frame's length, which says where the program ends
        program = program[9:] if program[:1] == b"\x95" else program
        tensor = _tensor(_storage("a", 1), 0, (1,), (1,))
        _zip(path, _dict(model=_dict(w=tensor), s=program), a=np.float32([3]))
        assert list(reader.read(path, "model")) == ["w"], name
        assert reader.outline(path).entries == {"model": ("w",)}, name
        _zip(path, _dict(w=tensor, s=program), a=np.float32([3]))
        assert list(reader.read(path)) == ["w"], name


def sharded(folder, parts, form="safetensors", name="model.safetensors", **changes):
    """A file in parts, with its index."""
    names = {}
    for i, arrays in enumerate(parts, start=1):
        stem, _, suffix = name.rpartition(".")
        file = f"{stem}-{i:05d}-of-{len(parts):05d}.{suffix}"
        writer.write(folder / file, arrays, form=form)
        names |= dict.fromkeys(arrays, file)
    index = {"metadata": {"total_size": 3}, "weight_map": names | changes}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder / f"{name}.index.json"


@pytest.mark.parametrize(
    ("form", "name"), [("safetensors", "model.safetensors"), ("torch", "pytorch_model.bin")]
)
def test_a_file_in_parts(form, name, tmp_path):
    parts = [{"a": np.ones(3, np.float32), "b.c": np.zeros((2, 2))}, {"d": np.arange(4)}]
    index = sharded(tmp_path, parts, form, name)
    for path in (index, tmp_path):
        found = reader.read(path)
        for key, array in (parts[0] | parts[1]).items():
            np.testing.assert_array_equal(found[key], array, strict=True)
        assert reader.outline(path) == reader.Outline(form, {"": ("a", "b.c", "d")})
    assert paths.located(tmp_path) == str(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "needs a weight_map"),
        ('{"weight_map": {}}', "needs a weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "plain name of a file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "plain name of a file"),
        ('{"weight_map": {"a": ["x"]}}', "plain name|not beside it"),
        ('{"weight_map": {"a": "none.safetensors"}}', "not beside it: fetch all parts"),
        ('{"weight_map": {"b": "x.safetensors"}}', "differ in a, b"),
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', "differ in b"),
    ],
)
def test_an_index_that_is_none(text, message, tmp_path):
    writer.write(tmp_path / "x.safetensors", {"a": np.ones(3)}, form="safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(interfaces.UserError, match=message):
        reader.read(path)


def test_a_folder_means_its_weight_file(tmp_path):
    with pytest.raises(interfaces.UserError, match="is a folder: name the file in it, one of none"):
        reader.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for number, name in enumerate(("pytorch_model.bin", "model.safetensors"), start=1):
        form = "torch" if name.endswith("bin") else "safetensors"
        writer.write(tmp_path / name, {"a": np.full(3, number)}, form=form)
        assert reader.read(tmp_path)["a"][0] == number  # safetensors where there are both
    writer.write(tmp_path / "second.safetensors", {"a": np.ones(3)}, form="safetensors")
    with pytest.raises(interfaces.UserError, match="one of model.safetensors, second.safetensors"):
        reader.read(tmp_path)


def test_a_network_is_found_in_what_trainers_put_around_it(tmp_path):
    path, arrays = tmp_path / "x.pth", {"a.w": np.ones(3), "a.b": np.zeros(2)}
    for wrap, prefix in (
        *(((), ""), (("state_dict",), ""), (("teacher",), "module.")),
        *((("model",), "_orig_mod.module."), ((), "module.")),
        *(((), "module._orig_mod."), ((), "module._fsdp_wrapped_module._orig_mod.")),
    ):
        entries = {wrap: {prefix + key: array for key, array in arrays.items()}}
        if wrap:
            entries |= {("optimizer", "state"): {"m": np.ones(9)}, (): {"step": np.ones(1)}}
        writer.write_entries(path, entries, form="torch")
        assert set(reader.network(path)) == set(arrays), (wrap, prefix)
    inside = {"module.a._checkpoint_wrapped_module.w": np.ones(3), "module.a.b": np.zeros(2)}
    writer.write_entries(path, {(): inside}, form="torch")
    assert set(reader.network(path)) == set(arrays)
    writer.write_entries(path, {("what", "ever"): arrays}, form="torch")
    with pytest.raises(interfaces.UserError, match="'what' is a dict, not a tensor"):
        reader.network(path)


def test_an_outline_names_what_holds_arrays(path):
    tensor = _tensor(_storage("a", 1), 0, (1,), (1,))
    value = _dict(
        ema=_dict(w=tensor),
        trainer=_dict(net=_dict(**{"x.y": tensor, "x.z": tensor}), step=_int(3)),
        loose=tensor,
    )
    _zip(path, value, a=np.float32([1]))
    found = reader.outline(path)
    assert found.form == "torch"
    assert found.entries == {"": ("loose",), "ema": ("w",), "trainer.net": ("x.y", "x.z")}
    assert found.names("trainer.net.x") == ("y", "z") and found.names("model") == ()
    assert list(reader.read(path, "trainer", "net", "x")) == ["y", "z"]
    _zip(path, b"]" + tensor + b"a", a=np.float32([1]))
    assert reader.outline(path).entries == {}
