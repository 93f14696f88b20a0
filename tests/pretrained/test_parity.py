"""Fixture folders of published systems against our models; and fixtures that were tampered with."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import cli, runtime
from tokgen.interfaces import Statistic, UserError
from tokgen.pretrained import keymap, parity, system
from tokgen.zoo import model as zoo

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
SHARED = (
    *("maskgit_vqgan", "maskgit_tokenizer", "llamagen_vq", "maskbit_tokenizer"),
    *("maskbit_vqganplus", "titok_legacy", "titok_onestage_vq", "titok_onestage_vae"),
    *("tatitok_vq", "var_vqvae", "openmagvit2", "disc_patchgan", "disc_stylegan", "disc_maskbit"),
    *("maskgit_discriminator", "lpips"),
)
OWN = {"taming_vqgan": "taming_vqgan", "ibq": "ibq", "openmagvit2_ema": "openmagvit2"}
# Held array by array, and given back bit for bit, in the tests of their own systems.
GENERATORS = {
    "test_causal_generators.py": ("rar", "llamagen_c2i", "llamagen_t2i")
    + ("openmagvit2_generator", "ibq_generator"),
    "test_masked_generators.py": ("maskgit_transformer", "maskbit_lfqbert", "maskbit_bert")
    + ("maskbit_lfqbert_older", "titok_imagebert", "titok_uvit"),
    "systems/test_var_generator.py": ("var", "var_shared_aln"),
}

# Held in files of their own, too: what measures images, and figures.
MEASURES = {
    "systems/test_inception_backbone.py": "inception_fid",
    "systems/test_adm_metrics.py": "metrics",
}

# What the descriptions of the fixtures call inputs: nothing else may pass for given.
INPUTS = {
    *("image", "image0", "image1", "image_fake", "real", "fake", "text"),
    *("q_latents", "q_cotangent", "ent_affinity", "stage1_target_codes"),
    *("aw_weight", "aw_u", "aw_v"),
    # of generators; numbered ones without their number
    *("tokens", "labels", "orders", "gt_indices_", "cond", "emb_masks", "train_valid", "mask"),
    *("noise_gumbel", "noise_u_token_", "noise_u_conf_", "train_u", "train_rand", "inpaint_input"),
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """jax is set up already, by conftest; a command must not set it up once more."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)


@functools.cache
def held(path, name=""):
    """(arrays of the fixture, lines, what our model computed)."""
    folder = parity.Folder(path, name)
    return (folder.arrays, *parity.hold(folder))


def place(shared, name):
    """(folder, system) of a fixture, here or beside the repository."""
    if name in OWN:
        return HERE / name, OWN[name]
    return shared / "parity" / name, name


def agrees(name, wanted, found):
    """The published tolerances, written out once more."""
    if wanted.dtype.kind in "iub":
        return np.array_equal(wanted, found)
    limit = 1e-4
    if "grad" in name or "entropy" in name or name == "q_quantizer_loss":
        limit = 1e-3
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    return bool(np.abs(wanted - found).max() <= limit * np.abs(wanted).max())


def holds(path, name):
    """Every array that the original code gave is computed, under its name, as it was given."""
    arrays, lines, computed = held(path, name)
    assert [line.name for line in lines] == list(arrays)
    verdicts = {line.name: line.verdict for line in lines}
    given = {array for array, verdict in verdicts.items() if verdict == "given"}
    for array in given:
        assert "margin" in array or {array, array.rstrip("0123456789")} & INPUTS, array
    assert set(arrays) - given == set(computed)
    for array, found in computed.items():
        wanted = arrays[array]
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), array
        assert agrees(array, wanted, found), array
        assert verdicts[array] == "pass", array
        assert np.ptp(wanted) > 0 or wanted.size < 3, array  # one that is constant shows nothing


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_fixture_made_here(name):
    holds(HERE / name, OWN[name])


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_fixture(shared, name):
    holds(shared / "parity" / name, name)


# ---------------------------------------------------------------- fixtures that were changed


@pytest.fixture
def copy(tmp_path):
    """A fixture that may be changed."""
    folder = tmp_path / "taming_vqgan"
    shutil.copytree(HERE / "taming_vqgan", folder)
    return folder


def rewrite(folder, **changes):
    """Other arrays in a fixture; None takes one out."""
    with np.load(folder / "case.npz") as file:
        arrays = {name: file[name] for name in file} | changes
    np.savez(folder / "case.npz", **{n: a for n, a in arrays.items() if a is not None})


def reweigh(folder, key, change):
    """Another weight: a fixture without a weight file can state the value of a key."""
    config = json.loads((folder / "config.json").read_text())
    array = change(parity.drawn(config["salt"], key, config["keys"][key]))
    config.setdefault("values", {})[key] = array.tolist()
    config["keys"][key] = list(array.shape)
    (folder / "config.json").write_text(json.dumps(config))


