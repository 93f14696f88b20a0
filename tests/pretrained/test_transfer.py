"""Published arrays into our models and back: bit for bit, and every misfit told."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import numpy as np
import pytest

from tokgen import state as states
from tokgen.interfaces import UserError
from tokgen.pretrained import parity, system, transfer, writer

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
OWN = {"taming_vqgan": "taming_vqgan", "ibq": "ibq", "openmagvit2_ema": "openmagvit2"}
SHARED = (
    *("maskgit_vqgan", "maskgit_tokenizer", "llamagen_vq", "maskbit_tokenizer"),
    *("maskbit_vqganplus", "var_vqvae", "openmagvit2", "titok_onestage_vae", "tatitok_vq"),
)


@functools.cache
def fitted(path, name):
    """(published arrays, system's name, what became of them, the published configuration)."""
    folder = parity.Folder(path, name)
    weights = folder.weights()
    return weights, transfer.fit(dict(weights), name, folder.config, source="here"), folder.config


def same(found, wanted):
    """Names, dtypes, shapes and bits."""
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        other = np.asarray(found[key])
        assert (other.dtype, other.shape) == (array.dtype, array.shape), key
        assert other.tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_round_trip_of_a_fixture_made_here(name):
    weights, imported, _ = fitted(HERE / name, OWN[name])
    same(transfer.publish(imported, OWN[name]), weights)
    assert any(key.startswith("loss.") for key in imported.aside)
    assert (imported.average is not None) == any(key.startswith("model_ema.") for key in weights)


@pytest.mark.parametrize("name", SHARED)
def test_the_round_trip_of_a_shared_fixture(shared, name):
    weights, imported, _ = fitted(shared / "parity" / name, name)
    same(transfer.publish(imported, name), weights)
    # nothing of the model came from elsewhere: as many numbers in as out
    numbers = sum(array.size for array in weights.values())
    graph, params, stats = states.split(imported.module)
    held = sum(leaf.size for leaf in jax.tree.leaves(params))
    aside = sum(array.size for array in imported.aside.values())
    counted = sum(a.size for k, a in weights.items() if k.endswith("ema_vocab_hit_SV"))
    copies = held if imported.average is not None else 0
    fixed = numbers - held - aside - counted - copies
    assert fixed == 0, f"{fixed} numbers of the file are no parameter"
    assert transfer.parameters(imported.module) == held


@pytest.mark.parametrize("name", ["ibq", "openmagvit2_ema"])
def test_averages_are_what_is_used_and_the_live_weights_are_kept(name):
    weights, imported, _ = fitted(HERE / name, OWN[name])
    assert imported.used is imported.average
    live, average = (
        np.asarray(module.encoder.conv_in.kernel[...]).transpose(3, 2, 0, 1)
        for module in (imported.module, imported.average)
    )
    np.testing.assert_array_equal(live, weights["encoder.conv_in.weight"])
    np.testing.assert_array_equal(average, weights["model_ema.encoderconv_inweight"])
    assert np.abs(live - average).max() > 0.01
    # the average of something that the file has none of: the live one
    without = {k: a for k, a in weights.items() if k != "model_ema.encoderconv_inweight"}
    again = transfer.fit(without, OWN[name], fitted(HERE / name, OWN[name])[2], source="here")
    np.testing.assert_array_equal(
        again.average.encoder.conv_in.kernel[...], imported.module.encoder.conv_in.kernel[...]
    )


def test_what_follows_from_a_model_is_published_without_having_been_read(shared):
    """A tokenizer trained here exports the buffers that the published class asks for."""
    for name in ("maskbit_tokenizer", "llamagen_vq"):
        weights, imported, _ = fitted(shared / "parity" / name, name)
        trained = dataclasses.replace(imported, aside={})
        found = transfer.publish(trained, name)
        assert set(weights) <= set(found)
        for key in set(weights) - {"quantize.codebook_used"}:
            assert np.asarray(found[key]).tobytes() == weights[key].tobytes(), key


def test_misfits_are_listed_together():
    weights, _, published = fitted(HERE / "taming_vqgan", "taming_vqgan")
    weights = dict(weights)
    del weights["decoder.norm_out.bias"]
    del weights["encoder.mid.attn_1.k.weight"]
    weights["encoder.surplus.weight"] = weights["decoder.more"] = np.zeros(3, np.float32)
    weights["post_quant_conv.weight"] = np.zeros((12, 9, 1, 1), np.float32)
    weights["decoder.conv_out.bias"] = np.zeros((), np.float32)
    with pytest.raises(UserError) as caught:
        transfer.fit(weights, "taming_vqgan", published, source="some.ckpt")
    said = str(caught.value)
    assert said.startswith("some.ckpt does not fit this system and sizes:")
    assert "2 missing: decoder.norm_out.bias, encoder.mid.attn_1.k.weight" in said or (
        "2 missing: encoder.mid.attn_1.k.weight, decoder.norm_out.bias" in said
    )
    assert "2 left over: decoder.more, encoder.surplus.weight" in said
    assert "post_quant_conv.weight has the shape (12, 9, 1, 1)" in said
    assert "decoder.conv_out.bias has the shape ()" in said


@pytest.mark.parametrize("published", [{"num_res_blocks": 1}, {"ch_mult": [1, 2, 2]}])
def test_a_configuration_that_the_weights_contradict_is_refused(published):
    weights, _, config = fitted(HERE / "taming_vqgan", "taming_vqgan")
    with pytest.raises(UserError, match="here does not fit"):
        transfer.fit(dict(weights), "taming_vqgan", {**config, **published}, source="here")


def test_sizes_are_read_from_the_weights_where_no_configuration_is_given():
    for name, known in OWN.items():
        weights, imported, _ = fitted(HERE / name, known)
        alone = transfer.fit(dict(weights), known, {}, source="here")
        for side in ("encoder", "decoder"):
            assert alone.config[side].to_dict() == imported.config[side].to_dict(), name
        same(transfer.publish(alone, known), weights)


def transfer_names():
    return sorted(name for name, found in system.known().items() if found.settings is not None)


def test_weights_of_another_system_say_which_key_is_missing():
    weights = {"encoder.conv_in.weight": np.zeros((32, 3, 3, 3), np.float32)}
    for name in transfer_names():
        with pytest.raises(UserError, match="(?s)encoder.conv_in.weight|needs the key|1 left over"):
            transfer.fit(weights, name, {}, source="here")


def test_a_system_without_a_tokenizer_is_not_imported(tmp_path):
    with pytest.raises(UserError, match="lpips is no tokenizer"):
        transfer.read(tmp_path / "x", "lpips")
    _, imported, _ = fitted(HERE / "taming_vqgan", "taming_vqgan")
    for name in ("lpips", "var_vqvae", "titok_legacy", "openmagvit2"):
        with pytest.raises(UserError, match=name):
            transfer.publish(imported, name)


def test_the_entry_around_the_weights_is_found(tmp_path):
    """In the order that a system states; a file without any is read as it is."""
    found = system.named("llamagen_vq")
    arrays = {"a": np.arange(3, dtype=np.float32)}
    for wrap in ((), ("state_dict",), ("model",), ("ema",)):
        writer.write(tmp_path / "x.pt", arrays, form="torch", wrap=wrap)
        same(transfer.weights_of(tmp_path / "x.pt", found), arrays)


def test_a_digest_is_that_of_the_file(tmp_path):
    (tmp_path / "x").write_bytes(b"weights")
    assert transfer.digest(tmp_path / "x") == hashlib.sha256(b"weights").hexdigest()
