"""Token shards of a bucket on this host: fetched once, whole, and known by their contents.

A shard is compared with its checksum before it is used, so it is read whole in any case; read a few
records at a time, as training does, a bucket would answer too slowly. What is here is found by its
checksum: sets that share a shard share its file, and one that was changed is another one.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

from tokgen import archives, report, runtime, storage
from tokgen.data import token_header
from tokgen.errors import UserError
from tokgen.output import failures, locks

FOLDER = "tokens"  # of the cache
HASH = re.compile(r"[0-9a-f]{64}")


def places(path: str, shards: Sequence[Mapping]) -> list[str]:
    """Where the shards of a set lie on this host, or will once they are fetched."""
    if not storage.is_remote(path):
        return [os.path.join(path, shard["file"]) for shard in shards]
    for shard in shards:
        if not HASH.fullmatch(shard["sha256"]):
            raise token_header.damage(f"{path}/{shard['file']}", "its checksum is none")
    cache = runtime.cache_folder() / FOLDER
    return [str(cache / f"{shard['sha256']}.array_record") for shard in shards]


def files(path: str, shards: Sequence[Mapping], *, verify: bool) -> list[str]:
    """Where the shards of a set lie on this host; those of a bucket once they are fetched.

    One that was fetched before and was cut off since is fetched again; with `verify`, so is one
    that is damaged in another way.

    Raises:
        UserError: there is no room for them, or one is not what the header states.
    """
    found = places(path, shards)
    if not storage.is_remote(path):
        return found
    cache, folder = runtime.cache_folder() / FOLDER, storage.path(path)
    targets = [pathlib.Path(file) for file in found]
    with storage.reached(path), failures.told(cache, option=""):
        cache.mkdir(parents=True, exist_ok=True)
        there = storage.sizes(folder)

        def is_here(shard: Mapping, target: pathlib.Path) -> bool:
            if not target.exists():
                return False
            if there.get(shard["file"], size := target.stat().st_size) != size:  # it was cut off
                return False
            return not verify or archives.sha256(target) == shard["sha256"]

        missing = [
            (folder / shard["file"], shard["sha256"], target)
            for shard, target in zip(shards, targets, strict=True)
            if not is_here(shard, target)
        ]
        need = sum(there.get(source.name, 0) for source, _, _ in missing)
        _check_room(path, cache, need)
        with report.bar(len(missing), unit="shard", what="fetch") as bar:
            for source, sha256, target in missing:
                _fetch(source, sha256, target)
                bar.update()
    return found


def _check_room(path: str, cache: pathlib.Path, need: int) -> None:
    free = shutil.disk_usage(cache).free
    if need > free:
        raise UserError(
            f"the tokens of {path} are fetched into {cache} first: that needs "
            f"{report.amount(need)}; found {report.amount(free)} free: make room, or say by "
            "TOKGEN_CACHE where there is more"
        )


def _fetch(source: pathlib.Path, sha256: str, target: pathlib.Path) -> None:
    """One process of a host fetches a shard; the others wait for it."""
    with locks.waiting(target.with_suffix(".lock"), f"{source.name} is being fetched by {{}}"):
        if target.exists() and archives.sha256(target) == sha256:
            return
        if not source.exists():
            raise token_header.damage(str(source), "the file is missing")
        part = target.with_suffix(".part")
        try:
            for _ in range(2):  # once more: the way there may have cut it off
                storage.download(source, part)
                if archives.sha256(part) == sha256:
                    break
            else:
                raise token_header.damage(
                    str(source), "the contents do not have the checksum that the header states"
                )
            with open(part, "rb") as file:  # else a host that fails may keep its name alone
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
