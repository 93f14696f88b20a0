"""Convolutional encoder and decoder over a 2-D grid (the form of VQGAN, arXiv:2012.09841).

The first step is a convolution, or a space-to-depth stem that takes `stem` x `stem` pixels at
once; then one level per width, each but the last halving the grid. `remat` says what of a stage the
backward pass computes again (nn.remat).
"""

from __future__ import annotations

from typing import Annotated

import jax
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import UserError
from tokgen.nn import conv, remat as policies
from tokgen.nn.precision import Precision

Stem = Annotated[int, ranges.Range(1, 256)]
Blocks = Annotated[int, ranges.Range(0, 256)]


class Encoder(nnx.Module):
    """Images [B, H, W, 3] to latents [B, P, C].

    The first convolution leads to `start` channels (0: to the first width). With `hidden` the
    network ends at so many channels and another convolution of size `projection` leads to the
    latents (the quant_conv of VQGAN). Where the variant has attention, it follows every block of
    the levels `attend` (0 the finest; None: the coarsest alone).
    """

    places = True  # a token is of a cell of the image

    @ranges.checked
    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        widths: ranges.Widths,
        blocks: Blocks = 2,
        stem: Stem = 1,
        attend: tuple[ranges.Whole, ...] | None = None,
        start: ranges.Optional = 0,
        hidden: ranges.Optional = 0,
        projection: ranges.Kernel = 1,
        variant: str = "vqgan",
        remat: str = "none",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        variant, options = conv.named(variant), dict(precision=precision, rngs=rngs)
        self.stem, self.blocks, self.levels = stem, blocks, len(widths)
        self.attended = _attended(variant, attend, len(widths))
        stages, width = [], start or widths[0]
        _check_blocks(blocks, (width, *widths))
        self.conv_in = conv.Conv(
            channels * stem**2, width, variant.first, bias=variant.first_bias, **options
        )
        for level, outputs in enumerate(widths):
            for _ in range(blocks):
                stages.append(variant.block(width, outputs, norm=variant.norm, **options))
                width = outputs
                if level in self.attended:
                    stages.append(variant.attention(width, norm=variant.norm, **options))
            if level < len(widths) - 1:
                stages.append(variant.down(width, **options))
        stages += variant.middle(width, blocks, variant, **options)
        self.stages, self.remat = nnx.List(stages), policies.named(remat)
        self.norm = variant.norm(width, **options)
        self.conv_out = conv.Conv(width, hidden or latent, variant.last, **options)
        self.conv_latent = conv.Conv(hidden, latent, projection, **options) if hidden else None

    @staticmethod
    @ranges.checked
    def grid(size: tuple[int, int], *, widths: ranges.Widths, stem: Stem = 1, **_) -> tuple:
        """(rows, columns) of the latents of an image of `size`."""
        stride = stem * 2 ** (len(widths) - 1)
        if size[0] % stride or size[1] % stride:
            raise UserError(
                f"the image must be divisible by the tokenizer's stride: size={tuple(size)}, "
                f"stride={stride} (stem {stem} and {len(widths)} widths)"
            )
        return size[0] // stride, size[1] // stride

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        """[B, H, W, 3] in the tokenizer's range -> [B, P, C]."""
        x_BHWC = self.conv_in(conv.space_to_depth(image_BHW3, self.stem))
        run = self.remat(conv.run)
        for stage in self.stages:
            x_BHWC = run(stage, x_BHWC)
        x_BHWC = self.conv_out(conv.silu(self.norm(x_BHWC)))
        if self.conv_latent is not None:
            x_BHWC = self.conv_latent(x_BHWC)
        return x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1])


class Decoder(nnx.Module):
    """Latents [B, P, C] to images [B, H, W, 3]; widths are given from fine to coarse, as above."""

    places = True  # a token is of a cell of the image

    @ranges.checked
    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        grid: tuple[ranges.Side, ranges.Side],
        size: tuple[int, int] | None = None,
        widths: ranges.Widths,
        blocks: Blocks = 2,
        stem: Stem = 1,
        attend: tuple[ranges.Whole, ...] | None = None,
        hidden: ranges.Optional = 0,
        projection: ranges.Kernel = 1,
        variant: str = "vqgan",
        remat: str = "none",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        variant, options = conv.named(variant), dict(precision=precision, rngs=rngs)
        self.stem, self.grid = stem, tuple(grid)
        self.blocks, self.levels = blocks + variant.more, len(widths)
        _check_blocks(self.blocks, widths)
        _check_size(size, self.grid, stem, len(widths))
        self.attended = _attended(variant, attend, len(widths))
        self.conv_latent = conv.Conv(latent, hidden, projection, **options) if hidden else None
        self.conv_in = conv.Conv(hidden or latent, widths[-1], **options)
        width = widths[-1]
        stages = variant.middle(width, blocks, variant, **options)
        for level, outputs in enumerate(reversed(widths)):
            if level:
                stages.append(variant.up(width, **options))
            if variant.adapt is not None:
                stages.append(variant.adapt(width, latent, **options))
            for _ in range(self.blocks):
                stages.append(variant.block(width, outputs, norm=variant.norm, **options))
                width = outputs
                if self.levels - 1 - level in self.attended:
                    stages.append(variant.attention(width, norm=variant.norm, **options))
        self.stages, self.remat = nnx.List(stages), policies.named(remat)
        self.norm = variant.norm(width, **options)
        self.conv_out = conv.Conv(width, channels * stem**2, **options)

    def __call__(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> [B, H, W, 3] in the tokenizer's range."""
        x_BHWC = latents_BPC.reshape(len(latents_BPC), *self.grid, -1)
        if self.conv_latent is not None:
            x_BHWC = self.conv_latent(x_BHWC)
        x_BHWC = self.conv_in(x_BHWC)
        run = self.remat(conv.run)
        for stage in self.stages:
            x_BHWC = run(stage, x_BHWC, latents_BPC=latents_BPC)
        x_BHWC = self.conv_out(conv.silu(self.norm(x_BHWC)))
        return conv.depth_to_space(x_BHWC, self.stem)


def _attended(
    variant: conv.Variant, attend: tuple[int, ...] | None, levels: int
) -> tuple[int, ...]:
    if variant.attention is None:
        return ()
    if attend is not None and not all(level < levels for level in attend):
        raise UserError(
            f"attend names levels, of which there are {levels}, 0 to {levels - 1}; found {attend}"
        )
    return (levels - 1,) if attend is None else tuple(attend)


def _check_blocks(blocks: int, widths: tuple[int, ...]) -> None:
    """Only blocks change the width; and only blocks have attention behind them."""
    if not blocks and len(set(widths)) > 1:
        raise UserError(
            f"without blocks every level has the same width; found blocks={blocks}, widths={widths}"
        )


def _check_size(size: tuple[int, int] | None, grid: tuple[int, int], stem: int, levels: int):
    """What is decoded must be as large as the image."""
    stride = stem * 2 ** (levels - 1)
    decoded = tuple(side * stride for side in grid)
    if size is not None and tuple(size) != decoded:
        raise UserError(
            f"the decoder must give images of {tuple(size)}; from a grid of {grid} with stem "
            f"{stem} and {levels} widths, a stride of {stride}, it gives {decoded}: give it the "
            "stem and the number of widths of the encoder"
        )
