"""What `--classes` and `--text` mean, and what they refuse; what a preset's place is taken by."""

import argparse
import contextlib
import json
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, options, samples
from tokgen.commands import sample
from tokgen.data import captioned, classes as classes_
from tokgen.interfaces import UserError
from tokgen.sampling import drawing, presets, sampler as samplers

CLASSES = ("cat", "dog", "hot-dog", "7")


@pytest.mark.parametrize(
    ("text", "labels"),
    [("", [0, 1, 2, 3]), ("cat", [0]), ("1-2", [1, 2]), ("hot-dog,0", [2, 0]), ("7", [3])],
)
def test_classes(text, labels):
    assert classes_.labels_of(text, CLASSES) == labels


@pytest.mark.parametrize("text", ["4", "-1", "2-1", "0-9", "bird", "cat,,dog"])
def test_classes_out_of_range_are_refused(text):
    with pytest.raises(UserError, match="class"):
        classes_.labels_of(text, CLASSES)


def test_names_that_are_numbers_are_names():
    """In the order of an older checkpoint, and where the first one is 1."""
    old = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, ...
    for text in ("2", "0-2", "all", "11"):
        names = [old[label] for label in classes_.labels_of(text, old)]
        assert names == {"2": ["2"], "0-2": ["0", "1", "2"], "11": ["11"]}.get(text, list(old))
    assert classes_.labels_of("1-3", ("1", "2", "3")) == [0, 1, 2]
    with pytest.raises(UserError, match="class ids are 1 to 3"):
        classes_.labels_of("0", ("1", "2", "3"))
    with pytest.raises(UserError, match="class ids are among 1 to 9"):
        classes_.labels_of("1-9", ("1", "2", "9"))


def test_of_many_classes_a_few_are_drawn(capfd):
    many = tuple(map(str, range(1000)))
    assert classes_.labels_of("", many) == [0, 125, 250, 375, 500, 625, 750, 875]
    assert classes_.labels_of("all", many) == list(range(1000))
    assert classes_.labels_of("all", ("one", "all")) == [1]
    labelled = types.SimpleNamespace(cond="label", layout=Reader.layout)
    _, label_N, _ = samples.conditions(_settings("--number", "2"), _loaded(labelled, many))
    assert len(label_N) == 16
    told = capfd.readouterr().err
    assert "8 of 1000 classes" in told and "--classes all draws 2,000 images" in told


def test_unconditional_model_has_one_label():
    assert classes_.labels_of("", ()) == [0]
    with pytest.raises(UserError, match="unconditional"):
        classes_.labels_of("cat", ())


class Reader(nnx.Module):
    """A generator that reads text: one masked step or more, whose logits are the mean feature."""

    layout = interfaces.TokenLayout((8,), ((2, 2),))
    knobs, cond = ("steps", "schedule"), "text"

    def __init__(self):
        self.steps, self.schedule = 1, "cosine"

    def check(self, cond):
        """Whatever is told."""

    def unstacked(self):
        return self

    def null(self, cond):
        return cond.replace(features_BTE=jnp.zeros_like(cond.features_BTE))

    def plan(self):
        return (interfaces.Phase(0, self.steps, 0, 4),)

    def start(self, cond, codec=None, *, keys_B, given):
        order_BL = jnp.broadcast_to(jnp.arange(4), (len(keys_B), 4))
        return interfaces.DecodeState(*given, order_BL=order_BL, cond=cond, keys_B=keys_B)

    def step(self, state, phase, index, codec, draw):
        text = state.cond
        logits_B8 = jnp.where(text.mask_BT[..., None], text.features_BTE, 0).sum(1)
        logits_BlGV = jnp.broadcast_to(logits_B8[:, None, None], (len(logits_B8), 4, 1, 8))
        return state.write(state.order_BL, draw(logits_BlGV)[0])


class Painter(nnx.Module):
    """Gray images whose pixels are the tokens."""

    quantizer = None

    def decode(self, tokens_BLG):
        image_BHW = tokens_BLG[..., 0].reshape(-1, 2, 2) / 8
        return jnp.broadcast_to(image_BHW[..., None], (*image_BHW.shape, 3))


