"""Evaluators of a run: the figures of `tokgen evaluate`, at their periods, once each."""

import dataclasses
import json
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tests.evaluation import test_collect, test_made_images
from tests.sampling import test_memory
from tokgen import distributed, metrics_log
from tokgen.errors import SharedError
from tokgen.evaluation import evaluators, score as scores, validation
from tokgen.interfaces import UserError
from tokgen.sampling import memory, sampler as samplers

COUNT = test_collect.COUNT


@pytest.fixture
def die(monkeypatch):
    for where, name, value in test_collect.fakes():
        monkeypatch.setattr(where, name, value)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators.feature_extractors, "EACH", 1)
        return test_collect.write_reference(tmp_path_factory.mktemp("reference") / "reference.npz")


def material(**sections) -> evaluators.Material:
    """What a run of the die has; its held-out images are three names."""
    presets = {"default": {"temperature": 1.0}, "cold": {"temperature": 0.25}}
    settings = {"generator": {}, "presets": presets, "evaluators": sections}
    held_out = types.SimpleNamespace(classes=test_made_images.CLASSES)
    return evaluators.Material(
        ml_collections.ConfigDict(settings),
        {"train": held_out, "held_out": held_out},
        test_made_images.loaded(test_made_images.Painter(), fingerprint="p" * 64),
        cond="label",
    )


def score(reference, **more) -> dict:
    about = {"kind": "score", "every": 2, "reference": str(reference), "samples": COUNT, "seed": 5}
    return about | {"accept": ("few",), "metrics": test_collect.METRICS} | more


def test_the_score_while_training_is_that_of_the_step_afterwards(die, reference, tmp_path):
    """The same images of the same seed, through the same network, against the same reference."""
    line = scores.score(test_collect.scoring_of(reference, tmp_path))
    (made,) = evaluators.made(material(fid=score(reference)))
    figures = made.measure(test_made_images.Dice()).figures
    assert set(line["metrics"]) >= {"sfid", "is", "precision"} and figures["images"] == COUNT
    for name, parts in line["metrics"].items():
        for part in {"value", "low", "high", "error"} & set(parts):
            key = name if part == "value" else f"{name}_{part}"
            np.testing.assert_allclose(figures[key], parts[part], rtol=1e-6)
    assert figures == made.measure(test_made_images.Dice()).figures  # and the next time


def test_each_has_its_own_period_preset_and_line(die, reference, tmp_path, capfd):
    made = evaluators.made(
        material(
            warm=score(reference, every=2, metrics=("precision",)),
            cold=score(reference, every=3, metrics=("precision",), preset="cold"),
            look=dict(kind="grid", every=4, columns=2),
            off=score(reference, every=0),
        )
    )
    asked = {s: [e.name for e in evaluators.due(made, s, 7)] for s in range(8)}
    assert asked == {
        **{0: [], 1: [], 2: ["warm"], 3: ["cold"], 4: ["look", "warm"], 5: []},
        **{6: ["cold", "warm"], 7: ["cold", "look", "warm"]},  # by name; after the last step all
    }
    log = metrics_log.Log(tmp_path)
    evaluators.run(evaluators.due(made, 7, 7)[:2], test_made_images.Dice(), 7, log)
    (last,) = evaluators.left(made, 7, 7, log)  # what was cut off
    evaluators.run([last], test_made_images.Dice(), 7, log)
    assert not evaluators.left(made, 7, 7, log) and not evaluators.left(made, 5, 7, log)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    cold, look, warm = lines
    assert [(line["split"], line["step"]) for line in lines] == [(e.name, 7) for e in made]
    assert cold["precision"] != warm["precision"]  # one draws by another preset
    assert (tmp_path / "images" / "look-0000007.png").is_file() and look["images"] == 6
    assert "step 7: warm: precision " in capfd.readouterr().err


