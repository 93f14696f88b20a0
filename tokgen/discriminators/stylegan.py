"""The residual discriminator of StyleGAN2 (arXiv:1912.04958): one logit for the whole image.

As MaskGIT trains its tokenizer against (arXiv:2202.04200), and as LlamaGen offers it
(arXiv:2406.06525). The forms differ in how a block halves its map and in the range of the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, interfaces, ranges
from tokgen.discriminators import pooling

SLOPE = 0.2
# Published widths by resolution; below 64 pixels all are 512.
WIDTHS = {64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
SMALLEST = 4  # pixels of the last map

xavier = nnx.initializers.xavier_uniform


def _conv(before: int, after: int, size: int, *, rngs: nnx.Rngs, **options) -> nnx.Conv:
    padding = options.pop("padding", ((size // 2, size // 2),) * 2)
    return nnx.Conv(
        before, after, (size, size), padding=padding, kernel_init=xavier(), rngs=rngs, **options
    )


class PooledBlock(nnx.Module):
    """[B, H, W, C] -> [B, H/2, W/2, C']: convolution, pooling, convolution; pooled skip."""

    def __init__(self, before: int, after: int, *, pool: Callable, rngs: nnx.Rngs):
        self.pool = pool
        self.conv_in = _conv(before, before, 3, rngs=rngs)
        self.conv_skip = _conv(before, after, 1, use_bias=False, rngs=rngs)
        self.conv_out = _conv(before, after, 3, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = self.pool(jax.nn.leaky_relu(self.conv_in(x_BHWC), SLOPE))
        y = jax.nn.leaky_relu(self.conv_out(y), SLOPE)
        return (y + self.conv_skip(self.pool(x_BHWC))) / math.sqrt(2)


class StridedBlock(nnx.Module):
    """[B, H, W, C] -> [B, H/2, W/2, C']: two convolutions, a smoothing, a strided convolution."""

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs):
        self.conv_in = _conv(before, after, 3, rngs=rngs)
        self.conv_out = _conv(after, after, 3, rngs=rngs)
        self.conv_down = _conv(after, after, 3, strides=(2, 2), rngs=rngs)
        self.conv_skip = _conv(before, after, 1, strides=(2, 2), rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = jax.nn.leaky_relu(self.conv_in(x_BHWC), SLOPE)
        y = jax.nn.leaky_relu(self.conv_out(y), SLOPE)
        y = self.conv_down(pooling.smooth(y))
        return (y + self.conv_skip(x_BHWC)) / math.sqrt(2)


def blurred(before: int, after: int, *, rngs: nnx.Rngs) -> PooledBlock:
    """MaskGIT's block as configured: pooling by [1, 3, 3, 1]."""
    return PooledBlock(before, after, pool=pooling.blur4, rngs=rngs)


def averaged(before: int, after: int, *, rngs: nnx.Rngs) -> PooledBlock:
    """MaskGIT's block without its blur."""
    return PooledBlock(before, after, pool=pooling.average, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the published forms disagree about."""

    block: Callable[..., nnx.Module]
    lowest: float  # the value of black; white is 1


FORMS = {
    "blur": Form(blurred, 0.0),  # MaskGIT
    "average": Form(averaged, 0.0),
    "strided": Form(StridedBlock, -1.0),  # LlamaGen
}


class Discriminator(nnx.Module):
    """image_BHW3 in [-1, 1], H = W = size -> logits [B, 1], float32.

    `widths` are those of the maps from `size` pixels down to 4; empty stands for the published
    ones, times `multiplier` above 32 pixels.
    """

    @ranges.checked
    def __init__(
        self,
        channels: int = 3,
        size: int = 256,
        widths: Sequence[ranges.Width] = (),
        multiplier: Annotated[int, ranges.Range(1, 64)] = 1,
        form: str = "blur",
        *,
        rngs: nnx.Rngs,
    ):
        choices.named(FORMS, form, "form of the StyleGAN discriminator")
        if size < 2 * SMALLEST or size & (size - 1):
            raise interfaces.UserError(
                "the StyleGAN discriminator needs images of a power of two, at least "
                f"{2 * SMALLEST} pixels; found size={size}: resize the data, or use the "
                "discriminator patchgan"
            )
        sizes = [size >> n for n in range(int(math.log2(size // SMALLEST)) + 1)]
        published = [WIDTHS[each] * multiplier if each in WIDTHS else 512 for each in sizes]
        widths = list(widths) or published
        if len(widths) != len(sizes):
            raise interfaces.UserError(
                f"the StyleGAN discriminator of {size} pixels needs {len(sizes)} widths, for "
                f"{', '.join(map(str, sizes))} pixels; found widths={tuple(widths)}"
            )
        self.channels, self.size, self.lowest = channels, size, FORMS[form].lowest
        self.conv_in = _conv(channels, widths[0], 3, rngs=rngs)
        self.blocks = nnx.List(
            FORMS[form].block(before, after, rngs=rngs)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        last = widths[-1]
        self.conv_out = _conv(last, last, 3, rngs=rngs)
        # The linear map over the flattened 4x4 map, as the convolution that it is: published
        # files flatten in different orders, a kernel of two axes would have to know which.
        self.conv_flat = nnx.Conv(
            last,
            last,
            (SMALLEST, SMALLEST),
            padding="VALID",
            kernel_init=xavier(in_axis=(0, 1, 2), out_axis=3),
            rngs=rngs,
        )
        self.last = _conv(last, 1, 1, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        wanted = (self.size, self.size, self.channels)
        if image_BHW3.ndim != 4 or image_BHW3.shape[1:] != wanted:
            raise interfaces.UserError(
                f"this StyleGAN discriminator needs images {list(wanted)} after the batch; found "
                f"{image_BHW3.shape}: set its size to that of the data"
            )
        white = image_BHW3.astype(jnp.float32)
        x = self.conv_in(self.lowest + (1 - self.lowest) * (white + 1) / 2)
        x = jax.nn.leaky_relu(x, SLOPE)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.leaky_relu(self.conv_out(x), SLOPE)
        x = jax.nn.leaky_relu(self.conv_flat(x), SLOPE)
        return self.last(x).reshape(-1, 1)
