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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx, struct

from tokgen.errors import UserError as UserError  # a word of every interface

Array = jax.Array
PyTree = Any
Given = tuple[jax.Array, jax.Array]  # tokens_BLG, V where none is given, and where one is


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


class Quantizer(Protocol):
    """Latent vectors into tokens and back. Always float32 inside."""

    layout: TokenLayout | None  # None: continuous, without tokens
    inputs: int  # channels that the encoder gives
    channels: int  # channels of the latents that it returns

    def __call__(self, latents_BPC: Array, *, key: Array | None = None) -> Quantized: ...
    def encode(self, latents_BPC: Array) -> Array: ...
    def decode(self, tokens_BLG: Array) -> Array: ...
    def maintain(self, latents_BPC: Array, *, key: Array) -> None: ...  # after an optimizer step


@runtime_checkable
class ScaleCodec(Protocol):
    """What a quantizer over a pyramid of grids has beside `Quantizer`: latents that add up.

    P are the positions of the finest grid, l those of one scale. It may have
    `toward(latents_BPC, known_BPC, held_BP, scale)` as well: [B, l, G, V], what a `Draw` is drawn
    toward where a part of the latents is held, or None where it cannot tell.
    """

    def empty(self, batch: int) -> Array:
        """[batch, P, C] latents of which nothing is known yet."""

    def known_before(self, tokens_BLG: Array) -> Array:
        """[B, L - first, C] what is known when each scale's turn comes, but for the first."""

    def absorb(self, latents_BPC: Array, tokens_BlG: Array, scale: int) -> Array:
        """[B, P, C] latents with the tokens of a scale added to them."""

    def view(self, latents_BPC: Array, scale: int) -> Array:
        """[B, l, C] latents averaged down to the grid of a scale."""

    def left(self, latents_BPC: Array, known_BPC: Array, scale: int) -> Array:
        """Tokens [B, l, G] that a scale has of latents of which so much is known."""


# ---------------------------------------------------------------- generator and sampler
#
# The one place that says what a generator and those who draw from it may assume of each other.
# `sampling.decode.generate` is the driver: it alone calls `unstacked`, `start` and `step`. A new
# generator is written from what follows; tests/generators/test_contract.py holds every one to it.
#
# The driver promises
#   - to call `start` once, then `step` for every step of `plan` in order. `index` is the step's
#     number, a Python integer in a phase of one step and traced in a longer one, whose steps run
#     in one compiled loop. A phase may come in two parts (`Phase.split`);
#   - rows that are the images of the batch, or those followed by as many with the `null` of their
#     conditions. The second half may come (where there is no cache) and go between two steps, so
#     that rows are counted anew in each;
#   - tokens that are V where none is given, and a cache with room for `phase.slots` slots;
#   - a `draw` that samples, merges guidance, and gives both halves the same tokens;
#   - of a generator that has `told(cond, phase, index, steps)`, to ask it before the loop over so
#     many steps of a phase from `index` on, and to hand each step its own as `state.modulation`.
#
# A generator promises
#   - where it says `holds_latents`, to hold what `kept_BPC` leaves in the place of given tokens;
#   - that what it has `told`, if anything, is arrays [rows, ..., slots, 6, D] of those steps, one
#     slot where all steps are alike, and that all nulls of a batch are told the same;
#   - rows that do not see each other: an image is the same in any batch;
#   - to ask `draw` in every step, for logits of each position that the step handles: all symbols
#     at once, or some of them in turn;
#   - a state of the same structure, shapes and dtypes after each step, in which nothing has changed
#     but CARRIED: all else stays outside of the compiled loop, and a change to it would be lost;
#   - tokens that are never written where they were given (`DecodeState.write` sees to that; where
#     `kept_BPC` is there, a scale's are those that it leaves), and none that is V after the last
#     step.

# Fields of a state that a step may change, and that are carried through a loop.
CARRIED = (
    *("tokens_BLG", "cache", "latents_BPC"),
    *("invalid_B", "near_B", "weight_B", "ahead_B", "when_BL"),
)


class Cache(Protocol):
    """What a layer, or a stack of them, keeps of the slots before: `nn.attention.KVCache`,
    `nn.attention.StackedCache`. A pytree whose arrays lead with the rows."""

    def grow(self, slots: int, most: int = 0) -> Cache:
        """The cache with room for `slots` slots, or at once for the `most` that there will be.

        It keeps what is in it, and never shrinks.
        """


