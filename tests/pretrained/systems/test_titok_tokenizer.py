"""TiTok and TA-TiTok files: their arrays, their round trip, settings of the published sizes."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from tokgen import rng
from tokgen.config import building as configs
from tokgen.interfaces import UserError
from tokgen.pretrained import entries, keymap, parity, transfer
from tokgen.pretrained.families import titok
from tokgen.pretrained.systems import titok_tokenizer

FIXTURES = ("titok_legacy", "titok_onestage_vq", "titok_onestage_vae", "tatitok_vq")


@pytest.fixture(params=FIXTURES)
def folder(request, shared):
    return parity.Folder(shared / "parity" / request.param)


def test_the_round_trip_is_exact(folder):
    weights = entries.weights(folder.file(), folder.system)
    module = folder.module()
    published = keymap.publish(module, titok.rows(module))
    assert set(published) == set(weights)
    for key, array in weights.items():
        assert published[key].shape == array.shape
        np.testing.assert_array_equal(published[key], array, err_msg=key)


def abstract(**shapes):
    """Arrays of the given shapes that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def keys_of(encoder, decoder, tokens, latent, **others):
    """What the settings look at in a published file; a side is (width, depth)."""
    found = {"latent_tokens": (tokens, encoder[0]), "decoder.decoder_embed.weight": (1, latent)}
    found["encoder.patch_embed.weight"] = (encoder[0], 3, 16, 16)
    for side, (width, depth) in (("encoder", encoder), ("decoder", decoder)):
        found[f"{side}.ln_pre.weight"] = (width,)
        found[f"{side}.positional_embedding"] = (257, width)
        found |= {f"{side}.transformer.{i}.ln_1.weight": (width,) for i in range(depth)}
    return abstract(**found, **others)


PIXELS = {
    f"pixel_decoder.up.{level}.block.{block}.conv1.weight": (width, 1, 3, 3)
    for level, width in enumerate((128, 128, 256, 256, 512))
    for block in range(2)
} | {"pixel_quantize.embedding.weight": (1024, 256), "decoder.ffn.2.weight": (1024, 1, 1, 1)}
VQ = "quantize.embedding.weight"
TEXT = {
    "decoder.text_guidance_proj.weight": (1024, 768),
    "decoder.text_guidance_positional_embedding": (77, 1024),
}


@pytest.mark.parametrize(
    ("weights", "tensors", "parameters", "heads"),
    [
        (keys_of((768, 12), (768, 12), 64, 12, **PIXELS, **{VQ: (4096, 12)}), 404, 204_814_095, 12),
        (keys_of((768, 12), (1024, 24), 64, 64, **{VQ: (8192, 64)}), 459, 390_016_148, 16),
        (keys_of((768, 12), (1024, 24), 64, 64, **{VQ: (8192, 64)}, **TEXT), 462, 390_882_452, 16),
        (keys_of((768, 12), (1024, 24), 64, 16), 458, 389_418_100, 16),
        (keys_of((768, 12), (1024, 24), 32, 16, **TEXT), 461, 390_202_484, 16),
    ],
    ids=["b64", "bl64_vq8k", "tatitok_bl64_vq", "bl64_vae", "tatitok_bl32_vae"],
)
def test_published_sizes_without_a_configuration(weights, tensors, parameters, heads):
    config = titok.settings({}, weights)
    module = nnx.eval_shape(lambda: configs.tokenizer(config, rngs=rng.rngs(0)))
    assert transfer.parameters(module) == parameters
    assert config.view.size == (256, 256) and config.encoder.heads == 12
    decoder = module.decoder.codes if "codes" in config.decoder else module.decoder
    assert decoder.transformer.heads == heads
    rows = titok.rows(module)
    assert len({row.key for row in rows}) == len(rows) == tensors


def test_heads_that_no_array_shows_are_asked_for(shared):
    folder = shared / "parity" / "titok_legacy"
    published = json.loads((folder / "config.json").read_text())
    weights = entries.weights(
        folder / "tokenizer_titok.bin", titok_tokenizer.SYSTEMS["titok_legacy"]
    )
    assert titok.settings(published, weights).decoder.codes.heads == 4
    del published["arch"]["vit_dec_heads"]
    with pytest.raises(UserError, match="width 48.*arch.vit_dec_heads"):
        titok.settings(published, weights)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latent_tokens": None}, "needs the key 'latent_tokens'"),
        ({"encoder.patch_embed.weight": (768, 48)}, "has 4 axes.*768, 48"),
        ({"encoder.positional_embedding": (200, 768)}, "one for every patch.*200 rows"),
        ({"decoder.ffn.2.weight": (1024, 1536, 1, 1)}, "lacks the decoder of these to pixels"),
    ],
)
def test_files_that_do_not_fit_are_refused(changed, message):
    weights = keys_of((768, 12), (768, 12), 64, 12, **{VQ: (4096, 12)})
    for key, shape in changed.items():
        weights.pop(key, None)
        if shape is not None:
            weights |= abstract(**{key: shape})
    with pytest.raises(UserError, match=message):
        titok.settings({}, weights)


def test_gradients_keep_their_norm_under_published_names(shared):
    """What stage1_grad_norm_all rests on: a table moves numbers and changes none."""
    module = parity.Folder(shared / "parity" / "titok_onestage_vq").module()
    published = keymap.publish(module, titok.rows(module))
    ours = sum(
        np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))
    )
    theirs = sum(np.sum(np.float64(array) ** 2) for array in published.values())
    np.testing.assert_allclose(theirs, ours, rtol=1e-12)
