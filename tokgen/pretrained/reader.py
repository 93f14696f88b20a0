"""Weight files into numpy arrays, executing nothing.

`.safetensors`, and what `torch.save` writes (`.pth`, `.pt`, `.bin`, `.ckpt`): the zip form of
PyTorch 1.6 and later, and the older form of consecutive pickles. The form is told from the file's
first bytes. PyTorch is not needed.

A pickle is a program. This one is inspected before it runs: only the opcodes that build
containers, strings and numbers are let through, and the only names it may mention are those of
`_NAMES`, each of which stands for an inert description. Arrays are made afterwards, from
descriptions whose offset, strides and length were compared with the bytes that are there. What
a file claims is never allocated before it is checked.
"""

import dataclasses
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from tokgen import interfaces

LARGEST_PICKLE = 8 * 2**20  # bytes; a state dict of 2,500 tensors takes 0.4 MB
DEEPEST = 64  # containers within containers
MOST_ENTRIES = 10**6  # of one value, each mention of a shared one counted
OVERLAP = 4  # times the file's size that all arrays may take: tied weights are stored once

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE
    BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    """
_MUTATING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"})

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
_DTYPES = """
    float64 double float32 float float16 half bfloat16 int64 long int32 int int16 short int8 uint8
    bool complex64 complex128
    """
# Those of safetensors that numpy and ml_dtypes have.
_SAFETENSORS = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64"

# All that damaged or hostile bytes make zipfile, pickletools and the unpickler raise.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RuntimeError,
    struct.error,
)


class _Inert:
    """What an unpickler can neither alter nor look into."""

    def __setstate__(self, state):
        raise interfaces.UserError(f"a pickle that changes a {type(self).__name__} is refused")


@dataclasses.dataclass(frozen=True)
class _Name(_Inert):
    """A name of `_NAMES`; calling it describes what PyTorch would have made."""

    name: str
    call: Callable[..., Any]

    def __call__(self, *args):
        return self.call(*args)


@dataclasses.dataclass(frozen=True)
class _Storage(_Inert):
    key: str
    dtype: np.dtype
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor(_Inert):
    storage: _Storage
    offset: int  # elements, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Table(dict):
    """An OrderedDict; the attributes PyTorch hangs on it (`_metadata`) are dropped."""

    def __init__(self, pairs: Any = None):
        if not isinstance(pairs, (list, type(None))):
            raise interfaces.UserError("an OrderedDict is not made of a list of pairs")
        super().__init__(pairs or ())
        if pairs:  # as Python 2 wrote it; emptied, so that no list makes a thousand tables
            pairs.clear()

    def __setstate__(self, state):
        del state


def read(path: str | os.PathLike, *unwrap: str, flatten: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a weight file by their names, copied, in the machine's byte order.

    `unwrap` names the entries to descend into: `read(path, "state_dict")`. With `flatten`,
    dicts within dicts are joined by dots; without it they are an error.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise interfaces.UserError(f"weight file: there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(9)
    size = os.path.getsize(path)
    arrays = None
    try:
        if start.startswith(b"PK"):
            arrays = _read_zip(path, size, unwrap, flatten)
        elif start.startswith(b"\x80"):
            arrays = _read_legacy(path, size, unwrap, flatten)
        elif start.endswith(b"{") or path.endswith(".safetensors"):
            arrays = _arrays(_read_safetensors(path), None, size, unwrap, flatten)
    except interfaces.UserError as error:
        raise interfaces.UserError(f"weight file {path}: {error}") from error
    except (safetensors.SafetensorError, *_DAMAGE) as error:
        raise interfaces.UserError(
            f"weight file {path} is damaged, or cut off ({type(error).__name__}: {error}); "
            "fetch it again and compare its size"
        ) from error
    if arrays is None:
        raise interfaces.UserError(
            f"weight file {path} is neither safetensors nor written by torch.save: it begins with "
            f"{start!r}"
        )
    return arrays


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    arrays = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for key in sorted(file.keys()):
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _SAFETENSORS.split():
                raise interfaces.UserError(f"{key} has the dtype {dtype}, which numpy lacks")
            arrays[key] = _cleaned(file.get_tensor(key))
    return arrays


def _read_zip(
    path: str, size: int, unwrap: tuple[str, ...], flatten: bool
) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise interfaces.UserError("two of its members have one name")
        # torch.save stores without compressing; so no member is larger than the file, nor all.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise interfaces.UserError("its members are compressed, which torch.save never does")
        if sum(member.file_size for member in members.values()) > size:
            raise interfaces.UserError("its members claim more bytes than the file has")
        if any(member.header_offset < 0 for member in members.values()):
            raise zipfile.BadZipFile("a member before the file's beginning")
        pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise interfaces.UserError("it is a zip file without one data.pkl in one folder")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise interfaces.UserError("it was written on a big-endian machine; convert it there")
        if members[pickles[0]].file_size > LARGEST_PICKLE:
            raise interfaces.UserError(f"its pickle is larger than {LARGEST_PICKLE} bytes")
        tree, _ = _unpickled(archive.read(pickles[0]), {})

        def fetch(storage: _Storage) -> bytes:
            name = f"{folder}data/{storage.key}"
            found = members[name].file_size if name in members else "none"
            need = storage.size * storage.dtype.itemsize
            if found != need:
                raise interfaces.UserError(f"its {name} must have {need} bytes, has {found}")
            return archive.read(name)

        return _arrays(tree, fetch, size, unwrap, flatten)


def _read_legacy(
    path: str, size: int, unwrap: tuple[str, ...], flatten: bool
) -> dict[str, np.ndarray]:
    """The form before PyTorch 1.6: five pickles (magic number, protocol, system, the object, the
    keys of its storages), then each storage as its number of elements and its bytes."""
    storages: dict[str, _Storage] = {}
    places: dict[str, int] = {}
    with open(path, "rb") as file:
        if _next_pickle(file, {}) != LEGACY_MAGIC or _next_pickle(file, {}) != LEGACY_PROTOCOL:
            raise interfaces.UserError("it is a pickle, but not one of torch.save")
        _next_pickle(file, {})
        tree, keys = _next_pickle(file, storages), _next_pickle(file, {})
        if not isinstance(keys, list) or set(keys) != set(storages):
            raise interfaces.UserError("its list of storages differs from those it mentions")
        for key in keys:
            need = storages[key].size
            (found,) = struct.unpack("<q", file.read(8))
            if found != need:
                raise interfaces.UserError(f"its {key} must have {need} elements, has {found}")
            places[key] = file.tell()
            end = places[key] + need * storages[key].dtype.itemsize
            if end > size:
                raise interfaces.UserError(f"it is cut off within the storage {key}")
            file.seek(end)

        def fetch(storage: _Storage) -> bytes:
            file.seek(places[storage.key])
            return file.read(storage.size * storage.dtype.itemsize)

        return _arrays(tree, fetch, size, unwrap, flatten)


def _next_pickle(file: BinaryIO, storages: dict[str, _Storage]) -> Any:
    start = file.tell()
    value, length = _unpickled(file.read(LARGEST_PICKLE), storages)
    file.seek(start + length)
    return value


def _unpickled(program: bytes, storages: dict[str, _Storage]) -> tuple[Any, int]:
    """The value of the pickle that `program` begins with, and its length in bytes.

    The storages it mentions are entered into `storages`.
    """
    length = _inspected(program)
    unpickler = _Unpickler(io.BytesIO(program[:length]), encoding="utf-8")
    unpickler.storages = storages
    return unpickler.load(), length


def _inspected(program: bytes) -> int:
    """The length of the pickle at the start of `program`, or an error if it may not be run.

    Follows the stack with (depth, entries) in the place of each value: hashing a tuple would
    overrun the C stack where it is nested a million times, and would never end where fifty
    levels mention the one below twice.
    """
    allowed = frozenset(_OPCODES.split())
    stack: list[tuple[int, int] | None] = []  # None is a mark
    memo: dict[int, tuple[int, int] | None] = {}
    for opcode, argument, position in pickletools.genops(program):
        if opcode.name not in allowed:
            raise interfaces.UserError(f"a pickle with the opcode {opcode.name} is refused")
        if opcode.name == "FRAME" and argument > len(program):
            raise interfaces.UserError("a pickle that claims more bytes than it has is refused")
        if opcode.name == "STOP":
            return position + 1
        if opcode.name == "MARK":
            stack.append(None)
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else argument
            # The unpickler's memo is an array that grows to the largest place.
            if place > len(program):
                raise interfaces.UserError(f"a pickle that numbers {place} values is refused")
            memo[place] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            _follow(opcode, stack)
    raise interfaces.UserError("its pickle does not end")


def _follow(opcode: pickletools.OpcodeInfo, stack: list[tuple[int, int] | None]):
    """Pop what `opcode` takes, push the depth and the entries of what it leaves."""
    kinds = list(opcode.stack_before)
    taken = []
    if pickletools.markobject in kinds:
        kinds = kinds[: kinds.index(pickletools.markobject)]
        while (value := stack.pop()) is not None:
            taken.append(value)
    taken = [stack.pop() for _ in kinds][::-1] + taken
    if None in taken:
        raise interfaces.UserError("a pickle that takes a mark for a value is refused")
    if not opcode.stack_after:
        return
    depth = 1 + max((depth for depth, _ in taken), default=0)
    if opcode.name in _MUTATING:  # taken[0] grows; that makes it no deeper than what it is given
        depth = max(taken[0][0], 1 + max((depth for depth, _ in taken[1:]), default=0))
    entries = 1 + sum(entries for _, entries in taken)
    if depth > DEEPEST or entries > MOST_ENTRIES:
        raise interfaces.UserError(
            f"a pickle nested more than {DEEPEST} deep, or of more than {MOST_ENTRIES} entries, is "
            "refused"
        )
    stack.append((depth, entries))


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_NAMES` and the storages of PyTorch, and nothing else."""

    storages: dict[str, _Storage]

    def find_class(self, module: str, name: str) -> _Name:
        if module == "torch" and name in _STORAGES:
            return _Name(name, _refused)
        if module == "torch" and name in _DTYPES.split():
            return _Name(name, _refused)
        if (module, name) not in _NAMES:
            raise interfaces.UserError(
                f"its pickle asks for {module}.{name}, which is refused: only tensors, containers, "
                "strings and numbers are read. Save the state_dict alone (safetensors is best)"
            )
        return _Name(f"{module}.{name}", _NAMES[module, name])

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", type, key, location, elements), in the old form followed by None
        match pid:
            case ("storage", _Name(name=kind), str(key), str(), int(size), *view) if (
                kind in _STORAGES and size >= 0 and view in ([], [None])
            ):
                storage = _Storage(key, _STORAGES[kind], size)
            case _:  # without its text, which may be endless
                raise interfaces.UserError("its pickle describes a storage in an unknown way")
        if self.storages.setdefault(key, storage) != storage:
            raise interfaces.UserError(f"its pickle describes the storage {key} in two ways")
        return storage


