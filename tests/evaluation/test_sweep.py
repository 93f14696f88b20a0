"""A sweep shares its seeds, goes on after a kill to the same end, and says how sure its best is."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import types

import ml_collections
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from tests.evaluation import test_page
from tokgen.checkpoints import checkpoint, loading
from tokgen.commands import sweep as command
from tokgen.evaluation import (
    collect,
    feature_extractors,
    inputs,
    protocols,
    references,
    score_settings,
    sweep,
)
from tokgen.interfaces import UserError
from tokgen.metrics import moments
from tokgen.sampling import presets, sampler


def parsed(*words) -> sweep.Settings:
    """What a command line asks for."""
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    given = ["ckpt", "--protocol", "local", "--reference", "r.npz", "--out", "out"]
    return command.settings_of(parser.parse_args([*given, *map(str, words)]))


def run(settings: sweep.Settings) -> None:
    """As the command does."""
    print(sweep.listed(sweep.sweep(settings)))


def test_every_combination_has_a_name():
    grid = sweep.grid_of(parsed("--guidance", 1, 1.5, "--steps", 8, 16, 8))
    assert grid == {
        "g1-s8": {"guidance": 1.0, "steps": 8},
        "g1-s16": {"guidance": 1.0, "steps": 16},
        "g1.5-s8": {"guidance": 1.5, "steps": 8},
        "g1.5-s16": {"guidance": 1.5, "steps": 16},
    }
    assert sweep.grid_of(parsed()) == {"": {}}
    with pytest.raises(UserError, match="six digits"):
        sweep.grid_of(parsed("--guidance", 1, 1.00000001))


def test_a_combination_is_scored_as_it_would_be_alone():
    shared = ["--samples", "90", "--top-k", "5", "--accept", "few", "--preset", "p", "--batch", "3"]
    swept = parsed(*shared, "--temperature", 0.9, 1, "--noise", 2)
    found = sweep.one(swept, {"temperature": 0.9, "steps": 8}, 4, pathlib.Path("out/t0.9"))
    assert found == score_settings.Settings(
        scored="ckpt",
        protocol="local",
        out="out/t0.9",
        reference="r.npz",
        samples=90,
        seed=4,
        batch=3,
        accept=("few",),
        sampling=presets.Choice("p", temperature=0.9, top_k=5, steps=8, noise=2.0),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", 0], "--seeds"),
        (["--seed", 2**32 - 1, "--seeds", 2], "--seeds"),
        (["--by", "psnr_db"], "--by is a metric of local: fid"),
        (["--protocol", "val-centercrop-rfid"], "nothing to sweep"),
        (["--protocol", "locale"], "did you mean"),
        (["--samples", -1], "--samples"),
    ],
)
def test_command_lines_that_cannot_be_meant(words, message):
    with pytest.raises(UserError, match=message):
        sweep.check(parsed(*words))


def lines_of(value_S, half=0.0):
    return [
        {"metrics": {"fid": {"value": value, "low": value - half, "high": value + half}}}
        for value in value_S
    ]


def test_ties_are_those_of_a_paired_t_test():
    draws = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        best_S = draws.normal(size=4)
        value_S = best_S + draws.uniform(0, 2) + 0.5 * draws.normal(size=4)
        expected = scipy.stats.ttest_rel(value_S, best_S).pvalue >= 0.05
        assert sweep.tied(lines_of(value_S), lines_of(best_S), "fid") == expected
        found.add(bool(expected))
    assert found == {True, False}
    # of one seed, the joint interval: 5 of 3 and 4
    assert sweep.tied(lines_of([14.9], 3.0), lines_of([10.0], 4.0), "fid")
    assert not sweep.tied(lines_of([15.1], 3.0), lines_of([10.0], 4.0), "fid")


def test_mean_deviation_and_best():
    values = {"g1": [3.0, 5.0], "g2": [2.0, 2.1]}
    lines = {}
    for name, value_S in values.items():
        lines[name] = [
            test_page.result(seed=seed, metrics={"fid": {"value": v}, "recall": {"value": v / 10}})
            for seed, v in enumerate(value_S)
        ]
    del lines["g2"][1]["metrics"]["recall"]
    grid = {"g1": {"guidance": 1.0}, "g2": {"guidance": 2.0}}
    found = sweep.summarised(parsed(), grid, lines)
    assert found["best"] == "g2" and found["seeds"] == [0, 1] and found["settings"]["g1"] == {
        "guidance": 1.0,
        "metrics": {
            "fid": {"mean": 4.0, "std": pytest.approx(2**0.5), "values": [3.0, 5.0]},
            "recall": {"mean": 0.4, "std": pytest.approx(0.1 * 2**0.5), "values": [0.3, 0.5]},
        },
    }  # fmt: skip
    assert set(found["settings"]["g2"]["metrics"]) == {"fid"}
    assert "other seeds" in found["warning"]
    del lines["g2"]
    assert sweep.summarised(parsed("--by", "recall"), grid, lines)["best"] == "g1"
    with pytest.raises(UserError, match="choose another"):
        sweep.value(lines["g1"][0], "classwise")


class Means(nnx.Module):
    """Features that are the means of four squares and three colours."""

    def __call__(self, image_BHW3):
        squares = image_BHW3.reshape(-1, 2, 4, 2, 4, 3).astype("float32").mean((2, 4))
        return {"pooled": squares.reshape(-1, 12)}


class Drawn:
    """Noise of (seed, index) around a gray that guidance moves: 1.5 is that of the reference."""

    classes, size = ("cat", "dog"), (8, 8)

    def __init__(self, seed: int, guidance: float, count: int):
        self.count, self.gray = count, 100 + 40 * abs(guidance - 1.5)
        self.identity = {
            "checkpoint": "ckpt",
            "fingerprint": "f" * 64,
            "settings": {"weight": guidance, "temperature": 1.0},
        }
        self.noise_NHW3 = np.random.default_rng(seed).normal(size=(count, 8, 8, 3))

    def __len__(self):
        return self.count

    def part(self, start, stop):
        image_NHW3 = self.gray + 20 * self.noise_NHW3[start:stop]
        label_N = np.arange(start, stop, dtype=np.int32) % 2
        return {"image": np.clip(image_NHW3, 0, 255).astype(np.uint8), "label": label_N}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A generator that is drawn from in no time; what was drawn; the words of its sweep."""
    network = Means()
    record = {"name": "local", "fingerprint": feature_extractors.fingerprint("local", network)}
    extractor = feature_extractors.Extractor("local", network, ("pooled",), record)
    feature_nD = feature_extractors.features(extractor, Drawn(99, 1.5, 60).part(0, 60)["image"])[
        "pooled"
    ]
    about = {
        "protocol": "local", "dataset": "/nowhere", "fingerprint": "x", "split": "train",
        "count": 60, "size": [8, 8], "crop": "center", "classes": [], "extractor": record,
        "layers": {"pooled": 12},
    }  # fmt: skip
    file = tmp_path / "reference.npz"
    found, none = moments.Moments.of(feature_nD), np.zeros(60, np.int32)
    references.save(file, about, {"pooled": found}, {"pooled": feature_nD}, none, none, {})

    plain = protocols.PROTOCOLS["local"]
    small = dataclasses.replace(plain, metrics=("fid", "precision", "recall"))
    monkeypatch.setitem(protocols.PROTOCOLS, "local", small)
    drawn = []

    def images_of(settings, out):
        weight = settings.sampling.guidance
        drawn.append((weight, settings.seed))
        if len(drawn) == stop.at:
            raise KeyboardInterrupt
        return Drawn(settings.seed, weight, settings.samples), 2

    def choose(generator, known, choice, classes):
        if choice.guidance < 0:
            raise UserError("sampling settings: a weight is at least 0")
        heat = 1.0 if choice.temperature is None else choice.temperature
        return {}, None, sampler.Sampler(heat)

    stop = types.SimpleNamespace(at=0)
    monkeypatch.setattr(inputs, "images_of", images_of)
    monkeypatch.setattr(inputs, "extractor_of", lambda *_: extractor)
    monkeypatch.setattr(checkpoint, "find", pathlib.Path)
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: {"kind": "generator"})
    loaded = types.SimpleNamespace(
        module=None, classes=(), config=ml_collections.ConfigDict({"presets": {}})
    )
    monkeypatch.setattr(loading, "load_generator", lambda _: loaded)
    monkeypatch.setattr(presets, "choose", choose)
    words = ["--reference", file, "--samples", 40, "--seeds", 2, "--guidance", 1, 1.5, "--out"]
    return types.SimpleNamespace(words=words, drawn=drawn, stop=stop, out=tmp_path)


