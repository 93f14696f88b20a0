"""ResNet and ConvNeXt: a block of each written out, counts, and torchvision's names."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, rng
from tokgen.backbones import convnext, perceptual, resnet


def _filled(module):
    rng = np.random.default_rng(0)
    module = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), "f4"), module)
    for _, norm in nnx.iter_graph(module):
        if isinstance(norm, resnet.FixedNorm):
            norm.variance[...] = jnp.abs(norm.variance[...]) + 0.5
    return module


def _map(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _wide(variable):
    return np.asarray(variable[...], np.float64)


def _conv(x, conv, stride, padding, *, alone=False):
    """[H, W, C]; `alone`: every channel by itself."""
    kernel = _wide(conv.kernel)
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - len(kernel)) // stride + 1 for n in padded.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            at = stride * i, stride * j
            window = padded[at[0] : at[0] + len(kernel), at[1] : at[1] + len(kernel)]
            formula = "hwc,hwc->c" if alone else "hwc,hwco->o"
            out[i, j] = np.einsum(formula, window, kernel[:, :, 0] if alone else kernel)
    return out if conv.bias is None else out + _wide(conv.bias)


def _fixed(x, norm):
    x = (x - _wide(norm.mean)) / np.sqrt(_wide(norm.variance) + 1e-5)
    return x * _wide(norm.scale) + _wide(norm.bias)


@pytest.mark.parametrize("before, stride", [(4, 2), (8, 1)])
def test_the_bottleneck_follows_its_formula(before, stride):
    make = lambda: resnet.Bottleneck(before, 2, stride, rngs=nnx.Rngs(0))  # noqa: E731
    block = _filled(nnx.eval_shape(make))
    x = _map(5, 6, before)
    y = np.maximum(_fixed(_conv(x, block.convs[0], 1, 0), block.norms[0]), 0)
    y = np.maximum(_fixed(_conv(y, block.convs[1], stride, 1), block.norms[1]), 0)
    y = _fixed(_conv(y, block.convs[2], 1, 0), block.norms[2])
    skip = x
    if before != 8:
        skip = _fixed(_conv(x, block.skip[0], stride, 0), block.skip[1])
    np.testing.assert_allclose(block(x[None])[0], np.maximum(skip + y, 0), atol=1e-5)


def test_the_convnext_block_follows_its_formula():
    make = lambda: convnext.ConvNeXtBlock(3, rngs=nnx.Rngs(0))  # noqa: E731
    block = _filled(nnx.eval_shape(make))
    block.norm.scale[...] = 10 * block.norm.scale[...]  # to where both forms of GELU differ
    x = _map(8, 9, 3)
    y = _conv(x, block.conv, 1, 3, alone=True)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * _wide(block.norm.scale) + _wide(block.norm.bias)
    y = y @ _wide(block.up.kernel) + _wide(block.up.bias)
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    y = (y @ _wide(block.down.kernel) + _wide(block.down.bias)) * _wide(block.scale)
    np.testing.assert_allclose(block(x[None])[0], x + y, atol=1e-5)


FULL = {"resnet50": resnet.ResNet50, "convnext_small": convnext.ConvNeXtSmall}


@pytest.mark.parametrize(
    "name, published", [("resnet50", 25_557_032), ("convnext_small", 50_223_688)]
)
def test_parameters_are_as_many_as_published(name, published):
    network = nnx.eval_shape(lambda: FULL[name](rngs=rng.rngs(0)))
    params = nnx.state(network, nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published
    slots = network.slots()
    # every array of the network has a published name
    assert sum(math.prod(slot.needed()) for slot in slots.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(network))
    )
    samples = {
        "resnet50": {
            "layer3.5.conv2.weight": (256, 256, 3, 3),
            "layer4.0.downsample.1.running_var": (2048,),
            "fc.weight": (1000, 2048),
        },
        "convnext_small": {
            "features.0.1.bias": (96,),
            "features.4.0.weight": (192,),
            "features.4.1.weight": (384, 192, 2, 2),
            "features.5.26.block.0.weight": (384, 1, 7, 7),
            "features.7.2.layer_scale": (768, 1, 1),
            "classifier.2.weight": (1000, 768),
        },
    }
    for key, shape in samples[name].items():
        assert slots[key].needed() == shape


@pytest.fixture(scope="module")
def small_resnet():
    make = lambda: resnet.ResNet50((1, 2), 2, 5, rngs=nnx.Rngs(0))  # noqa: E731
    return _filled(nnx.eval_shape(make))


@pytest.fixture(scope="module")
def small_convnext():
    make = lambda: convnext.ConvNeXtSmall((1, 1), 4, 5, rngs=nnx.Rngs(0))  # noqa: E731
    return _filled(nnx.eval_shape(make))


def _normal(image):
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((image.astype(np.float64) + 1) / 2 - mean) / deviation


def test_the_whole_resnet_around_its_blocks(small_resnet):
    image = np.random.default_rng(2).uniform(-1, 1, (1, 33, 32, 3)).astype(np.float32)
    x = np.maximum(
        _fixed(_conv(_normal(image[0]), small_resnet.conv_in, 2, 3), small_resnet.norm_in), 0
    )
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = ((n - 1) // 2 + 1 for n in x.shape[:2])
    pooled = np.zeros((rows, columns, 2))
    for i in range(rows):
        for j in range(columns):
            pooled[i, j] = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1))
    x = jnp.asarray(pooled[None], jnp.float32)
    for stage in small_resnet.stages:
        for block in stage:
            x = block(x)
    assert [len(block.skip) for stage in small_resnet.stages for block in stage] == [2, 2, 0]
    wanted = np.asarray(x, np.float64).mean((1, 2)) @ _wide(small_resnet.last.kernel)
    wanted += _wide(small_resnet.last.bias)
    np.testing.assert_allclose(
        jax.jit(type(small_resnet).__call__)(small_resnet, image), wanted, rtol=1e-3
    )


def test_the_whole_convnext_around_its_blocks(small_convnext):
    def normalised(x, norm):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * _wide(norm.scale) + _wide(norm.bias)

    def blocks(x, stage):
        for block in stage:
            x = np.asarray(block(jnp.asarray(x[None], jnp.float32))[0], np.float64)
        return x

    image = np.random.default_rng(2).uniform(-1, 1, (1, 32, 36, 3)).astype(np.float32)
    x = normalised(_conv(_normal(image[0]), small_convnext.convs[0], 4, 0), small_convnext.norms[0])
    x = blocks(x, small_convnext.stages[0])
    x = _conv(normalised(x, small_convnext.norms[1]), small_convnext.convs[1], 2, 0)
    x = blocks(x, small_convnext.stages[1])
    x = normalised(x.mean((0, 1)), small_convnext.norm_out)
    wanted = x @ _wide(small_convnext.last.kernel) + _wide(small_convnext.last.bias)
    found = jax.jit(type(small_convnext).__call__)(small_convnext, image)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)


# The published names over small networks: full ones hold 25 and 50 million numbers.
SMALL = {
    "resnet50": lambda rngs: resnet.ResNet50((1, 1), 2, 5, rngs=rngs),
    "convnext_small": lambda rngs: convnext.ConvNeXtSmall((1, 1), 4, 5, rngs=rngs),
}
SOURCES = {"resnet50": resnet.SOURCE, "convnext_small": convnext.SOURCE}


def _filled_from(name, weights):
    distance = perceptual.of_classifier(SMALL[name], name, SOURCES[name])
    return distance.make(weights).classifier


def _published(name):
    rng = np.random.default_rng(3)
    slots = nnx.eval_shape(lambda: SMALL[name](rngs=nnx.Rngs(0))).slots()
    return {
        key: rng.uniform(0.1, 1, slot.needed()).astype(np.float32) for key, slot in slots.items()
    }


def test_torchvision_weights_fill_the_network():
    weights = _published("resnet50")
    extra = {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    network = _filled_from("resnet50", weights | extra)
    kernel = weights["layer2.0.conv2.weight"]
    np.testing.assert_array_equal(
        network.stages[1][0].convs[1].kernel[...], kernel.transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(network.last.kernel[...], weights["fc.weight"].T)
    np.testing.assert_array_equal(network.norm_in.variance[...], weights["bn1.running_var"])
    assert isinstance(network.norm_in.variance, interfaces.Statistic)

    weights = _published("convnext_small")
    network = _filled_from("convnext_small", weights)
    scale = weights["features.3.0.layer_scale"].reshape(-1)
    np.testing.assert_array_equal(network.stages[1][0].scale[...], scale)
    np.testing.assert_array_equal(network.norms[1].scale[...], weights["features.2.0.weight"])


def test_what_does_not_fit_is_listed():
    weights = _published("convnext_small") | {"extra": np.zeros(2)}
    del weights["classifier.2.bias"]
    with pytest.raises(interfaces.UserError) as error:
        _filled_from("convnext_small", weights)
    for words in (
        "missing: classifier.2.bias",
        "left over: extra",
        "IMAGENET1K_V1",
        "=0 trains without it",
    ):
        assert words in str(error.value)
