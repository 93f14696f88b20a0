"""Convolutions, and the blocks of published tokenizers written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import conv, norms
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
    variant = conv.named(name)
    options = dict(precision=FLOAT32, rngs=nnx.Rngs(0))
    # a norm of single positions, so that the reach is that of the convolutions
    block = variant.block(32, 64, norm=norms.RMSNorm, **options)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 9, 9, 32)), jnp.float32)
    y = block(x)
    assert y.shape == (1, 9, 9, 64)
    moved = np.asarray(block(x.at[0, 4, 4].add(1.0)) - y)
    rows, columns = np.nonzero(np.abs(moved[0]).max(-1))
    reach = {"vqgan": 2, "light": 1, "local": 0}[name]
    assert np.abs(rows - 4).max() == np.abs(columns - 4).max() == reach


# ---------------------------------------------------------------- blocks, written out in float64


def filled(make, seed=0):
    """A module with a number in every leaf, without compiling its constructor."""
    graph, state = nnx.split(nnx.eval_shape(make))
    draw = np.random.default_rng(seed).normal
    state = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(size=leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, state)


def wide(variable):
    return np.asarray(variable[...], np.float64)


def convolved(x, layer, stride=1, before=None):
    """A sum over the window of a convolution; `before` zeros on top and on the left."""
    kernel = wide(layer.kernel)
    size = kernel.shape[0]
    before = (size - stride) // 2 if before is None else before
    B, H, W, _ = x.shape
    padded = np.zeros((B, H + 2 * size, W + 2 * size, x.shape[3]))
    padded[:, before : before + H, before : before + W] = x
    y = np.zeros((B, H // stride, W // stride, kernel.shape[3]))
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + H, stride)
            y += padded[:, rows, j : j + W : stride] @ kernel[i, j]
    return y if layer.bias is None else y + wide(layer.bias)


def by_groups(x, groups=32):
    B, H, W, C = x.shape
    parts = x.reshape(B, H, W, groups, C // groups)
    parts = parts - parts.mean((1, 2, 4), keepdims=True)
    return (parts / np.sqrt((parts**2).mean((1, 2, 4), keepdims=True) + 1e-6)).reshape(x.shape)


def group_norm(x, norm):
    return by_groups(x) * wide(norm.scale) + wide(norm.bias)


def rms_norm(x, norm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * wide(norm.scale)


def silu(x):
    return x / (1 + np.exp(-x))


def residual(x, block):
    y = convolved(silu(group_norm(x, block.norm1)), block.conv1)
    y = convolved(silu(group_norm(y, block.norm2)), block.conv2)
    return (x if block.conv_skip is None else convolved(x, block.conv_skip)) + y


def self_residual(x, block):
    y = convolved(silu(group_norm(x, block.norm1)), block.conv1)
    y = convolved(silu(group_norm(y, block.norm2)), block.conv2)
    return (x if block.conv_skip is None else convolved(y, block.conv_skip)) + y


def light(x, block):
    y = convolved(silu(convolved(rms_norm(x, block.norm), block.conv1)), block.conv2)
    return (x if block.conv_skip is None else convolved(x, block.conv_skip)) + y


BLOCKS = {
    "vqgan": (residual, True),
    "taming": (residual, True),
    "magvit2": (residual, False),
    "maskgit": (self_residual, False),
    "maskbit": (self_residual, False),
    "light": (light, True),
    "local": (light, True),
}


def draw(*shape):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("inputs, outputs", [(32, 64), (32, 32)])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_block_written_out(name, inputs, outputs):
    variant, (by_hand, biased) = conv.named(name), BLOCKS[name]
    options = dict(norm=variant.norm, precision=FLOAT32)
    block = filled(lambda: variant.block(inputs, outputs, rngs=nnx.Rngs(0), **options))
    assert (block.conv1.bias is not None) == biased
    x = draw(2, 3, 4, inputs)
    np.testing.assert_allclose(
        block(jnp.asarray(x)), by_hand(x.astype(np.float64), block), rtol=2e-4, atol=2e-5
    )


def test_attention_over_all_positions_written_out():
    layer = filled(
        lambda: conv.Attention(32, norm=norms.GroupNorm, precision=FLOAT32, rngs=nnx.Rngs(0))
    )
    x = draw(2, 2, 3, 32)
    flat = group_norm(x.astype(np.float64), layer.norm).reshape(2, 6, 32)

    def projected(name):
        part = getattr(layer.attention, name)
        return flat @ wide(part.kernel).reshape(32, 32) + wide(part.bias).reshape(-1)

    scores = projected("query") @ projected("key").transpose(0, 2, 1) / np.sqrt(32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = layer.attention.out
    mixed = (weights @ projected("value")) @ wide(out.kernel).reshape(32, 32) + wide(out.bias)
    np.testing.assert_allclose(
        layer(jnp.asarray(x)), x + mixed.reshape(x.shape), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("make, before", [(conv.Downsample, 0), (conv.symmetric, 1)])
def test_downsampling_pads_where_it_was_published(make, before):
    """Taming's form at the right and the bottom only, Open-MAGVIT2's on every side."""
    layer = filled(lambda: make(3, precision=FLOAT32, rngs=nnx.Rngs(0)))
    x = draw(2, 4, 6, 3)
    expected = convolved(x.astype(np.float64), layer.conv, stride=2, before=before)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_an_average_is_of_two_by_two():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    found = conv.Average(3, precision=FLOAT32, rngs=nnx.Rngs(0))(jnp.asarray(x))
    for row in range(2):
        for column in range(3):
            square = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(found[:, row, column], square.mean((1, 2)))


def test_unfolded_channels_are_ordered_row_column_channel():
    """Channel (2 r + c) C + k becomes channel k of the pixel r down and c to the right."""
    C = 3
    layer = filled(lambda: conv.Unfold(C, precision=FLOAT32, rngs=nnx.Rngs(0)))
    x = draw(1, 2, 3, C)
    deep = convolved(x.astype(np.float64), layer.conv)
    found = np.asarray(layer(jnp.asarray(x)))
    assert found.shape == (1, 4, 6, C)
    for row in range(4):
        for column in range(6):
            start = (2 * (row % 2) + column % 2) * C
            expected = deep[:, row // 2, column // 2, start : start + C]
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-4, atol=1e-5)


def test_an_adaptive_norm_looks_at_the_latents_of_the_whole_image():
    layer = filled(lambda: conv.AdaptiveNorm(32, 5, precision=FLOAT32, rngs=nnx.Rngs(0)))
    x, latents = draw(2, 3, 4, 32), draw(2, 6, 5)
    latents[..., 2] = 1.0  # a bit that never changes
    deviation = np.sqrt(latents.astype(np.float64).var(1, ddof=1) + 1e-6)
    scale = deviation @ wide(layer.scale.kernel) + wide(layer.scale.bias)
    shift = latents.astype(np.float64).mean(1) @ wide(layer.shift.kernel) + wide(layer.shift.bias)
    expected = by_groups(x.astype(np.float64)) * scale[:, None, None] + shift[:, None, None]
    found = layer(jnp.asarray(x), latents_BPC=jnp.asarray(latents))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)

    def summed(latents_BPC):
        return layer(jnp.asarray(x), latents_BPC=latents_BPC).sum()

    gradient = jax.grad(summed)(jnp.asarray(latents))
    assert np.isfinite(gradient).all()
    # in bfloat16 the statistics stay float32
    narrow = layer(jnp.asarray(x, jnp.bfloat16), latents_BPC=jnp.asarray(latents))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="'vgan'"):
        conv.named("vgan")
