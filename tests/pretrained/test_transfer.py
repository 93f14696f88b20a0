"""Published arrays into our models and back: bit for bit, and every misfit told."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from tokgen import parameters
from tokgen.interfaces import UserError
from tokgen.pretrained import entries, parity, system, transfer
from tokgen.pretrained.formats import writer

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
    graph, params, stats = parameters.split(imported.module)
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
        same(entries.weights(tmp_path / "x.pt", found), arrays)


@functools.cache
def small():
    """(arrays, configuration) of the smallest fixture made here."""
    weights, _, published = fitted(HERE / "taming_vqgan", "taming_vqgan")
    return {k: a for k, a in weights.items() if not k.startswith("loss.")}, published


def imported_from(path, name="taming_vqgan", **options):
    return transfer.read(path, name, small()[1], **options)


def written(path, *, entries=None, prefix="", form="torch", more=()):
    """The fixture's weights in a file."""
    arrays = {prefix + key: array for key, array in small()[0].items()} | dict(more)
    writer.write_entries(path, {(): arrays} if entries is None else entries(arrays), form=form)
    return path


def kernel(module):
    return np.asarray(module.encoder.conv_in.kernel[...]).transpose(3, 2, 0, 1)


@pytest.mark.parametrize("wrap", ["", "module", "state_dict", "model", "net", "x", "model.module"])
def test_weights_are_found_in_what_trainers_put_around_them(wrap, tmp_path):
    wrap = tuple(filter(None, wrap.split(".")))
    step = (
        {("optimizer", "state"): {"momentum": np.ones(3, np.float32)}} if wrap[:1] != ("x",) else {}
    )
    path = written(
        tmp_path / "x.pt", entries=lambda arrays: {wrap: arrays} | (step if wrap else {})
    )
    imported = imported_from(path)
    np.testing.assert_array_equal(kernel(imported.module), small()[0]["encoder.conv_in.weight"])
    assert imported.form.entry == ".".join(wrap) and imported.average is None
    told = " ".join(imported.notes)
    assert ("read from its entry" in told) == (wrap not in ((), ("state_dict",)))


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("module.", "module."),
        ("model.", "model."),
        ("_orig_mod.", ""),
        ("_orig_mod.module.", "module."),
        ("module._orig_mod.", "module."),
        ("net.model.vae.", "net.model.vae."),
    ],
)
def test_what_all_names_begin_with_is_left_away_and_told(prefix, told, tmp_path):
    more = {f"{prefix}loss.logvar": np.zeros((), np.float32)}
    path = written(tmp_path / "x.safetensors", prefix=prefix, form="safetensors", more=more)
    imported = imported_from(path)
    said = " ".join(imported.notes)
    assert (f"{told!r}, with which its names begin" in said) == bool(told)
    assert ("_orig_mod. within its names" in said) == ("_orig_mod." in prefix)
    same(
        transfer.publish(imported, "taming_vqgan"), {**small()[0], "loss.logvar": more.popitem()[1]}
    )


def test_wrappers_inside_of_names_are_left_away(tmp_path):
    arrays = {k.replace("encoder.", "encoder._orig_mod."): a for k, a in small()[0].items()}
    writer.write(tmp_path / "x.pt", arrays, form="torch")
    same(transfer.publish(imported_from(tmp_path / "x.pt"), "taming_vqgan"), small()[0])


def test_the_most_telling_attempt_is_the_one_reported(tmp_path):
    """Not that of names which nobody stripped, nor "no entry state_dict"."""
    path = tmp_path / "x.pt"
    arrays = {f"module.{k}": a for k, a in small()[0].items()}
    arrays["module.quant_conv.bias"] = np.zeros(7, np.float32)
    writer.write(path, arrays, form="torch", wrap=("net",))
    with pytest.raises(UserError, match=r"quant_conv.bias has the shape \(7,\)") as caught:
        imported_from(path)
    assert "missing" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        imported_from(path)
    entries = {("a", "b"): {"x": np.zeros(3)}, ("c",): {"y": np.zeros(3), "z": np.zeros(3)}}
    writer.write_entries(path, entries, form="torch")
    with pytest.raises(
        UserError, match=r"c \(2 arrays\), a.b \(1 arrays\): say which with --entry"
    ):
        imported_from(path)
    with pytest.raises(UserError, match=r"no arrays under --entry d; there are c"):
        imported_from(path, entry="d")


def test_live_weights_and_their_average_are_both_kept(tmp_path):
    shifted = {key: array + 1 for key, array in small()[0].items()}
    path = written(
        tmp_path / "x.pt", entries=lambda arrays: {("model",): arrays, ("ema",): shifted}
    )
    imported = imported_from(path)
    assert imported.used is imported.average
    first = small()[0]["encoder.conv_in.weight"]
    np.testing.assert_array_equal(kernel(imported.module), first)
    np.testing.assert_array_equal(kernel(imported.average), first + 1)
    assert "the average 'ema' is used" in " ".join(imported.notes)
    same(transfer.publish(imported, "taming_vqgan"), small()[0])
    same(transfer.publish_average(imported, "taming_vqgan"), shifted)
    for entry, wanted in (("model", first), ("ema", first + 1)):
        one = imported_from(path, entry=entry)
        np.testing.assert_array_equal(kernel(one.module), wanted)
        assert one.average is None and one.form.entry == entry
        assert transfer.publish_average(one, "taming_vqgan") == {}


