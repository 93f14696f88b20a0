"""What `--classes` and `--text` mean, and what they refuse; what a preset's place is taken by."""

import argparse
import contextlib
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, options, samples
from tokgen.commands import sample
from tokgen.data import captioned, classes as classes_
from tokgen.evaluation import made_images
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
    asked = samples.kinds(_settings("--number", "2"), _loaded(labelled, many))
    assert len(asked.kind_N) == 16
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
    asked = samples.kinds(settings, _loaded(Reader()))
    cond, row_N = asked.cond(np.arange(6)), asked.kind_N
    np.testing.assert_array_equal(row_N, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(cond.features_BTE, _text()["features"][row_N])
    np.testing.assert_array_equal(cond.mask_BT, _text()["mask"][row_N])
    assert asked.classes == [] and cond.mask_BT.dtype == bool
    sampler = samplers.Sampler(temperature=0, guidance=(3.0,))
    tokens, images = drawing.draw(Reader(), Painter(), cond, sampler, seed=0, batch=4)
    seen = np.where(cond.mask_BT[..., None], cond.features_BTE, 0).sum(1)
    np.testing.assert_array_equal(tokens[..., 0], np.repeat(seen.argmax(-1)[:, None], 4, 1))
    assert images.shape == (6, 2, 2, 3) and len(np.unique(tokens)) > 1
    warm = samplers.Sampler(temperature=2.0)
    tokens, _ = drawing.draw(Reader(), Painter(), cond, warm, seed=0, batch=4)
    part = interfaces.Text(cond.features_BTE[5:], cond.mask_BT[5:])
    alone, _ = drawing.draw(Reader(), Painter(), part, warm, seed=0, batch=4, index_N=[5])
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
        samples.kinds(_settings(), _loaded(Reader()))
    with pytest.raises(UserError, match="needs --text FILE.npz.*found --classes"):
        samples.kinds(_settings("--text", "a.npz", "--classes", "0"), _loaded(Reader()))
    other = types.SimpleNamespace(cond="label", layout=Reader.layout)
    with pytest.raises(UserError, match="of 4 classes: use --classes"):
        samples.kinds(_settings("--text", "a.npz"), _loaded(other, CLASSES))


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
    on_three = drawing.even(count, batch, 3)
    assert on_three % 3 == 0 and on_three >= expected and on_three < max(batch, expected) + 3


def test_of_so_many_in_all_every_class_has_its_share():
    labelled = types.SimpleNamespace(cond="label", layout=Reader.layout)
    many = tuple(map(str, range(1000)))

    def kind_N(*words, classes=many):
        return samples.kinds(_settings(*words), _loaded(labelled, classes)).kind_N

    equal_N = kind_N("--total", "50000", "--seed", "3")  # of all classes, and not of some
    assert set(np.bincount(equal_N)) == {50}
    # the formula that samples.json states; and the images that tokgen evaluate scores
    order_N = np.random.default_rng([3, 5]).permutation(50000)
    np.testing.assert_array_equal(equal_N, (np.arange(50000) % 1000)[order_N])
    np.testing.assert_array_equal(equal_N, made_images.balanced(50000, 1000, 3))
    drawn_N = kind_N("--total", "50000", "--class-counts", "drawn", "--seed", "3")
    expected_N = np.random.default_rng([3, 6]).integers(0, 1000, 50000)
    np.testing.assert_array_equal(drawn_N, expected_N)
    assert np.bincount(drawn_N).std() == pytest.approx(50**0.5, rel=0.1)  # of a multinomial
    some_N = kind_N("--total", "7", "--classes", "hot-dog,0", classes=CLASSES)
    assert sorted(some_N) == [0, 0, 0, 2, 2, 2, 2]
    assert kind_N("--total", "3", classes=()).tolist() == [0, 0, 0]


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