def _text(count: int = 3) -> dict[str, np.ndarray]:
    features = np.random.default_rng(0).normal(size=(count, 5, 8)).astype(np.float32)
    return {"features": features, "mask": np.arange(5)[None] >= np.arange(count)[:, None]}


def _loaded(module, classes=(), **presets):
    config = types.SimpleNamespace(
        presets=ml_collections.ConfigDict(presets),
        precision=types.SimpleNamespace(compute="float32"),
    )
    return types.SimpleNamespace(
        module=module, classes=classes, config=config, layout=module.layout
    )


def _args(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.arguments(parser)
    return parser.parse_args(["runs/generator", "--out", "nowhere", *words])


def _settings(*words: str) -> samples.Settings:
    return sample.settings_of(_args(*words))


def prepared(args, loaded):
    """(settings, generator, sampler) that a command line asks for; refused where it is in vain."""
    choice = sample.choice_of(args)
    found = presets.choose(loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes)
    options.refuse(presets.without_effect(choice, found[-1]))
    return found


def test_images_of_texts(tmp_path):
    np.savez(tmp_path / "text.npz", **_text())
    settings = _settings("--text", str(tmp_path / "text.npz"), "--number", "2")
    cond, row_N, classes = samples.conditions(settings, _loaded(Reader()))
    np.testing.assert_array_equal(row_N, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(cond.features_BTE, _text()["features"][row_N])
    np.testing.assert_array_equal(cond.mask_BT, _text()["mask"][row_N])
    assert classes == [] and cond.mask_BT.dtype == bool
    sampler = samplers.Sampler(temperature=0, guidance=(3.0,))
    tokens, images = drawing.draw(Reader(), Painter(), cond, sampler, seed=0, batch=4)
    seen = np.where(cond.mask_BT[..., None], cond.features_BTE, 0).sum(1)
    np.testing.assert_array_equal(tokens[..., 0], np.repeat(seen.argmax(-1)[:, None], 4, 1))
    assert images.shape == (6, 2, 2, 3) and len(np.unique(tokens)) > 1
    warm = samplers.Sampler(temperature=2.0)
    tokens, _ = drawing.draw(Reader(), Painter(), cond, warm, seed=0, batch=4)
    part = interfaces.Text(cond.features_BTE[5:], cond.mask_BT[5:])
    alone, _ = drawing.draw(Reader(), Painter(), part, warm, seed=0, batch=4, first=5)
    np.testing.assert_array_equal(alone, tokens[5:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": None}, "no mask"),
        ({"features": None, "mask": None}, "no features and no mask"),
        ({"features": np.zeros((3, 5, 8), int)}, "float32.*int64"),
        ({"features": np.zeros((3, 5), np.float32)}, r"\[N, T, E\].*\(3, 5\)"),
        ({"features": np.full((3, 5, 8), np.nan, np.float32)}, "finite"),
        ({"mask": np.ones((3, 4), bool)}, r"\(3, 5\).*\(3, 4\)"),
        ({"mask": np.full((3, 5), 2)}, "0 or 1"),
        ({"mask": np.zeros((3, 5), bool)}, "padded on the left"),
        ({"mask": np.arange(5)[None] < np.full((3, 1), 3)}, "padded on the left"),
        ({"mask": np.asarray([[1, 0, 1, 1, 1]] * 3)}, "padded on the left"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path, change, words):
    arrays = {k: v for k, v in (_text() | change).items() if v is not None}
    np.savez(tmp_path / "text.npz", **arrays)
    with pytest.raises(UserError, match=words):
        captioned.conditions(str(tmp_path / "text.npz"))


def test_what_is_no_text_is_refused(tmp_path):
    np.save(tmp_path / "text.npy", np.zeros(3))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 and no more")
    for name in ("text.npy", "empty.npz", "broken.npz", "nothing.npz"):
        with pytest.raises(UserError, match=f"--text needs.*{name}"):
            captioned.conditions(str(tmp_path / name))
    with pytest.raises(UserError, match="needs --text FILE.npz.*found none"):
        samples.conditions(_settings(), _loaded(Reader()))
    with pytest.raises(UserError, match="needs --text FILE.npz.*found --classes"):
        samples.conditions(_settings("--text", "a.npz", "--classes", "0"), _loaded(Reader()))
    other = types.SimpleNamespace(cond="label", layout=Reader.layout)
    with pytest.raises(UserError, match="of 4 classes: use --classes"):
        samples.conditions(_settings("--text", "a.npz"), _loaded(other, CLASSES))


def test_steps_and_noise_take_the_presets_place(capsys):
    loaded = _loaded(Reader(), default={"steps": 8, "noise": 4.0, "weight": 2.0})
    settings, generator, sampler = prepared(_args(), loaded)
    assert generator.steps == 8 and sampler.jitter[0] == 3.5 and len(sampler.guidance) == 8
    assert "departs" not in capsys.readouterr().out
    settings, generator, sampler = prepared(
        _args("--steps", "4", "--noise", "2", "--guidance", "1"), loaded
    )
    assert (settings["steps"], settings["noise"], settings["weight"]) == (4, 2.0, 1.0)
    assert generator.steps == 4 and sampler == samplers.Sampler(jitter=(1.5, 1.0, 0.5, 0.0))
    said = capsys.readouterr()
    assert "departs from preset 'default': " in said.out + said.err
    assert "{" not in said.out + said.err
    assert loaded.module.steps == 1


@pytest.mark.parametrize(
    ("preset", "words", "told"),
    [
        ({}, ("--temperature", "0", "--top-k", "3"), "--top-k .it is for temperatures above 0"),
        ({"temperature": 0}, ("--top-k", "0", "--top-p", "0.5"), "2 options .*--top-k .*--top-p "),
        # what the draws are at, not what is written: no noise, no temperature
        ({"drawing": "noise"}, ("--top-p", "0.9"), "--top-p "),
        ({}, ("--top-k", "1", "--temperature", "0.5"), "--temperature .it is for a top-k other"),
        ({"temperature": 0, "top_k": 3}, (), ""),  # a preset may say more than it needs
        ({"temperature": [0.0, 1.0], "steps": 2}, ("--top-k", "3"), ""),
        ({"temperature": 0}, ("--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"), ""),
    ],
)
def test_a_filter_is_refused_where_the_likeliest_is_taken_anyway(preset, words, told):
    args = _args(*words)
    refused = pytest.raises(UserError, match=f"(?=.*no effect here).*{told}")
    with refused if told else contextlib.nullcontext():
        prepared(args, _loaded(Reader(), default=preset))


@pytest.mark.parametrize(
    ("count", "batch", "expected"), [(8, 32, 8), (40, 32, 20), (64, 32, 32), (1, 1, 1), (0, 5, 1)]
)
def test_no_more_is_drawn_than_is_asked_for(count, batch, expected):
    assert drawing.even(count, batch) == expected


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A generator and tokenizer in the place of checkpoints; what was drawn, batch by batch."""
    np.savez(tmp_path / "text.npz", **_text(5))
    loaded = _loaded(Reader(), default={"temperature": 2.0})
    loaded.step, loaded.fingerprint = tmp_path / "G", "f"
    painter = types.SimpleNamespace(module=Painter(), fingerprint="t")
    monkeypatch.setattr(samples.runtime, "devices", lambda: None)
    monkeypatch.setattr(samples.checkpoint, "find", lambda path: path)
    monkeypatch.setattr(samples.checkpoint, "read_meta", lambda step: {"kind": "tokenizer"})
    monkeypatch.setattr(samples.checkpoint, "load_to_draw", lambda *_, **more: loaded)
    monkeypatch.setattr(samples.checkpoint, "load_to_decode", lambda *_: painter)
    real, batches = drawing.sharding.filled, []

    def filled(tree, batch, mesh):
        batches.append(batch)
        return real(tree, batch, mesh)

    monkeypatch.setattr(drawing.sharding, "filled", filled)

    def run(name, *words):
        out = ["--out", str(tmp_path / name)]
        sample.run(_args("--text", str(tmp_path / "text.npz"), *out, *words))
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    return types.SimpleNamespace(run=run, batches=batches, loaded=loaded)


def test_samples_that_were_killed_go_on_to_the_same_images(stand_ins, monkeypatch, tmp_path):
    whole = stand_ins.run("whole", "--number", "3", "--batch", "4")
    assert stand_ins.batches == [4, 4, 4, 4]
    png = [name for name in whole if name.startswith("seed0-")]
    assert len(png) == 15 and set(whole) - set(png) == {
        *("samples.npz", "samples.json", "tokens.npy", "grid.png")
    }
    save = samples.made_images.save_part

    def dying(file, arrays):
        if len(stand_ins.batches) == 2:
            raise KeyboardInterrupt
        save(file, arrays)

    stand_ins.batches.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(samples.made_images, "save_part", dying)
        stand_ins.run("killed", "--number", "3", "--batch", "4")
    assert not (tmp_path / "killed").exists()
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        stand_ins.run("killed", "--number", "3", "--seed", "1")
    # in other batches: eleven are left
    assert stand_ins.run("killed", "--number", "3", "--batch", "6") == whole
    assert stand_ins.batches == [4, 4, 6, 6]
    assert list(tmp_path.glob(".*")) == []


def test_python_draws_the_images_that_the_command_writes(stand_ins, tmp_path):
    stand_ins.run("out", "--number", "2", "--temperature", "0.5", "--no-png")
    text = str(tmp_path / "text.npz")
    found = samples.sample("G", text=text, number=2, temperature=0.5, batch=3)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        np.testing.assert_array_equal(found.image_NHW3, arrays["arr_0"])
        np.testing.assert_array_equal(found.kind_N, arrays["arr_1"])
    np.testing.assert_array_equal(found.tokens_NLG, np.load(tmp_path / "out" / "tokens.npy"))
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert found.classes == () and found.settings == record["settings"]
    assert record["settings"]["temperature"] == 0.5
    with pytest.raises(UserError, match="--number and --batch must be at least 1; found 0, 32"):
        samples.sample("G", text=text, number=0)


def test_samples_are_not_mixed_with_others(stand_ins, tmp_path):
    first = stand_ins.run("out", "--number", "2", "--batch", "32")
    assert stand_ins.batches == [10]  # and not 32
    with pytest.raises(UserError, match="--overwrite"):
        stand_ins.run("out", "--number", "1")
    stand_ins.loaded.module = None  # noticed before anything is loaded
    with pytest.raises(UserError, match="--overwrite"):
        stand_ins.run("out", "--number", "1")
    stand_ins.loaded.module = Reader()
    second = stand_ins.run("out", "--number", "1", "--overwrite", "--no-png")
    assert set(second) == {"samples.npz", "samples.json", "tokens.npy", "grid.png"}
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 2, 2, 3)
    assert len(first) == 14


def test_an_image_that_is_not_finite_ends_it(stand_ins, monkeypatch, tmp_path):
    draw_tokens = drawing.draw_tokens

    def invalid(*words):
        tokens, invalid_B, near_B = draw_tokens(*words)
        return tokens, invalid_B | (len(stand_ins.batches) > 1), near_B

    monkeypatch.setattr(drawing, "draw_tokens", invalid)
    with pytest.raises(UserError, match="logits must be finite.*: number 2"):
        stand_ins.run("out", "--number", "1", "--batch", "2")
    assert not (tmp_path / "out").exists()


def test_where_images_stand_in_the_grid():
    layout, told = samples.sheet(6, 2, (64, 64))
    np.testing.assert_array_equal(layout, [[0, 1], [2, 3], [4, 5]])
    assert told == "a row per class or text"
    layout, told = samples.sheet(40, 20, (64, 64))  # every class begins a row
    assert layout.shape == (4, 16) and layout[1].tolist() == [16, 17, 18, 19] + [-1] * 12
    assert layout[2, 0] == 20 and told == "2 rows per class or text"
    layout, told = samples.sheet(50_000, 50, (256, 256))  # of 1000 classes, evenly
    assert layout.shape[1] == 16 and layout.size * 256 * 256 <= samples.PIXELS
    assert (layout[:, 0] % 50 == 0).all() and layout[-1, 0] > 45_000
    assert f"{layout.size} of 50000 images" in told
    layout, told = samples.sheet(50_000, 50_000, (256, 256))  # of one class
    assert len(layout) > 30 and len(np.unique(layout)) == layout.size
    layout, _ = samples.sheet(3, 1, (20_000, 20_000))
    assert layout.tolist() == [[0]]
