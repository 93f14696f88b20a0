"""Frozen ImageNet classifiers whose logits tell images apart: ResNet-50 and ConvNeXt-S.

Modules have the structure of torchvision's, whose published weights fill them (`slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import trunks, weights


class FixedNorm(nnx.Module):
    """Batch normalisation by the recorded statistics of the training, per channel."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean = interfaces.Statistic(jnp.zeros(width))
        self.variance = interfaces.Statistic(jnp.ones(width))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        factor_C = self.scale[...] * jax.lax.rsqrt(self.variance[...] + 1e-5)
        shift_C = self.bias[...] - self.mean[...] * factor_C
        return x_BHWC * factor_C.reshape(1, 1, 1, -1) + shift_C.reshape(1, 1, 1, -1)

    def slots(self, key: str) -> dict[str, weights.Slot]:
        """Where the four published arrays belong."""
        return weights.affine(key, self, "scale") | {
            f"{key}.running_mean": weights.Slot(self, "mean"),
            f"{key}.running_var": weights.Slot(self, "variance"),
        }


def _conv(
    before: int, after: int, size: int, *, stride: int = 1, padding: int = 0, rngs: nnx.Rngs, **more
) -> nnx.Conv:
    return nnx.Conv(
        before,
        after,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rngs=rngs,
        **more,
    )


class Bottleneck(nnx.Module):
    """[B, H, W, C] -> [B, H/s, W/s, 4 w]: 1x1, 3x3 with the stride, 1x1; arXiv:1512.03385."""

    def __init__(self, before: int, width: int, stride: int, *, rngs: nnx.Rngs):
        after, options = 4 * width, dict(use_bias=False, rngs=rngs)
        self.convs = nnx.List(
            [
                _conv(before, width, 1, **options),
                _conv(width, width, 3, stride=stride, padding=1, **options),
                _conv(width, after, 1, **options),
            ]
        )
        self.norms = nnx.List([FixedNorm(width), FixedNorm(width), FixedNorm(after)])
        self.skip = nnx.List()
        if stride > 1 or before != after:
            skip = [_conv(before, after, 1, stride=stride, **options), FixedNorm(after)]
            self.skip = nnx.List(skip)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = x_BHWC
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if number == 0 else jax.nn.relu(y)))
        for part in self.skip:
            x_BHWC = part(x_BHWC)
        return jax.nn.relu(x_BHWC + y)

    def slots(self, key: str) -> dict[str, weights.Slot]:
        """Torchvision's names below `key`."""
        slots = {}
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            slots |= weights.affine(f"{key}.conv{number}", conv)
            slots |= norm.slots(f"{key}.bn{number}")
        if len(self.skip) > 0:
            slots |= weights.affine(f"{key}.downsample.0", self.skip[0])
            slots |= self.skip[1].slots(f"{key}.downsample.1")
        return slots


class ResNet50(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, 1000]; 25,557,032 parameters."""

    unused = (r".*\.num_batches_tracked",)

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        classes: int = 1000,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv_in = _conv(3, width, 7, stride=2, padding=3, use_bias=False, rngs=rngs)
        self.norm_in = FixedNorm(width)
        stages, before = [], width
        for number, depth in enumerate(depths):
            inner, blocks = width * 2**number, []
            for index in range(depth):
                stride = 2 if number > 0 and index == 0 else 1
                blocks.append(Bottleneck(before, inner, stride, rngs=rngs))
                before = 4 * inner
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.last = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        x = trunks.normalised(image_BHW3, 32)
        x = jax.nn.relu(self.norm_in(self.conv_in(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.last(x.mean((1, 2)))

    def slots(self) -> dict[str, weights.Slot]:
        """Torchvision's names."""
        slots = weights.affine("conv1", self.conv_in) | self.norm_in.slots("bn1")
        for number, stage in enumerate(self.stages, 1):
            for index, block in enumerate(stage):
                slots |= block.slots(f"layer{number}.{index}")
        return slots | weights.affine("fc", self.last)


def _norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class ConvNeXtBlock(nnx.Module):
    """[B, H, W, C] -> the same: 7x7 per channel, norm, two linear maps; arXiv:2201.03545."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = _conv(width, width, 7, padding=3, feature_group_count=width, rngs=rngs)
        self.norm = _norm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full((width,), 1e-6))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = self.up(self.norm(self.conv(x_BHWC)))
        y = self.down(jax.nn.gelu(y, approximate=False))
        return x_BHWC + self.scale[...].reshape(1, 1, 1, -1) * y

    def slots(self, key: str) -> dict[str, weights.Slot]:
        """Torchvision's names below `key`."""
        slots = weights.affine(f"{key}.block.0", self.conv)
        slots |= weights.affine(f"{key}.block.2", self.norm, "scale")
        slots |= weights.affine(f"{key}.block.3", self.up)
        slots |= weights.affine(f"{key}.block.5", self.down)
        scale = weights.Slot(self, "scale", (*self.scale.shape, 1, 1))
        return slots | {f"{key}.layer_scale": scale}


class ConvNeXtSmall(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, 1000]; 50,223,688 parameters."""

    unused = ()

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 27, 3),
        width: int = 96,
        classes: int = 1000,
        *,
        rngs: nnx.Rngs,
    ):
        convs, norms, stages, before = [], [], [], 3
        for number, depth in enumerate(depths):
            after, size = width * 2**number, 4 if number == 0 else 2
            convs.append(_conv(before, after, size, stride=size, rngs=rngs))
            # the first norm follows its convolution, the others stand before theirs
            norms.append(_norm(after if number == 0 else before, rngs=rngs))
            stages.append(nnx.List(ConvNeXtBlock(after, rngs=rngs) for _ in range(depth)))
            before = after
        self.convs, self.norms, self.stages = nnx.List(convs), nnx.List(norms), nnx.List(stages)
        self.norm_out = _norm(before, rngs=rngs)
        self.last = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        x = self.norms[0](self.convs[0](trunks.normalised(image_BHW3, 32)))
        for number, stage in enumerate(self.stages):
            if number > 0:
                x = self.convs[number](self.norms[number](x))
            for block in stage:
                x = block(x)
        return self.last(self.norm_out(x.mean((1, 2))))

    def slots(self) -> dict[str, weights.Slot]:
        """Torchvision's names: even parts of `features` halve the map, odd ones are stages."""
        slots = {}
        for number, (conv, norm, stage) in enumerate(
            zip(self.convs, self.norms, self.stages, strict=True)
        ):
            conv_part, norm_part = (0, 1) if number == 0 else (1, 0)
            slots |= weights.affine(f"features.{2 * number}.{conv_part}", conv)
            slots |= weights.affine(f"features.{2 * number}.{norm_part}", norm, "scale")
            for index, block in enumerate(stage):
                slots |= block.slots(f"features.{2 * number + 1}.{index}")
        slots |= weights.affine("classifier.0", self.norm_out, "scale")
        return slots | weights.affine("classifier.2", self.last)


CLASSIFIERS = {"resnet50": ResNet50, "convnext_small": ConvNeXtSmall}
