"""CLIP's image tower against OpenAI's code and `transformers`, its pixels against PIL."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tokgen import interfaces
from tokgen.backbones import clip
from tokgen.nn import resample
from tokgen.pretrained import parity

FIXTURE = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "clip"
CONFIG = json.loads((FIXTURE / "config.json").read_text())
CASE = dict(np.load(FIXTURE / "case.npz"))
features = jax.jit(lambda network, image_BHW3: network(image_BHW3))


def drawn(publisher):
    """The arrays of a published file."""
    entry = CONFIG[publisher]
    return {key: parity.drawn(entry["salt"], key, shape) for key, shape in entry["keys"].items()}


@pytest.mark.parametrize("publisher", ["openai", "transformers"])
def test_features_are_those_of_the_published_code(publisher):
    network = clip.from_weights(drawn(publisher))
    assert network.trunk.size == CONFIG["size"] and network.trunk.heads == CONFIG["heads"]
    found, expected = features(network, CASE["image"]), CASE[f"{publisher}_embedding"]
    assert set(found) == set(network.features) == {"embedding"}
    assert found["embedding"].dtype == np.float32
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found["embedding"], expected, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize("shape", [(75, 61), (61, 75), (58, 61), (56, 56)])
def test_the_square_is_cut_out_before_pil_resizes(shape):
    image = np.random.default_rng(2).integers(0, 256, (1, *shape, 3)).astype(np.uint8)
    found = resample.resize_pil(clip.square(image), (56, 56))
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    whole = Image.fromarray(image[0]).crop((left, top, left + side, top + side))
    expected = np.asarray(whole.resize((56, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[0], expected)


def test_the_pixels_of_the_fixture():
    found = resample.resize_pil(clip.square(CASE["image"]), (56, 56))
    np.testing.assert_array_equal(found, CASE["bytes"])


@pytest.mark.parametrize("form", [clip.OPENAI, clip.TRANSFORMERS])
def test_the_size_of_the_published_network(form):
    shapes = form.needed(form.sizes({}, clip.PUBLISHED))
    assert sum(map(math.prod, shapes.values())) == 304_293_888  # of OpenAI's class


def test_a_text_tower_is_left_out_and_nothing_is_trained():
    weights = drawn("openai")
    text = {"transformer.resblocks.0.ln_1.bias", "token_embedding.weight", "ln_final.weight"}
    text |= {"positional_embedding", "text_projection", "logit_scale", "input_resolution"}
    whole = weights | dict.fromkeys([*text, "context_length", "vocab_size"], np.ones(3))
    whole = {key: array.astype(np.float16) for key, array in whole.items()}
    alone = {key: array.astype(np.float16) for key, array in weights.items()}
    both = [nnx.state(clip.from_weights(arrays)) for arrays in (whole, alone)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(both[0]))
    assert not jax.tree.leaves(nnx.state(clip.from_weights(weights), nnx.Param))
    weights = drawn("transformers")
    text = ("text_model.final_layer_norm.bias", "text_projection.weight", "logit_scale")
    text += ("vision_model.embeddings.position_ids",)
    both = [weights | dict.fromkeys(text, np.ones(3)), weights]
    both = [nnx.state(clip.from_weights(arrays)) for arrays in both]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_all_that_does_not_fit_is_said_at_once():
    weights = drawn("openai")
    del weights["visual.proj"]
    weights["visual.attnpool.k_proj.weight"] = np.ones((3, 3))
    weights["visual.transformer.resblocks.2.ln_1.bias"] = np.ones(127)
    expected = (
        r"weights for CLIP: missing: visual\.proj; left over: visual\.attnpool\.k_proj\.weight; "
        r"visual\.transformer\.resblocks\.2\.ln_1\.bias must have the shape \(128,\), has "
        r"\(127,\)\. .*ViT-L-14-336px.pt"
    )
    with pytest.raises(interfaces.UserError, match=expected):
        clip.from_weights(weights)
    network = clip.from_weights(drawn("openai"))
    with pytest.raises(interfaces.UserError, match=r"CLIP needs images of uint8 \[B, H, W, 3\]"):
        network(CASE["image"].astype(np.int32))
