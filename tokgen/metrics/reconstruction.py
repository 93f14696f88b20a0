"""PSNR and SSIM between images in [0, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen.interfaces import Array

WINDOW, SIGMA = 11, 1.5  # of SSIM, as in the paper
K1, K2 = 0.01, 0.03


def to_uint8(image_BHW3: Array) -> Array:
    """The one rule by which images become bytes: clip, scale by 255, round to nearest."""
    scaled = jnp.round(jnp.clip(image_BHW3.astype(jnp.float32), 0, 1) * 255)
    return scaled.astype(jnp.uint8)


def from_uint8(image_BHW3: Array) -> Array:
    """Bytes as float32 in [0, 1]."""
    return image_BHW3.astype(jnp.float32) / 255


def psnr(image_BHW3: Array, painted_BHW3: Array) -> Array:
    """[B] peak signal-to-noise ratio in dB, of one image each; equal images give 100."""
    error = image_BHW3.astype(jnp.float32) - painted_BHW3.astype(jnp.float32)
    mean_B = jnp.mean(error * error, axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(mean_B, 1e-10))


def ssim(image_BHW3: Array, painted_BHW3: Array) -> Array:
    """[B] structural similarity: Gaussian window of 11, sigma 1.5, valid windows, mean of colours.

    Wang et al. 2004, Eq. 13, with K1 = 0.01, K2 = 0.03 and a range of 1.
    """
    if min(image_BHW3.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} pixels; found {image_BHW3.shape}")
    x, y = image_BHW3.astype(jnp.float32), painted_BHW3.astype(jnp.float32)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return jnp.mean(similarity, axis=(1, 2, 3))


def _blur(x_BHWC: Array) -> Array:
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = jnp.asarray(taps / taps.sum(), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    rows, columns = (
        jnp.arange(size - WINDOW + 1)[:, None] + jnp.arange(WINDOW)[None]
        for size in x_BHWC.shape[1:3]
    )
    x_BHWC = jnp.einsum("BhtWC,t->BhWC", x_BHWC[:, rows], taps, precision=highest)
    return jnp.einsum("BhwtC,t->BhwC", x_BHWC[:, :, columns], taps, precision=highest)
