"""The discriminator of VAR's tokenizer (arXiv:2404.02905): heads on the features of a frozen DINO.

As projected GANs have it (arXiv:2301.09515). Every level of the trunk has a head of circular
convolutions over the sequence of patches, with spectral and batch normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces, ranges, rng
from tokgen.backbones import dino, imagenet, weights
from tokgen.nn import resample

SLOPE = 0.2
EPSILON = 1e-6  # of the batch norm
MOMENTUM = 0.1  # share of the batch at hand in the running statistics
HIGHEST = jax.lax.Precision.HIGHEST


class SpectralConv(nnx.Module):
    """x [B, L, C] -> [B, L, C'], the sequence closed to a ring; arXiv:1802.05957.

    The kernel is divided by its largest singular value, estimated by one step of the power
    iteration from `direction`, which `maintain` moves.
    """

    def __init__(self, before: int, after: int, size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (size, before, after)))
        self.bias = nnx.Param(jnp.zeros(after))
        self.direction = interfaces.Statistic(_unit(jax.random.normal(rngs.params(), (after,))))

    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        left, right = _estimate(self.kernel[...], self.direction[...])
        rows_IC = self.kernel[...].reshape(-1, len(right))
        largest = jnp.dot(jnp.dot(left, rows_IC, precision=HIGHEST), right, precision=HIGHEST)
        size = self.kernel.shape[0]
        x_BLC = jnp.pad(x_BLC, ((0, 0), (size // 2, (size - 1) // 2), (0, 0)), mode="wrap")
        x_BLC = jax.lax.conv_general_dilated(
            x_BLC,
            self.kernel[...] / largest,
            (1,),
            "VALID",
            dimension_numbers=("NHC", "HIO", "NHC"),
        )
        return x_BLC + self.bias[...].reshape(1, 1, -1)

    def maintain(self):
        """One step of the power iteration."""
        # not `[...] =`: it asks a traced array for its sharding, and that reads the whole trace
        self.direction.set_value(_estimate(self.kernel[...], self.direction[...])[1])


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


def _estimate(kernel: jax.Array, direction_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors (left, right) near those of the largest singular value; constants."""
    rows_IC = jax.lax.stop_gradient(kernel).reshape(-1, len(direction_C))
    left = _unit(jnp.dot(rows_IC, jax.lax.stop_gradient(direction_C), precision=HIGHEST))
    return left, _unit(jnp.dot(left, rows_IC, precision=HIGHEST))


class BatchNorm(nnx.Module):
    """Per channel over batch and sequence; the batch under `jit` is the global one."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean = interfaces.Statistic(jnp.zeros(width))
        self.variance = interfaces.Statistic(jnp.ones(width))

    def by_batch(self, x_BLC: jax.Array) -> jax.Array:
        """By the statistics of the batch at hand."""
        return self._normalised(x_BLC, *_moments(x_BLC))

    def by_record(self, x_BLC: jax.Array) -> jax.Array:
        """By the running statistics."""
        return self._normalised(x_BLC, self.mean[...], self.variance[...])

    def recorded(self, x_BLC: jax.Array) -> jax.Array:
        """By those of the batch, which enter the running ones, the variance unbiased."""
        mean_C, variance_C = _moments(x_BLC)
        count = x_BLC.shape[0] * x_BLC.shape[1]
        unbiased_C = variance_C * count / max(count - 1, 1)
        self.mean.set_value((1 - MOMENTUM) * self.mean[...] + MOMENTUM * mean_C)
        self.variance.set_value((1 - MOMENTUM) * self.variance[...] + MOMENTUM * unbiased_C)
        return self._normalised(x_BLC, mean_C, variance_C)

    def _normalised(self, x_BLC: jax.Array, mean_C: jax.Array, variance_C: jax.Array) -> jax.Array:
        factor_C = self.scale[...] * jax.lax.rsqrt(variance_C + EPSILON)
        centred_BLC = x_BLC - mean_C.reshape(1, 1, -1)
        return centred_BLC * factor_C.reshape(1, 1, -1) + self.bias[...].reshape(1, 1, -1)


def _moments(x_BLC: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean_C = x_BLC.mean((0, 1))
    return mean_C, jnp.square(x_BLC - mean_C.reshape(1, 1, -1)).mean((0, 1))


class Head(nnx.Module):
    """features [B, L, D] -> logits [B, L]."""

    def __init__(self, width: int, size: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List(SpectralConv(width, width, each, rngs=rngs) for each in (1, size))
        self.norms = nnx.List([BatchNorm(width), BatchNorm(width)])
        self.last = SpectralConv(width, 1, 1, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, normalise: Callable) -> jax.Array:
        x = jax.nn.leaky_relu(normalise(self.norms[0], self.convs[0](x_BLD)), SLOPE)
        y = jax.nn.leaky_relu(normalise(self.norms[1], self.convs[1](x)), SLOPE)
        return self.last((x + y) / math.sqrt(2))[:, :, 0]


class Discriminator(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, levels * patches], float32.

    Without a key the whole image is brought to `size`, by areas or, when it is smaller, by cubic
    interpolation. With one, half the calls see a random crop of larger images instead.

    The call, for the discriminator's own loss, normalises by the batch it is handed; `evaluated`,
    for the tokenizer's, by running statistics, which `maintain` moves after a step of the
    discriminator. The trunk is drawn at random until `load` fills it.
    """

    @ranges.checked
    def __init__(
        self,
        channels: int = 3,
        size: ranges.Side = 224,
        patch: ranges.Side = 16,
        width: ranges.Width = 384,
        depth: ranges.Depth = 12,
        heads: ranges.Heads = 6,
        levels: Sequence[ranges.Whole] = (2, 5, 8, 11),
        kernel: ranges.Kernel = 9,
        *,
        rngs: nnx.Rngs,
    ):
        self.channels, self.size = channels, size
        self.trunk = dino.ViT(size, patch, width, depth, heads, levels, rngs=rngs)
        self.heads = nnx.List(Head(width, kernel, rngs=rngs) for _ in range(len(levels) + 1))

    def load(self, *paths: str, read: Callable[[str], dict[str, np.ndarray]]):
        """Fill the trunk from DINO's weight file, read by `pretrained.reader.read`."""
        arrays = weights.gather(paths, read, source=dino.SOURCE)
        weights.fill(self.trunk.slots(), arrays, what="DINO", source=dino.SOURCE)

    def __call__(self, image_BHW3: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self._logits(image_BHW3, key, BatchNorm.by_batch)

    def evaluated(self, image_BHW3: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """image_BHW3 in [-1, 1] -> logits by running statistics: an image is scored alone."""
        return self._logits(image_BHW3, key, BatchNorm.by_record)

    def maintain(self, image_BHW3: jax.Array, key: jax.Array | None = None):
        """Move running statistics and spectral directions; once for real, once for fake images."""
        self._logits(image_BHW3, key, BatchNorm.recorded)
        for head in self.heads:
            for conv in (*head.convs, head.last):
                conv.maintain()

    def _logits(
        self, image_BHW3: jax.Array, key: jax.Array | None, normalise: Callable
    ) -> jax.Array:
        if image_BHW3.ndim != 4 or image_BHW3.shape[3] != self.channels:
            raise interfaces.UserError(
                f"this discriminator needs images [B, H, W, {self.channels}]; found "
                f"{image_BHW3.shape}"
            )
        levels = self.trunk(imagenet.normalised(self._fitted(image_BHW3, key), 1))
        logits = [head(x, normalise) for head, x in zip(self.heads, levels, strict=True)]
        return jnp.concatenate(logits, 1)

    def _fitted(self, image_BHW3: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, size, size, C]."""
        height, width = image_BHW3.shape[1:3]
        size = (self.size, self.size)
        matrix = resample.area if height > self.size else resample.bicubic_torch
        whole_BHW3 = resample.resize(image_BHW3, size, matrix)
        if key is None or min(height, width) <= self.size:
            return whole_BHW3
        row = jax.random.randint(rng.use(key, rng.ROW), (), 0, height - self.size + 1)
        column = jax.random.randint(rng.use(key, rng.COLUMN), (), 0, width - self.size + 1)
        chosen = jax.random.bernoulli(rng.use(key, rng.CHOSEN))
        shape = (len(image_BHW3), *size, self.channels)
        crop_BHW3 = jax.lax.dynamic_slice(image_BHW3, (0, row, column, 0), shape)
        return jnp.where(chosen, crop_BHW3.astype(jnp.float32), whole_BHW3)
