"""Multi-head attention, and the cache of its keys and values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct

from tokgen import sharding
from tokgen.nn import bands, dropout, fused, linear, masks, norms, positions
from tokgen.nn.precision import Precision


@struct.dataclass
class KVCache:
    """Keys and values of one layer; the decode product reads them without a transpose."""

    keys_BNSK: jax.Array
    values_BNSK: jax.Array

    @classmethod
    def empty(cls, rows: int, heads: int, size: int, dtype: jax.typing.DTypeLike) -> KVCache:
        """A cache without slots."""
        return cls(*(jnp.zeros((rows, heads, 0, size), dtype) for _ in range(2)))

    def write(self, keys_BNlK: jax.Array, values_BNlK: jax.Array, at: jax.Array | int) -> KVCache:
        """The cache with l slots written from slot `at` on."""

        def put(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=2)

        return KVCache(put(self.keys_BNSK, keys_BNlK), put(self.values_BNSK, values_BNlK))

    def read(self, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, N, S, K] of the first `slots` slots; None: of all."""
        return self.keys_BNSK[:, :, :slots], self.values_BNSK[:, :, :slots]

    def grow(self, slots: int, most: int = 0) -> KVCache:
        """The cache with room for `slots` slots; it never shrinks."""
        del most
        more = max(0, slots - self.keys_BNSK.shape[2])
        pad = ((0, 0), (0, 0), (0, more), (0, 0))
        return KVCache(jnp.pad(self.keys_BNSK, pad), jnp.pad(self.values_BNSK, pad))


@struct.dataclass
class StackedCache:
    """Keys and values of all layers, for a scan over them; leads with the rows, as all of a state.

    [B, Y, N, S, K], or [B, Y, 1, S, N K] of heads side by side: a product reads a layer where it
    lies. A head of 64 by itself may be filled up to the 128 lanes of a TPU, where a step has many
    positions (VAR-d30: twice the memory); side by side, one position's heads would be copied.
    """

    keys_BYNSK: jax.Array
    values_BYNSK: jax.Array

    @classmethod
    def empty(
        cls, rows: int, layers: int, groups: int, size: int, dtype: jax.typing.DTypeLike
    ) -> StackedCache:
        """A cache without slots, of so many groups of heads, each of `size` channels in all."""
        return cls(*(jnp.zeros((rows, layers, groups, 0, size), dtype) for _ in range(2)))

    def grow(self, slots: int, most: int = 0) -> StackedCache:
        """The cache with room for `most` slots, at once: it is read in part, and never copied."""
        more = max(0, max(slots, most) - self.keys_BYNSK.shape[3])
        pad = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
        return StackedCache(jnp.pad(self.keys_BYNSK, pad), jnp.pad(self.values_BYNSK, pad))