def verdicts(folder):
    lines, _ = parity.hold(parity.Folder(folder))
    return {line.name: line for line in lines}


def failing(folder):
    return {name for name, line in verdicts(folder).items() if line.verdict == "fail"}


def nudged(array):
    array = array.copy()
    array[..., 0] += 1e-2  # of a codebook every row's
    return array


@pytest.mark.parametrize(
    ("key", "hit", "spared"),
    [
        ("decoder.conv_out.bias", {"decoded"}, {"latents", "indices", "q_out", "q_loss"}),
        ("encoder.conv_out.bias", {"latents"}, {"q_out", "q_loss", "q_grad_codebook"}),
        ("quantize.embedding.weight", {"q_loss", "q_grad_codebook"}, {"latents"}),
    ],
)
def test_a_weight_changed_by_a_hundredth_fails(copy, key, hit, spared):
    reweigh(copy, key, nudged)
    found = failing(copy)
    assert hit <= found and not spared & found


def test_what_is_wrong_fails_and_is_told(copy):
    """One index, one shape, one value that is no number; the others stay as they are."""
    arrays, _, computed = held(HERE / "taming_vqgan", "taming_vqgan")
    indices, latents = arrays["indices"].copy(), arrays["latents"].copy()
    indices[5] ^= 1
    latents[0, 0, 0, 0] += 1.01e-4 * np.abs(latents).max()
    rewrite(copy, indices=indices, latents=latents, decoded=arrays["decoded"][:, :, :-1])
    found = verdicts(copy)
    assert {n for n, line in found.items() if line.verdict == "fail"} == {
        *("indices", "latents", "decoded")
    }
    assert found["indices"].absolute == 1 and found["indices"].tolerance == 0
    assert str(computed["decoded"].shape) in found["decoded"].note
    missing = parity.compare("x", np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32))
    assert missing.verdict == "fail"


def test_the_tolerance_is_that_of_the_name_and_of_the_largest_magnitude():
    wanted = np.array([0.0, -50.0, 1e-6], np.float32)
    for name, limit in (
        ("latents", 1e-4),
        ("q_grad_latents", 1e-3),
        ("ent_entropy", 1e-3),
        ("q_quantizer_loss", 1e-3),
        ("q_quantizer_loss_t1", 1e-4),
        ("q_loss", 1e-4),
    ):
        for share, verdict in ((0.9, "pass"), (1.1, "fail")):
            off = wanted + np.float32(50 * limit * share) * np.eye(3, dtype=np.float32)[0]
            assert parity.compare(name, wanted, off).verdict == verdict, (name, share)
    for a, b, verdict in ((3, 3, "pass"), (3, 4, "fail"), (True, False, "fail")):
        assert parity.compare("codes", np.array([a]), np.array([b])).verdict == verdict
    zeros = np.zeros(2, np.float32)
    assert parity.compare("x", zeros, zeros + np.float32(2e-4)).verdict == "fail"


def test_arrays_are_uncovered_or_given(copy, capsys):
    rewrite(copy, new_output=np.ones(3, np.float32), other_margins=np.ones(2, np.float32))
    found = {name: line.verdict for name, line in verdicts(copy).items()}
    assert found["new_output"] == "uncovered" and found["other_margins"] == "given"
    assert found["image"] == found["q_cotangent"] == found["indices_margin"] == "given"
    assert cli.main(["parity", str(copy)]) == 2
    said = capsys.readouterr()
    assert "1 uncovered" in said.err and said.err.count("error:") == 1
    assert "new_output" in said.out


def test_a_setting_that_the_fixture_lacks_is_named(copy, capsys):
    file = copy / "config.json"
    settings = json.loads(file.read_text())
    del settings["beta"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="config.json lacks 'beta'"):
        verdicts(copy)
    file.write_text("[1]")
    with pytest.raises(UserError, match="must hold a table"):
        verdicts(copy)


# ---------------------------------------------------------------- what generators need


def test_a_dotted_setting_leads_through_sections(copy):
    file = copy / "config.json"
    settings = json.loads(file.read_text()) | {"model": {"generator": {"hidden_size": 32}}}
    file.write_text(json.dumps(settings))
    folder = parity.Folder(copy)
    assert folder.setting("model.generator.hidden_size") == 32
    assert folder.setting("model.generator") == {"hidden_size": 32}
    for name in ("model.generator.width", "model.hidden_size", "beta.more", "model."):
        with pytest.raises(UserError, match=f"lacks '{name}', which taming_vqgan needs"):
            folder.setting(name)


def generator_of(copy, tokenizer="taming_vqgan", **settings):
    """A folder as if its system were a generator with a tokenizer beside it."""
    folder = copy.parent / "generator"
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    said = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(said))
    found = parity.Folder(folder, "taming_vqgan")
    found.system = dataclasses.replace(found.system, beside=tokenizer)
    return found