def _refused(*args) -> None:
    raise interfaces.UserError("its pickle calls a dtype")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2`; what is ignored says how to train it."""
    del ignored
    if not isinstance(storage, _Storage) or not all(map(_is_size, (shape, strides, (offset,)))):
        raise interfaces.UserError("a tensor's storage, offset, shape or strides are none")
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False))
    if (
        len(shape) != len(strides)
        or len(shape) > 32
        or max(shape, default=0) >= 2**31
        or elements > storage.size  # an expanded view: a few bytes that claim to be many
        or (elements > 0 and last >= storage.size)
    ):
        raise interfaces.UserError(
            f"a tensor of shape {shape[:32]}, strides {strides[:32]} and offset {offset} does not "
            f"lie within its storage {storage.key} of {storage.size} elements"
        )
    return _Tensor(storage, offset, shape, strides)


def _is_size(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)


def _parameter(tensor: Any, *ignored: Any) -> _Tensor:
    """`torch._utils._rebuild_parameter`."""
    del ignored
    if not isinstance(tensor, _Tensor):
        raise interfaces.UserError("a parameter is not made of a tensor")
    return tensor


def _size(values: Any) -> tuple[int, ...]:
    """`torch.Size`."""
    if not _is_size(values):
        raise interfaces.UserError("a torch.Size is not made of sizes")
    return values


_NAMES = {
    ("collections", "OrderedDict"): _Table,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _arrays(
    tree: Any,
    fetch: Callable[[_Storage], bytes] | None,
    size: int,
    unwrap: tuple[str, ...],
    flatten: bool,
) -> dict[str, np.ndarray]:
    for name in unwrap:
        if not isinstance(tree, dict) or name not in tree:
            raise interfaces.UserError(f"it has no entry {name!r}; there is {_contents(tree)}")
        tree = tree[name]
    leaves = _leaves(tree, flatten)
    claimed = sum(_claim(leaf) for leaf in leaves.values())
    if claimed > OVERLAP * size:
        raise interfaces.UserError(f"its tensors claim {claimed} bytes, the file has {size}")
    storages: dict[str, np.ndarray] = {}
    arrays = {}
    for key, leaf in leaves.items():
        if isinstance(leaf, _Tensor):
            storage = leaf.storage
            if storage.key not in storages:
                storages[storage.key] = np.frombuffer(fetch(storage), storage.dtype)
            leaf = _cleaned(_view(storages[storage.key], leaf))
        arrays[key] = leaf
    return arrays


def _contents(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    names = [name if isinstance(name, str) else type(name).__name__ for name in list(tree)[:20]]
    return ", ".join(names) + (f" and {len(tree) - 20} more" if len(tree) > 20 else "")


def _leaves(tree: Any, flatten: bool) -> dict[str, np.ndarray | _Tensor]:
    leaves: dict[str, np.ndarray | _Tensor] = {}
    pending = [("", tree, 0)]
    visited = 0
    while pending:
        prefix, value, depth = pending.pop()
        visited += 1
        if visited > MOST_ENTRIES or depth > DEEPEST:
            raise interfaces.UserError(
                f"it has more than {MOST_ENTRIES} entries, or dicts more than {DEEPEST} deep"
            )
        if isinstance(value, dict) and (flatten or depth == 0):
            if not all(isinstance(key, (str, int)) for key in value):
                raise interfaces.UserError(f"the keys of its entry {prefix!r} are not all strings")
            pairs = [(f"{prefix}.{key}" if depth else str(key), value[key]) for key in value]
            pending.extend((name, child, depth + 1) for name, child in reversed(pairs))
        elif not isinstance(value, (_Tensor, np.ndarray)) or depth == 0:
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            raise interfaces.UserError(
                f"its entry {prefix!r} is a {kind}, not a tensor: name the entry that holds the "
                f"weights, or flatten; there is {_contents(tree)}"
            )
        elif prefix in leaves:
            raise interfaces.UserError(f"two of its entries are called {prefix!r}")
        else:
            leaves[prefix] = value
    return leaves


def _claim(leaf: np.ndarray | _Tensor) -> int:
    if isinstance(leaf, np.ndarray):
        return leaf.nbytes
    return math.prod(leaf.shape) * leaf.storage.dtype.itemsize


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """`tensor` within the elements of its storage; `_tensor` has checked that it lies there."""
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, storage.dtype)
    strides = tuple(stride * storage.itemsize for stride in tensor.strides)
    start = storage[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)


def _cleaned(array: np.ndarray) -> np.ndarray:
    """A copy; of truth values one that holds nothing but 0 and 1."""
    if array.dtype == np.bool_:
        return array.view(np.uint8) != 0
    return np.array(array, array.dtype.newbyteorder("="), order="C")
