"""Arrays into the weight files that others publish, without PyTorch.

`FORMS` names them: `safetensors`; `torch`, the zip file of `torch.save` (`.bin`, `.pt`, `.pth`,
`.ckpt`); `flax`, the msgpack of `flax.serialization`. The same arrays give the same bytes. A file
appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from tokgen import interfaces
from tokgen.pretrained.formats import msgpack, pickles, stored

FLAX_CHUNK = 2**30  # bytes; Flax writes longer arrays in pieces of this
ALIGNMENT = 64  # bytes, of a storage within the file: PyTorch maps it into memory

_SAFETENSORS = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
    **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
    **{"bool": "BOOL", "complex64": "C64"},
}
_STORAGES = {dtype.name: name for name, dtype in pickles.STORAGES.items()}


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, Any],
    *,
    form: str,
    wrap: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named arrays; `reader.read(path, *wrap)` gives them back, bit for bit.

    `wrap` puts them into dicts of these names, outermost first, as in `{"state_dict": ...}`. In the
    form `flax` the dots of a name are dicts, which `reader.read(..., flatten=True)` joins again.
    `metadata` is of safetensors, which in turn can't be wrapped.
    """
    write_entries(path, {tuple(wrap): arrays}, form=form, metadata=metadata)


def write_entries(
    path: str | os.PathLike,
    entries: Mapping[tuple[str, ...], Mapping[str, Any]],
    *,
    form: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write dicts of named arrays, each wrapped as its key says; see `write`."""
    path = pathlib.Path(path)
    if form not in FORMS:
        raise interfaces.UserError(f"weight file {path}: no form {form!r}; {', '.join(FORMS)}")
    if not path.parent.is_dir():
        raise interfaces.UserError(f"weight file {path}: there is no folder {path.parent}")
    if not all(entries.values()):
        raise interfaces.UserError(f"weight file {path}: there are no arrays to write")
    put, dtypes = FORMS[form]
    tree: Tree = {}
    for wrap, arrays in entries.items():
        branch = tree
        for name in wrap:
            branch = branch.setdefault(name, {})
        for name, array in arrays.items():
            if name in branch:
                raise interfaces.UserError(f"weight file {path}: two of its entries are {name!r}")
            branch[name] = _ready(name, array, dtypes, form)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            put(file, tree, dict(metadata or {}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _ready(name: str, array: Any, dtypes: list[str], form: str) -> np.ndarray | stored.Stored:
    """An array under a name that a file can have; one that is not read yet stays so."""
    if not isinstance(name, str) or not name:
        raise interfaces.UserError(f"the name of an array must be a text, is {name!r}")
    if not isinstance(array, stored.Stored):
        array = np.asarray(array)
    if array.dtype.name not in dtypes:
        raise interfaces.UserError(
            f"{name} has the dtype {array.dtype}, which the form {form} can't hold; convert it to "
            f"one of {', '.join(dtypes)}"
        )
    return array


def _bytes(array: np.ndarray | stored.Stored) -> memoryview:
    """The numbers of an array in rows, little-endian."""
    array = array.read() if isinstance(array, stored.Stored) else array
    array = np.array(array, array.dtype.newbyteorder("<"), order="C", copy=None)
    return array.reshape(-1).view(np.uint8).data


Tree = dict[str, Any]  # dicts within dicts, of arrays


def _put_safetensors(file: BinaryIO, arrays: Tree, metadata: dict[str, str]) -> None:
    if any(isinstance(a, dict) for a in arrays.values()) or "__metadata__" in arrays:
        raise interfaces.UserError(
            "safetensors hold no dicts within dicts, and no array called __metadata__; write the "
            "form torch"
        )
    if any(not isinstance(text, str) for pair in metadata.items() for text in pair):
        raise interfaces.UserError(f"the metadata of safetensors must be texts, is {metadata}")
    # The largest items first, then by name, as the package safetensors has it: numbers are aligned.
    # The package itself would replace the file by one that nobody else may read.
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in ordered:
        end = place + arrays[name].nbytes
        header[name] = {
            "dtype": _SAFETENSORS[arrays[name].dtype.name],
            "shape": list(arrays[name].shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in ordered:
        file.write(_bytes(arrays[name]))


def _put_torch(file: BinaryIO, tree: Tree, metadata: dict[str, str]) -> None:
    _no_metadata(metadata)
    found: list[np.ndarray] = []
    program = b"\x80\x02" + _dict(tree, found) + b"."
    if len(program) > pickles.LARGEST:
        raise interfaces.UserError("the names of the arrays are too many to be read again")
    with zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", program)
        _add(archive, "byteorder", b"little")
        for i, array in enumerate(found):
            _add(archive, f"data/{i}", _bytes(array))
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Store a member whose bytes begin at a multiple of `ALIGNMENT`."""
    info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that equal arrays make equal files
    info.external_attr = 0o644 << 16
    place = archive.fp.tell() + 30 + len(info.filename) + 4  # its header, and that of the padding
    padding = -place % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)


