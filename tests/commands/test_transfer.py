"""Import, use, fine-tune, export: a published file through the commands and back."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests import command_line
from tokgen import image_grid, interfaces, parameters, rng, runtime, sharding
from tokgen.checkpoints import checkpoint, exporting, imported as imports, loading, run as runs
from tokgen.config import building as configs
from tokgen.pretrained import entries, parity, system
from tokgen.pretrained.families import convolutional
from tokgen.pretrained.formats import reader, writer
from tokgen.training import optimizer as optimizers, train_state
from tokgen.zoo import model as zoo

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
OWN = {"taming_vqgan": "taming_vqgan", "openmagvit2_ema": "openmagvit2"}
SHARED = ("maskgit_tokenizer", "maskbit_tokenizer", "titok_onestage_vq", "var_vqvae")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """jax is set up already, by conftest; a command must not set it up once more."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)


def published(path, name, folder):
    """(weight file, its configuration, the fixture) as its authors publish them."""
    fixture = parity.Folder(path, name)
    if "salt" not in fixture.config:
        return fixture.file(), path / "config.json", fixture
    file = folder / f"{path.name}.ckpt"
    writer.write(file, fixture.weights(), form="torch", wrap=("state_dict",))
    options = {k: v for k, v in fixture.config.items() if k not in ("salt", "keys", "values")}
    config = folder / f"{path.name}.json"
    config.write_text(json.dumps(options))
    return file, config, fixture


def there_and_back(path, name, folder, capfd):
    """Import, encode, export."""
    file, config, fixture = published(path, name, folder)
    out, back = folder / "imported", folder / "exported"
    assert (
        command_line.call("import", file, "--system", name, "--config", config, "--out", out) == 0
    )
    loaded = loading.load_tokenizer(out)
    encodes_as_published(loaded.module, fixture)
    says_where_it_comes_from(out, file, name, capfd)
    assert command_line.call("export", out, "--out", back) == 0
    (again,) = back.rglob(f"{'*' if file.name == 'model.safetensors' else '.'}/{file.name}")
    wanted, found = (entries.weights(f, fixture.system) for f in (file, again))
    assert list(found) and set(found) == set(wanted)
    for key, array in wanted.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key
    holds_what_is_used(back, loaded)


def encodes_as_published(tokenizer, fixture):
    """The same tokens from the fixture's image, as from its own code."""
    image_BHW3 = fixture.given("image")
    if image_BHW3.shape[1] == 3:
        image_BHW3 = convolutional.nhwc(image_BHW3)
    low, high = tokenizer.pixels
    if fixture.name.startswith("titok"):  # published on [0, 1], with the networks' range inside
        latents_of = tokenizer.latents
    else:
        assert low <= image_BHW3.min() and image_BHW3.max() <= high
        latents_of = tokenizer.encoder
    encode = jax.jit(lambda image_BHW3: tokenizer.quantizer.encode(latents_of(image_BHW3)))
    tokens = np.asarray(encode(image_BHW3))
    arrays = fixture.arrays
    scales = [name for name in arrays if name.startswith("indices_") and name[-1].isdigit()]
    wanted = np.concatenate([arrays[s] for s in scales], 1) if scales else arrays["indices"]
    if tokens.shape[-1] > 1:  # several symbols of a position: there one word of all bits
        sizes = np.log2(tokenizer.layout.vocab).astype(int)
        shifts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        tokens = (tokens << shifts).sum(-1)
    np.testing.assert_array_equal(tokens.ravel(), wanted.ravel())


