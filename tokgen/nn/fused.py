"""Attention that never writes out all scores: splash attention on a TPU, cuDNN's on a GPU.

Scores are computed block by block, in the backward pass again. What a rule (`nn.masks`) shows to
nobody is left out by the block on a TPU, and by the slot where it is causal on a GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import sharding
from tokgen.nn import masks

# Slots from which it is taken. Below, a TPU's blocks are mostly filling, and the scores are few.
LEAST = {"tpu": 512, "gpu": 128}
LANES, LARGEST = 128, 512  # blocks are multiples of a TPU's lanes; larger ones leave its memory
WASTE = 1.25  # slots with their filling, against the fewest that lanes allow, for larger blocks

Fused = Callable[[jax.Array, jax.Array, jax.Array, masks.Blocks | None], jax.Array]


def fitting(
    queries_BNlK: jax.Array,
    keys_BNSK: jax.Array,
    mask: jax.Array | masks.Blocks | None,
    *,
    platform: str,
) -> Fused | None:
    """What computes such attention best on a platform, if it is fused: of (queries, keys, values,
    mask), as `attention.attend`.

    All slots must be there: those of a cache are few at a time. cuDNN takes 16 bits alone, and
    heads of up to 128 channels that 8 divides.
    """
    length, size = queries_BNlK.shape[2:]
    whole = length == keys_BNSK.shape[2] and not isinstance(mask, jax.Array)
    if not whole or length < LEAST.get(platform, length + 1):
        return None
    if platform == "tpu":
        return on_paper if sharding.counted() else splash
    narrow = queries_BNlK.dtype in (jnp.bfloat16, jnp.float16)
    if not narrow or size > 128 or size % 8:
        return None
    return on_paper if sharding.counted() else cudnn if has_kernel() else None


def has_kernel() -> bool:
    """Whether the GPUs of this process have cuDNN's kernel: NVIDIA's, from Ampere on.

    Where there are none, the program is for others, which may.
    """
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return True
    number = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return number is not None and int(number[1]) >= 8  # AMD's are words, as gfx90a


def cudnn(
    queries_BNLK: jax.Array,
    keys_BNLK: jax.Array,
    values_BNLK: jax.Array,
    mask: masks.Blocks | None,
) -> jax.Array:
    """By cuDNN's kernel. What is neither causal nor whole is told as an array of all pairs, of 16
    bits and for all heads alike."""
    length, told = queries_BNLK.shape[2], {}
    filled = length + length % 2  # gradients are of even lengths alone
    if mask is not None and mask.causal and mask.valid_BL is None:
        told["is_causal"] = True
    elif mask is not None:
        fill = filled - length
        written = jnp.pad(mask.written(), ((0, 0), (0, 0), (0, fill), (0, fill)))
        told["mask"] = written.at[..., length:, 0].set(True)  # whoever fills up sees somebody
    elif filled > length:
        told["key_value_seq_lengths"] = jnp.full(len(queries_BNLK), length, jnp.int32)
    mixed_BLNK = jax.nn.dot_product_attention(
        *(
            jnp.swapaxes(_filled(operand, filled), 1, 2)
            for operand in (queries_BNLK, keys_BNLK, values_BNLK)
        ),
        scale=1.0,
        implementation="cudnn",
        **told,
    )
    return jnp.swapaxes(mixed_BLNK, 1, 2)[:, :, :length]


def splash(
    queries_BNLK: jax.Array,
    keys_BNLK: jax.Array,
    values_BNLK: jax.Array,
    mask: masks.Blocks | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """By the kernel of jax.experimental.pallas (arXiv:2205.14135 in blocks of what is seen).

    Each device takes its own rows and heads. `interpret` runs it anywhere, slowly.
    """
    length = queries_BNLK.shape[2]
    block, filled = _blocks(length)
    operands = [_filled(operand, filled) for operand in (queries_BNLK, keys_BNLK, values_BNLK)]
    axes = ["BNLK"] * 3
    if mask is not None and mask.valid_BL is not None:
        # slots see those of their own segment: each slot of padding is one
        alone_L = 1 + jnp.arange(length, dtype=jnp.int32)[None]
        segments_BL = jnp.where(mask.valid_BL, 0, alone_L)
        segments_BL = jnp.broadcast_to(segments_BL, (len(queries_BNLK), length))
        operands.append(jnp.pad(segments_BL, ((0, 0), (0, filled - length))))
        axes.append("BL")
    run = functools.partial(_splash, _seen(mask, length, filled), block, interpret)
    return sharding.by_device(run, axes, *operands)[:, :, :length]


def _splash(
    seen_LL: np.ndarray,
    block: int,
    interpret: bool,
    queries_BNLK: jax.Array,
    keys_BNLK: jax.Array,
    values_BNLK: jax.Array,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """`splash` of whole blocks, on one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # a second, that few need
        splash_attention_kernel as kernels,
        splash_attention_mask as kernel_masks,
    )

    parts = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    heads = queries_BNLK.shape[1]
    kernel = kernels.make_splash_mha(
        kernel_masks.MultiHeadMask([kernel_masks.NumpyMask(seen_LL)] * heads),
        block_sizes=kernels.BlockSizes(**{f"block_{part}": block for part in parts}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if segments_BL is None:
        return jax.vmap(kernel)(queries_BNLK, keys_BNLK, values_BNLK)

    def row(queries, keys, values, segments):
        return kernel(queries, keys, values, segment_ids=kernels.SegmentIds(segments, segments))

    return jax.vmap(row)(queries_BNLK, keys_BNLK, values_BNLK, segments_BL)


def _blocks(length: int) -> tuple[int, int]:
    """(slots of a block, slots in all): the largest blocks that need little filling."""

    def filled(block):
        return -(-length // block) * block

    fit = (b for b in range(LARGEST, 0, -LANES) if filled(b) <= WASTE * filled(LANES))
    block = next(fit)
    return block, filled(block)


def _seen(mask: masks.Blocks | None, length: int, filled: int) -> np.ndarray:
    """[L, L], filled up: nobody sees what fills, which sees the first slot."""
    numbers_L = np.zeros(length, int) if mask is None else mask.numbers()
    seen_LL = np.zeros((filled, filled), bool)
    seen_LL[:length, :length] = numbers_L[None, :] <= numbers_L[:, None]
    seen_LL[length:, 0] = True
    return seen_LL


def _filled(x_BNLK: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x_BNLK, ((0, 0), (0, 0), (0, length - x_BNLK.shape[2]), (0, 0)))


# ---------------------------------------------------------------- what is only counted


@jax.custom_vjp
def on_paper(
    queries_BNLK: jax.Array,
    keys_BNLK: jax.Array,
    values_BNLK: jax.Array,
    mask: masks.Blocks | None,
) -> jax.Array:
    """Attention for who counts a program: plain products, in functions that a kernel stands for.

    Kernels say nothing of their operations. What they write is what these functions return
    (`KERNELS`), and what they keep is their operands: scores are computed again, beside the model's
    own work, with two products forwards and four backwards (arXiv:2205.14135).
    """
    return attended(queries_BNLK, keys_BNLK, values_BNLK, mask)


def _scores(queries_BNLK: jax.Array, keys_BNLK: jax.Array, mask: masks.Blocks | None) -> jax.Array:
    """The softmax, float32."""
    wide = dict(preferred_element_type=jnp.float32)
    scores_BNLL = jnp.einsum("BNlK,BNLK->BNlL", queries_BNLK, keys_BNLK, **wide)
    if mask is not None:
        scores_BNLL = jnp.where(mask.written(), scores_BNLL, -jnp.inf)
    return jax.nn.softmax(scores_BNLL, axis=-1)


@jax.jit
def attended(queries_BNLK, keys_BNLK, values_BNLK, mask) -> jax.Array:
    """`on_paper` forwards."""
    weights_BNLL = _scores(queries_BNLK, keys_BNLK, mask).astype(values_BNLK.dtype)
    return weights_BNLL @ values_BNLK


@jax.jit
def attended_slopes(queries_BNLK, keys_BNLK, values_BNLK, mask, mixed_BNLK, slope_BNLK) -> tuple:
    """`on_paper` backwards."""
    with jax.named_scope("rematted_computation"):
        weights_BNLL = _scores(queries_BNLK, keys_BNLK, mask)
    dtype = values_BNLK.dtype
    to_values_BNLK = weights_BNLL.astype(dtype).mT @ slope_BNLK
    # the weighted mean of the slopes of a row's weights is that of what they mix
    mean_BNL1 = jnp.sum((slope_BNLK * mixed_BNLK).astype(jnp.float32), axis=-1, keepdims=True)
    to_scores_BNLL = (weights_BNLL * (slope_BNLK @ values_BNLK.mT - mean_BNL1)).astype(dtype)
    return to_scores_BNLL @ keys_BNLK, to_scores_BNLL.mT @ queries_BNLK, to_values_BNLK


def _kept(*operands) -> tuple[jax.Array, tuple]:
    mixed_BNLK = attended(*operands)
    return mixed_BNLK, (*operands, mixed_BNLK)


def _slopes(kept: tuple, slope_BNLK: jax.Array) -> tuple:
    return (*attended_slopes(*kept, slope_BNLK), None)


on_paper.defvjp(_kept, _slopes)
KERNELS = (attended.__name__, attended_slopes.__name__)
