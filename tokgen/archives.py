"""What a file says of itself, held against what it is before anything is done with it.

`arrays` reads an .npz whose members must fit their own headers and the bytes that are there; a few
hundred bytes may claim a thousand million images. `check_numbers` refuses weights that are not
finite. `plain` lets a name that was read from a file
become the name of a file of ours, or refuses it.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tokgen import storage
from tokgen.errors import UserError

# What zipfile, zlib and numpy raise on damaged archives
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, OverflowError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
DEFLATED = 1032  # bytes that one byte of a compressed member can become, no more
SMALL, RATIO = 2**26, 100  # bytes that any file may become in memory; beyond, times its own size
LONGEST = 200  # characters of a name; file systems end at 255 bytes, and parts are named beside it
# Names that Windows keeps for devices, with any ending
_DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def plain(name: object, what: str) -> str:
    """`name`, if a file of that name lies in the folder it is meant for, on every system.

    `what` says in the error where the name was read.
    """
    if isinstance(name, str) and is_plain(name):
        return name
    raise UserError(
        f"{what} must be the plain name of a file, without folders; found {name!r:.100}: it is not "
        "used, as it may lead elsewhere"
    )


def is_plain(name: str) -> bool:
    """Whether a name is one component of a path, visible and portable."""
    return (
        0 < len(name.encode(errors="replace")) <= LONGEST
        and name.isprintable()
        and not set(name) & set('/\\:*?"<>|')
        and not name.startswith((".", "-", "~"))
        and not name.endswith((".", " "))
        and name.split(".")[0].strip().lower() not in _DEVICES
    )


def opened(path: str | os.PathLike) -> zipfile.ZipFile:
    """An .npz whose members can be what they claim: none becomes more than its bytes can."""
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise UserError(
            f"cannot read {path} as .npz: {error}; need an archive as numpy.savez writes"
        ) from error
    problem = _problem(archive, os.path.getsize(path))
    if problem:
        archive.close()
        raise UserError(f"{path} is damaged, or means harm: {problem}; restore a copy")
    return archive


def _problem(archive: zipfile.ZipFile, size: int) -> str:
    """What is wrong with the claims of the members of a file of `size` bytes."""
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        return "two of its members have one name"
    if sum(member.compress_size for member in members) > size:
        return f"its members claim more bytes than the {size} that it has"
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED
        if not stored and member.compress_type != zipfile.ZIP_DEFLATED:
            return f"{member.filename!r:.100} is packed in a way that numpy never uses"
        most = member.compress_size if stored else DEFLATED * member.compress_size
        if member.file_size > most:
            return (
                f"{member.filename!r:.100} claims {member.file_size} bytes, of {most} at the most "
                f"that its {member.compress_size} can be"
            )
    return ""


def described(
    archive: zipfile.ZipFile, name: str, path: str | os.PathLike
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in column order, dtype) of the member NAME.npy, which has that many bytes."""
    try:
        with archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version not in HEADERS:
                raise ValueError(f"its version is {version}")
            shape, fortran, dtype = HEADERS[version](member)
            found = archive.getinfo(f"{name}.npy").file_size - member.tell()
    except DAMAGE as error:
        raise UserError(
            f"{path} is damaged: {name!r:.100} is no array ({error}); make it again or restore a "
            "copy"
        ) from error
    if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=1) < 0:
        raise UserError(f"{name!r:.100} of {path} must hold numbers or text; found {dtype} {shape}")
    need = math.prod(shape) * dtype.itemsize
    if need != found:
        raise UserError(
            f"{path} is damaged: {name!r:.100} claims {dtype} {shape}, {need} bytes; it has "
            f"{found}; make it again or restore a copy"
        )
    return tuple(shape), bool(fortran), dtype


def array(archive: zipfile.ZipFile, name: str, path: str | os.PathLike) -> np.ndarray:
    """One array of an archive that `opened` gave, whole; its checksum is compared."""
    described(archive, name, path)
    try:
        with archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    except DAMAGE as error:
        raise UserError(
            f"{path} is damaged: {name!r:.100} cannot be read ({error}); make it again or restore "
            "a copy"
        ) from error


def names(archive: zipfile.ZipFile) -> list[str]:
    """What its arrays are called."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def arrays(path: str | os.PathLike, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an .npz by name, but for those of `without`."""
    with opened(path) as archive:
        wanted = [name for name in names(archive) if name not in without]
        claimed = sum(archive.getinfo(f"{name}.npy").file_size for name in wanted)
        size = os.path.getsize(path)
        if claimed > max(SMALL, RATIO * size):
            raise UserError(
                f"{path} has {size} bytes and would take {claimed} in memory, more than {RATIO} "
                "times as many: if it is meant, save it uncompressed (numpy.savez)"
            )
        return {name: array(archive, name, path) for name in wanted}


def check_numbers(weights: Mapping[str, np.ndarray], source: str) -> None:
    """An error that names the arrays with numbers that are none, or that float32 does not hold."""
    wrong = [what for key, array in weights.items() if (what := not_finite(key, array, source))]
    refuse_numbers(wrong, source)


def not_finite(key: str, array: np.ndarray, source: str) -> str:
    """Of an array with numbers that are none its name and how many; "" where there are none."""
    if array.dtype.kind in "cb":
        raise UserError(f"{key} of {source} holds {array.dtype}, which no weight is")
    with np.errstate(over="ignore"):
        fine = np.isfinite(array.astype(np.float32, copy=False))
    return "" if fine.all() else f"{key} ({fine.size - np.count_nonzero(fine)} of {fine.size})"


def refuse_numbers(wrong: Sequence[str], source: str) -> None:
    """The error of arrays that `not_finite` found."""
    if wrong:
        shown = ", ".join(wrong[:6]) + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise UserError(
            f"{source} holds numbers that are not finite in {len(wrong)} arrays: {shown}; nothing "
            "of use comes of them: fetch the file again, or take an earlier checkpoint"
        )


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with storage.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