# The pickle of a state dict, protocol 2. A tuple is what lies above a mark.


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little")


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _items(pairs: list[tuple[str, bytes]]) -> bytes:
    return b"(" + b"".join(_text(name) + value for name, value in pairs) + b"u"


def _dict(tree: Tree, found: list[np.ndarray]) -> bytes:
    """A dict; one of arrays is an OrderedDict, as state dicts are. Arrays go to `found`."""
    items, plain = [], False
    for name, value in tree.items():
        if isinstance(value, dict):
            plain = True
            items.append((name, _dict(value, found)))
        else:
            items.append((name, _tensor(str(len(found)), value)))
            found.append(value)
    return (b"}" if plain else _global("collections", "OrderedDict") + b")R") + _items(items)


def _tensor(key: str, array: np.ndarray) -> bytes:
    """A call of `_rebuild_tensor_v2`: storage, offset, shape, strides, no gradient, no hooks."""
    kind = _global("torch", _STORAGES[array.dtype.name])
    storage = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _int(array.size)) + b"Q"
    strides = [1]
    for size in array.shape[:0:-1]:
        strides.append(strides[-1] * max(size, 1))
    shape = _tuple(*map(_int, array.shape))
    strides = _tuple(*map(_int, strides[: array.ndim][::-1]))
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = _tuple(storage, _int(0), shape, strides, b"\x89", hooks)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _put_flax(file: BinaryIO, arrays: Tree, metadata: dict[str, str]) -> None:
    _no_metadata(metadata)
    _put_message(file.write, _nested(arrays))


def _nested(arrays: Tree) -> Tree:
    """`arrays` as dicts within dicts, one for each dot of their names."""
    tree: Tree = {}
    for name, array in arrays.items():
        if isinstance(array, dict):
            tree[name] = _nested(array)
            continue
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise interfaces.UserError(f"{name} lies within another array")
        if last in branch:
            raise interfaces.UserError(f"{name} is an array and holds others")
        branch[last] = array
    return tree


def _put_message(put: Callable[[bytes], Any], value: Any) -> None:
    """Write a value as Flax does: msgpack, its arrays as extensions, or as dicts of pieces."""
    if isinstance(value, dict):
        put(_head(len(value), 0x80, 16, (None, 0xDE, 0xDF)))
        for key, child in value.items():
            _put_message(put, key)
            _put_message(put, child)
    elif isinstance(value, bool):
        put(b"\xc3" if value else b"\xc2")
    elif isinstance(value, int):
        put(_head(value, 0, 128, (0xCC, 0xCD, 0xCE, 0xCF)))
    elif isinstance(value, str):
        data = value.encode()
        put(_head(len(data), 0xA0, 32, (0xD9, 0xDA, 0xDB)) + data)
    elif value.nbytes > FLAX_CHUNK:
        step = max(1, FLAX_CHUNK // value.itemsize)
        flat = np.asarray(value).reshape(-1)
        pieces = [flat[start : start + step] for start in range(0, flat.size, step)]
        numbered = [{str(i): x for i, x in enumerate(xs)} for xs in (value.shape, pieces)]
        _put_message(put, {msgpack.CHUNKED: True, "shape": numbered[0], "chunks": numbered[1]})
    else:
        _put_array(put, value)


def _put_array(put: Callable[[bytes], Any], array: np.ndarray) -> None:
    parts: list[bytes] = [b"\x93", _head(array.ndim, 0x90, 16, (None, 0xDC, 0xDD))]
    for size in array.shape:
        _put_message(parts.append, size)
    _put_message(parts.append, array.dtype.name)
    parts.append(_head(array.nbytes, 0, 0, (0xC4, 0xC5, 0xC6)))
    inner = b"".join(parts)
    length = len(inner) + array.nbytes
    if length in (1, 2, 4, 8, 16):
        put(bytes([0xD4 + length.bit_length() - 1]))
    else:
        put(_head(length, 0, 0, (0xC7, 0xC8, 0xC9)))
    put(bytes([msgpack.ARRAY]) + inner)
    put(_bytes(array))


def _head(size: int, short: int, limit: int, codes: tuple[int | None, ...]) -> bytes:
    """A size below `limit` within its code; above, a code and 1, 2, 4 or 8 bytes."""
    if size < limit:
        return bytes([short | size])
    for code, form in zip(codes, (">B", ">H", ">I", ">Q"), strict=False):
        if code is not None and size < 1 << 8 * struct.calcsize(form):
            return bytes([code]) + struct.pack(form, size)
    raise interfaces.UserError(f"a size of {size} does not fit into msgpack")


def _no_metadata(metadata: dict[str, str]) -> None:
    if metadata:
        raise interfaces.UserError("only safetensors hold metadata; leave them out, or write those")


# A form: what writes it, and the dtypes it has.
FORMS = {
    "safetensors": (_put_safetensors, list(_SAFETENSORS)),
    "torch": (_put_torch, list(_STORAGES)),
    "flax": (_put_flax, list(msgpack.DTYPES)),
}