@dataclasses.dataclass(frozen=True)
class Phase:
    """Consecutive decoding steps that share one compiled loop; static, and hashable.

    The phases of a plan follow each other: `first` is 0, then the last one's `first + steps`.
    """

    first: int  # number of its first step
    steps: int
    start: int  # place of its first position in the sequence
    size: int  # positions handled by each step
    slots: int = 0  # cache slots in use when it ends

    def place(self, index: Array | int) -> Array | int:
        """Place in the sequence of the first position that step `index` handles.

        Without a meaning where every step handles all positions.
        """
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
    """Where a decode stands; every array leads with the rows of the batch.

    A generator makes it in `start` and leaves what it has no use for at None; `invalid_B`,
    `weight_B`, `ahead_B`, `kept_BPC` and `when_BL` are the driver's own, and `near_B` is set to
    false by it before the first step.
    """

    tokens_BLG: Array  # drawn so far; V marks "not yet"
    given_BLG: Array  # true where a token was given, not drawn
    order_BL: Array  # which position is handled at each place of the sequence
    cond: PyTree
    keys_B: Array  # one key per image: an image does not depend on its batch
    modulation: PyTree = None  # what the blocks need from the condition, when computed beforehand
    cache: tuple[Cache, ...] | None = None  # per layer, or one; None where slots see both ways
    latents_BPC: Array | None = None  # what a scale codec has accumulated
    kept_BPC: Array | None = None  # what it is to come to where tokens are given; else they are it
    invalid_B: Array | None = None  # true where logits were not finite; written by the driver
    near_B: Array | None = None  # true where rounding could have changed what was drawn
    weight_B: Array | None = None  # ln of a particle's weight; written by the driver
    ahead_B: Array | None = None  # the part of it that is of what is still to come; likewise
    when_BL: Array | None = None  # the step that drew each position, -1 of none; likewise

    def read(self, positions_Bl: Array) -> Array:
        """Tokens [B, l, G] at some positions."""
        return jnp.take_along_axis(self.tokens_BLG, positions_Bl[..., None], axis=1)

    def write(self, positions_Bl: Array, tokens_BlG: Array) -> DecodeState:
        """The state with tokens written at some positions, never over a given one."""
        given_BlG = jnp.take_along_axis(self.given_BLG, positions_Bl[..., None], axis=1)
        tokens_BlG = jnp.where(given_BlG, self.read(positions_Bl), tokens_BlG)
        rows_B1 = jnp.arange(len(tokens_BlG))[:, None]
        return self.replace(tokens_BLG=self.tokens_BLG.at[rows_B1, positions_Bl].set(tokens_BlG))


class Draw(Protocol):
    """What a step draws tokens with."""

    def __call__(
        self,
        logits_BlGV: Array,
        symbol: int = 0,
        wanted_BlG: Array | None = None,
        toward_BlGV: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """(tokens [B, l, G] int32, their confidence, how far rounding may move that) of logits.

        `logits_BlGV` may be those of some of a position's symbols, of which `symbol` is the first;
        they are -inf where V is beyond a symbol's alphabet. `wanted_BlG` is true where a token is
        taken, None where all are: the others may be anything, and no near tie counts there.
        `toward_BlGV` is for particles: ln, up to a number for each symbol, of how likely each token
        makes what is held and comes later, as far as one can tell. Draws go where it is large, and
        the weights of the particles take back what was too much.
        """


class Drawn(NamedTuple):
    """What a sampler draws.

    A draw is near a tie where rounding of the logits, as a program of another size or on another
    device may round them, could have drawn another token.
    """

    tokens_BlG: Array  # int32
    confidence_BlG: Array
    near_B: Array  # true where some draw of the image's was near a tie
    unsure_BlG: Array | float = 0.0  # how far rounding may move the confidence; 0: no tie counts
    owed_BlG: Array | float = 0.0  # ln of how much likelier it was without what it was drawn toward


class Sampler(Protocol):
    """How tokens are drawn from logits; static under jit. `sampling.sampler.Sampler` is the one
    that presets make, others replay recorded draws."""

    guidance: tuple  # one weight per step, or per step and symbol; empty: none
    steps: int | None  # decoding steps that its settings are written for; None fits any number

    def draw(
        self,
        logits_BlGV: Array,
        *,
        keys_B: Array,
        step: Array | int,
        symbol: int = 0,
        wanted_BlG: Array | None = None,
        toward_BlGV: Array | None = None,
    ) -> Drawn:
        """What `Draw` gives, of rows that are the images alone: image i by its key, `keys_B[i]`."""


class Generator(Protocol):
    """A loss, and a decoding state machine."""

    layout: TokenLayout
    classes: int  # that labels are of; 0: unconditional, or of texts
    cond: str  # what a condition is: "label", label_B of int32, or "text", a Text
    text: tuple[int, int] | None  # (T, E) of the Text that it reads; None where cond is "label"
    label_drop: float | None  # share of conditions dropped in training; None: it knows no `null`
    exact: bool  # whether `nats` is the likelihood; else an upper bound, by random orders
    any_order: bool  # whether `TokenBatch.order_BL` may be any order; else it must be None
    sees_given: bool  # whether every draw sees all that is given; else what its own `order` has
    knobs: tuple[str, ...]  # attributes that sampling settings may change, as a number of steps

    def check(self, cond: PyTree) -> None:
        """UserError where `cond` is no condition of this generator's."""

    def null(self, cond: PyTree) -> PyTree:
        """Conditions that stand for none, of the structure, shapes and dtypes of `cond`.

        UserError where it was trained without.
        """

    def logits(self, batch: TokenBatch, codec: Quantizer, *, key: Array | None = None) -> Array:
        """Float32 logits [B, L, G, V] of all tokens of a batch; nothing is dropped without a key.

        Row j is place j of the order. A masked generator reads V as "unknown".
        """

    def loss(
        self, batch: TokenBatch, codec: Quantizer, *, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """(what training descends, named scalars for the log) at a training step."""

    def nats(self, batch: TokenBatch, codec: Quantizer, *, key: Array | None = None) -> Array:
        """[B, L] nats of the tokens, summed over their symbols; `key` only where not `exact`."""

    def unstacked(self) -> Generator:
        """A copy for decoding, with its stacks of layers apart; itself where it has none.

        Where a scan over layers inside the loop over steps would copy weights and cache at every
        step; `sampling.decode.laid_out` knows where.
        """

    def plan(self) -> tuple[Phase, ...]:
        """The decoding steps; of static attributes alone."""

    def start(self, cond: PyTree, codec: Quantizer, *, keys_B: Array, given: Given) -> DecodeState:
        """The state before the first step; UserError for a condition or codec that is none of its.

        `given` are tokens [B, L, G], V where none is given, and the mask that says where one is.
        """

    def step(
        self, state: DecodeState, phase: Phase, index: Array | int, codec: Quantizer, draw: Draw
    ) -> DecodeState:
        """The state after step `index`, which is one of `phase`."""
