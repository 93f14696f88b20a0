"""Randomness: every key is a pure function of (seed, stream, step), and of what it is used for.

No key is kept in a module or a checkpoint: a run that is resumed at step n draws exactly what it
would have drawn. Below a step there are three ways on, and each key goes one of them only:

    a sampler of jax.random eats it;
    `use(key, USE)`, one of the table below: what the draw is for;
    `number(key, n)`, `numbered(key, count)`: which of many of a kind (the images of a batch, the
    layers of a stack, the symbols of a position, the scales of a pyramid).

`jax.random.split` and `fold_in` are called nowhere else, but where a published program's own draws
are replayed, since `split(key, n)[1]` is `fold_in(key, 1)`: two uses that never heard of each other
would draw the same mask. Numbers lie below 2^24 and uses above, so that not even a key that went
both ways would draw twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STREAMS = ("init", "train", "sample", "eval")
NUMBERS = 2**24  # what `number` may be given lies below, where it is not a step or an image


def _letters(word: str) -> int:
    return int.from_bytes(word.encode("ascii"), "big")


# ---------------------------------------------------------------- the table: one constant per use

PART = _letters("part")  # of a batch that is taken in parts; below it its number, then as a step

# a training step of a generator, per step or per image of it
DROPOUT = _letters("drop")  # all that its networks leave out
LABEL_DROP = _letters("labl")  # which conditions are dropped
MASK = _letters("mask")  # masked models: below it, per image, TIME and SLOTS
TIME, SLOTS = _letters("time"), _letters("slot")
ORDER = 2  # of the tokens. Not a word: the images that a seed draws in random order depend on it
SHUFFLE, CHANCE = _letters("shuf"), _letters("chan")  # another order, and whether it is taken

# below DROPOUT: the parts of a network, and of a block below the number of its layer
INPUTS, TRUNK, HEAD = _letters("inpt"), _letters("trnk"), _letters("head")
ATTENTION, ATTENDED = _letters("attn"), _letters("attd")  # its weights; its residual branch
HIDDEN, MAPPED = _letters("hidn"), _letters("mapd")  # of the MLP; its residual branch
RESIDUAL, PATH = _letters("resi"), _letters("path")  # entries of a branch; a branch as a whole

# a training step of a tokenizer
QUANTIZER, MAINTAIN = _letters("quan"), _letters("main")
DISCRIMINATOR = _letters("crit")  # below it, which images it sees: real, reconstructed, ...
REAL, FAKE = _letters("real"), _letters("pain")
AGAIN = _letters("agai")  # ... each a second time, to compare; ...
TOKENIZER, UPKEEP = _letters("play"), _letters("upke")  # ... for the tokenizer's loss; statistics
CROP, AUGMENT = _letters("crop"), _letters("augm")  # below each of these; then what they draw:
CHOSEN, ROW, COLUMN = _letters("chos"), _letters("row_"), _letters("colm")
COLOR, TRANSLATION, CUTOUT = _letters("colr"), _letters("tran"), _letters("cuto")

# a training step of a local classifier
FLIP, TURN, MOVE = _letters("flip"), _letters("turn"), _letters("move")

# an image that is drawn: below it the number of the step, then of the symbol; and ORDER
DRAW, JITTER = _letters("draw"), _letters("jitt")
PARTICLE = _letters("prtc")  # below it the number of one of several draws for one image
RESAMPLE = _letters("rsmp")  # which particles of an image go on; below it the number of the step
CHOICE = _letters("choi")  # which one is the image in the end


def key(seed: int, stream: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of one step of a named stream."""
    root = jax.random.fold_in(jax.random.key(seed), _number_of(stream))
    return jax.random.fold_in(root, step)


def _number_of(stream: str) -> int:
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}; found {stream!r}")
    # crc32 and not hash(): Python salts the hashes of strings anew in every process
    return zlib.crc32(stream.encode()) & 0x7FFFFFFF


def per_image(seed: int, stream: str, indices_B: jax.Array) -> jax.Array:
    """One key per image index: an image depends on (seed, index) and on nothing beside it."""
    return jax.vmap(lambda index: key(seed, stream, index))(indices_B)


def data_per_image(seed: int, stream: str, index_B: np.ndarray) -> np.ndarray:
    """The data of `per_image`'s keys [B, 2], made where the numbers of images lie: on the host.

    As programs that draw keys they are a fraction of a second in the making, more than a small
    network takes to draw.
    """
    if jax.config.jax_default_prng_impl != "threefry2x32":
        return np.asarray(jax.random.key_data(per_image(seed, stream, index_B)))
    # arrays of one: what overflows in a scalar is warned of
    key = (np.array([0], np.uint32), np.array([seed % 2**32], np.uint32))
    root = _threefry(key, np.array([_number_of(stream)], np.uint32))
    return np.stack(_threefry(root, np.asarray(index_B, np.uint32)), axis=-1)


def _threefry(key: Sequence[np.ndarray], number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both words of `fold_in`: the block (0, number) under Threefry-2x32 of 20 rounds, a cipher
    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x_B, y_B = np.broadcast_to(keys[0], number_B.shape), number_B + keys[1]
    for turn in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            x_B = x_B + y_B
            y_B = x_B ^ (y_B << np.uint32(bits) | y_B >> np.uint32(32 - bits))
        x_B = x_B + keys[(turn + 1) % 3]
        y_B = y_B + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return x_B, y_B


def use(key: jax.Array | None, what: int) -> jax.Array | None:
    """The key of one use, a constant of the table; none of none."""
    return None if key is None else jax.random.fold_in(key, what)


def number(key: jax.Array | None, n: int | jax.Array) -> jax.Array | None:
    """The key of number n of many of a kind; none of none."""
    return None if key is None else jax.random.fold_in(key, n)


def numbered(key: jax.Array | None, count: int) -> jax.Array | None:
    """[count] keys, of numbers 0 to count - 1; none of none."""
    if key is None:
        return None
    if count >= NUMBERS:
        raise ValueError(f"at most {NUMBERS - 1} of a kind have keys of their own; found {count}")
    return jax.vmap(lambda n: number(key, n))(jnp.arange(count))


# ---------------------------------------------------------------- for the making of modules


class _Stream(nnx.RngStream):
    """A stream that counts its keys in Python."""

    def __init__(self, key: jax.Array | int, *, tag: str):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key

    def fork(self) -> nnx.RngStream:
        """For a module to keep: that one counts as nnx does."""
        return nnx.RngStream(self(), tag=self.tag)


def rngs(key: jax.Array | int) -> nnx.Rngs:
    """`nnx.Rngs(key)`, the same keys, for modules that are made under a trace.

    There nnx counts with an array, and at each key jax words an error that nobody reads, the
    longer the more has been traced (flax 0.12.8, jax 0.10.2).
    """
    found = nnx.Rngs()
    found.default = _Stream(key, tag="default")
    return found