@pytest.mark.parametrize(("temperatures", "fine"), [((0,), False), ((0, 1), True)])
def test_a_filter_must_have_an_effect_in_some_setting(temperatures, fine, world):
    swept = parsed(*world.words, world.out, "--top-k", 3, "--temperature", *temperatures)
    refused = pytest.raises(UserError, match="no effect here: --top-k .it is for temperatures")
    with contextlib.nullcontext() if fine else refused:
        sweep.try_out(swept, sweep.grid_of(swept))


def test_a_sweep_that_is_killed_goes_on_to_the_same_end(world, capsys):
    out = world.out / "sweep"
    world.stop.at = 3
    with pytest.raises(KeyboardInterrupt):
        run(parsed(*world.words, out))
    assert not (out / "sweep.json").exists()
    run(parsed(*world.words, out))
    # seeds are shared, and what was finished isn't drawn again
    assert world.drawn == [(1.0, 0), (1.0, 1), (1.5, 0), (1.5, 0), (1.5, 1)]
    names = sorted(path.parent.name for path in out.glob("*/results.jsonl"))
    assert names == ["g1-seed0", "g1-seed1", "g1.5-seed0", "g1.5-seed1"]
    run(parsed(*world.words, world.out / "whole"))
    summary, whole = (
        json.loads((world.out / name / "sweep.json").read_text()) for name in ("sweep", "whole")
    )
    assert summary == whole and summary["best"] == "g1.5"
    first = collect.results(out / "g1-seed1")[0]
    assert (
        summary["settings"]["g1"]["metrics"]["fid"]["values"][1] == first["metrics"]["fid"]["value"]
    )
    assert "g1.5" in capsys.readouterr().out

    found = test_page.parsed(out / "index.html")
    assert "report other seeds" in " ".join(found.words) and "best" in found.marks
    assert len(found.pictures()) == 2
    for given in ("scored", "text"):  # what is read lies in what would be replaced
        swept = parsed(*world.words, out, "--overwrite")
        inside = {given: str(out / "g1-seed0" / "run.json")}
        with pytest.raises(UserError, match="holds what the command reads"):
            run(dataclasses.replace(swept, score=dataclasses.replace(swept.score, **inside)))
    for name in names:
        test_page.parsed(out / name / "index.html")

    # other samples in the same folder would be another sweep; more guidance is the same one
    with pytest.raises(UserError, match="samples: 40 there, 50 here"):
        run(parsed(*world.words, out, "--samples", 50))
    before = len(world.drawn)
    run(parsed(*world.words, out, "--guidance", 1.5, 2))
    assert world.drawn[before:] == [(2.0, 0), (2.0, 1)]


def test_a_setting_that_is_none_is_found_before_anything_is_drawn(world, monkeypatch):
    with pytest.raises(UserError, match="at least 0"):
        run(parsed(*world.words, world.out / "sweep", "--guidance", 1, -1))
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: {"kind": "tokenizer"})
    with pytest.raises(UserError, match="needs a generator"):
        run(parsed(*world.words, world.out / "sweep"))
    assert world.drawn == []
