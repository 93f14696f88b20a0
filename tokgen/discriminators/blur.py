"""The patch discriminator with blurred strides of VQGAN+ (MaskBit, arXiv:2409.16211) and TiTok.

Smaller than the PatchGAN: convolutions keep the size, a fixed filter halves it (arXiv:1904.11486),
and the largest values of 16 x 16 areas are scored.
"""

from __future__ import annotations

import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, interfaces, ranges
from tokgen.discriminators import pooling

GRID = 16  # rows and columns of logits, whatever the size of the image
EPSILON = 1e-5


def leaky_relu(x: jax.Array) -> jax.Array:
    """With the slope of VQGAN+, half the PatchGAN's."""
    return jax.nn.leaky_relu(x, 0.1)


ACTIVATIONS = {"leaky_relu": leaky_relu, "silu": jax.nn.silu}
DOWN = {
    "blur3": pooling.blur3,
    "blur4": pooling.blur4,
    "blur5": pooling.blur5,
    "average": pooling.average,
}


class Stage(nnx.Module):
    """[B, H, W, C] -> [B, H/2, W/2, C']: convolution, halving, normalisation, activation."""

    def __init__(self, before: int, after: int, *, down: str, activation: str, rngs: nnx.Rngs):
        self.down, self.activation = DOWN[down], ACTIVATIONS[activation]
        self.conv = _conv(before, after, 3, rngs=rngs)
        self.norm = nnx.GroupNorm(
            after, math.gcd(32, after), epsilon=EPSILON, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.activation(self.norm(self.down(self.conv(x_BHWC))))


class Discriminator(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, 16, 16, 1], float32.

    Stage n has width * 2**n channels. 1,909,889 parameters at width 128 and three stages,
    7,431,297 with four. An image is best of at least 16 * 2**stages pixels: smaller ones are
    scored in repeated areas.
    """

    @ranges.checked
    def __init__(
        self,
        channels: int = 3,
        width: ranges.Width = 128,
        stages: Annotated[int, ranges.Range(1, 12)] = 3,
        down: str = "blur4",
        activation: str = "leaky_relu",
        *,
        rngs: nnx.Rngs,
    ):
        choices.named(DOWN, down, "down of the blur discriminator")
        choices.named(ACTIVATIONS, activation, "activation of the blur discriminator")
        self.channels, self.smallest = channels, 2**stages
        self.activation = ACTIVATIONS[activation]
        self.first = _conv(channels, width, 5, rngs=rngs)
        widths = [width, *(width * 2**n for n in range(stages))]
        self.stages = nnx.List(
            Stage(before, after, down=down, activation=activation, rngs=rngs)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv_out = _conv(widths[-1], widths[-1], 1, rngs=rngs)
        self.last = _conv(widths[-1], 1, 5, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        shape = image_BHW3.shape
        if len(shape) != 4 or shape[3] != self.channels or min(shape[1:3]) < self.smallest:
            raise interfaces.UserError(
                f"this blur discriminator needs images [B, H, W, {self.channels}] of at least "
                f"{self.smallest} x {self.smallest} pixels; found {shape}: use fewer stages"
            )
        x = (image_BHW3.astype(jnp.float32) + 1) / 2  # published on [0, 1]
        x = self.activation(self.first(x))
        for stage in self.stages:
            x = stage(x)
        x = pooling.adaptive_max(x, GRID)
        return self.last(self.activation(self.conv_out(x)))


def _conv(before: int, after: int, size: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    # PyTorch's defaults, which the publication leaves untouched: both uniform within
    # 1/sqrt(inputs), a variance of 1/(3 inputs)
    bound = 1 / math.sqrt(before * size * size)
    return nnx.Conv(
        before,
        after,
        (size, size),
        padding="SAME",
        kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=lambda key, shape, dtype, **_: jax.random.uniform(
            key, shape, dtype, -bound, bound
        ),
        rngs=rngs,
    )
