"""A frozen vision transformer, DINO's ViT-S/16 (arXiv:2104.14294): what it sees at each depth.

Its arrays are Statistics: a discriminator that looks through it saves them and trains none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import weights

EPSILON = 1e-6
SOURCE = (
    "DINO's ViT-S/16 is github.com/facebookresearch/dino, dino_deitsmall16_pretrain.pth; without "
    "it, train against the discriminator patchgan"
)


def _drawn(shape: tuple[int, ...], rngs: nnx.Rngs) -> interfaces.Statistic:
    return interfaces.Statistic(0.02 * jax.random.normal(rngs.params(), shape))


class Linear(nnx.Module):
    """x @ kernel + bias."""

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs):
        self.kernel = _drawn((before, after), rngs)
        self.bias = interfaces.Statistic(jnp.zeros(after))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD @ self.kernel[...] + self.bias[...].reshape(1, 1, -1)


class LayerNorm(nnx.Module):
    """Over the last axis."""

    def __init__(self, width: int):
        self.scale = interfaces.Statistic(jnp.ones(width))
        self.bias = interfaces.Statistic(jnp.zeros(width))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        centred_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
        variance_BL1 = jnp.square(centred_BLD).mean(-1, keepdims=True)
        x_BLD = centred_BLD * jax.lax.rsqrt(variance_BL1 + EPSILON)
        return x_BLD * self.scale[...].reshape(1, 1, -1) + self.bias[...].reshape(1, 1, -1)


class Block(nnx.Module):
    """[B, L, D] -> [B, L, D]: attention and MLP, each after a norm and beside a skip."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm_attention, self.norm_mlp = LayerNorm(width), LayerNorm(width)
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.up, self.down = (
            Linear(width, 4 * width, rngs=rngs),
            Linear(4 * width, width, rngs=rngs),
        )

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        batch, length, width = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).reshape(batch, length, 3, self.heads, -1)
        query_BLNK, key_BLNK, value_BLNK = jnp.moveaxis(qkv, 2, 0)
        mixed_BLNK = jax.nn.dot_product_attention(query_BLNK, key_BLNK, value_BLNK)
        x_BLD = x_BLD + self.out(mixed_BLNK.reshape(batch, length, width))
        # the tanh form, as VAR's trainer has it; DINO itself was trained with the exact one
        hidden = jax.nn.gelu(self.up(self.norm_mlp(x_BLD)), approximate=True)
        return x_BLD + self.down(hidden)

    def slots(self, key: str) -> dict[str, weights.Slot]:
        """The published names below `key`."""
        slots = weights.affine(f"{key}.norm1", self.norm_attention, "scale")
        slots |= weights.affine(f"{key}.attn.qkv", self.qkv)
        slots |= weights.affine(f"{key}.attn.proj", self.out)
        slots |= weights.affine(f"{key}.norm2", self.norm_mlp, "scale")
        slots |= weights.affine(f"{key}.mlp.fc1", self.up)
        return slots | weights.affine(f"{key}.mlp.fc2", self.down)


def _in_turn(x_BLD: jax.Array, blocks: Sequence[Block]) -> jax.Array:
    for block in blocks:
        x_BLD = block(x_BLD)
    return x_BLD


def _stacked(x_BLD: jax.Array, blocks: Sequence[Block]) -> jax.Array:
    """As `_in_turn`; all blocks compile as one."""
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return jax.lax.scan(lambda x_BLD, block: (block(x_BLD), None), x_BLD, stack)[0]


class Patches(nnx.Module):
    """image [B, H, W, 3] -> [B, L, D], one linear map of each patch."""

    def __init__(self, patch: int, width: int, *, rngs: nnx.Rngs):
        self.kernel = _drawn((patch, patch, 3, width), rngs)
        self.bias = interfaces.Statistic(jnp.zeros(width))

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        patches = jax.lax.conv_general_dilated(
            image_BHW3,
            kernel,
            kernel.shape[:2],
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        flat_BLD = patches.reshape(len(patches), -1, patches.shape[-1])
        return flat_BLD + self.bias[...].reshape(1, 1, -1)


class ViT(nnx.Module):
    """image [B, size, size, 3], normalised -> readouts [B, L, D] at each of `levels`.

    A readout is the class token added to every patch: before the blocks, and after those whose
    numbers `levels` names. 21,665,664 numbers at the published size.
    """

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        levels: Sequence[int] = (2, 5, 8, 11),
        *,
        rngs: nnx.Rngs,
    ):
        if size % patch or width % heads or not all(0 <= level < depth for level in levels):
            raise interfaces.UserError(
                "a ViT needs a size of whole patches, a width of whole heads and levels below its "
                f"depth; found size={size}, patch={patch}, width={width}, heads={heads}, "
                f"depth={depth}, levels={tuple(levels)}"
            )
        if list(levels) != sorted(set(levels)):
            raise interfaces.UserError(
                f"levels are numbers of blocks, each once and rising; found {tuple(levels)}"
            )
        self.size, self.levels = size, tuple(levels)
        self.patches = Patches(patch, width, rngs=rngs)
        self.token = _drawn((width,), rngs)
        self.positions = _drawn((1, (size // patch) ** 2 + 1, width), rngs)
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(depth))
        self.norm = LayerNorm(width)  # published with it; every readout is before it

    def __call__(self, image_BHW3: jax.Array) -> tuple[jax.Array, ...]:
        patches_BLD = self.patches(image_BHW3)
        batch, _, width = patches_BLD.shape
        token_B1D = jnp.broadcast_to(self.token[...].reshape(1, 1, -1), (batch, 1, width))
        positions = self.positions[...]
        x = jnp.concatenate([token_B1D, patches_BLD], 1) + positions
        readouts = [x[:, 1:] + x[:, :1]]
        for first, last in itertools.pairwise((-1, *self.levels)):
            span = tuple(self.blocks[first + 1 : last + 1])
            # a CPU would copy the weights
            x = jax.lax.platform_dependent(x, span, cpu=_in_turn, default=_stacked)
            readouts.append(x[:, 1:] + x[:, :1])
        return tuple(readouts)

    def slots(self) -> dict[str, weights.Slot]:
        """The published names."""
        slots = {
            "cls_token": weights.Slot(self, "token", (1, 1, *self.token.shape)),
            "pos_embed": weights.Slot(self, "positions"),
        }
        slots |= weights.affine("patch_embed.proj", self.patches)
        for number, block in enumerate(self.blocks):
            slots |= block.slots(f"blocks.{number}")
        return slots | weights.affine("norm", self.norm, "scale")