def test_processes_with_and_without_a_log_ask_for_what_it_has_by_one_name(tmp_path, monkeypatch):
    asked = []

    def decided(act, *args):
        asked.append(distributed._name(act))
        return act(*args)

    monkeypatch.setattr(distributed, "decided", decided)
    one = evaluators.Evaluator("own", 1, lambda network: None)
    for log in (metrics_log.Log(tmp_path), metrics_log.Nowhere()):
        assert evaluators.left([one], 1, 1, log) == [one]
        log.close()
    assert len(asked) == 2 and len(set(asked)) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("no image"), ["config.evaluators.own: no image"]),
        (SharedError("no image"), ["config.evaluators.own: no image"]),
        (MemoryError(), ["a smaller config.evaluators.own.batch", "evaluators.own.every=0"]),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), ["(RESOURCE_EXHAUSTED: 9 GiB)", "own.batch"]),
        (RuntimeError("a fault"), None),
    ],
)
def test_an_error_of_an_evaluator_has_its_name_and_its_remedy(error, words):
    def measure(network):
        raise error

    one = evaluators.Evaluator("own", 1, measure, "batch")
    with pytest.raises(Exception) as caught:
        evaluators.run([one], "network", 1, metrics_log.Nowhere())
    if words is None:
        assert caught.value is error
        return
    # what all processes have stays what all have
    assert type(caught.value) is (type(error) if isinstance(error, UserError) else UserError)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"a": {"reference": "none.npz"}}, ["evaluators.a: no reference at none.npz"]),
        ({"a": {"metrics": ("fdi",)}}, ["evaluators.a: the metric must be one of", "'fdi'"]),
        (
            {"a": {"samples": 3, "metrics": ("fid",), "accept": ()}},
            ["a: a Frechet distance of", "say accept=('few',)"],
        ),
        (
            {"a": {"samples": 3, "metrics": ("mifid",), "accept": ()}},
            ["a: a Frechet distance of", "say accept=('few',)"],
        ),
        ({"a": {"samples": 2, "metrics": ("kid",)}}, ["a: kid needs 3 images or more", "found 2"]),
        (
            {"a": {"samples": 6, "metrics": ("is_infinity", "psnr_db", "is", "classwise")}},
            ["a: metrics that can't", "is_infinity: it needs 200", "psnr_db: it is of pairs"],
        ),
        ({"a": {"samples": 5, "metrics": ("classwise",)}}, ["classwise: 1 of 3 classes have no"]),
        (
            {"a": {"reference": "none.npz"}, "b": {"reference": "neither.npz"}},
            ["evaluators.a: no reference at none", "evaluators.b: no reference at neither"],
        ),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_first_step(die, reference, sections, words):
    found = {name: score(reference) | section for name, section in sections.items()}
    with pytest.raises(UserError) as error:
        evaluators.made(material(**found))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            dict(kind="score", every=9, batch=8),
            r"batch of 8 .*evaluators\.a\.batch that .* is 7$",
        ),
        (dict(kind="grid", every=9, columns=3), r"batch of 9 .*\.a\.columns times 3 that .* is 7$"),
        (dict(kind="score", every=9, batch=7), None),
        (dict(kind="score", every=9, batch=8, samples=14), None),  # seven, twice
        (dict(kind="grid", every=9, columns=2), None),
    ],
)
def test_what_is_drawn_at_a_time_is_held_against_the_room_before_the_first_step(
    section, words, reference, monkeypatch
):
    generator = nnx.eval_shape(test_memory.make)
    given = material(a=section | ({"reference": "r.npz"} if section["kind"] == "score" else {}))
    free = memory.kept(generator, None, np.arange(1), samplers.Sampler(), 7).all
    monkeypatch.setattr(evaluators.sharding, "current", lambda: test_memory.on(free))
    if words is None:
        evaluators.check_room(given, generator)
        return
    with pytest.raises(UserError, match=f"evaluators.a: a {words}"):
        evaluators.check_room(given, generator)


def test_what_is_by_class_is_refused_of_texts(die, reference, monkeypatch):
    monkeypatch.setattr(evaluators, "_filled", lambda material, split: None)
    given = material(a=score(reference, metrics=("precision", "class_accuracy")))
    with pytest.raises(UserError, match=r"a: .*here, class_accuracy: the samples have no labels"):
        evaluators.made(dataclasses.replace(given, cond="text"))


