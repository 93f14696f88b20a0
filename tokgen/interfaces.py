"""What crosses between the parts of tokgen: the alphabet of axes, layouts, batches, protocols.

One letter per axis, the same in variable names, einsum strings, docstrings and sharding rules:

    B     batch                                   D     transformer width
    H, W  image rows, columns                     N, K  attention heads, size of one head
    P     positions of the finest latent grid     F     hidden width of an MLP
    L     tokens of one image (sequence)          S     cached positions (keys and values)
    G     symbols of one position                 Y     layers, when parameters are stacked
    V     size of a symbol's alphabet (largest)   T     decoding steps
    C     channels of a latent vector             3     colour (1 where images are gray)

An array of rank two or more ends in its axes: tokens_BLG, latents_BPC, logits_BLGV, image_BHW3.
A batch of scalars ends in _B. A small letter is a part of the axis: tokens_BlG. Every token in
the library is [B, L, G]: an ordinary codebook has G = 1. Images are float32 in [0, 1] wherever
they cross an interface; the range that a network sees belongs to its tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from tokgen.errors import UserError as UserError  # a word of every interface

Array = jax.Array
PyTree = Any


class Statistic(nnx.Variable):
    """What a module owns beside its parameters (codebook counts): saved, without a gradient."""


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """What a generator knows of a tokenizer: alphabets of the symbols, grids coarse to fine.

    A stride-16 VQGAN at 256 pixels is `TokenLayout((1024,), ((16, 16),))`; 32 one-dimensional
    tokens are `TokenLayout((4096,), ((1, 32),))`; 14 bits as two halves, `vocab=(128, 128)`.
    """

    vocab: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]

    def __post_init__(self):
        # lists come from JSON and configs; a layout must be hashable to be static under jit
        object.__setattr__(self, "vocab", tuple(int(v) for v in self.vocab))
        object.__setattr__(self, "grids", tuple((int(r), int(c)) for r, c in self.grids))
        if not self.vocab or min(self.vocab) < 2:
            raise UserError(f"a layout needs alphabets of at least 2 symbols; found {self.vocab}")
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            raise UserError(f"a layout needs grids of at least 1 x 1; found {self.grids}")
        # far above every published one; a record that says more would be believed with memory
        many = max(len(self.vocab), len(self.grids))
        if max(self.vocab) > 2**24 or many > 1000 or self.length > 2**20:
            raise UserError(
                "a layout has at most 1,000 alphabets and grids, 2^24 symbols and 2^20 tokens; "
                f"found {str(self.vocab)[:100]}, {str(self.grids)[:100]}"
            )

    @property
    def groups(self) -> int:
        """G, how many symbols a position has."""
        return len(self.vocab)

    @property
    def absent(self) -> int:
        """V, the largest alphabet; as a token it says "nothing here"."""
        return max(self.vocab)

    @property
    def length(self) -> int:
        """L, the tokens of one image."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, size) of each grid in the sequence: grids 1, 2, 3 give (0, 1), (1, 4), (5, 9)."""
        sizes = [rows * columns for rows, columns in self.grids]
        return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))

    @property
    def coordinates(self) -> np.ndarray:
        """[L, 2] centres (row, column) of the cells in [0, 1], in the order of the sequence."""
        centres = []
        for rows, columns in self.grids:
            r, c = np.divmod(np.arange(rows * columns), columns)
            centres.append(np.stack([(r + 0.5) / rows, (c + 0.5) / columns], -1))
        return np.concatenate(centres).astype(np.float32)

    def to_json(self) -> dict:
        """A dictionary for JSON files; `from_json` is its inverse."""
        return {"vocab": list(self.vocab), "grids": [list(grid) for grid in self.grids]}

    @classmethod
    def from_json(cls, record: dict) -> TokenLayout:
        """The layout written by `to_json`; UserError for any other record."""
        try:
            vocab, grids = tuple(record["vocab"]), tuple(map(tuple, record["grids"]))
            if not all(type(n) is int for n in (*vocab, *(n for grid in grids for n in grid))):
                raise TypeError("numbers that are no integers")
            if not all(len(grid) == 2 for grid in grids):
                raise TypeError("a grid is rows and columns")
        except (KeyError, TypeError) as error:
            raise UserError(f"no layout of tokens: {str(record)[:100]} ({error})") from error
        return cls(vocab, grids)


@struct.dataclass
class Quantized:
    """What a quantizer returns while training."""

    latents_BPC: Array  # straight-through: the value of the code, the gradient of the input
    tokens_BLG: Array
    losses: dict[str, Array]  # named, unweighted scalars; the config holds the weights