def test_where_a_file_has_room_for_one_the_average_is_published():
    """Of a network that was trained here, to be read by programs that know no average."""
    _, imported, _ = fitted(HERE / "taming_vqgan", "taming_vqgan")
    moved = transfer.fit(
        {key: array + 1 for key, array in small()[0].items()},
        "taming_vqgan",
        small()[1],
        source="here",
    )
    both = dataclasses.replace(imported, average=moved.module, form=entries.Form(), aside={})
    found = transfer.publish(both, "taming_vqgan")
    same(found, {key: array + 1 for key, array in small()[0].items()})
    assert transfer.publish_average(both, "taming_vqgan") == {}


def test_every_array_keeps_its_dtype():
    weights = {
        key: array.astype(np.float32 if "norm" in key or "quantize" in key else ml_dtypes.bfloat16)
        for key, array in small()[0].items()
    }
    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"].astype(np.float64)
    imported = transfer.fit(weights, "taming_vqgan", small()[1], source="here")
    same(transfer.publish(imported, "taming_vqgan"), weights)
    again = transfer.fit(
        transfer.publish(imported, "taming_vqgan"), "taming_vqgan", small()[1], source="here"
    )
    for one, other in zip(
        *(jax.tree.leaves(parameters.split(found.module)[1]) for found in (imported, again)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    weights = {key: array.astype(np.float64) for key, array in small()[0].items()}
    weights["encoder.conv_in.bias"][2:4] = value
    weights["decoder.conv_out.weight"][0] = value
    with pytest.raises(UserError, match="not finite in 2 arrays") as caught:
        transfer.fit(weights, "taming_vqgan", small()[1], source="here")
    said = str(caught.value)
    assert "encoder.conv_in.bias (2 of" in said and "decoder.conv_out.weight (" in said
    weights = {key: array.astype(np.complex64) for key, array in small()[0].items()}
    with pytest.raises(UserError, match="complex64, which no weight is"):
        transfer.fit(weights, "taming_vqgan", small()[1], source="here")


@pytest.mark.parametrize("name", ["ibq", "openmagvit2_ema"])
def test_an_average_that_is_not_finite_is_refused(name):
    weights, _, published = fitted(HERE / name, OWN[name])
    key = "model_ema.encoderconv_inweight"
    weights = weights | {key: np.full_like(weights[key], np.nan)}
    with pytest.raises(UserError, match="moving averages.*not finite in 1 arrays"):
        transfer.fit(weights, OWN[name], published, source="here")


def test_masks_of_infinity_that_are_no_weights_are_kept(shared):
    """VAR's `attn_bias_for_masking`."""
    weights, imported, _ = fitted(shared / "parity" / "var", "var")
    assert np.isneginf(weights["attn_bias_for_masking"]).any()
    np.testing.assert_array_equal(
        transfer.publish(imported, "var")["attn_bias_for_masking"], weights["attn_bias_for_masking"]
    )


def test_a_trainers_file_with_a_generator_and_its_tokenizer(shared, tmp_path):
    """VAR's `ar-ckpt-last.pth`."""
    var, vae = (fitted(shared / "parity" / name, name) for name in ("var", "var_vqvae"))
    entries = {
        ("trainer", "var_wo_ddp"): var[0],
        ("trainer", "vae_local"): vae[0],
        ("trainer", "var_opt", "state", "0"): {"exp_avg": np.zeros(3, np.float32)},
    }
    path = tmp_path / "ar-ckpt-last.pth"
    writer.write_entries(path, entries, form="torch")
    generator = transfer.read(path, "var", var[2])
    assert "import it with --system var_vqvae" in " ".join(generator.notes)
    same(transfer.publish(generator, "var"), var[0])
    tokenizer = transfer.read(path, "var_vqvae", vae[2])
    same(transfer.publish(tokenizer, "var_vqvae"), vae[0])
    same(
        transfer.publish(transfer.read(path, "var", var[2], entry="trainer.var_wo_ddp"), "var"),
        var[0],
    )


def test_a_tokenizer_within_the_names_of_a_generator(tmp_path):
    """Lightning's files of IBQ and Open-MAGVIT2."""
    weights, _, published = fitted(HERE / "ibq", "ibq")
    inside = {f"first_stage_model.{key}": array for key, array in weights.items()}
    others = {"transformer.head.weight": np.zeros((3, 4), np.float32)}
    path = tmp_path / "x.ckpt"
    writer.write(path, inside | others, form="torch", wrap=("state_dict",))
    same(transfer.publish(transfer.read(path, "ibq", published), "ibq"), weights)
    found = entries.contents(path, system.named("ibq_generator"))
    assert set(found.weights) == {*inside, *others}
    assert "import it with --system ibq" in " ".join(found.notes)


@pytest.mark.parametrize("width", [32, 96])
def test_a_width_without_published_heads_asks_for_them(shared, width):
    """Of the systems whose heads no array shows."""
    weights, _, published = fitted(shared / "parity" / "llamagen_c2i", "llamagen_c2i")
    weights = weights | {"output.weight": np.zeros((64, width), np.float32)}
    with pytest.raises(UserError, match="n_head"):
        transfer.fit(weights, "llamagen_c2i", {}, source="here")
    for heads in (0, -2, 1.5, "2", True, 7):
        with pytest.raises(UserError, match="n_head must divide"):
            transfer.fit(weights, "llamagen_c2i", published | {"n_head": heads}, source="here")


def test_a_digest_is_that_of_the_file(tmp_path):
    (tmp_path / "x").write_bytes(b"weights")
    assert transfer.digest(tmp_path / "x") == hashlib.sha256(b"weights").hexdigest()
