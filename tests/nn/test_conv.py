import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import conv, linear
from tokgen.nn.precision import FLOAT32


@pytest.mark.parametrize("size, stride", [(3, 1), (1, 1), (3, 2)])
def test_a_convolution_is_a_sum_over_its_window(size, stride):
    rng = np.random.default_rng(0)
    layer = conv.Conv(2, 3, size, stride=stride, precision=FLOAT32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(rng.normal(size=3), jnp.float32)
    H, W = 4, 6
    x = rng.normal(size=(2, H, W, 2)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...], np.float64)
    # SAME: the padding is split evenly, and what is left over goes behind
    before = max(size - stride, 0) // 2
    expected = np.zeros((2, H // stride, W // stride, 3))
    for row in range(H // stride):
        for column in range(W // stride):
            for i in range(size):
                for j in range(size):
                    r, c = row * stride + i - before, column * stride + j - before
                    if 0 <= r < H and 0 <= c < W:
                        expected[:, row, column] += x[:, r, c].astype(np.float64) @ kernel[i, j]
    expected += np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_space_to_depth_moves_blocks_and_back():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    deep = conv.space_to_depth(x, 2)
    assert deep.shape == (2, 2, 3, 12)
    for row in range(2):
        for column in range(3):
            block = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(deep[:, row, column], block.reshape(2, -1))
    np.testing.assert_array_equal(conv.depth_to_space(deep, 2), x)


def test_upsampling_shows_every_pixel_four_times():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(
        conv.upsample(x)[0, :, :, 0], np.kron(np.arange(6.0).reshape(2, 3), np.ones((2, 2)))
    )


@pytest.mark.parametrize("name", ["vqgan", "light", "local"])
def test_blocks_keep_the_grid_and_know_how_far_they_look(name):
    kit = conv.named(name)
    options = dict(precision=FLOAT32, rngs=nnx.Rngs(0))
    # a norm of single positions, so that the reach is that of the convolutions
    block = kit.block(32, 64, norm=linear.RMSNorm, **options)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 9, 9, 32)), jnp.float32)
    y = block(x)
    assert y.shape == (1, 9, 9, 64)
    moved = np.asarray(block(x.at[0, 4, 4].add(1.0)) - y)
    rows, columns = np.nonzero(np.abs(moved[0]).max(-1))
    reach = {"vqgan": 2, "light": 1, "local": 0}[name]
    assert np.abs(rows - 4).max() == np.abs(columns - 4).max() == reach


def test_an_unknown_kit_is_refused():
    with pytest.raises(ValueError, match="'vgan'"):
        conv.named("vgan")