def says_where_it_comes_from(out, file, name, capfd):
    source = checkpoint.read_meta(checkpoint.find(out))["source"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = system.named(name)
    wanted = dict(system=name, file=file.name, sha256=digest, home=home(name, file.name))
    assert source.items() >= (wanted | dict(licence=found.licence, dtype="float32")).items()
    capfd.readouterr()
    assert command_line.call("checkpoint", out, "--verify") == 0
    (line,) = [s for s in capfd.readouterr().out.splitlines() if s.startswith("source ")]
    assert all(word in line for word in (name, file.name, digest, found.licence))


def home(name, file):
    """Where files of that name lie, or, where none is called so, all of the system."""
    rows = zoo.of(name).values()
    found = [row.home for row in rows if row.file == file] or [row.home for row in rows]
    return ", ".join(dict.fromkeys(found))


def holds_what_is_used(back, loaded):
    """Beside the published form: our names, and the config that builds the model."""
    arrays = safetensors.numpy.load_file(back / "model.safetensors")
    _, params, stats = parameters.split(loaded.module)
    leaves = {f"params.{k}": v for k, v in parameters.paths(params).items()}
    leaves |= {f"stats.{k}": v for k, v in parameters.paths(stats).items()}
    leaves = {key.replace("/", "."): leaf for key, leaf in leaves.items()}
    assert set(arrays) == set(leaves)
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(arrays[key], leaf, err_msg=key)
    record = json.loads((back / "config.json").read_text())
    assert record["fingerprint"] == loaded.fingerprint
    assert record["source"] == loaded.meta["source"]
    assert record["config"]["encoder"] == json.loads(
        json.dumps(configs.plain(loaded.config)["encoder"])
    )


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_published_file_made_here(name, tmp_path, capfd):
    there_and_back(HERE / name, OWN[name], tmp_path, capfd)


@pytest.mark.parametrize("name", SHARED)
def test_a_published_file(shared, name, tmp_path, capfd):
    there_and_back(shared / "parity" / name, name, tmp_path, capfd)


# ---------------------------------------------------------------- one that is imported


@pytest.fixture(scope="module")
def taming(tmp_path_factory):
    """(work directory of an import, weight file, its configuration, published arrays)."""
    folder = tmp_path_factory.mktemp("taming")
    file, config, fixture = published(HERE / "taming_vqgan", "taming_vqgan", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        words = ("import", file, "--system", "taming_vqgan", "--config", config)
        assert command_line.call(*words, "--out", folder / "run") == 0
    return folder / "run", file, config, fixture.weights()


def test_a_second_import_into_one_folder_is_refused(taming, capfd):
    out, file, config, _ = taming
    before = checkpoint.read_meta(checkpoint.find(out))
    words = ("import", file, "--system", "taming_vqgan", "--config", config, "--out", out)
    assert "it holds checkpoints; name a new folder" in command_line.refused(capfd, *words)
    assert checkpoint.read_meta(checkpoint.find(out)) == before


def test_misfits_are_one_message_and_leave_nothing(taming, tmp_path, capfd):
    _, file, config, weights = taming
    out, other = tmp_path / "out", tmp_path / "other.ckpt"
    changed = dict(weights)
    del changed["decoder.conv_in.bias"]
    changed["decoder.surplus"] = np.zeros(2, np.float32)
    changed["quant_conv.bias"] = np.zeros(7, np.float32)
    writer.write(other, changed, form="torch", wrap=("state_dict",))
    words = ("import", other, "--system", "taming_vqgan", "--config", config, "--out", out)
    said = command_line.refused(capfd, *words)
    for part in ("1 missing: decoder.conv_in.bias", "1 left over: decoder.surplus", "(7,)", "(8,)"):
        assert part in said, said
    strange = tmp_path / "\x1b[2J"
    said = command_line.refused(capfd, "import", strange, "--system", "taming_vqgan", "--out", out)
    assert "?[2J" in said and "\x1b" not in said
    other.with_suffix(".bin").write_bytes(b"")
    words = ("import", file, "--out", out)
    assert "did you mean 'taming_vqgan'" in command_line.refused(
        capfd, *words, "--system", "taming_vqgam"
    )
    assert "found 'lpips'" in command_line.refused(capfd, *words, "--system", "lpips")
    assert "--system right" in command_line.refused(capfd, *words, "--system", "llamagen_vq")
    assert str(tmp_path / "none.ckpt") in command_line.refused(
        capfd, "import", tmp_path / "none.ckpt", "--system", "taming_vqgan", "--out", out
    )
    words = ("import", tmp_path, "--system", "taming_vqgan", "--out", out)
    assert "is a folder: name the file in it, one of other.bin, other.ckpt" in command_line.refused(
        capfd, *words
    )
    broken = tmp_path / "broken.json"
    for text in ("- 1", "a: [", ""):
        broken.write_text(text)
        words = ("import", file, "--system", "taming_vqgan", "--out", out, "--config", broken)
        assert str(broken) in command_line.refused(capfd, *words)
    assert not out.exists()


def test_export_refuses_what_the_model_is_not(taming, tmp_path, capfd):
    out = taming[0]
    for name in ("var_vqvae", "titok_legacy", "lpips"):
        words = ("export", out, "--out", tmp_path / "x", "--system", name)
        assert name in command_line.refused(capfd, *words)
        assert not (tmp_path / "x").exists()
    # IBQ's keys are taming's: the same arrays under another name of the file
    assert command_line.call("export", out, "--out", tmp_path / "y", "--system", "ibq") == 0
    assert (tmp_path / "y" / "ibq.bin").is_file()


def test_a_decoder_of_text_reconstructs_with_features(shared, tmp_path, capfd):
    fixture, out = shared / "parity" / "tatitok_vq", tmp_path / "imported"
    file, config, _ = published(fixture, "tatitok_vq", tmp_path)
    words = ("import", file, "--system", "tatitok_vq", "--config", config, "--out", out)
    assert command_line.call(*words) == 0
    assert "IMAGES --text DIR" in capfd.readouterr().err
    image, text = tmp_path / "image.png", tmp_path / "text"
    image_grid.save_png(image, np.zeros((40, 40, 3), np.uint8))
    words = ("reconstruct", out, image, "--out", tmp_path / "look")
    assert "--text must name a folder with all.npy" in command_line.refused(capfd, *words)
    shape = loading.load_tokenizer(out).config.decoder.text
    text.mkdir()
    painted = []
    for number in (0.0, 1.0):
        np.save(text / "all.npy", np.full((1, *shape), number, np.float32))
        assert command_line.call(*words, "--text", text, "--overwrite") == 0
        painted.append((tmp_path / "look" / "pairs.png").read_bytes())
    assert painted[0] != painted[1]


def test_every_system_that_has_settings_is_offered():
    names = system.importable()
    assert {"taming_vqgan", "ibq", "openmagvit2", "var_vqvae", "titok_legacy"} <= set(names)
    assert not {"lpips", "disc_patchgan"} & set(names)


# ---------------------------------------------------------------- fine-tuning


def beginning(settings, workdir, **others):
    """(states, what was done) as a run begins, with zeros that must be overwritten."""
    optimizer = optimizers.optimizer(4, learning_rate=1e-3)

    module = nnx.eval_shape(lambda: configs.tokenizer(settings, rngs=rng.rngs(0)))
    _, params, stats = parameters.split(module)
    zero = jnp.zeros((), jnp.int32)

    def whole(params, stats):
        average = params if settings.ema else None
        return train_state.TrainState(
            zero, zero, params, stats, optimizer.chain.init(params), average
        )

    abstract = jax.eval_shape(whole, params, stats)
    laid = train_state.shardings(abstract, sharding.make_mesh(), "data")
    model = jax.tree.map(
        lambda leaf, at: jax.device_put(np.full(leaf.shape, 7, leaf.dtype), at), abstract, laid
    )
    model = model.replace(step=zero)
    run = runs.start(
        workdir, settings, kind="tokenizer", layout=module.layout, classes=(), best="l2", data=""
    )
    try:
        return runs.resume_or_start(run, {"model": model, **others})
    finally:
        run.close()


def settings_of(out, **changes):
    settings = loading.load_tokenizer(out).config
    with settings.unlocked():
        settings.init_from = str(out)
        settings.update(changes)
    return settings


def test_an_import_without_an_average_is_fine_tuned_with_one(taming, tmp_path):
    out, weights = taming[0], taming[3]
    discriminator = {"params": {"first": jnp.full(3, 2.0)}, "stats": {"mean": jnp.full(3, 5.0)}}
    others = {"discriminator": discriminator, "averages": {"real": jnp.full((), 3.0)}}
    networks, what = beginning(settings_of(out, ema=0.9), tmp_path / "run", **others)
    model = networks["model"]
    assert what.startswith(f"started from the parameters of {out}")
    kernel = np.asarray(model.params["encoder"]["conv_in"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kernel, weights["encoder.conv_in.weight"])
    jax.tree.map(np.testing.assert_array_equal, model.ema, model.params)
    assert model.step == 0
    # neither the optimizer nor a discriminator comes from there
    moments = parameters.paths(model.opt_state)
    assert all((leaf == 7).all() for path, leaf in moments.items() if "/mu/" in path)
    jax.tree.map(np.testing.assert_array_equal, networks["discriminator"], discriminator)
    assert networks["averages"]["real"] == 3
    without, _ = beginning(settings_of(out, ema=0.0), tmp_path / "without")
    assert without["model"].ema is None
    jax.tree.map(np.testing.assert_array_equal, without["model"].params, model.params)


def test_weights_that_are_not_finite_are_neither_imported_nor_begun_from(taming, tmp_path, capfd):
    _, file, config, weights = taming
    wrong = weights["decoder.conv_in.bias"].copy()
    wrong[1] = np.nan
    broken = tmp_path / "broken.ckpt"
    writer.write(broken, weights | {"decoder.conv_in.bias": wrong}, form="torch")
    words = ("import", broken, "--system", "taming_vqgan", "--config", config)
    said = command_line.refused(capfd, *words, "--out", tmp_path / "out")
    assert "not finite in 1 arrays: decoder.conv_in.bias (1 of" in said
    assert not (tmp_path / "out").exists()
    # an import of an earlier version may hold them
    imported = parity.Folder(HERE / "taming_vqgan", "taming_vqgan").imported()
    imported.module.decoder.conv_in.bias[...] = jnp.asarray(wrong)
    imports.save_imported(tmp_path / "old", imported, {})
    said = command_line.refused(capfd, "checkpoint", tmp_path / "old", "--verify")
    assert "not finite, in model/params/decoder/conv_in/bias: it was read as" in said
    with pytest.raises(interfaces.UserError, match="not finite, in model/params/decoder/conv_in/b"):
        beginning(settings_of(tmp_path / "old"), tmp_path / "run")


def test_a_model_of_other_sizes_is_not_started_from_an_import(taming, tmp_path):
    settings = settings_of(taming[0])
    settings.quantizer.codes = 64
    with pytest.raises(interfaces.UserError, match="(?s)other arrays.*codebook.*96.*64"):
        beginning(settings, tmp_path / "run")


def test_an_export_of_a_moved_checkpoint_is_the_same(taming, tmp_path):
    """The arrays that lay aside travel with the step."""
    out, file, _, weights = taming
    moved = shutil.copytree(out, tmp_path / "moved")
    assert command_line.call("export", moved, "--out", tmp_path / "x") == 0
    found = entries.weights(tmp_path / "x" / file.name, system.named("taming_vqgan"))
    assert set(found) == set(weights)
    for key in weights:
        assert found[key].tobytes() == weights[key].tobytes(), key


def test_a_record_does_not_say_where_an_export_writes(taming, tmp_path, monkeypatch, capfd):
    """A name that is more than a name is told, and not used."""
    load, root, name = imports.load_imported, tmp_path / "deep" / "down", "../../x.bin"

    def told(path):
        loaded, imported = load(path)
        meta = {**loaded.meta, "source": {**loaded.meta["source"], "file": name}}
        return dataclasses.replace(loaded, meta=meta), imported

    monkeypatch.setattr(imports, "load_imported", told)
    assert command_line.call("export", taming[0], "--out", root / "out") == 0
    assert "is not used" in capfd.readouterr().err
    files = {str(f.relative_to(root)) for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {"out/model.safetensors", "out/config.json", "out/taming_vqgan.bin"}
    for name in ("/tmp/x.bin", "..", "a/b.bin", "config.json", "Config.JSON", 7, ["x"]):
        found, told = exporting._name({"file": name, "system": "ibq"}, "ibq")
        assert found == "ibq.bin" and "is not used" in told[0]
    assert exporting._name({"file": "x.pt", "system": "ibq"}, "ibq") == ("x.pt", ())


def test_others_may_read_what_is_written_if_the_mask_says_so(taming, tmp_path):
    before = os.umask(0o027)
    try:
        words = ("import", taming[1], "--system", "taming_vqgan", "--config", taming[2])
        assert command_line.call(*words, "--out", tmp_path / "run") == 0
        assert command_line.call("export", taming[0], "--out", tmp_path / "out") == 0
    finally:
        os.umask(before)
    modes = {f: oct(f.stat().st_mode & 0o777) for f in tmp_path.rglob("*") if f.is_file()}
    assert len(modes) > 5 and set(modes.values()) == {"0o640"}, modes


@pytest.mark.long
def test_live_weights_and_average_go_there_and_back(taming, tmp_path, capfd):
    _, file, config, weights = taming
    weights = {k: a for k, a in weights.items() if not k.startswith("loss.")}
    half = {k: (a + 1).astype(np.float16) if "norm" in k else a + 1 for k, a in weights.items()}
    both = tmp_path / "both.pt"
    writer.write_entries(both, {("model",): weights, ("ema",): half}, form="torch")
    words = ("import", both, "--system", "taming_vqgan", "--config", config)
    assert command_line.call(*words, "--out", tmp_path / "run") == 0
    assert "the average 'ema' is used (--entry model takes the live" in capfd.readouterr().err
    assert command_line.call("checkpoint", tmp_path / "run") == 0
    assert "average_dtypes" in capfd.readouterr().out
    assert command_line.call("export", tmp_path / "run", "--out", tmp_path / "x") == 0
    assert "in the entries model and ema" in capfd.readouterr().err
    for entry, wanted in (("model", weights), ("ema", half)):
        found = reader.read(tmp_path / "x" / "both.pt", entry)
        assert set(found) == set(wanted)
        for key, array in wanted.items():
            np.testing.assert_array_equal(found[key], array, strict=True)
    used = safetensors.numpy.load_file(tmp_path / "x" / "model.safetensors")
    bias = used["params.encoder.conv_in.bias"]
    np.testing.assert_array_equal(bias, weights["encoder.conv_in.bias"] + 1)
    assert command_line.call(*words, "--out", tmp_path / "live", "--entry", "model") == 0
    assert "ema" not in {p.split("/")[1] for p in manifest_of(tmp_path / "live")}
    # an export that keeps the average apart is the same network again, by its fingerprint
    assert command_line.call("import", tmp_path / "x", "--out", tmp_path / "again") == 0
    again = loading.load_tokenizer(tmp_path / "again")
    assert again.fingerprint == loading.load_tokenizer(tmp_path / "run").fingerprint


def manifest_of(out):
    return checkpoint.read_meta(checkpoint.find(out))["manifest"]


def test_an_export_is_imported_again(taming, tmp_path, capfd):
    out = tmp_path / "x"
    assert command_line.call("export", taming[0], "--out", out) == 0
    assert command_line.call("import", out / "model.safetensors", "--out", tmp_path / "again") == 0
    one, again = (loading.load_tokenizer(path) for path in (taming[0], tmp_path / "again"))
    assert one.fingerprint == again.fingerprint and one.layout == again.layout
    words = ("import", out, "--out", tmp_path / "more")
    assert "is an export of tokgen" in command_line.refused(capfd, *words, "--entry", "ema")
    assert "is a tokenizer itself" in command_line.refused(capfd, *words, "--tokenizer", taming[0])
    assert "leave out --system" in command_line.refused(capfd, *words, "--system", "taming_vqgan")
    for record in ("", "[]", '{"config": {}}', '{"config": {"view": 1}, "fingerprint": "a"}'):
        (out / "config.json").write_text(record)
        assert "error:" in command_line.refused(capfd, *words)
    assert not (tmp_path / "more").exists()


def test_a_record_of_an_older_import_or_of_a_stranger(taming):
    assert imports.form_of({"dtype": "bfloat16"}, "x") == entries.Form("bfloat16")
    form = entries.Form("float16", {"a": "float32", "b": "int64"}, "model", "ema", "float32")
    assert imports.form_of(imports._recorded(form), "x") == form
    odd_ones = [
        *({"dtype": 7}, {"entry": []}, {"entry": "a\ud800"}, {"average_dtypes": [1]}),
        *({"dtypes": "x"}, {"dtypes": {"a": 7}}, {"dtypes": {"float32": [["x"]]}}),
    ]
    for odd in odd_ones:
        with pytest.raises(interfaces.UserError, match="does not say how its file was written"):
            imports.form_of(odd, "x")


ODD = {
    "empty": b"",
    "text": b"words, not weights\n" * 40,
    "json": b'{"a": [1, 2]}',
    "zip": b"PK\x03\x04" + bytes(60),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "nothing but zeros": bytes(4096),
}


@pytest.mark.parametrize("suffix", ["bin", "safetensors", "npz"])
def test_files_that_are_none_are_one_message(taming, suffix, tmp_path, capfd):
    """Every command that takes a file, with files of every other kind, and a folder."""
    path, out = tmp_path / f"odd.{suffix}", tmp_path / "out"
    image = tmp_path / "image.png"
    image_grid.save_png(image, np.zeros((16, 16, 3), np.uint8))
    whole = taming[1].read_bytes()
    for name, data in {**ODD, "cut": whole[: len(whole) // 2], "folder": None}.items():
        path.unlink(missing_ok=True)
        path.mkdir() if data is None else path.write_bytes(data)
        for words in (
            ("import", path, "--system", "taming_vqgan", "--out", out),
            ("import", path, "--out", out),
            ("import", taming[1], "--system", "taming_vqgan", "--config", path, "--out", out),
            ("export", path, "--out", out),
            ("parity", path, "--system", "taming_vqgan"),
            ("checkpoint", path),
            ("reconstruct", path, image, "--out", out),
            ("pretokenize", "--tokenizer", path, "--out", out),
            ("sample", path, "--out", out),
            ("compare", path, "--out", out),
            ("evaluate", path, "--protocol", "inception", "--reference", path, "--out", out),
        ):
            if name != "json" or "--config" not in words:  # a configuration may hold anything
                assert command_line.refused(capfd, *words).count("\n") < 12, (name, words)
    assert not out.exists()
