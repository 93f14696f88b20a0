"""The pickles inside `torch.save` files, inspected before they run.

A pickle is a program; `inspection` lets few of its opcodes through. The only names it may mention
are those of `_NAMES`, each of which stands for an inert description: of a tensor its storage,
offset, shape and strides, checked against one another.

Other names are refused, or, where the caller wants `OPAQUE`, become an `Opaque`. A Lightning
checkpoint needs that for its callbacks and settings.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tokgen import interfaces
from tokgen.pretrained.formats import inspection

LARGEST = 8 * 2**20  # bytes; a state dict of 2,500 tensors takes 0.4 MB

STORAGES = {
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
    """.split()
_REMEDY = (
    "Save the weights alone (safetensors is best), or leave unknown objects out of what is read: "
    "--opaque, unknown='opaque' in Python; nothing of theirs is executed"
)


class _Inert:
    """What an unpickler can neither alter nor look into."""

    def __setstate__(self, state):
        raise interfaces.UserError(f"a pickle that changes a {type(self).__name__} is refused")


@dataclasses.dataclass(frozen=True)
class Name(_Inert):
    """A name of `_NAMES`; calling it describes what PyTorch would have made."""

    name: str
    call: Callable[..., Any]

    def __call__(self, *args):
        return self.call(*args)


@dataclasses.dataclass(frozen=True)
class Storage(_Inert):
    """Numbers in a row, as the file keeps them."""

    key: str
    dtype: np.dtype
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class Tensor(_Inert):
    """A view of a storage; it lies within it."""

    storage: Storage
    offset: int  # elements, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What an array of its own takes."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def view(self, storage: np.ndarray) -> np.ndarray:
        """The tensor within the elements of its storage."""
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, storage.dtype)
        strides = tuple(stride * storage.itemsize for stride in self.strides)
        start = storage[self.offset :]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=False)


class Opaque:
    """In the place of an unknown class and of its objects: takes anything, keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args):
        del args
        return object.__new__(cls)

    def __init__(self, *args):
        del args

    def __call__(self, *args):
        raise interfaces.UserError("its pickle calls what an unknown object made: refused")

    def __setstate__(self, state):
        del state

    def __setitem__(self, key, value):
        del key, value

    def append(self, value):
        """Of a subclass of list."""
        del value


# Module: names of things without consequence, found beside weights; an `Opaque` stands for them.
_HARMLESS = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "collections": "Counter deque",
    "datetime": "date datetime time timedelta timezone",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "uuid": "UUID",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "_codecs": "encode",
    "torch": "device Generator",
    "torch.torch_version": "TorchVersion",
    "numpy": "dtype",
    "numpy.core.multiarray": "scalar",
    "numpy._core.multiarray": "scalar",
} | dict.fromkeys(
    ("builtins", "__builtin__"),
    "set frozenset list dict tuple int float str bool bytes bytearray complex range slice object"
    " xrange unicode long",
)


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


@dataclasses.dataclass(frozen=True)
class Policy:
    """What becomes of a name that is not known."""

    missing: Callable[[str], Any]


def _refuse(name: str) -> None:
    raise interfaces.UserError(
        f"its pickle asks for {name:.200}, which is refused: only tensors, containers, strings and "
        f"numbers are read. {_REMEDY}"
    )


def _placeholder(name: str) -> type[Opaque]:
    del name
    return Opaque  # the class itself: the unpickler makes objects of nothing but classes


REFUSE = Policy(_refuse)
OPAQUE = Policy(_placeholder)
POLICIES = {"refuse": REFUSE, "opaque": OPAQUE}


def is_opaque(value: Any) -> bool:
    """Whether a value stands for what is unknown."""
    return value is Opaque or isinstance(value, Opaque)


def unpickled(program: bytes, storages: dict[str, Storage], policy: Policy) -> tuple[Any, int]:
    """The value of the pickle that `program` begins with, and its length in bytes.

    The storages it mentions are entered into `storages`.
    """
    length = inspection.inspected(program)
    unpickler = _Unpickler(io.BytesIO(program[:length]), encoding="utf-8")
    unpickler.storages, unpickler.missing = storages, policy.missing
    return unpickler.load(), length


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_NAMES` and the storages of PyTorch, and nothing else."""

    storages: dict[str, Storage]
    missing: Callable[[str], Any]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name in STORAGES or name in _DTYPES):
            return Name(name, _no_call)
        if name in _HARMLESS.get(module, "").split():
            return Opaque
        if (module, name) not in _NAMES:
            return self.missing(f"{module:.100}.{name:.100}")
        return Name(f"{module}.{name}", _NAMES[module, name])

    def persistent_load(self, pid: Any) -> Any:
        # ("storage", type, key, location, elements), in the old form followed by None; the old form
        # also describes a class of network, with its source
        match pid:
            case ("module", found, *_) if is_opaque(found):
                return found
            case ("storage", Name(name=kind), str(key), str(), int(size), *view) if (
                kind in STORAGES and 0 <= size < 2**63 and view in ([], [None])
            ):
                storage = Storage(key, STORAGES[kind], size)
            case _:  # without its text, which may be endless
                raise interfaces.UserError("its pickle describes a storage in an unknown way")
        if self.storages.setdefault(key, storage) != storage:
            raise interfaces.UserError(f"its pickle describes the storage {key} in two ways")
        return storage


