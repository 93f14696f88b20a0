"""PSNR and SSIM between images in [0, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import boundary
from tokgen.interfaces import Array, UserError
from tokgen.metrics import metric

WINDOW, SIGMA = 11, 1.5  # of SSIM, as in the paper
K1, K2 = 0.01, 0.03


def to_uint8(image_BHW3: Array) -> Array:
    """The one rule by which images become bytes: clip, scale by 255, round to nearest.

    Of arrays whose values are known; a compiled program uses `bytes_of`, which has a flag for what
    no byte can say.
    """
    if not jnp.issubdtype(image_BHW3.dtype, jnp.floating):
        raise UserError(
            f"to_uint8 takes floating numbers in [0, 1]; found {image_BHW3.dtype}: leave bytes as "
            "they are"
        )
    if not boundary.known(image_BHW3):
        raise ValueError(
            "inside a compiled program NaN would become a colour: use reconstruction.bytes_of, "
            "and ask boundary.refuse for its flags outside"
        )
    values_BHW3 = np.asarray(jax.device_get(image_BHW3))
    flat_BX = values_BHW3.reshape(len(values_BHW3) if values_BHW3.ndim > 3 else 1, -1)
    boundary.refuse(~np.isfinite(flat_BX).all(1), "pixels")
    outside = np.mean((flat_BX < -0.05) | (flat_BX > 1.05)) if flat_BX.size else 0.0
    if outside > 0.5:
        raise UserError(
            f"to_uint8 takes images in [0, 1]; found {float(outside):.0%} of the numbers outside, "
            f"from {float(flat_BX.min()):.4g} to {float(flat_BX.max()):.4g}: scale them first"
        )
    return _bytes(jnp.asarray(image_BHW3))


def bytes_of(image_BHW3: Array) -> tuple[Array, Array]:
    """(bytes of images by the rule of `to_uint8`, [B] true where a pixel is not finite)."""
    return _bytes(image_BHW3), boundary.not_finite(image_BHW3)


def _bytes(image_BHW3: Array) -> Array:
    scaled = jnp.round(jnp.clip(image_BHW3.astype(jnp.float32), 0, 1) * 255)
    return scaled.astype(jnp.uint8)


def from_uint8(image_BHW3: Array) -> Array:
    """Bytes as float32 in [0, 1]."""
    if image_BHW3.dtype != jnp.uint8:
        raise UserError(
            f"from_uint8 takes bytes; found {image_BHW3.dtype}: leave float images in [0, 1] as "
            "they are"
        )
    return image_BHW3.astype(jnp.float32) / 255


def psnr(image_BHW3: Array, decoded_BHW3: Array) -> Array:
    """[B] peak signal-to-noise ratio in dB, of one image each; equal images give 100."""
    boundary.pair(image_BHW3, decoded_BHW3)
    error = image_BHW3.astype(jnp.float32) - decoded_BHW3.astype(jnp.float32)
    mean_B = jnp.mean(error * error, axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(mean_B, 1e-10))


def ssim(image_BHW3: Array, decoded_BHW3: Array) -> Array:
    """[B] structural similarity: Gaussian window of 11, sigma 1.5, valid windows, mean of colours.

    Wang et al. 2004, Eq. 13, with K1 = 0.01, K2 = 0.03 and a range of 1.
    """
    boundary.pair(image_BHW3, decoded_BHW3)
    if min(image_BHW3.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs images of at least {WINDOW} pixels; found {image_BHW3.shape}")
    x, y = image_BHW3.astype(jnp.float32), decoded_BHW3.astype(jnp.float32)
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


# ---------------------------------------------------------------- as metrics of a score


METRICS = (
    metric.Metric("psnr_db", title="PSNR, dB", better="higher", row=200),
    metric.Metric("ssim", title="SSIM", better="higher", row=210),
    metric.Metric("lpips_vgg", title="lpips vgg", better="lower", row=220),
    metric.Metric("lpips_alex", title="lpips alex", better="lower", row=230),
)
