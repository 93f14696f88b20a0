"""Convolutions over images, and the stages of which encoders and decoders are made.

A stage (`Stage`) is a block, an attention, a change of scale or a norm that follows the latents.
A network runs its stages in turn and tells all of them by name what they may need beside their
input: an encoder nothing, a decoder its latents. A stage takes what it reads and leaves the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices
from tokgen.nn import attention, linear, norms, remat, tiles, winograd
from tokgen.nn.precision import Precision


class Stage(Protocol):
    """One entry of the `stages` of an encoder or a decoder."""

    def __call__(self, x_BHWC: jax.Array, **told: jax.Array) -> jax.Array:
        """[B, H, W, C] to the next stage's. `told`: in a decoder `latents_BPC` [B, P, C], the
        quantized latents as the quantizer gives them; in an encoder nothing."""


class Conv(nnx.Module):
    """[B, H, W, I] -> [B, H / stride, W / stride, O]; SAME padding unless it is given."""

    CAST = ("kernel", "bias")  # to the compute dtype, before anything is done with them

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: str | tuple[tuple[int, int], ...] = "SAME",
        bias: bool = True,
        gain: float = 1.0,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, inputs, outputs)
        std = gain * (size * size * inputs) ** -0.5
        self.kernel = nnx.Param(
            std * jax.random.truncated_normal(rngs.params(), -2, 2, shape, precision.params_dtype)
        )
        self.bias = nnx.Param(jnp.zeros(outputs, precision.params_dtype)) if bias else None
        self.stride, self.padding, self.precision = stride, padding, precision

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Convolve, in the compute dtype."""
        shape, kernel = x_BHWC.shape, self.kernel[...].shape
        if self.stride == 1 and self.padding == "SAME":
            if tiles.pays(shape, kernel, self.precision.compute_dtype):
                return self._product(tiles.same, x_BHWC)
            if winograd.pays(shape, kernel):
                return self._product(winograd.same, x_BHWC)
        return self._product(self._written, x_BHWC)

    def doubled(self, x_BHWC: jax.Array) -> jax.Array:
        """The convolution of a map whose every place is first shown 2 x 2 times."""
        B, H, W, C = x_BHWC.shape
        shape, kernel = (B, 2 * H, 2 * W, C), self.kernel[...].shape
        if tiles.pays(shape, kernel, self.precision.compute_dtype):
            return self._product(tiles.doubled, x_BHWC)
        if winograd.pays(shape, kernel):
            return self._product(winograd.doubled, x_BHWC)
        return self(upsample(x_BHWC))

    def _written(self, x_BHWC: jax.Array, kernel_hwIO: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x_BHWC,
            kernel_hwIO,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _product(self, product: Callable, x_BHWC: jax.Array) -> jax.Array:
        dtype = self.precision.compute_dtype
        y_BHWC = product(x_BHWC.astype(dtype), self.kernel[...].astype(dtype))
        y_BHWC = remat.convolution(y_BHWC)
        if self.bias is None:
            return y_BHWC
        return y_BHWC + self.bias[...].astype(dtype).reshape(1, 1, 1, -1)


class Residual(nnx.Module):
    """x + conv3(silu(norm(conv3(silu(norm(x)))))): the block of VQGAN (arXiv:2012.09841)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Callable,
        bias: bool = True,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        self.norm1, self.norm2 = norm(inputs, **options), norm(outputs, **options)
        self.conv1 = Conv(inputs, outputs, bias=bias, **options)
        self.conv2 = Conv(outputs, outputs, bias=bias, **options)
        differ = inputs != outputs
        self.conv_skip = Conv(inputs, outputs, 1, bias=bias, **options) if differ else None

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv1(silu(self.norm1(x_BHWC)))
        y_BHWC = self.conv2(silu(self.norm2(y_BHWC)))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(x_BHWC)) + y_BHWC


def unbiased(inputs: int, outputs: int, **options) -> Residual:
    """`Residual` whose convolutions have no bias, as in Open-MAGVIT2 (arXiv:2409.04410)."""
    return Residual(inputs, outputs, bias=False, **options)


class SelfResidual(nnx.Module):
    """The block of MaskGIT's VQGAN (arXiv:2202.04200) and its descendants.

    Where the width changes, the 1 x 1 convolution sees the branch and not the input: y + W y. The
    input is lost there. The published weights were trained so.
    """

    def __init__(
        self, inputs: int, outputs: int, *, norm: Callable, precision: Precision, rngs: nnx.Rngs
    ):
        options = dict(precision=precision, rngs=rngs)
        self.norm1, self.norm2 = norm(inputs, **options), norm(outputs, **options)
        self.conv1 = Conv(inputs, outputs, bias=False, **options)
        self.conv2 = Conv(outputs, outputs, bias=False, **options)
        differ = inputs != outputs
        self.conv_skip = Conv(outputs, outputs, 1, bias=False, **options) if differ else None

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv1(silu(self.norm1(x_BHWC)))
        y_BHWC = self.conv2(silu(self.norm2(y_BHWC)))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(y_BHWC)) + y_BHWC


class LightResidual(nnx.Module):
    """x + conv1(silu(conv3(norm(x)))): half the products of `Residual`, for small budgets."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Callable,
        size: int = 3,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        self.norm = norm(inputs, **options)
        self.conv1 = Conv(inputs, outputs, size, **options)
        # a small second gain: the block begins close to the identity
        self.conv2 = Conv(outputs, outputs, 1, gain=0.1, **options)
        self.conv_skip = Conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Same height and width."""
        y_BHWC = self.conv2(silu(self.conv1(self.norm(x_BHWC))))
        return (x_BHWC if self.conv_skip is None else self.conv_skip(x_BHWC)) + y_BHWC


def local(inputs: int, outputs: int, **options) -> LightResidual:
    """`LightResidual` with a 1 x 1 convolution: every position for itself."""
    return LightResidual(inputs, outputs, size=1, **options)


class Attention(nnx.Module):
    """x + attention(norm(x)) over all positions, with one head (the AttnBlock of VQGAN)."""

    def __init__(self, width: int, *, norm: Callable, precision: Precision, rngs: nnx.Rngs):
        options = dict(precision=precision, rngs=rngs)
        self.norm = norm(width, **options)
        self.attention = attention.Attention(
            width, 1, biased=attention.ALL, std=linear.fan_in, **options
        )

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Same height and width."""
        B, H, W, C = x_BHWC.shape
        y_BPC, _ = self.attention(self.norm(x_BHWC).reshape(B, H * W, C))
        return x_BHWC + y_BPC.reshape(B, H, W, C)


class Downsample(nnx.Module):
    """A convolution of stride 2; SAME pads even images at the right and the bottom only."""

    def __init__(
        self,
        width: int,
        *,
        padding: str | tuple[tuple[int, int], ...] = "SAME",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(width, width, stride=2, padding=padding, precision=precision, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Half the height and width."""
        return self.conv(x_BHWC)


def symmetric(width: int, **options) -> Downsample:
    """`Downsample` padded by one on every side, as in Open-MAGVIT2."""
    return Downsample(width, padding=((1, 1), (1, 1)), **options)


class Average(nnx.Module):
    """The mean of 2 x 2 pixels."""

    def __init__(self, width: int, **options):
        del width, options

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Half the height and width."""
        B, H, W, C = x_BHWC.shape
        return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


class Upsample(nnx.Module):
    """Every pixel twice, then a convolution."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = Conv(width, width, precision=precision, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Twice the height and width."""
        return self.conv.doubled(x_BHWC)


class Unfold(nnx.Module):
    """A convolution to four times the channels, which become 2 x 2 pixels (Open-MAGVIT2)."""

    def __init__(self, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.conv = Conv(width, 4 * width, precision=precision, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, **_) -> jax.Array:
        """Twice the height and width."""
        return depth_to_space(self.conv(x_BHWC), 2)


class AdaptiveNorm(nnx.Module):
    """GroupNorm scaled and shifted by what the quantized latents look like over the image.

    Scale: a linear map of the standard deviation of each latent channel; shift: of its mean
    (Open-MAGVIT2, arXiv:2409.04410). The variance is the unbiased one and the scale has no
    "1 +", as published.
    """

    def __init__(self, width: int, latent: int, *, precision: Precision, rngs: nnx.Rngs):
        options = dict(bias=True, std=linear.fan_in, precision=precision, rngs=rngs)
        self.scale = linear.Linear(latent, width, **options)
        self.shift = linear.Linear(latent, width, **options)

    def __call__(self, x_BHWC: jax.Array, *, latents_BPC: jax.Array, **_) -> jax.Array:
        """Same height and width."""
        # float32: a channel of bits that never changes has the variance 0
        wide_BPC = latents_BPC.astype(jnp.float32)
        std_BC = jnp.sqrt(jnp.var(wide_BPC, axis=1, ddof=1) + 1e-6)
        scale_B11C = self.scale(std_BC)[:, None, None]
        shift_B11C = self.shift(wide_BPC.mean(1))[:, None, None]
        y_BHWC = norms.grouped(x_BHWC) * scale_B11C.astype(jnp.float32)
        return (y_BHWC + shift_B11C.astype(jnp.float32)).astype(x_BHWC.dtype)


def run(stage: Stage, x_BHWC: jax.Array, **told: jax.Array) -> jax.Array:
    """A stage as a function of its parameters, as `remat` needs it."""
    return stage(x_BHWC, **told)


def silu(x_BHWC: jax.Array) -> jax.Array:
    """x sigmoid(x) (arXiv:1702.03118)."""
    if x_BHWC.dtype == jnp.float32:
        return jax.nn.silu(x_BHWC)

    def wide(x_BHWC: jax.Array) -> jax.Array:
        # a CPU has no bfloat16 sums: XLA would round between any two steps
        return jax.nn.silu(x_BHWC.astype(jnp.float32)).astype(x_BHWC.dtype)

    return jax.lax.platform_dependent(x_BHWC, cpu=wide, default=jax.nn.silu)


def space_to_depth(x_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H / size, W / size, size * size * C]."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size, W // size, size * size * C)


def depth_to_space(x_BHWC: jax.Array, size: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, size, size, C // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H * size, W * size, C // size**2)


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """Every pixel twice in both directions; transposed convolutions are slow on every backend."""
    return jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)


def no_middle(width: int, blocks: int, variant: Variant, **options) -> list[nnx.Module]:
    """Nothing between the encoder's coarsest level and its end."""
    del width, blocks, variant, options
    return []


def plain_middle(width: int, blocks: int, variant: Variant, **options) -> list[nnx.Module]:
    """As many blocks as a level of the encoder has."""
    return [variant.block(width, width, norm=variant.norm, **options) for _ in range(blocks)]


def attentive_middle(width: int, blocks: int, variant: Variant, **options) -> list[nnx.Module]:
    """Block, attention, block."""
    del blocks
    first = variant.block(width, width, norm=variant.norm, **options)
    between = Attention(width, norm=variant.norm, **options)
    return [first, between, variant.block(width, width, norm=variant.norm, **options)]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What published convolutional tokenizers disagree about."""

    block: Callable
    norm: Callable = norms.GroupNorm
    down: Callable = Downsample
    up: Callable = Upsample
    middle: Callable = no_middle  # between the coarsest level and the latents, on both sides
    attention: Callable | None = None  # after every block of the coarsest level
    adapt: Callable | None = None  # before every level of the decoder
    more: int = 0  # blocks that a level of the decoder has beyond one of the encoder
    first: int = 3  # size of the encoder's first kernel
    last: int = 3  # and of its last
    first_bias: bool = True


VQGAN = Variant(Residual)
LIGHT = Variant(LightResidual, norms.RMSNorm)
LOCAL = Variant(local, norms.RMSNorm, first=1, last=1)

# MaskGIT's VQGAN, arXiv:2202.04200
MASKGIT = Variant(SelfResidual, down=Average, middle=plain_middle, last=1, first_bias=False)
# VQGAN+ and the bit tokenizers of MaskBit, arXiv:2409.16211: MASKGIT with learned downsampling
MASKBIT = Variant(SelfResidual, middle=plain_middle, last=1, first_bias=False)
# VQGAN, arXiv:2012.09841; also LlamaGen, VAR and IBQ
TAMING = Variant(Residual, middle=attentive_middle, attention=Attention, more=1)
# Open-MAGVIT2, arXiv:2409.04410
MAGVIT2 = Variant(
    unbiased,
    down=symmetric,
    up=Unfold,
    middle=plain_middle,
    adapt=AdaptiveNorm,
    last=1,
    first_bias=False,
)


KNOWN = {name.lower(): it for name, it in vars().items() if isinstance(it, Variant)}


def named(name: str) -> Variant:
    """The constant of this file that a config names, in lower case."""
    return choices.named(KNOWN, name, "variant")
