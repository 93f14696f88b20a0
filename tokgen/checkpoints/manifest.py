"""What a checkpoint should hold: a checksum of every array, the size of every file.

The store returns flipped bytes and casts dtypes without a word, and never misses a file that it
skips. `checkpoint.py` writes these records beside every step and compares them on every restore.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import records, storage

BLOCK, FEW = 2**20, 2**16  # elements
SIZES = "sizes.json"
FIGURES = "figures.json"  # comes after the seal, and has a digest of its own


@jax.jit
def checksum(leaf: jax.Array, before: jax.Array | int = 0) -> jax.Array:
    """Two 32-bit sums of the bits, each element times an odd number of its own.

    Sums of integers modulo 2^32 have no order: any sharding gives the same, no array has to leave
    its device, and those of its pieces add up; `before` are the elements before a piece. A single
    changed element is always seen.
    """
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return _summed(_bits(leaf), index + jnp.asarray(before, jnp.uint32))


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of every element as a number."""
    if jnp.issubdtype(leaf.dtype, jnp.bool_):
        leaf = leaf.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _summed(bits: jax.Array, index: jax.Array) -> jax.Array:
    """Both sums of elements of these numbers."""

    def mixed(constant):
        x = (index + jnp.uint32(1)) * jnp.uint32(constant)
        x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
        return (x ^ (x >> 12)) | jnp.uint32(1)

    return jnp.stack([jnp.sum(bits * mixed(c), dtype=jnp.uint32) for c in (0x9E3779B1, 0x85EBCA77)])


@jax.jit
def _checksum_in_blocks(leaf: jax.Array, before: jax.Array | int = 0) -> jax.Array:
    """As `checksum`, of a large array in one piece; what it needs on the way is small."""
    flat, before = leaf.reshape(-1), jnp.asarray(before, jnp.uint32)

    def body(number, sums):
        first = number * BLOCK
        start = jnp.minimum(first, flat.size - BLOCK)  # the last block overlaps that before it
        place = start + jnp.arange(BLOCK, dtype=jnp.int32)
        bits = _bits(jax.lax.dynamic_slice(flat, (start,), (BLOCK,)))
        bits = jnp.where(place >= first, bits, 0)
        return sums + _summed(bits, place.astype(jnp.uint32) + before)

    return jax.lax.fori_loop(0, -(-flat.size // BLOCK), body, jnp.zeros(2, jnp.uint32))


@jax.jit
def _checksum_of_block(flat: jax.Array, before: jax.Array) -> jax.Array:
    return _summed(_bits(flat), jnp.arange(flat.size, dtype=jnp.uint32) + before)


def _checksum_on_host(leaf: np.ndarray, before: int) -> np.ndarray:
    """As `checksum`; in blocks of one size, so that a shape more is no program more."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize]
    flat = np.ascontiguousarray(leaf).reshape(-1).view(width)
    found, start = np.zeros(2, np.uint32), 0
    while start < flat.size:
        block = flat[start : start + BLOCK]
        first = np.uint32((before + start) % 2**32)
        if len(block) <= FEW:
            found = found + _checksum_of_few(block, first)
        else:  # zeros add nothing
            padded = np.pad(block, (0, BLOCK - len(block)))
            found = found + np.asarray(_checksum_of_block(padded, first))
        start += BLOCK
    return found


def _checksum_of_few(flat: np.ndarray, before: np.uint32) -> np.ndarray:
    """As `_checksum_of_block`, sooner than a program is called."""
    place = np.arange(flat.size, dtype=np.uint32) + (before + np.ones(1, np.uint32))
    sums = []
    for constant in (0x9E3779B1, 0x85EBCA77):
        x = place * np.uint32(constant)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
        mixed = (x ^ (x >> np.uint32(12))) | np.uint32(1)
        sums.append((flat.astype(np.uint32) * mixed).sum(dtype=np.uint32))
    return np.stack(sums)


def _checksum_of(
    leaf: jax.Array | np.ndarray, before: np.uint32 | int = 0
) -> jax.Array | np.ndarray:
    if isinstance(leaf, np.ndarray):
        return _checksum_on_host(leaf, int(before))
    in_blocks = leaf.is_fully_replicated and BLOCK < leaf.size < 2**31
    return (_checksum_in_blocks if in_blocks else checksum)(leaf, before)


def of(leaves: dict[str, jax.Array]) -> dict[str, dict]:
    """Shape, dtype and checksum of every leaf."""
    leaves = {**leaves, **jax.device_get({p: a for p, a in leaves.items() if _is_small(a)})}
    sums = jax.device_get({path: _checksum_of(leaf) for path, leaf in leaves.items()})
    return {path: _entry(leaf, sums[path]) for path, leaf in leaves.items()}


def _is_small(leaf: jax.Array | np.ndarray) -> bool:
    """Whether it is summed on the host, where a shape more is no program more."""
    return leaf.size <= FEW and isinstance(leaf, jax.Array) and leaf.is_fully_replicated


def _entry(leaf: jax.Array | jax.ShapeDtypeStruct, sums: np.ndarray) -> dict:
    return {
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "checksum": "".join(f"{int(part):08x}" for part in sums),
    }


class Sums:
    """Checksums of leaves that arrive in pieces: whole, or layer by layer."""

    def __init__(self):
        self.found: dict[str, np.ndarray] = {}

    def add(self, path: str, layer: int, piece: np.ndarray) -> None:
        """Take in a piece of a leaf, the first layer or another of the same shape."""
        before = np.uint32(layer * piece.size % 2**32)
        found = np.asarray(_checksum_of(piece, before))
        self.found[path] = self.found.get(path, np.zeros(2, np.uint32)) + found

    def manifest(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, dict]:
        """As `of`, of the leaves whose pieces were all taken in."""
        return {path: _entry(leaf, self.found[path]) for path, leaf in leaves.items()}


def digest(meta: dict) -> str:
    # of the JSON text: what is written with tuples is read with lists
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def seal(step: pathlib.Path) -> None:
    """Note the size of every file of a committed step: the store never misses what it skips."""
    if not (step / SIZES).exists():
        put(step, SIZES, json.dumps(_sizes(step)))


def put(step: pathlib.Path, name: str, text: str) -> None:
    """Write a file of a step that is there; it appears whole or not at all."""
    if storage.is_remote(step):
        storage.save(step / name, text.encode())
        return
    # beside the step: a part that is left over is none of its files
    part = step.parent / f".{step.name}.{name}"
    part.write_text(text)
    part.replace(step / name)


def _sizes(step: pathlib.Path) -> dict[str, int]:
    return {n: size for n, size in storage.sizes(step).items() if n not in (SIZES, FIGURES)}


def misfit(step: pathlib.Path) -> str:
    """What is wrong with the sizes of a step's files, truncated and missing ones; empty if nothing.

    A step that was killed before its seal has checksums only.
    """
    with storage.reached(step):
        if not (step / SIZES).exists():
            return ""
    try:
        with storage.reached(step):
            noted = records.load(step / SIZES)
            found = _sizes(step)
        wrong = [f"{name} ({found.get(name, 'missing')} bytes, {size} needed)"
                 for name, size in noted.items() if found.get(name) != size]  # fmt: skip
    except storage.NotReached:
        raise
    except (OSError, ValueError, AttributeError) as error:
        return f"{SIZES} cannot be read ({error})"
    return f"its files are not as they were saved: {', '.join(wrong[:3])}" if wrong else ""