@struct.dataclass
class Text:
    """A condition of text: features of a frozen encoder, padded on the left."""

    features_BTE: Array
    mask_BT: Array  # true where a feature is valid


@struct.dataclass
class TokenBatch:
    """What a generator is trained on."""

    tokens_BLG: Array  # V where a masked generator is to see nothing
    cond: PyTree  # label_B, or a Text
    order_BL: Array | None = None  # position handled at each place; None: the generator's own


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive decoding steps that share one compiled loop; static."""

    first: int  # number of its first step
    steps: int
    start: int  # place of its first position in the sequence
    size: int  # positions handled by each step
    slots: int = 0  # cache slots in use when it ends

    def place(self, index: Array | int) -> Array | int:
        """Place in the sequence of the first position that step `index` handles."""
        return self.start + (index - self.first) * self.size

    def split(self, index: int) -> tuple[Phase, Phase]:
        """The phase in two, the second of which begins with step `index`."""
        done = index - self.first
        left = dataclasses.replace(self, steps=done)
        right = dataclasses.replace(
            self, first=index, steps=self.steps - done, start=self.start + done * self.size
        )
        return left, right


@struct.dataclass
class DecodeState:
    """Where a decode stands; every array leads with the rows of the batch."""

    tokens_BLG: Array  # drawn so far; V marks "not yet"
    given_BLG: Array  # true where a token was given, not drawn
    order_BL: Array  # which position is handled at each place of the sequence
    cond: PyTree
    keys_B: Array  # one key per image: an image does not depend on its batch
    modulation: PyTree = None  # what the blocks need from the condition, when computed beforehand
    cache: Any = None  # one KVCache per layer; None for generators that look both ways
    latents_BPC: Array | None = None  # what a scale codec has accumulated
    invalid_B: Array | None = None  # true where logits were not finite; written by the driver

    def read(self, positions_Bl: Array) -> Array:
        """Tokens [B, l, G] at some positions."""
        return jnp.take_along_axis(self.tokens_BLG, positions_Bl[..., None], axis=1)

    def write(self, positions_Bl: Array, tokens_BlG: Array) -> DecodeState:
        """The state with tokens written at some positions, never over a given one."""
        given_BlG = jnp.take_along_axis(self.given_BLG, positions_Bl[..., None], axis=1)
        tokens_BlG = jnp.where(given_BlG, self.read(positions_Bl), tokens_BlG)
        rows_B1 = jnp.arange(len(tokens_BlG))[:, None]
        return self.replace(tokens_BLG=self.tokens_BLG.at[rows_B1, positions_Bl].set(tokens_BlG))


class Quantizer(Protocol):
    """Latent vectors into tokens and back. Always float32 inside."""

    layout: TokenLayout | None  # None: continuous, without tokens
    inputs: int  # channels that the encoder gives
    channels: int  # channels of the latents that it returns

    def __call__(self, latents_BPC: Array, *, key: Array | None = None) -> Quantized: ...
    def encode(self, latents_BPC: Array) -> Array: ...
    def decode(self, tokens_BLG: Array) -> Array: ...
    def maintain(self, latents_BPC: Array, *, key: Array) -> None: ...  # after an optimizer step


Draw = Callable[..., tuple[Array, Array]]  # draw(logits_BlGV, symbol=0) -> tokens, confidence


class Generator(Protocol):
    """A loss, and a decoding state machine."""

    layout: TokenLayout
    exact: bool  # whether `nats` is the likelihood; else an upper bound, by random orders
    knobs: tuple[str, ...]  # attributes that sampling settings may change, as a number of steps

    def logits(self, batch: TokenBatch, codec: Quantizer, *, key: Array | None = None) -> Array: ...
    def loss(
        self, batch: TokenBatch, codec: Quantizer, *, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]: ...
    def nats(self, batch: TokenBatch, codec: Quantizer, *, key: Array | None = None) -> Array: ...
    def check(self, cond: PyTree) -> None: ...  # an error where it is no condition of its
    def null(self, cond: PyTree) -> PyTree: ...
    def plan(self) -> tuple[Phase, ...]: ...
    def start(
        self, cond: PyTree, codec: Quantizer, *, keys_B: Array, given: tuple[Array, Array]
    ) -> DecodeState: ...
    def step(
        self, state: DecodeState, phase: Phase, index: Array, codec: Quantizer, draw: Draw
    ) -> DecodeState: ...
