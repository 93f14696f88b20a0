"""Which files a path means: one, the one in a folder, or the parts that an index names."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from tokgen import archives, interfaces, records

MOST_NAMES = 10**6  # of an index
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack")


def located(path: str | os.PathLike) -> str:
    """The weight file, or the index of several, that a path means: itself, or one in a folder."""
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise interfaces.UserError(f"weight file: there is no file {path}")
    names = sorted(os.listdir(path))
    for suffixes in ((f".safetensors{INDEX}",), (INDEX,), (".safetensors",), SUFFIXES):
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return os.path.join(path, found[0])
        if found:
            break
    raise interfaces.UserError(
        f"weight file: there is no file {path}, which is a folder: name the file in it, one of "
        f"{', '.join(found[:5]) or ', '.join(names[:5]) or 'none'}{' ...' if found[5:] else ''}"
    )


def files(path: str) -> list[str]:
    """The file of a path, or those that an index names, which lie beside it."""
    if not path.endswith(INDEX):
        return [path]
    folder = os.path.dirname(path)
    return [os.path.join(folder, name) for name in sorted(set(_index(path).values()))]


def _index(path: str) -> dict[str, str]:
    """Which part holds which array, of `....index.json` as Hugging Face's programs write it."""
    try:
        found = records.load(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise interfaces.UserError(f"the index {path} cannot be read: {error}") from error
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        raise interfaces.UserError(
            f"the index {path} needs a weight_map, from the name of every array to its file"
        )
    if len(names) > MOST_NAMES:
        raise interfaces.UserError(f"the index {path} has more than {MOST_NAMES} entries")
    for name in dict.fromkeys(map(str, names.values())):
        archives.plain(name, f"a file in the index {path}")
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise interfaces.UserError(
                f"the index {path} names {name}, which is not beside it: fetch all parts"
            )
    return {name: str(file) for name, file in names.items()}


def check_names(path: str, found: Sequence[set[str]]) -> None:
    """An error where the parts hold others than the index says."""
    index = _index(path)
    for file, names in zip(files(path), found, strict=True):
        file = os.path.basename(file)
        wanted = {name for name, part in index.items() if part == file}
        if wanted != names:
            raise interfaces.UserError(
                f"{file} and its index {path} differ in {', '.join(sorted(wanted ^ names)[:5])}: "
                "fetch both again"
            )