def test_the_tokenizer_lies_beside_a_generator(copy):
    beside = generator_of(copy).beside()
    assert beside.path.resolve() == copy.resolve() and beside.name == "taming_vqgan"
    np.testing.assert_array_equal(beside.given("image"), parity.Folder(copy).given("image"))
    # or where the configuration says; the folder's name does not bind
    moved = copy.rename(copy.parent / "elsewhere")
    folder = generator_of(moved, vae="../elsewhere/config.json")
    assert folder.beside().path.resolve() == moved.resolve()
    assert folder.beside().name == "taming_vqgan"
    with pytest.raises(UserError, match="needs its tokenizer's .taming_vqgan. at .*/nowhere"):
        generator_of(moved, vae="../nowhere/config.json").beside()
    folder = generator_of(moved)
    folder.config.pop("vae", None)
    with pytest.raises(UserError, match="(?s)at .*taming_vqgan; there is none: copy"):
        folder.beside()
    for settings, tokenizer in (({"vae": {"ch": 160}}, "taming_vqgan"), ({}, "")):
        with pytest.raises(UserError, match="must name its tokenizer's config.json as 'vae'"):
            generator_of(moved, tokenizer, **settings).beside()


class Toy(nnx.Module):
    """What key tables meet: a table in two, a fused map, a statistic."""

    def __init__(self, random):
        self.symbols = nnx.Param(jnp.asarray(random.normal(size=(1, 3, 2)), jnp.float32))
        self.labels = nnx.Param(jnp.asarray(random.normal(size=(2, 2)), jnp.float32))
        self.kernel = nnx.Param(jnp.asarray(random.normal(size=(2, 3, 2)), jnp.float32))
        self.idle = nnx.Param(jnp.ones(2))
        self.counts = Statistic(jnp.full(2, 2.0))


def test_gradients_come_under_published_keys():
    """d of sum(counts * symbols^2 / 2) + sum(labels * kernel[:, 0]), closed forms."""
    toy = Toy(np.random.default_rng(0))
    rows = [
        keymap.Row("embed.weight", ("symbols", "labels"), keymap.rows_apart()),
        keymap.row("fused.weight", "kernel", keymap.chunks((1, 2, 0))),
        keymap.row("idle", "idle"),
        keymap.row("counts", "counts"),
    ]

    def loss(toy):
        own = 0.5 * jnp.sum(toy.counts[...][None, None] * toy.symbols[...] ** 2)
        return own + jnp.sum(toy.labels[...] * toy.kernel[...][:, 0]), {"own": own}

    value, scalars, found = parity.gradients(toy, loss, iter(rows))
    symbols, labels, kernel = (
        np.asarray(leaf[...], np.float64) for leaf in (toy.symbols, toy.labels, toy.kernel)
    )
    np.testing.assert_allclose(scalars["own"], np.sum(symbols**2), rtol=1e-6)
    np.testing.assert_allclose(value, np.sum(symbols**2) + np.sum(labels * kernel[:, 0]), rtol=1e-6)
    assert set(found) == {"embed.weight", "fused.weight", "idle"}
    np.testing.assert_allclose(
        found["embed.weight"], np.concatenate([2 * symbols[0], kernel[:, 0]]), rtol=1e-6
    )
    fused = np.zeros((6, 2))
    fused[2:4] = labels.T  # our chunk 0 is the published chunk 1
    np.testing.assert_allclose(found["fused.weight"], fused, rtol=1e-6)
    assert not found["idle"].any()
    norms, whole = parity.grad_norms(found, ("fused.weight",))
    np.testing.assert_allclose(norms, [np.linalg.norm(labels)], rtol=1e-6)
    parts = (2 * symbols, kernel[:, 0], labels)
    wanted = np.sqrt(sum(np.sum(part**2) for part in parts))
    np.testing.assert_allclose(whole, wanted, rtol=1e-6)


# ---------------------------------------------------------------- the command


def test_the_command_prints_json_and_saves_what_was_computed(tmp_path, capsys):
    arrays, _, computed = held(HERE / "taming_vqgan", "taming_vqgan")
    file = tmp_path / "ours.npz"
    words = ["parity", str(HERE / "taming_vqgan"), "--json", "--arrays", str(file)]
    assert cli.main(words) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["name"] for record in records] == list(arrays)
    for record in records:
        if record["name"] in computed:
            assert record["verdict"] == "pass"
            assert (
                0 <= record["max_rel_diff"] <= record["tolerance"] and record["max_abs_diff"] >= 0
            )
        else:
            assert record["verdict"] == "given" and record["max_abs_diff"] is None
    with np.load(file) as saved:
        assert set(saved) == set(computed)
        for name in saved:
            assert (saved[name].shape, saved[name].dtype) == (
                arrays[name].shape,
                arrays[name].dtype,
            )
            assert agrees(name, arrays[name], saved[name])


