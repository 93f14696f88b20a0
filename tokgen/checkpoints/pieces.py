"""Arrays of a step read in pieces: a leaf at a time, or a layer of one, on the host.

Orbax restores a stacked leaf whole, several at a time, and lets go of them late: a network would
need up to three times its size to be loaded. These read the store beneath it, a few pieces ahead of
who takes them. Each leaf is held against its checksum when its last piece was taken.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore

from tokgen import runtime, storage
from tokgen.checkpoints import manifest

AHEAD = 2**25  # bytes of pieces that are read before they are asked for
EACH = 2**26  # bytes of pieces after which what was freed is given back to the system

Piece = tuple[str, int | None, np.ndarray]  # path, layer of a leaf that comes apart, numbers


def read(
    folder: pathlib.Path,
    wanted: Mapping[str, Any],
    record: Mapping[str, Mapping],
    name: Callable[[str], str],
    apart: Collection[str],
) -> Iterator[Piece]:
    """Every leaf of `wanted` (shapes and dtypes by path), in its order.

    Those in `apart` come layer by layer where they are stored so: others would be decoded whole
    for each of their layers. `name` is what a path is called in the store.

    Raises:
        ValueError: a leaf cannot be read, or is not as `record`, its manifest, says.
    """
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    stores = {
        path: tensorstore.open(_spec(folder, name(path)), read=True, open=True, context=context)
        for path in wanted
    }
    for path, leaf in wanted.items():
        store = stores[path] = stores[path].result()
        if store.shape != tuple(leaf.shape) or store.dtype.numpy_dtype != np.dtype(leaf.dtype):
            there = f"{store.dtype.name} {list(store.shape)}"
            raise ValueError(f"{path} is {there} there, not {leaf.dtype} {list(leaf.shape)}")
    sums, ahead, taken, freed = manifest.Sums(), collections.deque(), 0, 0
    for path, layer, last in [*_order(stores, apart), (None, None, True)]:
        size = 0
        if path is not None:
            place = stores[path] if layer is None else stores[path][layer]
            size = place.size * place.dtype.numpy_dtype.itemsize
        # all that are left at the end; one at least is always on its way
        while ahead and (path is None or taken + size > AHEAD):
            piece, future, of_piece = ahead.popleft()
            yield from _taken(piece, future, sums, wanted, record)
            taken, freed = taken - of_piece, freed + of_piece
            del future
            if freed > EACH:
                runtime.release()
                freed = 0
        if path is not None:
            ahead.append(((path, layer, last), place.read(), size))
            taken += size
    runtime.release()


def _taken(
    piece: tuple[str, int | None, bool],
    future: tensorstore.Future,
    sums: manifest.Sums,
    wanted: Mapping[str, Any],
    record: Mapping[str, Mapping],
) -> Iterator[Piece]:
    (path, layer, last), numbers = piece, future.result()
    sums.add(path, layer or 0, numbers)
    if last and sums.manifest({path: wanted[path]})[path]["checksum"] != record[path]["checksum"]:
        raise ValueError(f"the checksum of {path} does not match its manifest")
    yield path, layer, numbers


def _order(
    stores: Mapping[str, tensorstore.TensorStore], apart: Collection[str]
) -> Iterator[tuple[str, int | None, bool]]:
    """(path, layer, whether it is the last piece of its leaf) of all pieces."""
    for path, store in stores.items():
        chunks = store.chunk_layout.read_chunk.shape
        if path in apart and store.rank > 1 and chunks[0] == 1:
            for layer in range(store.shape[0]):
                yield path, layer, layer == store.shape[0] - 1
        else:
            yield path, None, True


def _spec(folder: pathlib.Path, name: str) -> dict:
    """Where Orbax puts an array: into a database of one folder, or a folder of its own."""
    if (folder / "manifest.ocdbt").exists():
        base = _store(f"{folder}/")
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return {"driver": "zarr", "kvstore": _store(f"{folder}/{name}/")}


def _store(path: str) -> dict | str:
    """What tensorstore calls a folder: of a bucket, its address."""
    return path if storage.is_remote(path) else {"driver": "file", "path": path}
