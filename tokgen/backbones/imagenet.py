"""What networks trained on ImageNet share: how they take pixels, and their convolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces

# ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225) are said of [0, 1];
# of [-1, 1] they are 2 mean - 1 and 2 deviation, the "scaling layer" of LPIPS.
MEAN_3 = (-0.030, -0.088, -0.188)
DEVIATION_3 = (0.458, 0.448, 0.450)


def conv(
    before: int, after: int, size: int, *, stride: int = 1, padding: int = 0, rngs: nnx.Rngs, **more
) -> nnx.Conv:
    """A square convolution with so many rows of zeros around; `more` are arguments of nnx.Conv."""
    return nnx.Conv(
        before,
        after,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rngs=rngs,
        **more,
    )


def normalised(image_BHW3: jax.Array, smallest: int) -> jax.Array:
    """image [B, H, W, 1 or 3] in [-1, 1] -> [B, H, W, 3] as ImageNet's networks were trained."""
    shape = image_BHW3.shape
    if len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:3]) < smallest:
        raise interfaces.UserError(
            f"this feature network needs images [B, H, W, 1 or 3] of at least {smallest} x "
            f"{smallest} pixels, found {shape}: train on larger images, or without this loss"
        )
    mean_3 = jnp.asarray(MEAN_3).reshape(1, 1, 1, 3)
    deviation_3 = jnp.asarray(DEVIATION_3).reshape(1, 1, 1, 3)
    # float32: distances between near images are differences of large, nearly equal features.
    return (image_BHW3.astype(jnp.float32) - mean_3) / deviation_3
