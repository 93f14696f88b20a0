import jax.numpy as jnp
import numpy as np
import pytest

from tokgen.discriminators import pooling


def _map(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 1), (1, 4, 6, 4, 1)])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_a_blur_is_the_written_out_filter(taps, size):
    """TensorFlow's SAME: what is padded is halved, the larger half after the map."""
    x = _map(2, *size, 3)
    total = [max(2 * (-(-n // 2) - 1) + len(taps) - n, 0) for n in size]
    padded = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    wanted = np.zeros((2, -(-size[0] // 2), -(-size[1] // 2), 3))
    for i in range(wanted.shape[1]):
        for j in range(wanted.shape[2]):
            for a, left in enumerate(taps):
                for b, right in enumerate(taps):
                    wanted[:, i, j] += left * right * padded[:, 2 * i + a, 2 * j + b]
    wanted /= sum(taps) ** 2
    blurred = {3: pooling.blur3, 4: pooling.blur4, 5: pooling.blur5}[len(taps)]
    np.testing.assert_allclose(blurred(jnp.asarray(x)), wanted, atol=1e-6)


def test_an_average_is_over_whole_squares():
    x = _map(1, 5, 4, 2)
    wanted = [[x[0, i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_allclose(pooling.average(jnp.asarray(x))[0], wanted, atol=1e-6)


def test_smoothing_mirrors_the_border():
    x = _map(1, 4, 5, 1)
    at = _mirrored
    wanted = np.zeros((4, 5))
    for i in range(4):
        for j in range(5):
            for a, left in zip((-1, 0, 1), (1, 2, 1), strict=True):
                for b, right in zip((-1, 0, 1), (1, 2, 1), strict=True):
                    wanted[i, j] += left * right * x[0, at(i + a, 4), at(j + b, 5), 0] / 16
    np.testing.assert_allclose(pooling.smooth(jnp.asarray(x))[0, :, :, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 5), (2, 3)])
def test_the_largest_of_adaptive_bins(size):
    x = _map(2, *size, 3)
    wanted = np.zeros((2, 4, 4, 3))
    for i in range(4):
        for j in range(4):
            rows = slice(i * size[0] // 4, -(-(i + 1) * size[0] // 4))
            columns = slice(j * size[1] // 4, -(-(j + 1) * size[1] // 4))
            wanted[:, i, j] = x[:, rows, columns].max((1, 2))
    np.testing.assert_array_equal(pooling.adaptive_max(jnp.asarray(x), 4), wanted)


def _mirrored(place, size):
    return -place if place < 0 else 2 * (size - 1) - place if place >= size else place