def _no_call(*args) -> None:
    raise interfaces.UserError("its pickle calls a dtype or a type")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`; what is ignored says how to train it."""
    del ignored
    if not isinstance(storage, Storage) or not all(map(_is_size, (shape, strides, (offset,)))):
        raise interfaces.UserError("a tensor's storage, offset, shape or strides are none")
    elements = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False))
    if (
        len(shape) != len(strides)
        or max(shape, default=0) >= 2**31
        or elements > storage.size  # an expanded view: a few bytes that claim to be many
        or (elements > 0 and last >= storage.size)
    ):
        raise interfaces.UserError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} does not "
            f"lie within its storage {storage.key:.100} of {storage.size} elements"
        )
    return Tensor(storage, offset, shape, strides)


def _is_size(values: Any) -> bool:
    """Whether these are up to 32 counts, as many as numpy has axes, that a file can mean."""
    return (
        isinstance(values, tuple)
        and len(values) <= 32
        and all(type(n) is int and 0 <= n < 2**63 for n in values)
    )


def _parameter(tensor: Any, *ignored: Any) -> Tensor:
    """`torch._utils._rebuild_parameter`."""
    del ignored
    if not isinstance(tensor, Tensor):
        raise interfaces.UserError("a parameter is not made of a tensor")
    return tensor


def _typed(made: Any, kind: Any, arguments: Any, *ignored: Any) -> Tensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor that carried attributes, which are dropped.

    Files of sharded training (FSDP) have them.
    """
    del kind, ignored
    if not isinstance(made, Name) or made.call not in (_tensor, _parameter):
        raise interfaces.UserError("a tensor with attributes is not made of a tensor")
    if not isinstance(arguments, tuple):
        raise interfaces.UserError("a tensor with attributes is made of no arguments")
    return made(*arguments)


def _size(values: Any) -> tuple[int, ...]:
    """`torch.Size`."""
    if not _is_size(values):
        raise interfaces.UserError("a torch.Size is not made of sizes")
    return values


def _defaults(*ignored: Any) -> _Table:
    """`collections.defaultdict`; what it is made of says what is absent."""
    del ignored
    return _Table()


_NAMES = {
    ("collections", "OrderedDict"): _Table,
    ("collections", "defaultdict"): _defaults,
    ("torch", "Size"): _size,
    ("torch", "Tensor"): _no_call,
    ("torch.nn.parameter", "Parameter"): _no_call,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type"): _typed,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
}
