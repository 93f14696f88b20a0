"""What `torch.save` writes, read without PyTorch: a zip file, or the older consecutive pickles.

Both give a tree of dicts whose leaves describe arrays, and what fetches the numbers of a storage.
What a file claims is compared with the bytes that are there, before anything is allocated.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tokgen import interfaces
from tokgen.pretrained.formats import pickles, stored

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
Fetch = Callable[[pickles.Storage], np.ndarray]


def read_zip(source: stored.Source, policy: pickles.Policy) -> tuple[Any, Fetch]:
    """The form of PyTorch 1.6 and later: one pickle, and a member for each storage."""
    archive = zipfile.ZipFile(source.file)  # closes nothing: the file is the source's
    members = _members(archive, source.size)
    programs = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(programs) != 1:
        raise interfaces.UserError("it is a zip file without one data.pkl in one folder")
    folder = programs[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
        raise interfaces.UserError("it was written on a big-endian machine; convert it there")
    if members[programs[0]].file_size > pickles.LARGEST:
        raise interfaces.UserError(f"its pickle is larger than {pickles.LARGEST} bytes")
    tree, _ = pickles.unpickled(archive.read(programs[0]), {}, policy)

    def fetch(storage: pickles.Storage) -> np.ndarray:
        name = f"{folder}data/{storage.key}"
        found = members[name].file_size if name in members else "none"
        need = storage.size * storage.dtype.itemsize
        if found != need:
            raise interfaces.UserError(f"its {name:.200} must have {need} bytes, has {found}")
        numbers = np.empty(need, np.uint8)
        with archive.open(name) as member:  # at its end the checksum is compared
            if stored.filled(member, numbers) < need or member.read(1):
                raise EOFError(f"{name:.200} ends early")
        source.check()
        return numbers.view(storage.dtype)

    return tree, fetch


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a file of `size` bytes, if `torch.save` may have written them."""
    members = {member.filename: member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise interfaces.UserError("two of its members have one name")
    # torch.save stores without compressing; so no member is larger than the file, nor all.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise interfaces.UserError("its members are compressed, which torch.save never does")
    if sum(member.file_size for member in members.values()) > size:
        raise interfaces.UserError("its members claim more bytes than the file has")
    if any(not 0 <= member.header_offset < size for member in members.values()):
        raise interfaces.UserError("one of its members lies outside the file")
    return members


def read_legacy(source: stored.Source, policy: pickles.Policy) -> tuple[Any, Fetch]:
    """The form before PyTorch 1.6: five pickles (magic number, protocol, system, the object, the
    keys of its storages), then each storage as its number of elements and its bytes."""
    file = source.file
    storages: dict[str, pickles.Storage] = {}
    places: dict[str, int] = {}
    file.seek(0)
    for wanted in (LEGACY_MAGIC, LEGACY_PROTOCOL):
        found = _next_pickle(source, {}, pickles.REFUSE)
        if type(found) is not int or found != wanted:
            raise interfaces.UserError("it is a pickle, but not one of torch.save")
    _next_pickle(source, {}, pickles.REFUSE)
    tree, keys = _next_pickle(source, storages, policy), _next_pickle(source, {}, pickles.REFUSE)
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise interfaces.UserError("its list of storages differs from those it mentions")
    for key in keys:
        need = storages[key].size
        (found,) = struct.unpack("<q", file.read(8))
        if found != need:
            raise interfaces.UserError(f"its {key:.100} must have {need} elements, has {found}")
        places[key] = file.tell()
        end = places[key] + need * storages[key].dtype.itemsize
        if end > source.size:
            raise interfaces.UserError(f"it is cut off within the storage {key:.100}")
        file.seek(end)

    def fetch(storage: pickles.Storage) -> np.ndarray:
        found = source.read(places[storage.key], storage.size * storage.dtype.itemsize)
        return found.view(storage.dtype)

    return tree, fetch


def _next_pickle(
    source: stored.Source, storages: dict[str, pickles.Storage], policy: pickles.Policy
) -> Any:
    file = source.file
    start = file.tell()
    program = file.read(min(pickles.LARGEST, source.size - start))  # read(n) takes n at once
    value, taken = pickles.unpickled(program, storages, policy)
    file.seek(start + taken)
    return value
