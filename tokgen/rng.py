"""Randomness: every key is a pure function of (seed, stream, step).

No key is kept in a module or a checkpoint: a run that is resumed at step n draws exactly what it
would have drawn. Inside a step, `fold_in` one of the constants below per use.
"""

from __future__ import annotations

import zlib

import jax

STREAMS = ("init", "train", "sample", "eval")

# Uses of randomness inside one step.
DROPOUT, LABEL_DROP, ORDER, MASK, QUANTIZER, MAINTAIN, CRITIC, SHUFFLE = range(8)


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of one step of a named stream."""
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}; found {stream!r}")
    # crc32 and not hash(): Python salts the hashes of strings anew in every process
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(root, step)


def per_image(seed: int, stream: str, indices_B: jax.Array) -> jax.Array:
    """One key per image index: an image depends on (seed, index) and on nothing beside it."""
    return jax.vmap(lambda index: key(seed, stream, index))(indices_B)