@struct.dataclass
class Layer:
    """One layer of a StackedCache; `Attention` takes it for a KVCache."""

    stack: StackedCache
    index: jax.Array
    heads: int = struct.field(pytree_node=False)

    def read(self, slots: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, N, S, K] of the layer's first `slots` slots; None: of all."""

        def part(stack_BYNSK):
            B, _, groups, S, size = stack_BYNSK.shape
            S = S if slots is None else slots
            # one slice, of layer and slots: of two, the first would be brought near whole
            where, sizes = (0, self.index, 0, 0, 0), (B, 1, groups, S, size)
            part = jax.lax.dynamic_slice(stack_BYNSK, where, sizes)
            part = part.reshape(B, groups, S, self.heads // groups, -1)
            return jnp.swapaxes(part, 2, 3).reshape(B, self.heads, S, -1)

        return part(self.stack.keys_BYNSK), part(self.stack.values_BYNSK)

    def write(self, keys_BNlK: jax.Array, values_BNlK: jax.Array, at: jax.Array | int) -> Layer:
        """The layer with l slots written from slot `at` on, in the stack where they lie."""

        def put(old, new_BNlK):
            B, groups, count = len(old), old.shape[2], new_BNlK.shape[2]
            new = new_BNlK.reshape(B, groups, self.heads // groups, count, -1)
            new = jnp.swapaxes(new, 2, 3).reshape(B, 1, groups, count, -1).astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, (0, self.index, 0, at, 0))

        stack = StackedCache(
            put(self.stack.keys_BYNSK, keys_BNlK), put(self.stack.values_BYNSK, values_BNlK)
        )
        return self.replace(stack=stack)


TOGETHER = 2**18  # scores that a core's cache keeps between the two products


def attend(
    queries_BNlK: jax.Array,
    keys_BNSK: jax.Array,
    values_BNSK: jax.Array,
    mask: jax.Array | masks.Blocks | None,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T) v in [B, N, l, K]; `mask` broadcasts to [B, N, l, S], true where seen.

    Queries come scaled. Scores and softmax are float32: probabilities in bfloat16 lose the tail.
    On a TPU or GPU, many slots that follow a rule, or that all see all, go to what never writes out
    the scores (`fused`), unless some are dropped. A CPU takes head after head where all scores
    together would leave its cache; in training, or behind a mask, where those of one head would,
    and none are dropped: by a rule, rows meet the keys that they see and few others.
    """
    if key is None or rate == 0.0:
        fits = fused.fitting(queries_BNlK, keys_BNSK, mask, platform=sharding.platform())
        if fits is not None:
            return fits(queries_BNlK, keys_BNSK, values_BNSK, mask)
    rule = mask if isinstance(mask, masks.Blocks) and mask.valid_BL is None else None
    mask = mask.written() if isinstance(mask, masks.Blocks) else mask
    whole = functools.partial(_together, mask=mask, rate=rate, key=key)
    mesh = jax.sharding.get_abstract_mesh()
    spread = not (mesh.empty or mesh.size == 1 or mesh.manual_axes)  # rows and heads over devices
    scores = math.prod(queries_BNlK.shape[:3]) * keys_BNSK.shape[2]
    few = scores <= TOGETHER or queries_BNlK.shape[2] == 1  # one position reads keys once anyway
    kept = key is None or rate == 0.0
    large = queries_BNlK.shape[2] * keys_BNSK.shape[2] > TOGETHER and sharding.platform() == "cpu"
    if large and kept and not (few or spread) and (mask is None or mask.shape[:2] == (1, 1)):
        operands = queries_BNlK, keys_BNSK, values_BNSK
        if rule is not None:
            return bands.attend(bands.of_rule(rule), *operands, mask[0, 0])
        whole_band = bands.Band(0, queries_BNlK.shape[2], keys_BNSK.shape[2], mask is not None)
        return bands.attend((whole_band,), *operands, None if mask is None else mask[0, 0])
    if few or spread or mask is not None or key is not None:
        return whole(queries_BNlK, keys_BNSK, values_BNSK)
    return _by_platform(queries_BNlK, keys_BNSK, values_BNSK)


@jax.custom_jvp
def _by_platform(
    queries_BNlK: jax.Array, keys_BNSK: jax.Array, values_BNSK: jax.Array
) -> jax.Array:
    return jax.lax.platform_dependent(
        queries_BNlK, keys_BNSK, values_BNSK, cpu=_in_turn, default=_together
    )


@_by_platform.defjvp
def _slopes(operands: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(_together, operands, tangents)  # what is differentiated takes all together


def _in_turn(queries_BNlK: jax.Array, keys_BNSK: jax.Array, values_BNSK: jax.Array) -> jax.Array:
    """One head of one row after the other."""

    def one(head):
        part_11lK = (part[None, None] for part in head)
        return _together(*part_11lK, sums=linear.WIDE)[0, 0]

    heads = (a.reshape(-1, *a.shape[2:]) for a in (queries_BNlK, keys_BNSK, values_BNSK))
    return jax.lax.map(one, tuple(heads)).reshape(queries_BNlK.shape)


def _together(
    queries_BNlK: jax.Array,
    keys_BNSK: jax.Array,
    values_BNSK: jax.Array,
    *,
    mask: jax.Array | None = None,
    rate: float = 0.0,
    key: jax.Array | None = None,
    sums: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`attend` for all heads at once; the last product sums in `sums`, as its operands if None."""
    scores = jnp.einsum(
        "BNlK,BNSK->BNlS", queries_BNlK, keys_BNSK, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = dropout.dropout(jax.nn.softmax(scores, axis=-1), rate, key)
    dtype = values_BNSK.dtype
    mixed = jnp.einsum(
        "BNlS,BNSK->BNlK", weights.astype(dtype), values_BNSK, preferred_element_type=sums
    )
    return mixed.astype(dtype)


class Scaled(nnx.Module):
    """Scores q k / sqrt(K) (arXiv:1706.03762)."""

    def __init__(self, heads: int, size: int, *, precision: Precision, rngs: nnx.Rngs):
        del heads, precision, rngs
        self.factor = size**-0.5

    def __call__(self, queries_BNlK, keys_BNlK) -> tuple[jax.Array, jax.Array]:
        """(queries with the scale in them, keys)."""
        return queries_BNlK * self.factor, keys_BNlK


class Quartered(nnx.Module):
    """Scores q k / (4 sqrt(K)): VAR's code where its cosine attention is off."""

    def __init__(self, heads: int, size: int, *, precision: Precision, rngs: nnx.Rngs):
        del heads, precision, rngs
        self.factor = 0.25 * size**-0.5

    def __call__(self, queries_BNlK, keys_BNlK) -> tuple[jax.Array, jax.Array]:
        """(queries with the scale in them, keys)."""
        return queries_BNlK * self.factor, keys_BNlK


class HeadNorm(nnx.Module):
    """A LayerNorm over each head's query and key, shared by the heads, then Scaled (RAR)."""

    def __init__(self, heads: int, size: int, *, precision: Precision, rngs: nnx.Rngs):
        del heads
        self.query_norm = norms.LayerNorm(size, precision=precision, rngs=rngs)
        self.key_norm = norms.LayerNorm(size, precision=precision, rngs=rngs)
        self.factor = size**-0.5

    def __call__(self, queries_BNlK, keys_BNlK) -> tuple[jax.Array, jax.Array]:
        """(queries with the scale in them, keys)."""
        return self.query_norm(queries_BNlK) * self.factor, self.key_norm(keys_BNlK)


class Cosine(nnx.Module):
    """Scores cos(q, k) exp(scale), one learned scale per head, at most 100 (VAR)."""

    def __init__(self, heads: int, size: int, *, precision: Precision, rngs: nnx.Rngs):
        del size, rngs
        self.scale = nnx.Param(jnp.full(heads, math.log(4.0), precision.params_dtype))

    def __call__(self, queries_BNlK, keys_BNlK) -> tuple[jax.Array, jax.Array]:
        """(queries with the scale in them, keys)."""
        scale_N = jnp.exp(jnp.minimum(self.scale[...].astype(jnp.float32), math.log(100.0)))
        # float32: a bfloat16 sum of squares has three significant digits
        queries = norms.unit(queries_BNlK.astype(jnp.float32)) * scale_N[None, :, None, None]
        keys = norms.unit(keys_BNlK.astype(jnp.float32))
        return queries.astype(queries_BNlK.dtype), keys.astype(keys_BNlK.dtype)


ALL = ("query", "key", "value", "out")


class Attention(nnx.Module):
    """Self-attention with optional rotary positions and a cache that is handed in and returned.

    Args:
        biased: which of its four maps have a bias.
        similarity: the module that turns queries and keys into those whose product is the score.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        biased: tuple[str, ...] = (),
        similarity: Callable = Scaled,
        std: Callable[[int], float] = linear.published,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        size = width // heads
        options = dict(std=std, precision=precision, rngs=rngs)
        self.query, self.key, self.value = (
            linear.Linear(width, (heads, size), bias=name in biased, **options)
            for name in ("query", "key", "value")
        )
        self.out = linear.Linear((heads, size), width, bias="out" in biased, **options)
        self.similarity = similarity(heads, size, precision=precision, rngs=rngs)

    def __call__(
        self,
        x_BlD: jax.Array,
        *,
        rotary: positions.Rotary | None = None,
        mask: jax.Array | masks.Blocks | None = None,
        cache: KVCache | None = None,
        at: jax.Array | int = 0,
        slots: int | None = None,
        rate: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | Layer | None]:
        """(outputs [B, l, D], the cache with slots at .. at + l written).

        Of a cache, the first `slots` are read; None: all.
        """
        queries, keys, values = (
            sharding.constrain(jnp.swapaxes(project(x_BlD), 1, 2), "BNLK")
            for project in (self.query, self.key, self.value)
        )
        queries, keys = self.similarity(queries, keys)
        if rotary is not None:
            queries, keys = positions.rotate(queries, rotary), positions.rotate(keys, rotary)
        if cache is not None:
            cache = cache.write(keys, values, at)
            keys, values = cache.read(slots)
        mixed = attend(queries, keys, values, mask, rate=rate, key=key)
        return self.out(jnp.swapaxes(mixed, 1, 2)), cache
