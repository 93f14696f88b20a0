"""The discriminator on frozen features: trunk and heads written out, and who may move what."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tokgen import interfaces, rng
from tokgen.backbones import dino, imagenet
from tokgen.discriminators import feature_heads
from tokgen.pretrained.formats import reader

SIZES = dict(size=8, patch=4, width=6, depth=3, heads=2, levels=(0, 2))


def _filled(module, scale=0.3):
    rng = np.random.default_rng(0)

    def value(leaf):
        return jnp.asarray(rng.normal(0.05, scale, leaf.shape), "f4")

    module = jax.tree.map(value, module)
    for _, norm in nnx.iter_graph(module):
        if isinstance(norm, feature_heads.BatchNorm):
            norm.variance[...] = jnp.abs(norm.variance[...]) + 0.5
    return module


@pytest.fixture(scope="module")
def discriminator():
    make = lambda: feature_heads.Discriminator(kernel=3, rngs=nnx.Rngs(0), **SIZES)  # noqa: E731
    return _filled(nnx.eval_shape(make))


def _image(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _wide(variable):
    return np.asarray(variable[...], np.float64)


def _layer_norm(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * _wide(norm.scale) + _wide(norm.bias)


def _linear(x, linear):
    return x @ _wide(linear.kernel) + _wide(linear.bias)


def _block(x, block, heads):
    """One image [L, D]."""
    width = x.shape[1] // heads
    qkv = _linear(_layer_norm(x, block.norm_attention), block.qkv)
    query, key, value = np.split(qkv, 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            scores = np.exp(key[:, part] @ query[i, part] / math.sqrt(width))
            mixed[i, part] = (scores / scores.sum()) @ value[:, part]
    x = x + _linear(mixed, block.out)
    hidden = _linear(_layer_norm(x, block.norm_mlp), block.up)
    gate = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + _linear(hidden * gate, block.down)


def _trunk(image, trunk, heads):
    kernel, patch = _wide(trunk.patches.kernel), trunk.patches.kernel.shape[0]
    patches = []
    for i in range(0, len(image), patch):
        for j in range(0, len(image), patch):
            window = image[i : i + patch, j : j + patch]
            patches.append(np.einsum("hwc,hwco->o", window, kernel) + _wide(trunk.patches.bias))
    x = np.stack([_wide(trunk.token), *patches]) + _wide(trunk.positions)[0]
    readouts = [x[1:] + x[:1]]
    for number, block in enumerate(trunk.blocks):
        x = _block(x, block, heads)
        if number in trunk.levels:
            readouts.append(x[1:] + x[:1])
    return readouts


def test_readouts_follow_the_written_out_transformer(discriminator):
    image = _image(1, 2, 8, 8, 3)
    found = jax.jit(dino.ViT.__call__)(discriminator.trunk, image)
    assert len(found) == 3
    for number in range(2):
        wanted = _trunk(image[number].astype(np.float64), discriminator.trunk, 2)
        for level, readout in enumerate(wanted):
            np.testing.assert_allclose(found[level][number], readout, rtol=1e-4, atol=1e-5)


def test_but_on_a_cpu_a_deeper_trunk_is_no_larger_program(discriminator):
    """Blocks between two readouts are a loop there, and give the same."""
    x_BLD = jnp.asarray(_image(7, 2, 5, 6))
    blocks = tuple(discriminator.trunk.blocks)
    in_turn, stacked = (jax.jit(way)(x_BLD, blocks) for way in (dino._in_turn, dino._stacked))
    np.testing.assert_allclose(stacked, in_turn, rtol=1e-5, atol=1e-6)

    def lines(depth):
        def make():
            return dino.ViT(8, 4, 6, depth, 2, (depth - 1,), rngs=nnx.Rngs(0))

        run = jax.jit(dino.ViT.__call__).trace(nnx.eval_shape(make), jnp.ones((1, 8, 8, 3)))
        text = run.lower(lowering_platforms=("tpu",)).as_text()
        return text.count("dot_general")

    assert lines(4) == lines(2) > 0


def test_the_trunk_has_as_many_numbers_as_published():
    trunk = nnx.eval_shape(lambda: dino.ViT(rngs=rng.rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(trunk)) == 21_665_664
    assert trunk.slots()["pos_embed"].needed() == (1, 197, 384)
    assert trunk.slots()["blocks.11.attn.qkv.weight"].needed() == (1152, 384)


def _ring(x, conv):
    """Circular convolution [B, L, C] by the kernel over its largest singular value, estimated."""
    kernel, direction = _wide(conv.kernel), _wide(conv.direction)
    rows = kernel.reshape(-1, kernel.shape[2])
    left = rows @ direction
    left /= np.linalg.norm(left)
    right = left @ rows
    right /= np.linalg.norm(right)
    kernel = kernel / (left @ rows @ right)
    out = np.zeros((*x.shape[:2], kernel.shape[2])) + _wide(conv.bias)
    for place in range(x.shape[1]):
        for tap in range(len(kernel)):
            out[:, place] += x[:, (place + tap - len(kernel) // 2) % x.shape[1]] @ kernel[tap]
    return out


def _head(x, head, recorded):
    def normalised(x, norm):
        mean, variance = x.mean((0, 1)), x.var((0, 1))
        if recorded:
            mean, variance = _wide(norm.mean), _wide(norm.variance)
        x = (x - mean) / np.sqrt(variance + 1e-6) * _wide(norm.scale) + _wide(norm.bias)
        return np.where(x > 0, x, 0.2 * x)

    x = normalised(_ring(x, head.convs[0]), head.norms[0])
    y = normalised(_ring(x, head.convs[1]), head.norms[1])
    return _ring((x + y) / math.sqrt(2), head.last)[:, :, 0]


@pytest.mark.parametrize("recorded", [False, True])
def test_logits_follow_the_written_out_heads(discriminator, recorded):
    image = _image(2, 3, 8, 8, 3)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = ((image.astype(np.float64) + 1) / 2 - mean) / deviation
    levels = np.moveaxis([_trunk(x, discriminator.trunk, 2) for x in normal], 1, 0)
    wanted = [_head(x, head, recorded) for x, head in zip(levels, discriminator.heads, strict=True)]
    scored = discriminator.evaluated if recorded else discriminator
    logits = scored(image)
    assert logits.shape == (3, 3 * 4) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.concatenate(wanted, 1), rtol=1e-4, atol=1e-4)


def test_maintaining_moves_statistics_and_directions_alone(discriminator):
    network = nnx.clone(discriminator)
    before = jax.tree.map(np.asarray, nnx.state(network, interfaces.Statistic))
    params = jax.tree.map(np.asarray, nnx.state(network, nnx.Param))
    image = _image(3, 4, 8, 8, 3)
    first = network.heads[0].convs[0](network.trunk(imagenet.normalised(image, 1))[0])
    network.maintain(image)
    jax.tree.map(np.testing.assert_array_equal, params, nnx.state(network, nnx.Param))
    places = np.asarray(first, np.float64).reshape(-1, 6)
    norm, old = network.heads[0].norms[0], before["heads"][0]["norms"][0]
    np.testing.assert_allclose(
        norm.mean[...], 0.9 * np.asarray(old["mean"]) + 0.1 * places.mean(0), rtol=1e-4, atol=1e-6
    )
    wanted = 0.9 * np.asarray(old["variance"]) + 0.1 * places.var(0, ddof=1)
    np.testing.assert_allclose(norm.variance[...], wanted, rtol=1e-4)
    trunk = nnx.state(network.trunk)
    jax.tree.map(np.testing.assert_array_equal, before["trunk"], trunk)


def test_the_direction_converges_to_the_largest_singular_value():
    make = lambda: feature_heads.SpectralConv(4, 5, 3, rngs=nnx.Rngs(0))  # noqa: E731
    conv = _filled(nnx.eval_shape(make))
    for _ in range(60):
        conv.maintain()
    rows = _wide(conv.kernel).reshape(-1, 5)
    _, values, rights = np.linalg.svd(rows)
    assert abs(rights[0] @ _wide(conv.direction)) == pytest.approx(1, abs=1e-5)
    x = _image(4, 1, 7, 4)
    twice = nnx.clone(conv)
    twice.kernel[...] = 2 * conv.kernel[...]
    np.testing.assert_allclose(twice(x), conv(x), rtol=1e-5)  # the norm is divided out
    one_hot = np.zeros((1, 7, 4), np.float32)
    one_hot[0, 3] = 1
    wanted = np.zeros((7, 5))
    wanted[2:5] = _wide(conv.kernel).sum(1)[::-1] / values[0]
    np.testing.assert_allclose(conv(one_hot)[0] - conv.bias[...][None], wanted, atol=1e-5)


def test_the_trunk_is_saved_and_never_trained(discriminator):
    assert not jax.tree.leaves(nnx.state(discriminator.trunk, nnx.Param))
    gradient = jax.grad(lambda image: discriminator(image).sum())(
        jnp.asarray(_image(5, 2, 8, 8, 3))
    )
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_sizes_are_fitted_and_crops_are_drawn(discriminator, key):
    image = _image(6, 1, 12, 10, 3)
    areas = np.zeros((1, 8, 8, 3))
    for i in range(8):
        for j in range(8):
            rows = slice(i * 12 // 8, -(-(i + 1) * 12 // 8))
            columns = slice(j * 10 // 8, -(-(j + 1) * 10 // 8))
            areas[:, i, j] = image[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(discriminator._fitted(image, None), areas, atol=1e-6)
    crops = {(i, j): image[:, i : i + 8, j : j + 8] for i in range(5) for j in range(3)}
    seen, whole = set(), 0
    fitted = jax.jit(jax.vmap(lambda key: discriminator._fitted(image, key)))(
        jax.random.split(key, 200)
    )
    for each in np.asarray(fitted):
        places = [place for place, crop in crops.items() if np.array_equal(each, crop)]
        seen.update(places)
        whole += np.allclose(each, areas, atol=1e-6)
        assert len(places) == 1 or np.allclose(each, areas, atol=1e-6)
    assert 70 < whole < 130 and len(seen) == len(crops)
    small = _image(7, 1, 4, 4, 3)
    enlarged = discriminator._fitted(small, key)
    assert enlarged.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(enlarged, discriminator._fitted(small, None))


def _published(trunk):
    rng = np.random.default_rng(1)
    slots = trunk.slots()
    return {key: rng.normal(size=slot.needed()).astype(np.float32) for key, slot in slots.items()}


def test_published_weights_fill_the_trunk(discriminator, tmp_path):
    network = nnx.clone(discriminator)
    published = _published(network.trunk)
    safetensors.numpy.save_file(published, tmp_path / "dino.safetensors")
    network.load(str(tmp_path / "dino.safetensors"), read=reader.read)
    trunk = network.trunk
    patch = published["patch_embed.proj.weight"]  # out, in, height, width
    np.testing.assert_array_equal(trunk.patches.kernel[1, 2, 0], patch[:, 0, 1, 2])
    up = published["blocks.1.mlp.fc1.weight"]
    np.testing.assert_array_equal(trunk.blocks[1].up.kernel[...], up.T)
    np.testing.assert_array_equal(trunk.token[...], published["cls_token"][0, 0])
    np.testing.assert_array_equal(trunk.positions[...], published["pos_embed"])
    assert not jax.tree.leaves(nnx.state(network.trunk, nnx.Param))


def test_what_does_not_fit_is_listed(discriminator, tmp_path):
    network = nnx.clone(discriminator)
    published = _published(network.trunk) | {"head.weight": np.zeros(3, np.float32)}
    del published["norm.bias"]
    published["cls_token"] = np.zeros((1, 1, 5), np.float32)
    safetensors.numpy.save_file(published, tmp_path / "dino.safetensors")
    with pytest.raises(interfaces.UserError) as error:
        network.load(str(tmp_path / "dino.safetensors"), read=reader.read)
    for words in (
        "missing: norm.bias;",
        "left over: head.weight;",
        "cls_token must have the shape (1, 1, 6), has (1, 1, 5)",
        "facebookresearch/dino",
    ):
        assert words in str(error.value)
    with pytest.raises(interfaces.UserError, match="no weight file.*facebookresearch"):
        network.load(str(tmp_path / "none.pth"), read=reader.read)
    with pytest.raises(ValueError, match=r"levels=\(0, 3\)"):
        dino.ViT(**SIZES | {"levels": (0, 3)}, rngs=nnx.Rngs(0))
    with pytest.raises(interfaces.UserError, match=r"\[B, H, W, 3\]"):
        network(np.zeros((1, 8, 8, 1)))
