"""Convolutional encoder and decoder over a 2-D grid (the form of VQGAN, arXiv:2012.09841).

The first step is a convolution, or a space-to-depth stem that takes `stem` x `stem` pixels at
once; then one level per width, each but the last halving the grid.
"""

from __future__ import annotations

import jax
from flax import nnx

from tokgen.nn import conv
from tokgen.nn.precision import Precision


def grid(size: tuple[int, int], widths: tuple[int, ...], stem: int = 1) -> tuple[int, int]:
    """(rows, columns) of the latents of an image of `size`."""
    stride = stem * 2 ** (len(widths) - 1)
    if size[0] % stride or size[1] % stride:
        raise ValueError(
            f"the image must be divisible by the tokenizer's stride: size={tuple(size)}, "
            f"stride={stride} (stem {stem} and {len(widths)} widths)"
        )
    return size[0] // stride, size[1] // stride


class Encoder(nnx.Module):
    """Images [B, H, W, 3] to latents [B, P, C]."""

    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        widths: tuple[int, ...],
        blocks: int = 2,
        stem: int = 1,
        parts: str = "vqgan",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        kit, options = conv.named(parts), dict(precision=precision, rngs=rngs)
        local = 1 if kit is conv.LOCAL else 3
        self.stem = stem
        self.conv_in = conv.Conv(channels * stem**2, widths[0], local, **options)
        stages, width = [], widths[0]
        for level, outputs in enumerate(widths):
            for _ in range(blocks):
                stages.append(kit.block(width, outputs, norm=kit.norm, **options))
                width = outputs
            if level < len(widths) - 1:
                stages.append(Downsample(width, **options))
        self.stages = nnx.List(stages)
        self.norm = kit.norm(width, **options)
        self.conv_out = conv.Conv(width, latent, local, **options)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        """[B, H, W, 3] in the tokenizer's range -> [B, P, C]."""
        x_BHWC = self.conv_in(conv.space_to_depth(image_BHW3, self.stem))
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        x_BHWC = self.conv_out(jax.nn.silu(self.norm(x_BHWC)))
        return x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1])


class Decoder(nnx.Module):
    """Latents [B, P, C] to images [B, H, W, 3]; widths are given from fine to coarse, as above."""

    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        grid: tuple[int, int],
        widths: tuple[int, ...],
        blocks: int = 2,
        stem: int = 1,
        parts: str = "vqgan",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        kit, options = conv.named(parts), dict(precision=precision, rngs=rngs)
        self.stem, self.grid = stem, tuple(grid)
        self.conv_in = conv.Conv(latent, widths[-1], **options)
        stages, width = [], widths[-1]
        for level, outputs in enumerate(reversed(widths)):
            if level:
                stages.append(Upsample(width, **options))
            for _ in range(blocks):
                stages.append(kit.block(width, outputs, norm=kit.norm, **options))
                width = outputs
        self.stages = nnx.List(stages)
        self.norm = kit.norm(width, **options)
        self.conv_out = conv.Conv(width, channels * stem**2, **options)

    def __call__(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> [B, H, W, 3] in the tokenizer's range."""
        x_BHWC = latents_BPC.reshape(len(latents_BPC), *self.grid, -1)
        x_BHWC = self.conv_in(x_BHWC)
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        x_BHWC = self.conv_out(jax.nn.silu(self.norm(x_BHWC)))
        return conv.depth_to_space(x_BHWC, self.stem)


class Downsample(nnx.Module):
    """A convolution of stride 2."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = conv.Conv(width, width, stride=2, precision=precision, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Half the height and width."""
        return self.conv(x_BHWC)


class Upsample(nnx.Module):
    """Every pixel twice, then a convolution."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = conv.Conv(width, width, precision=precision, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Twice the height and width."""
        return self.conv(conv.upsample(x_BHWC))
