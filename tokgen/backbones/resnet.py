"""ResNet-50 (arXiv:1512.03385), a frozen classifier whose logits tell images apart.

It has the structure of torchvision's, whose published weights fill it (`slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import imagenet, perceptual, weights


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


class Bottleneck(nnx.Module):
    """[B, H, W, C] -> [B, H/s, W/s, 4 w]: 1x1, 3x3 with the stride, 1x1; arXiv:1512.03385."""

    def __init__(self, before: int, width: int, stride: int, *, rngs: nnx.Rngs):
        after, options = 4 * width, dict(use_bias=False, rngs=rngs)
        self.convs = nnx.List(
            [
                imagenet.conv(before, width, 1, **options),
                imagenet.conv(width, width, 3, stride=stride, padding=1, **options),
                imagenet.conv(width, after, 1, **options),
            ]
        )
        self.norms = nnx.List([FixedNorm(width), FixedNorm(width), FixedNorm(after)])
        self.skip = nnx.List()
        if stride > 1 or before != after:
            skip = [imagenet.conv(before, after, 1, stride=stride, **options), FixedNorm(after)]
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
        self.conv_in = imagenet.conv(3, width, 7, stride=2, padding=3, use_bias=False, rngs=rngs)
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
        x = imagenet.normalised(image_BHW3, 32)
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


SOURCE = (
    "the perceptual loss resnet50 needs torchvision's "
    "ResNet50_Weights.IMAGENET1K_V1 (resnet50-0676ba61.pth); "
    "config.loss.resnet50=0 trains without it"
)
DISTANCES = {"resnet50": perceptual.of_classifier(ResNet50, "resnet50", SOURCE)}
