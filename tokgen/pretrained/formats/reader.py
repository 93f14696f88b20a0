"""Weight files into numpy arrays, executing nothing.

`.safetensors`; what `torch.save` writes (`.pth`, `.pt`, `.bin`, `.ckpt`): the zip form of PyTorch
1.6 and later, and the older form of consecutive pickles; the msgpack of `flax.serialization`; and
the constants of a frozen TensorFlow graph (`.pb`). The form is told from the file's first bytes.
Neither PyTorch nor TensorFlow is needed. A path may also be the index of a file in several parts
(`model.safetensors.index.json`), or a folder that holds one of all these.

What a file claims is never allocated before it is compared with the bytes that are there; the
pickles within are inspected before they run (`pickles`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from tokgen import interfaces
from tokgen.pretrained.formats import graphdef, msgpack, paths, pickles, stored, torch_file

DEEPEST = 64  # dicts within dicts
SHALLOW = 4  # dicts around a state dict
MOST_ENTRIES = 10**6
LONGEST_NAMES = 2**26  # characters, of all names together: a dict may be mentioned many times
OVERLAP = 4  # times the file's size that all arrays may take: tied weights are stored once
LONGEST_MESSAGE = 900
# Entries around a state dict that trainers write, whatever the network
CONTAINERS = (
    *("state_dict", "model", "module", "net", "network", "model_state_dict", "params", "weights"),
    *("generator", "tokenizer", "teacher"),
)
# Parts of names that torch.compile and those that shard a network put into them
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


# Those of safetensors that numpy and ml_dtypes have.
_SAFETENSORS = {
    name: np.dtype(dtype)
    for name, dtype in {
        **dict(F64="<f8", F32="<f4", F16="<f2", BF16=ml_dtypes.bfloat16),
        **dict(I64="<i8", I32="<i4", I16="<i2", I8="i1"),
        **dict(U64="<u8", U32="<u4", U16="<u2", U8="u1", BOOL="?", C64="<c8"),
    }.items()
}

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

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def read(
    path: str | os.PathLike, *unwrap: str, flatten: bool = False, unknown: str = "refuse"
) -> dict[str, np.ndarray]:
    """The arrays of a weight file by their names, copied, in the machine's byte order.

    The arguments are those of `lying`.
    """
    return {
        name: array.read()
        for name, array in lying(path, *unwrap, flatten=flatten, unknown=unknown).items()
    }


def lying(
    path: str | os.PathLike, *unwrap: str, flatten: bool = False, unknown: str = "refuse"
) -> dict[str, stored.Stored]:
    """The arrays of a weight file by their names, none of them read yet.

    Numbers that several of them share stay in memory while one of these is left.

    `unwrap` names the entries to descend into: `read(path, "state_dict")`; the last may be what the
    names of an entry begin with. With `flatten`,
    dicts within dicts are joined by dots; without it they are an error. Flax's files are such
    dicts: `read(path, "params", flatten=True)`. `unknown="opaque"` leaves out what is of an unknown
    class (the callbacks and settings of a Lightning file), which is an error otherwise.
    """

    def arrays(form: str, tree: Any, fetch: Fetch, source: stored.Source):
        del form
        return _arrays(_descended(tree, unwrap), fetch, source, flatten)

    path = paths.located(path)
    parts = [_opened(part, unknown, arrays) for part in paths.files(path)]
    found = {name: array for part in parts for name, array in part.items()}
    if path.endswith(paths.INDEX):
        paths.check_names(path, [set(part) for part in parts])
    return found


def network(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of the one network in a file, out of what trainers put around them.

    The entry of CONTAINERS with the most of them, or the outermost; without WRAPPERS in their names
    and "module." before all.
    """
    found = outline(path)
    known = [name for name in ("", *CONTAINERS) if name in found.entries]
    entry = max(known, key=lambda name: len(found.entries[name]), default="")
    arrays = unwrapped(read(path, *filter(None, [entry]), flatten=found.form == "flax"))
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def unwrapped(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`arrays` with WRAPPERS left away inside of their names."""
    found = {}
    for name, array in arrays.items():
        for part in WRAPPERS:
            name = name.replace(part, "")
        found[name] = array
    return found if len(found) == len(arrays) else dict(arrays)


@dataclasses.dataclass(frozen=True)
class Outline:
    """What lies in a weight file, without its numbers.

    Attributes:
        form: how it is written, a name of `writer.FORMS`, or graphdef.
        entries: the dotted name of every dict that holds arrays, "" for the outermost -> the names
            of these; Flax's dicts within dicts are one entry.
    """

    form: str
    entries: dict[str, tuple[str, ...]]

    def names(self, entry: str) -> tuple[str, ...]:
        """What an entry holds, or the names of another one that begin with its last part."""
        if entry in self.entries:
            return self.entries[entry]
        outer, _, inner = entry.rpartition(".")
        names = self.entries.get(outer, ())
        return tuple(n.removeprefix(f"{inner}.") for n in names if n.startswith(f"{inner}."))


def outline(path: str | os.PathLike, unknown: str = "refuse") -> Outline:
    """What is in a weight file; nothing of its arrays is read."""
    path = paths.located(path)
    found = [_opened(part, unknown, _outlined) for part in paths.files(path)]
    entries: dict[str, tuple[str, ...]] = {}
    for part in found:
        for entry, names in part.entries.items():
            entries[entry] = entries.get(entry, ()) + names
    return Outline(found[0].form, entries)


def _opened(path: str, unknown: str, use: Callable) -> Any:
    """What `use` makes of (form, tree, what fetches numbers, the open file) of one file."""
    if unknown not in pickles.POLICIES:
        raise interfaces.UserError(
            f"unknown={unknown!r}: give one of {', '.join(pickles.POLICIES)}"
        )
    with _telling(path):
        source = stored.Source(path)
        start = source.file.read(256)
        if (problem := _no_weights(start)) is not None:
            raise interfaces.UserError(problem)
        form = _form(start, path)
        tree, fetch = _FORMS[form](source, pickles.POLICIES[unknown])
        return use(form, tree, fetch, source)


@contextlib.contextmanager
def _telling(path: str) -> Iterator[None]:
    """Errors of a file as one message that names it."""
    try:
        yield
    except interfaces.UserError as error:
        raise interfaces.UserError(f"weight file {path}: {_printable(error)}") from error
    except (safetensors.SafetensorError, *_DAMAGE) as error:
        raise interfaces.UserError(
            f"weight file {path} is damaged, or cut off ({type(error).__name__}: "
            f"{_printable(error)}); fetch it again and compare its size"
        ) from error
    except OSError as error:
        raise interfaces.UserError(f"weight file {path} can't be read: {error}") from error


def _outlined(form: str, tree: Any, fetch: Any, source: stored.Source) -> Outline:
    """Of one file; what holds no array is left out."""
    del fetch, source
    if form == "flax":
        return Outline(form, {"": tuple(_leaves(tree, flatten=True))})
    form = {"zip": "torch", "legacy": "torch"}.get(form, form)
    entries: dict[str, tuple[str, ...]] = {}
    pending, visited = [("", tree, 0)] if isinstance(tree, dict) else [], 0
    while pending:
        prefix, value, depth = pending.pop(0)
        visited += len(value)
        if visited > MOST_ENTRIES:
            raise interfaces.UserError(f"it has more than {MOST_ENTRIES} entries")
        names = [name for name, child in value.items() if isinstance(child, _LEAVES)]
        if names:
            entries[prefix] = tuple(map(str, names))
        if depth < SHALLOW:
            inner = [(k, v) for k, v in value.items() if isinstance(k, str) and isinstance(v, dict)]
            pending += [(f"{prefix}.{k}".lstrip("."), v, depth + 1) for k, v in inner]
    return Outline(form, entries)


def _printable(error: Exception) -> str:
    """A message without what a file may have put in it to confuse a terminal."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(error)[:10_000])
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def _no_weights(start: bytes) -> str | None:
    """What is wrong with a file that begins so, if it is no weight file at all."""
    if not start:
        return "it is empty; fetch it again"
    if start.startswith(_POINTER):
        return (
            "it is a git-lfs pointer, not the weights it points to; fetch the real file "
            "(`git lfs pull`, or the download link of its page)"
        )
    if start.lstrip(b"\xef\xbb\xbf\t\r\n ").lower().startswith(_PAGES):
        return "it is a web page (of an error, or a login), saved in its place; fetch it again"
    return None


def _form(start: bytes, path: str) -> str:
    # First what is the least ambiguous: safetensors begin with a length, which may have any last
    # byte, also those that the other forms begin with.
    if start[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if start.startswith(b"PK"):
        return "zip"
    if start.startswith(b"\x80"):
        return "legacy"
    if msgpack.looks_so(start):
        return "flax"
    if start[:1] == b"\n" and path.endswith(".pb"):
        return "graphdef"
    if start[8:9] == b"{" or path.endswith(".safetensors"):
        return "safetensors"
    raise interfaces.UserError(
        "it is neither safetensors, nor written by torch.save or flax.serialization, nor a "
        f"TensorFlow graph (.pb): it begins with {start[:9]!r}"
    )


# Each reader of a form returns a tree of dicts whose leaves are arrays or describe them, and what
# fetches the numbers of a storage, if they lie in some.
Fetch = torch_file.Fetch | None


def _read_safetensors(source: stored.Source, policy: pickles.Policy) -> tuple[Any, Fetch]:
    del policy
    # the package holds the header against the file: sizes, gaps, overlaps
    safetensors.safe_open(source.path, framework="numpy")
    first = 8 + int.from_bytes(source.read(0, 8).tobytes(), "little")
    header = json.loads(source.read(8, first - 8).tobytes())
    arrays = {}
    for key in sorted(set(header) - {"__metadata__"}):
        entry = header[key]
        if entry["dtype"] not in _SAFETENSORS:
            raise interfaces.UserError(
                f"{key:.100} has the dtype {entry['dtype']}, which numpy lacks"
            )
        start, end = entry["data_offsets"]
        found = _Lying(source, first + start, _SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
        if end - start != found.nbytes:
            raise interfaces.UserError(f"{key:.100} must have {found.nbytes} bytes")
        arrays[key] = found
    return arrays, None


@dataclasses.dataclass(frozen=True)
class _Lying:
    """An array of safetensors, not read yet."""

    source: stored.Source
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        return self.source.read(self.start, self.nbytes).view(self.dtype).reshape(self.shape)


def _read_flax(source: stored.Source, policy: pickles.Policy) -> tuple[Any, Fetch]:
    del policy
    return msgpack.read(source), None


def _read_graphdef(source: stored.Source, policy: pickles.Policy) -> tuple[Any, Fetch]:
    del policy
    return graphdef.read(source.path), None


_FORMS = {
    "safetensors": _read_safetensors,
    "zip": torch_file.read_zip,
    "legacy": torch_file.read_legacy,
    "flax": _read_flax,
    "graphdef": _read_graphdef,
}

# What a leaf of a tree may be.
_LEAVES = (np.ndarray, pickles.Tensor, msgpack.Packed, _Lying)


def _arrays(
    tree: Any, fetch: Fetch, source: stored.Source, flatten: bool
) -> dict[str, stored.Stored]:
    leaves = _leaves(tree, flatten)
    claimed = sum(leaf.nbytes for leaf in leaves.values())
    if claimed > OVERLAP * source.size:
        raise interfaces.UserError(f"its tensors claim {claimed} bytes, the file has {source.size}")
    users = collections.Counter(
        leaf.storage.key for leaf in leaves.values() if isinstance(leaf, pickles.Tensor)
    )
    shared: dict[str, np.ndarray] = {}

    def numbers(leaf: Any) -> np.ndarray:
        with _telling(source.path):
            if not isinstance(leaf, pickles.Tensor):
                return _cleaned(leaf if isinstance(leaf, np.ndarray) else leaf.array())
            key = leaf.storage.key
            storage = shared[key] if key in shared else fetch(leaf.storage)
            if users[key] > 1:
                shared[key] = storage
            array = leaf.view(storage)
            # all of its storage, in its order: nobody else has it
            alone = users[key] == 1 and array.nbytes == storage.nbytes and array.flags.c_contiguous
            return _cleaned(storage.reshape(array.shape) if alone else array.copy())

    return {
        name: stored.Stored(
            _native(_dtype(leaf)), tuple(leaf.shape), functools.partial(numbers, leaf)
        )
        for name, leaf in leaves.items()
    }


def _dtype(leaf: Any) -> np.dtype:
    return leaf.storage.dtype if isinstance(leaf, pickles.Tensor) else leaf.dtype


def _native(dtype: np.dtype) -> np.dtype:
    """In the machine's byte order."""
    return dtype.newbyteorder("=")


def _descended(tree: Any, unwrap: tuple[str, ...]) -> Any:
    for name in unwrap:
        found = tree.get(name) if isinstance(tree, dict) else None
        if found is None and isinstance(tree, dict) and name == unwrap[-1]:
            texts = [key for key in tree if isinstance(key, str) and key.startswith(f"{name}.")]
            found = {key.removeprefix(f"{name}."): tree[key] for key in texts} or None
        if found is None:
            raise interfaces.UserError(f"it has no entry {name!r}; there is {_contents(tree)}")
        tree = found
    return tree


def _contents(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    names = [name if isinstance(name, str) else type(name).__name__ for name in list(tree)[:20]]
    names = [f"{name:.30}" for name in names]
    return ", ".join(names) + (f" and {len(tree) - 20} more" if len(tree) > 20 else "")


def _leaves(tree: Any, flatten: bool) -> dict[str, Any]:
    """What `_LEAVES` names, by its name in `tree`; what is opaque is left out."""
    leaves: dict[str, Any] = {}
    pending = [("", tree, 0)]
    visited = letters = 0
    while pending:
        prefix, value, depth = pending.pop()
        if depth > DEEPEST:
            raise interfaces.UserError(f"it has dicts more than {DEEPEST} deep")
        if isinstance(value, dict) and (flatten or depth == 0):
            if not all(isinstance(key, (str, int)) for key in value):
                raise interfaces.UserError(
                    f"the keys of its entry {prefix!r:.100} are not all strings"
                )
            visited += len(value)
            letters += sum(len(prefix) + len(str(key)) for key in value)
            if visited > MOST_ENTRIES or letters > LONGEST_NAMES:
                raise interfaces.UserError(
                    f"it has more than {MOST_ENTRIES} entries, or endless names"
                )
            pairs = [(f"{prefix}.{key}" if depth else str(key), value[key]) for key in value]
            pending.extend((name, child, depth + 1) for name, child in reversed(pairs))
        elif depth > 0 and (pickles.is_opaque(value) or (not flatten and not _holds_any(value))):
            continue
        elif not isinstance(value, _LEAVES) or depth == 0:
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            raise interfaces.UserError(
                f"its entry {prefix!r:.100} is a {kind}, not a tensor: name the entry that holds "
                f"the weights, or flatten; there is {_contents(tree)}"
            )
        elif prefix in leaves:
            raise interfaces.UserError(f"two of its entries are called {prefix!r:.100}")
        else:
            leaves[prefix] = value
    if not leaves:
        raise interfaces.UserError("it holds no array")
    return leaves


def _holds_any(value: Any) -> bool:
    """Whether there is an array somewhere within."""
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if isinstance(value, _LEAVES):
            return True
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
    return False


def _cleaned(array: np.ndarray) -> np.ndarray:
    """In rows, writable; truth values are nothing but 0 and 1."""
    if array.dtype == np.bool_:
        return np.array(array.view(np.uint8) != 0)
    return np.require(array, _native(array.dtype), ["C", "W"])
