"""DINOv2 against Facebook's code and `transformers`, its positions against a loop."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import dinov2
from tokgen.nn import resample
from tokgen.pretrained import parity

FIXTURE = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "dinov2"
CONFIG = json.loads((FIXTURE / "config.json").read_text())
CASE = dict(np.load(FIXTURE / "case.npz"))
features = jax.jit(lambda network, image_BHW3: network(image_BHW3))


def drawn(publisher):
    """The arrays of a published file."""
    entry = CONFIG[publisher]
    return {key: parity.drawn(entry["salt"], key, shape) for key, shape in entry["keys"].items()}


def agree(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("publisher", "size", "offset", "array"),
    [
        ("facebook", 42, 0.1, "cls_42"),
        ("facebook", 42, 0.0, "cls_42_without_offset"),
        ("facebook", 98, 0.1, "cls_98"),
        # this version of transformers interpolates by the size alone
        ("transformers", 42, 0.0, "transformers_cls_42"),
        ("transformers", 98, 0.1, "transformers_cls_98"),
    ],
)
def test_features_are_those_of_the_published_code(publisher, size, offset, array):
    network = dinov2.from_weights(drawn(publisher), size=size, offset=offset)
    found = features(network, CASE["image"])
    assert set(found) == set(network.features) == {"cls"}
    agree(found["cls"], CASE[array])


def test_the_pixels_of_the_fixture():
    """The whole image, without a crop."""
    found = resample.resize_pil(jnp.asarray(CASE["image"]), (42, 42))
    np.testing.assert_array_equal(found, CASE["bytes_42"])


def test_an_image_does_not_depend_on_its_batch():
    network = dinov2.from_weights(drawn("facebook"), size=42)
    turned = features(network, CASE["image"][::-1])["cls"][::-1]
    agree(np.asarray(turned), CASE["cls_42"])
    assert np.abs(CASE["cls_42"][0] - CASE["cls_42"][1]).max() > 0.01


def test_nothing_is_trained_and_the_defaults_are_the_published_ones():
    weights = drawn("facebook")
    network = dinov2.from_weights({key: a.astype(np.float16) for key, a in weights.items()})
    assert not jax.tree.leaves(nnx.state(network, nnx.Param))
    arrays = jax.tree.leaves(nnx.state(network, interfaces.Statistic))
    assert arrays and all(array.dtype == np.float32 for array in arrays)
    assert (network.trunk.heads, network.trunk.size, network.trunk.epsilon) == (2, 224, 1e-6)


@pytest.mark.parametrize("form", [dinov2.FACEBOOK, dinov2.TRANSFORMERS])
def test_the_size_of_the_published_network(form):
    """Facebook's class holds 304,368,640 numbers, 1,024 of which are the mask token."""
    shapes = form.needed(form.sizes({}, dinov2.PUBLISHED))
    assert sum(map(math.prod, shapes.values())) == 304_368_640 - 1024


def test_grouped_blocks_are_the_same_blocks():
    weights = drawn("facebook")
    grouped = {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", key): a for key, a in weights.items()}
    assert "blocks.2.2.ls1.gamma" in grouped
    both = [nnx.state(dinov2.from_weights(w, size=98)) for w in (weights, grouped)]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_positions_against_pytorch_and_a_loop():
    """Steps of 37 / 16.1, Keys' cubic of a = -0.75, the edge repeated."""
    table = drawn("facebook")["pos_embed"][0]
    agree(dinov2.positions(table, 3, 0.1), CASE["positions_42"])
    assert dinov2.positions(table, 7, 0.1) is table
    table = np.random.default_rng(1).normal(size=(1 + 37 * 37, 2)).astype(np.float32)
    grid = table[1:].reshape(37, 37, 2).astype(np.float64)

    def weight(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

    def taps(place):
        centre = (place + 0.5) * 37 / 16.1 - 0.5
        low = int(np.floor(centre))
        return [(min(max(k, 0), 36), weight(centre - k)) for k in range(low - 1, low + 3)]

    expected = [table[0]]
    for row in range(16):
        for column in range(16):
            pairs = [(r, c, a * b) for r, a in taps(row) for c, b in taps(column)]
            expected.append(sum(grid[r, c] * share for r, c, share in pairs))
    agree(dinov2.positions(table, 16, 0.1), np.asarray(expected, np.float32))
    # the offset moves them by far more than rounding
    assert np.abs(dinov2.positions(table, 16, 0.0) - np.asarray(expected)).max() > 0.1


@pytest.mark.parametrize("publisher", ["facebook", "transformers"])
def test_all_that_does_not_fit_is_said_at_once(publisher):
    weights = drawn(publisher)
    token, *_, bias = [key for key in weights if "cls" in key or key.endswith("norm.bias")]
    del weights[bias]
    weights |= {token: weights[token][..., :-1], "register_tokens": np.zeros((1, 4, 128))}
    expected = (
        rf"weights for DINOv2: missing: {bias}; left over: register_tokens; {token} must have "
        r"the shape \(1, 1, 128\), has \(1, 1, 127\)\. .*dinov2_vitl14_pretrain.*Apache"
    )
    with pytest.raises(interfaces.UserError, match=expected):
        dinov2.from_weights(weights)


@pytest.mark.parametrize("publisher", ["facebook", "transformers"])
def test_weights_that_are_not_finite_are_refused(publisher):
    weights = drawn(publisher)
    token = next(key for key in weights if "cls" in key)
    weights[token] = np.full_like(weights[token], np.nan)
    with pytest.raises(interfaces.UserError, match=f"DINOv2.*not finite in 1 arrays: {token}"):
        dinov2.from_weights(weights)


def test_a_gap_in_the_depth_and_a_table_that_is_no_square():
    weights = drawn("facebook")
    gap = {re.sub(r"^blocks\.1\.", "blocks.7.", key): array for key, array in weights.items()}
    with pytest.raises(interfaces.UserError, match=r"missing: blocks\.1\..*left over: blocks\.7"):
        dinov2.from_weights(gap)
    weights["pos_embed"] = weights["pos_embed"][:, :-1]
    with pytest.raises(interfaces.UserError, match=r"\(1, 37, 128\), has \(1, 49, 128\)"):
        dinov2.from_weights(weights)
    with pytest.raises(interfaces.UserError, match="missing: cls_token, pos_embed"):
        dinov2.from_weights({})
    empty = drawn("facebook")
    empty["patch_embed.proj.weight"] = np.ones((128, 3, 0, 0))
    with pytest.raises(interfaces.UserError, match="weights for DINOv2: there are empty arrays"):
        dinov2.from_weights(empty)


def test_sizes_heads_and_images_that_cannot_be():
    with pytest.raises(interfaces.UserError, match="whole patches of 14 pixels; found a size of"):
        dinov2.from_weights(drawn("facebook"), size=40)
    with pytest.raises(interfaces.UserError, match="width of 128 .* found 3"):
        dinov2.from_weights(drawn("facebook"), heads=3)
    network = dinov2.from_weights(drawn("facebook"), size=42)
    for image in (CASE["image"] / 255, CASE["image"][..., :1], CASE["image"][0]):
        with pytest.raises(interfaces.UserError, match=r"DINOv2 needs images of uint8 \[B, H, W"):
            network(image)
