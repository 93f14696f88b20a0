"""Import, export and fine-tune a generator: a tiny one, published in a form made up here."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import command_line
from tokgen import interfaces, parameters, rng, runtime, sharding
from tokgen.checkpoints import checkpoint, imported as imports, loading, run as runs
from tokgen.config import building, reading as configs
from tokgen.pretrained import entries, keymap, parity, system, transfer
from tokgen.pretrained.formats import writer
from tokgen.training import train_state

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
CLASSES = 6


# ---------------------------------------------------------------- a published generator


def settings(published, weights):
    """As a family's file has it: the config of a recipe, with the sizes of the file."""
    config = configs.load("configs/generator/shapes.py")
    config.generator.update(width=published["dim"], depth=2, heads=2)
    config.precision.compute = "float32"
    config.presets = dict(default=dict(weight=3.0), paper=dict(weight=1.5, top_k=8))
    return config


def tokens(published, weights):
    layout = interfaces.TokenLayout((published["vocab_size"],), (tuple(published["grid"]),))
    return layout, len(weights["embed.weight"]) - layout.absent - 1


def rows(generator):
    """Our own names, but for one table of symbols and classes together."""
    found, fused = [], []
    for path in parameters.paths(parameters.split(generator)[1]):
        if path.endswith(("embeddings/table", "labels/table")):
            fused.append(path)
        else:
            found.append(keymap.row(path.replace("/", "."), path))
    fused.sort(key=lambda path: path.endswith("labels/table"))
    return [*found, keymap.Row("embed.weight", tuple(fused), keymap.rows_apart())]


TINY = system.System(
    parity=lambda folder: {},
    settings=settings,
    rows=rows,
    tokens=tokens,
    beside="taming_vqgan",
    aside=("freqs",),
    unwrap=("model",),
    wrap=("model",),
    home="here",
    licence="MIT",
)


@pytest.fixture(autouse=True)
def offered(monkeypatch):
    """Commands in this process, and the tiny system among those that are known."""
    known = system.known() | {"tiny": TINY}
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    monkeypatch.setattr(system, "known", lambda: known)


def tokenizer_in(folder, change=0.0):
    """The checkpoint of a tokenizer, with one weight moved."""
    fixture = parity.Folder(HERE / "taming_vqgan", "taming_vqgan")
    imported = fixture.imported()
    bias = imported.module.decoder.conv_out.bias
    bias[...] = bias[...] + change
    imports.save_imported(folder, imported, {})
    return loading.load_tokenizer(folder)


def published_in(folder, layout):
    """(weight file, its configuration, its arrays)."""
    said = {"dim": 16, "vocab_size": layout.absent, "grid": layout.grids[0]}
    blank = {"embed.weight": np.zeros((layout.absent + CLASSES + 1, 16))}
    config = settings(said, blank)
    make = nnx.eval_shape(
        lambda: building.generator(config, layout, CLASSES, rngs=rng.rngs(0)),
    )
    leaves, random = parameters.paths(parameters.split(make)[1]), np.random.default_rng(3)
    filled = {path: random.normal(size=leaf.shape) for path, leaf in leaves.items()}
    weights = {}
    for row in rows(make):
        parts = [filled[place] for place in row.places]
        weights[row.key] = row.rule.published(parts).astype(np.float32)
    weights["freqs"] = np.arange(4, dtype=np.float32)
    writer.write(folder / "tiny.pt", weights, form="torch", wrap=("model",))
    (folder / "tiny.json").write_text(json.dumps(said))
    return folder / "tiny.pt", folder / "tiny.json", weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(import command of the file, its arrays, tokenizer) and what it wrote, with a tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = tokenizer_in(folder / "tokenizer")
    file, config, weights = published_in(folder, tokenizer.layout)
    words = ("import", file, "--system", "tiny", "--config", config)
    with pytest.MonkeyPatch.context() as patch:
        known = system.known() | {"tiny": TINY}
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        patch.setattr(system, "known", lambda: known)
        assert (
            command_line.call(*words, "--out", folder / "run", "--tokenizer", folder / "tokenizer")
            == 0
        )
        assert command_line.call(*words, "--out", folder / "alone") == 0
    return folder, words, weights, tokenizer


