"""PSNR and SSIM against loops in float64; the rule by which images become bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import reconstruction


def pair(key, shape=(2, 16, 13, 3)):
    image, noise = jax.random.uniform(key, (2, *shape))
    return image, jnp.clip(image + 0.3 * (noise - 0.5), 0, 1)


def ssim(x, y):
    """One window at a time: Wang et al. 2004, Eq. 13, Gaussian of 11 pixels and sigma 1.5."""
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    rows, columns, channels = x.shape
    values = []
    for channel in range(channels):
        for row in range(rows - 10):
            for column in range(columns - 10):
                a = x[row : row + 11, column : column + 11, channel]
                b = y[row : row + 11, column : column + 11, channel]
                mean_a, mean_b = (taps * a).sum(), (taps * b).sum()
                var_a = (taps * (a - mean_a) ** 2).sum()
                var_b = (taps * (b - mean_b) ** 2).sum()
                both = (taps * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
                values.append(top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
    return np.mean(values)


@pytest.mark.parametrize("channels", [3, 1])
def test_ssim_is_the_written_out_loop(channels, key):
    image, painted = pair(key, (2, 16, 13, channels))
    found = reconstruction.ssim(image, painted)
    expected = [ssim(*np.asarray((a, b), np.float64)) for a, b in zip(image, painted, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert 0.2 < min(expected) and max(expected) < 0.99
    np.testing.assert_allclose(reconstruction.ssim(image, image), 1, atol=1e-5)


def test_ssim_of_a_small_image_is_refused():
    with pytest.raises(ValueError, match="11"):
        reconstruction.ssim(jnp.zeros((1, 16, 10, 3)), jnp.zeros((1, 16, 10, 3)))


def test_psnr_of_each_image(key):
    image, painted = pair(key)
    a, b = np.asarray(image, np.float64), np.asarray(painted, np.float64)
    expected = 10 * np.log10(1 / ((a - b) ** 2).mean((1, 2, 3)))
    found = reconstruction.psnr(image, painted)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # half a gray level everywhere: 20 log10(255 / 0.5)
    shifted = reconstruction.psnr(jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), 0.5 / 255))
    np.testing.assert_allclose(shifted, 20 * np.log10(510), rtol=1e-5)
    np.testing.assert_array_equal(reconstruction.psnr(image, image), 100)


def test_images_become_bytes_by_one_rule():
    values = jnp.asarray([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 127.6 / 255, 1.0, 7.0])
    found = reconstruction.to_uint8(values)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 127, 128, 255, 255])


def test_bytes_survive_the_round_trip():
    all_bytes = jnp.arange(256, dtype=jnp.uint8)
    image = reconstruction.from_uint8(all_bytes)
    assert image.dtype == jnp.float32 and image.min() == 0 and image.max() == 1
    np.testing.assert_array_equal(reconstruction.to_uint8(image), all_bytes)


def test_bytes_are_made_of_numbers_and_of_nothing_else():
    image = np.full((3, 2, 2, 1), 0.5, np.float32)
    image[1, 0, 0] = np.nan
    for wrong in (image, jnp.asarray(image), np.where(np.isnan(image), np.inf, image)):
        with pytest.raises(interfaces.UserError, match="pixels must be finite.* images: 1;"):
            reconstruction.to_uint8(wrong)
    with pytest.raises(interfaces.UserError, match="found uint8"):
        reconstruction.to_uint8(np.full((1, 2, 2, 1), 7, np.uint8))
    with pytest.raises(interfaces.UserError, match=r"100% of the numbers outside, from 127"):
        reconstruction.to_uint8(np.full((1, 2, 2, 1), 127.0, np.float32))
    with pytest.raises(ValueError, match="bytes_of"):
        jax.jit(reconstruction.to_uint8)(image)
    painted, invalid_B = jax.jit(reconstruction.bytes_of)(image)
    assert invalid_B.tolist() == [False, True, False] and painted.dtype == jnp.uint8
    with pytest.raises(interfaces.UserError, match="from_uint8 takes bytes; found float32"):
        reconstruction.from_uint8(image)


@pytest.mark.parametrize("measure", [reconstruction.psnr, reconstruction.ssim])
def test_what_is_compared_is_of_one_shape_type_and_range(measure):
    image = np.full((1, 12, 12, 3), 0.5, np.float32)
    for other, words in (
        (image[:, :, :, :1], "of one shape"),  # it would broadcast
        ((image * 255).astype(np.uint8), "reconstructions must be float32"),
        (image * 255, "reconstructions must lie in"),
        (image[0], "reconstructions must be an array"),
    ):
        with pytest.raises(interfaces.UserError, match=words):
            measure(image, other)