def test_texts_are_read_to_be_measured_with_and_not_held(die, reference, monkeypatch):
    asked = []

    def texts(material, count):
        asked.append(count)
        return np.arange(count) % 3

    monkeypatch.setattr(evaluators, "_filled", lambda material, split: None)
    monkeypatch.setattr(evaluators, "_texts", texts)
    given = material(a=score(reference, metrics=("precision",)))
    (made,) = evaluators.made(dataclasses.replace(given, cond="text"))
    assert not asked
    assert made.measure(test_made_images.Dice()).figures["images"] == COUNT and asked == [COUNT]


class Blank(test_made_images.Painter):
    """Paints nothing."""

    def decode(self, tokens_BLG):
        return jnp.zeros((len(tokens_BLG), 16, 16, 3))


def test_samples_that_are_all_one_are_counted_and_end_no_run(die, reference):
    given = material(fid=score(reference, metrics=("precision",)))
    given.tokenizer.module = Blank()
    (made,) = evaluators.made(given)
    figures = made.measure(test_made_images.Dice()).figures
    assert figures["duplicates"] == COUNT - 1 and figures["constant"] == COUNT


def test_likelihood_is_of_the_split_that_is_named(monkeypatch):
    seen = []

    def likelihood(generator, codec, source, *, count):
        seen.append((generator, source, count))
        return {"nats_per_token": 2.0, "nats_error": None}

    monkeypatch.setattr(validation, "likelihood", likelihood)
    given = material(
        overfit=dict(kind="likelihood", every=1, images=30, split="train"),
        more=dict(kind="likelihood", every=1, images=40),
    )
    given.sources.update(train=range(9), held_out=range(5))
    more, overfit = evaluators.made(given)
    assert overfit.measure("network").figures["nats_per_token"] == 2.0
    more.measure("network")
    assert seen == [("network", range(9), 30), ("network", range(5), 40)]
    given.sources["held_out"] = range(0)
    with pytest.raises(UserError, match="evaluators.more: there are no images in the part"):
        evaluators.made(given)


class Pictures:
    """Held-out images of the classes."""

    classes = test_made_images.CLASSES

    def __len__(self):
        return COUNT


@pytest.mark.long
def test_a_tokenizer_is_scored_by_its_held_out_reconstructions(die, reference, monkeypatch):
    """Each with the label of its original, whatever the order that images come in."""
    label_N = np.arange(COUNT) % 3
    draw = np.random.default_rng(7)
    gray_NHW = draw.integers(0, 80, (COUNT, 4, 4)) + 60 * label_N[:, None, None]
    image_NHW3 = np.kron(gray_NHW, np.ones((1, 4, 4)))[..., None].repeat(3, 3).astype(np.uint8)

    def reconstructed(tokenizer, source, view, *, chosen):
        assert tokenizer == "network" and sorted(chosen) == list(range(COUNT))
        for rows in np.array_split(chosen, 3):
            yield {"label": label_N[rows]}, (None, image_NHW3[rows], {})

    monkeypatch.setattr(validation, "reconstructed", reconstructed)
    section = dict(kind="score", every=1, reference=str(reference), images=COUNT, accept=("few",))
    settings = {"view": {"size": (16, 16), "channels": 3}, "evaluators": {"rfid": section}}
    held_out = Pictures()
    (made,) = evaluators.made(
        evaluators.Material(ml_collections.ConfigDict(settings), {"held_out": held_out})
    )
    figures = made.measure("network").figures
    assert figures["images"] == COUNT and figures["duplicates"] == 0
    (judge,) = (
        c.cell_contents for c in made.measure.__closure__ if hasattr(c.cell_contents, "reference")
    )
    logits_NK = evaluators.feature_extractors.features(judge.extractor, image_NHW3)["logits"]
    assert figures["class_accuracy"] == pytest.approx((logits_NK.argmax(1) == label_N).mean())