# ---------------------------------------------------------------- import and export


def test_an_import_holds_what_sampling_needs(made):
    folder, _, weights, tokenizer = made
    loaded = loading.load_generator(folder / "run")
    assert loaded.layout == tokenizer.layout and loaded.classes == ("0", "1", "2", "3", "4", "5")
    assert loaded.config.presets.paper.to_dict() == {"weight": 1.5, "top_k": 8}
    source = loaded.meta["source"]
    assert source["sha256"] == transfer.digest(folder / "tiny.pt")
    assert (source["system"], source["licence"], source["home"]) == ("tiny", "MIT", "here")
    leaves = parameters.paths(parameters.split(loaded.module)[1])
    (path,) = [path for path in leaves if path.endswith("labels/table")]
    np.testing.assert_array_equal(leaves[path], weights["embed.weight"][-CLASSES - 1 :])
    found = loading.load_tokenizer_of(loaded)
    assert found.fingerprint == loaded.meta["tokenizer"]["fingerprint"] == tokenizer.fingerprint


@pytest.mark.parametrize("which", ["run", "alone"])
def test_an_export_gives_the_file_back(made, which, tmp_path):
    folder, _, weights, _ = made
    assert command_line.call("export", folder / which, "--out", tmp_path) == 0
    found = entries.weights(tmp_path / "tiny.pt", TINY)
    assert set(found) == set(weights)
    for key, array in weights.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["classes"] == [str(i) for i in range(CLASSES)]
    assert record["layout"] == checkpoint.read_meta(checkpoint.find(folder / "run"))["layout"]
    assert (tmp_path / "model.safetensors").is_file()


def test_an_import_without_its_tokenizer_asks_for_it(made, tmp_path, capfd):
    folder, words, _, tokenizer = made
    assert command_line.call(*words, "--out", tmp_path / "out") == 0
    hint = f"tokgen sample {tmp_path / 'out'} --out DIR --tokenizer CKPT --classes 0-3 --number 2"
    assert hint in capfd.readouterr().err
    loaded = loading.load_generator(folder / "alone")
    with pytest.raises(interfaces.UserError, match="imported without its tokenizer.*--tokenizer"):
        loading.load_tokenizer_of(loaded)
    found = loading.load_tokenizer_of(loaded, str(folder / "tokenizer"))
    assert found.fingerprint == tokenizer.fingerprint


@pytest.fixture
def coarse(made, tmp_path):
    """The same weights, said to write a smaller grid."""
    folder, words, _, tokenizer = made
    ((height, width),) = tokenizer.layout.grids
    said = json.loads((folder / "tiny.json").read_text()) | {"grid": [height - 1, width]}
    (tmp_path / "coarse.json").write_text(json.dumps(said))
    return [*words[:-1], tmp_path / "coarse.json"], tokenizer.layout.grids, ((height - 1, width),)


def test_a_tokenizer_of_other_tokens_is_refused_with_both_layouts(made, coarse, tmp_path, capfd):
    folder, (words, theirs, ours) = made[0], coarse
    place = ("--tokenizer", folder / "tokenizer")
    said = command_line.refused(capfd, *words, "--out", tmp_path / "out", *place)
    assert str(theirs) in said and str(ours) in said
    assert not (tmp_path / "out").exists()
    assert command_line.call(*words, "--out", tmp_path / "out") == 0
    loaded = loading.load_generator(tmp_path / "out")
    with pytest.raises(interfaces.UserError) as caught:
        loading.load_tokenizer_of(loaded, str(folder / "tokenizer"))
    assert str(theirs) in str(caught.value) and str(ours) in str(caught.value)


def test_words_that_do_not_fit_are_told(made, tmp_path, capfd):
    folder, words, _, _ = made
    out = ("--out", tmp_path / "out")
    tokenizer = ("--tokenizer", folder / "tokenizer")
    wrong = (*words[:2], "--system", "taming_vqgan", *out, *tokenizer)
    assert "--tokenizer is for generators" in command_line.refused(capfd, *wrong)
    wrong = (*words, *out, "--tokenizer", folder / "run")
    assert "holds a generator; need the checkpoint of a tokenizer" in command_line.refused(
        capfd, *wrong
    )
    wrong = (*words[:4], *out)  # without its configuration
    assert "do not look like tiny" in command_line.refused(capfd, *wrong)
    assert not (tmp_path / "out").exists()


