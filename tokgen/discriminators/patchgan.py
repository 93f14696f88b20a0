"""The patch discriminator: a small convolutional network with a logit per overlapping patch.

Isola et al. (arXiv:1611.07004), in the form that VQGAN (arXiv:2012.09841) and its descendants
train: 4x4 convolutions, each but the first and the last followed by a normalisation.
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, interfaces, ranges

SLOPE = 0.2  # of the leaky ReLU
EPSILON = 1e-5  # of both normalisations; PyTorch's default, which published weights assume
WIDEST = 8  # stage n has width * min(2**n, 8) channels


class BatchNorm(nnx.Module):
    """Normalisation by the mean and variance of the batch at hand, per channel.

    No running statistics: a discriminator is never asked outside training. Under
    `jit` the batch is the global one, so any number of devices computes the same.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(1 + 0.02 * jax.random.normal(rngs.params(), (width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        mean_C = x_BHWC.mean((0, 1, 2), keepdims=True)
        centred_BHWC = x_BHWC - mean_C  # two passes: E[x^2] - E[x]^2 cancels in float32
        variance_C = jnp.square(centred_BHWC).mean((0, 1, 2), keepdims=True)
        scale_C = self.scale[...].reshape(1, 1, 1, -1) * jax.lax.rsqrt(variance_C + EPSILON)
        return centred_BHWC * scale_C + self.bias[...].reshape(1, 1, 1, -1)


class GroupNorm(nnx.Module):
    """Normalisation of each image alone, over 32 groups of channels where they divide so."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # The fast variance is E[x^2] - E[x]^2, see above.
        self.norm = nnx.GroupNorm(
            width, math.gcd(32, width), epsilon=EPSILON, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.norm(x_BHWC)


class NoNorm(nnx.Module):
    """What it is given."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        del width, rngs

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return x_BHWC


NORMS = {"batch": BatchNorm, "group": GroupNorm, "none": NoNorm}


class Discriminator(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, h, w, 1], one for each overlapping patch; float32.

    `h` is `H // 2**layers - 2`. With `norm="batch"` the statistics are those of the batch it is
    handed: real and generated images go in separate calls. `"group"` does not mix images;
    `"none"` is for gradient penalties, and gives every convolution a bias.
    """

    @ranges.checked
    def __init__(
        self,
        channels: int = 3,
        width: ranges.Width = 64,
        layers: Annotated[int, ranges.Range(1, 12)] = 3,
        norm: str = "batch",
        *,
        rngs: nnx.Rngs,
    ):
        choices.named(NORMS, norm, "norm of the discriminator")
        self.channels, self.layers = channels, layers
        widths = [width * min(2**n, WIDEST) for n in range(layers + 1)]
        strides = [2] * layers + [1]
        self.first = _conv(channels, widths[0], 2, use_bias=True, rngs=rngs)
        convs, norms = [], []
        for before, after, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True):
            convs.append(_conv(before, after, stride, use_bias=norm == "none", rngs=rngs))
            norms.append(NORMS[norm](after, rngs=rngs))
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.last = _conv(widths[-1], 1, 1, use_bias=True, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        _check(image_BHW3.shape, self.channels, self.layers)
        # float32 although the decoder may compute in bfloat16: batch statistics and the few,
        # small logits do not bear eight bits.
        x = jax.nn.leaky_relu(self.first(image_BHW3.astype(jnp.float32)), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), SLOPE)
        return self.last(x)


def _conv(before: int, after: int, stride: int, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        before,
        after,
        (4, 4),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _check(shape: tuple[int, ...], channels: int, layers: int) -> None:
    smallest = 3 * 2**layers  # three cells are left after the strides; two 4x4 kernels eat two
    if len(shape) != 4 or shape[3] != channels or min(shape[1:3]) < smallest:
        fitting = int(math.log2(min(shape[1:3]) / 3)) if min(shape[1:3], default=0) >= 6 else 0
        remedy = f"; try layers={fitting}" if 1 <= fitting < layers else ""
        raise interfaces.UserError(
            f"a discriminator with channels={channels}, layers={layers} needs images [B, H, W, "
            f"{channels}] of at least {smallest} x {smallest}, found {shape}{remedy}"
        )