def test_a_folder_that_fails_ends_the_command_with_2(copy, tmp_path, capsys):
    arrays = held(HERE / "taming_vqgan", "taming_vqgan")[0]
    rewrite(copy, q_loss=arrays["q_loss"] + np.float32(1))
    renamed = copy.rename(tmp_path / "of_another_name")
    file = tmp_path / "ours.npz"
    words = ["parity", str(renamed), "--system", "taming_vqgan", "--arrays", str(file)]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "8 pass, 1 fail, 4 given" in said.err and "Traceback" not in said.err
    (line,) = [line for line in said.out.splitlines() if line.startswith("q_loss")]
    assert line.split()[-1] == "fail"
    with np.load(file) as saved:  # what differs is what one wants to look at
        np.testing.assert_allclose(saved["q_loss"], arrays["q_loss"], rtol=1e-4)


def test_what_was_computed_replaces_nothing_that_is_published(copy, capsys):
    for file in sorted(copy.iterdir()):
        before = file.read_bytes()
        words = ["parity", str(copy), "--arrays", str(file), "--overwrite"]
        assert cli.main(words) == 2 and file.read_bytes() == before
        assert "is what the command reads" in capsys.readouterr().err


def _no_case(folder):
    (folder / "case.npz").unlink()


def _broken_case(folder):
    (folder / "case.npz").write_bytes(b"PK\x03\x04 and then nothing")


def _broken_config(folder):
    (folder / "config.json").write_text("{")


def _no_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["salt"]
    (folder / "config.json").write_text(json.dumps(config))


def _two_weights(folder):
    _no_weights(folder)
    for name in ("a.ckpt", "b.ckpt"):
        (folder / name).write_bytes(b"x")


def _no_input(folder):
    rewrite(folder, q_cotangent=None)


def _no_output(folder):
    rewrite(folder, decoded=None)


def _left_over(folder):
    config = json.loads((folder / "config.json").read_text())
    config["keys"]["encoder.more.weight"] = [3]
    del config["keys"]["decoder.conv_in.bias"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_case, ("case.npz",)),
        (_broken_case, ("cannot read", "case.npz")),
        (_broken_config, ("cannot be read",)),
        (_no_weights, ("one weight file", "none")),
        (_two_weights, ("one weight file", "a.ckpt, b.ckpt")),
        (_no_input, ("lacks", "'q_cotangent'")),
        (_no_output, ("lacks", "decoded")),
        (_left_over, ("1 missing: decoder.conv_in.bias", "1 left over: encoder.more.weight")),
    ],
)
def test_a_damaged_fixture_is_one_message(copy, capsys, damage, words):
    damage(copy)
    assert cli.main(["parity", str(copy)]) == 2
    said = capsys.readouterr()
    assert said.err.count("error:") == 1 and "Traceback" not in said.err + said.out
    assert all(word in said.err for word in words), said.err


def test_an_unknown_system_is_answered_with_those_that_are_there(copy, capsys):
    assert cli.main(["parity", str(copy), "--system", "taming_vqgam"]) == 2
    said = capsys.readouterr().err
    assert "'taming_vqgam'; did you mean 'taming_vqgan'?" in said and "llamagen_vq" in said
    assert cli.main(["parity", str(copy.rename(copy.parent / "mine"))]) == 2
    assert "--system" in capsys.readouterr().err


def test_every_system_is_held_somewhere():
    """And a generator knows the tokenizer that its fixture lies beside."""
    known = system.known()
    generators = {name for name, found in known.items() if found.tokens is not None}
    assert generators == {name for names in GENERATORS.values() for name in names}
    # an encoder of titok_onestage_vae with a decoder of tatitok_vq: no fixture of its own
    held = {*SHARED, *OWN.values(), *MEASURES.values()}
    assert set(known) - generators - {"tatitok_vae"} == held
    for file, name in MEASURES.items():
        text = (pathlib.Path(__file__).parent / file).read_text()
        assert f'"{name}"' in text, (file, name)
    for file, names in GENERATORS.items():
        text = (pathlib.Path(__file__).parent / file).read_text()
        for name in names:
            assert f'"{name}"' in text, (file, name)
            assert known[known[name].beside].settings and known[known[name].beside].tokens is None


def test_every_system_says_where_its_weights_come_from():
    """Itself, or the zoo for it; not both."""
    for name, found in system.known().items():
        assert bool(found.home) != bool(zoo.of(name)) or name == "maskbit_bert", name
        assert found.licence and callable(found.parity), name
        assert (found.settings is None) == (found.rows is None), name
    with pytest.raises(UserError, match="must be one of"):
        system.named("")