def test_its_tokenizer_is_looked_at_before_the_weights_are_read(made, tmp_path, monkeypatch, capfd):
    folder, words, _, _ = made
    monkeypatch.setattr(transfer, "read", None)  # reading would fail
    wrong = (*words, "--out", tmp_path / "out", "--tokenizer", folder / "run")
    assert "holds a generator; need the checkpoint of a tokenizer" in command_line.refused(
        capfd, *wrong
    )


def test_images_of_other_classes_and_texts_are_not_scored(made, tmp_path, capfd):
    folder = made[0]
    for name in ("daisy", "rose"):
        for i in range(3):
            (tmp_path / "flowers" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"flowers/{name}/{i}.png")
    words = ("evaluate", folder / "run", "--data", tmp_path / "flowers", "--split", "all")
    refused = command_line.refused(capfd, *words)
    assert "must be among those of the generator; found daisy, rose" in refused
    assert "flowers: 2 classes (daisy 3, rose 3); all 6" in refused
    assert "the generator's condition is a label" in command_line.refused(
        capfd, *words, "--text", tmp_path
    )


# ---------------------------------------------------------------- fine-tuning


def began(workdir, init_from, layout, tokenizer, classes=CLASSES, ema=0.0, names=None, **changes):
    """(model, what was done) as a training of a generator begins, with sevens everywhere."""
    names = names or tuple(f"class {i}" for i in range(classes))
    config = settings({"dim": 16}, {})
    config.init_from = str(init_from)
    config.generator.update(changes)
    make = nnx.eval_shape(lambda: building.generator(config, layout, classes, rngs=rng.rngs(0)))
    _, params, stats = parameters.split(make)
    whole = sharding.replicated(sharding.make_mesh())
    params = jax.tree.map(
        lambda leaf: jax.device_put(jnp.full(leaf.shape, 7, leaf.dtype), whole), params
    )
    zero = jax.device_put(jnp.zeros((), jnp.int32), whole)
    model = train_state.TrainState(zero, zero, params, stats, (), params if ema else None)
    run = runs.start(
        workdir,
        config,
        kind="generator",
        layout=layout,
        classes=names,
        best="nats_per_token",
        data="",
        tokenizer=checkpoint.reference(tokenizer.step, workdir)
        | {"fingerprint": tokenizer.fingerprint},
    )
    try:
        networks, what = runs.resume_or_start(run, {"model": model})
    finally:
        run.close()
    return networks["model"], what


def arrays(tree):
    return {path: np.asarray(leaf) for path, leaf in parameters.paths(tree).items()}


@pytest.mark.parametrize(("classes", "ema"), [(3, 0.9), (9, 0.0), (0, 0.0)])
def test_other_classes_begin_anew_but_for_no_class(made, tmp_path, classes, ema):
    folder, _, _, tokenizer = made
    there = arrays(parameters.split(loading.load_generator(folder / "run").module)[1])
    model, what = began(
        tmp_path, folder / "run", tokenizer.layout, tokenizer, classes=classes, ema=ema
    )
    assert f"the class table is new: {CLASSES} classes there, {classes} here" in what
    for tree in (model.params, model.ema) if ema else (model.params,):
        found = arrays(tree)
        assert set(found) == set(there)
        for path, array in there.items():
            if path.endswith("labels/table"):
                assert found[path].shape == (classes + 1, 16)
                assert (found[path][:-1] == 7).all()
                np.testing.assert_array_equal(found[path][-1], array[-1])
            else:
                np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("5", "4", "3", "2", "1", "0"), [5, 4, 3, 2, 1, 0]),
        (("cat", "3", "dog", "1"), [7, 3, 7, 1]),
        (("0", "1", "2"), [7, 7, 7]),  # numbers in the place of names, and of other sets
    ],
)
def test_classes_keep_their_rows_by_name(made, tmp_path, names, rows):
    folder, _, _, tokenizer = made
    there = arrays(parameters.split(loading.load_generator(folder / "run").module)[1])
    model, what = began(
        tmp_path, folder / "run", tokenizer.layout, tokenizer, classes=len(names), names=names
    )
    (path,) = [path for path in there if path.endswith("labels/table")]
    found = arrays(model.params)[path]
    for row, old in zip(found, rows, strict=False):
        np.testing.assert_array_equal(row, np.full(16, 7.0) if old == 7 else there[path][old])
    np.testing.assert_array_equal(found[-1], there[path][-1])
    assert ("by name" in what) == (7 not in rows or "cat" in names)


def test_a_head_that_counts_classes_keeps_its_codes_and_its_mask(made, tmp_path, monkeypatch):
    """MaskGIT's, which has no row of "no class" and a bias for codes, classes and the mask."""
    _, _, _, tokenizer = made
    config = settings({"dim": 16}, {})
    config.generator = dict(
        name="masked", variant="maskgit", entry="normed", head="tied_to_all", label_drop=None
    )
    config.generator.update(width=16, depth=1, heads=2)
    module = building.generator(config, tokenizer.layout, CLASSES, rngs=nnx.Rngs(0))
    module.head.bias[...] = jnp.arange(tokenizer.layout.absent + CLASSES + 1.0)
    imported = transfer.Imported(config, module, None, {}, layout=tokenizer.layout, classes=CLASSES)
    imports.save_imported(tmp_path / "source", imported, {}, tokenizer)
    monkeypatch.setitem(globals(), "settings", lambda published, weights: config)
    model, _ = began(tmp_path / "run", tmp_path / "source", tokenizer.layout, tokenizer, classes=3)
    V = tokenizer.layout.absent
    bias = np.asarray(model.params["head"]["bias"])
    np.testing.assert_array_equal(bias, [*range(V), 7, 7, 7, V + CLASSES])
    assert (np.asarray(model.params["labels"]["table"]) == 7).all()


def test_as_many_classes_keep_their_rows(made, tmp_path):
    folder, _, _, tokenizer = made
    there = arrays(parameters.split(loading.load_generator(folder / "run").module)[1])
    model, what = began(tmp_path / "a", folder / "run", tokenizer.layout, tokenizer)
    assert "kept, by number: 0, 1, 2 ... are now class 0, class 1, class 2" in what
    for path, array in arrays(model.params).items():
        np.testing.assert_array_equal(array, there[path], err_msg=path)
    _, what = began(tmp_path / "b", folder / "alone", tokenizer.layout, tokenizer)
    assert "its tokenizer is not recorded" in what


def test_other_tokens_are_refused(made, coarse, tmp_path):
    """Another layout, another tokenizer of the same layout, another kind: need, found, remedy."""
    folder, _, _, tokenizer = made
    other = tokenizer_in(tmp_path / "other", change=1e-3)
    assert other.layout == tokenizer.layout and other.fingerprint != tokenizer.fingerprint
    both = f"{tokenizer.fingerprint[:16]}.*{other.fingerprint[:16]}.*tokgen pretokenize"
    with pytest.raises(interfaces.UserError, match=both):
        began(tmp_path / "a", folder / "run", other.layout, other)
    _, theirs, ours = coarse
    both = f"{re.escape(str(theirs))}.*{re.escape(str(ours))}.*pretokenize"
    with pytest.raises(interfaces.UserError, match=both):
        layout = interfaces.TokenLayout(tokenizer.layout.vocab, ours)
        began(tmp_path / "b", folder / "run", layout, tokenizer)
    with pytest.raises(interfaces.UserError, match="holds a tokenizer; this program trains a gen"):
        began(tmp_path / "c", folder / "tokenizer", tokenizer.layout, tokenizer)
    with pytest.raises(interfaces.UserError, match="(?s)other arrays.*labels/table"):
        began(tmp_path / "d", folder / "run", tokenizer.layout, tokenizer, classes=3, width=32)
