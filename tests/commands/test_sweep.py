"""A sweep shares its seeds, goes on after a kill to the same end, and says how sure its best is."""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
import scipy.stats
from flax import nnx

from tests.evaluation import test_page
from tokgen.checkpoints import checkpoint
from tokgen.commands import evaluate, sample, sweep
from tokgen.evaluation import collect, feature_extractors, protocols, references, score as scores
from tokgen.interfaces import UserError
from tokgen.metrics import moments
from tokgen.sampling import sampler


def parsed(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sweep.arguments(parser)
    given = ["ckpt", "--protocol", "local", "--reference", "r.npz", "--out", "out"]
    return parser.parse_args([*given, *map(str, words)])


def test_every_combination_has_a_name():
    grid = sweep.settings_of(parsed("--guidance", 1, 1.5, "--steps", 8, 16, 8))
    assert grid == {
        "g1-s8": {"guidance": 1.0, "steps": 8},
        "g1-s16": {"guidance": 1.0, "steps": 16},
        "g1.5-s8": {"guidance": 1.5, "steps": 8},
        "g1.5-s16": {"guidance": 1.5, "steps": 16},
    }
    assert sweep.settings_of(parsed()) == {"": {}}
    with pytest.raises(UserError, match="six digits"):
        sweep.settings_of(parsed("--guidance", 1, 1.00000001))


def test_an_evaluation_is_what_its_own_command_line_says():
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    shared = ["--samples", "90", "--top-k", "5", "--accept", "few", "--preset", "p", "--batch", "3"]
    swept = parsed(*shared, "--temperature", 0.9, 1, "--noise", 2)
    made = sweep.one(swept, {"temperature": 0.9, "steps": 8}, 4, pathlib.Path("out/t0.9"))
    words = ["ckpt", "--protocol", "local", "--reference", "r.npz", "--out", "out/t0.9", *shared]
    words += ["--temperature", "0.9", "--steps", "8", "--seed", "4", "--noise", "2"]
    assert vars(made) == vars(parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", 0], "--seeds"),
        (["--seed", 2**32 - 1, "--seeds", 2], "--seeds"),
        (["--by", "psnr_db"], "--by is a figure of local: fid"),
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
        {"figures": {"fid": {"value": value, "low": value - half, "high": value + half}}}
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
            test_page.result(seed=seed, figures={"fid": {"value": v}, "recall": {"value": v / 10}})
            for seed, v in enumerate(value_S)
        ]
    del lines["g2"][1]["figures"]["recall"]
    grid = {"g1": {"guidance": 1.0}, "g2": {"guidance": 2.0}}
    found = sweep.summarised(parsed(), grid, lines)
    assert found["best"] == "g2" and found["seeds"] == [0, 1] and found["settings"]["g1"] == {
        "guidance": 1.0,
        "figures": {
            "fid": {"mean": 4.0, "std": pytest.approx(2**0.5), "values": [3.0, 5.0]},
            "recall": {"mean": 0.4, "std": pytest.approx(0.1 * 2**0.5), "values": [0.3, 0.5]},
        },
    }  # fmt: skip
    assert set(found["settings"]["g2"]["figures"]) == {"fid"}
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

    def supply_of(args, protocol, out):
        drawn.append((args.guidance, args.seed))
        if len(drawn) == stop.at:
            raise KeyboardInterrupt
        return Drawn(args.seed, args.guidance, args.samples), 2

    def prepared(args, loaded):
        if args.guidance < 0:
            raise UserError("sampling settings: a weight is at least 0")
        return {}, None, sampler.Sampler(1.0 if args.temperature is None else args.temperature)

    stop = types.SimpleNamespace(at=0)
    monkeypatch.setattr(scores, "supply_of", supply_of)
    monkeypatch.setattr(scores, "extractor_of", lambda *_: extractor)
    monkeypatch.setattr(checkpoint, "find", pathlib.Path)
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: {"kind": "generator"})
    monkeypatch.setattr(checkpoint, "load_generator", lambda _: None)
    monkeypatch.setattr(sample, "prepared", prepared)
    words = ["--reference", file, "--samples", 40, "--seeds", 2, "--guidance", 1, 1.5, "--out"]
    return types.SimpleNamespace(words=words, drawn=drawn, stop=stop, out=tmp_path)


@pytest.mark.parametrize(("temperatures", "fine"), [((0,), False), ((0, 1), True)])
def test_a_filter_must_have_an_effect_in_some_setting(temperatures, fine, world):
    args = parsed(*world.words, world.out, "--top-k", 3, "--temperature", *temperatures)
    args.given = frozenset(("top_k", "temperature"))
    refused = pytest.raises(UserError, match="no effect here: --top-k .it is for temperatures")
    with contextlib.nullcontext() if fine else refused:
        sweep.try_out(args, sweep.settings_of(args))


def test_a_sweep_that_is_killed_goes_on_to_the_same_end(world, capsys):
    out = world.out / "sweep"
    world.stop.at = 3
    with pytest.raises(KeyboardInterrupt):
        sweep.run(parsed(*world.words, out))
    assert not (out / "sweep.json").exists()
    sweep.run(parsed(*world.words, out))
    # seeds are shared, and what was finished isn't drawn again
    assert world.drawn == [(1.0, 0), (1.0, 1), (1.5, 0), (1.5, 0), (1.5, 1)]
    names = sorted(path.parent.name for path in out.glob("*/results.jsonl"))
    assert names == ["g1-seed0", "g1-seed1", "g1.5-seed0", "g1.5-seed1"]
    sweep.run(parsed(*world.words, world.out / "whole"))
    summary, whole = (
        json.loads((world.out / name / "sweep.json").read_text()) for name in ("sweep", "whole")
    )
    assert summary == whole and summary["best"] == "g1.5"
    first = collect.results(out / "g1-seed1")[0]
    assert (
        summary["settings"]["g1"]["figures"]["fid"]["values"][1] == first["figures"]["fid"]["value"]
    )
    assert "g1.5" in capsys.readouterr().out

    found = test_page.parsed(out / "index.html")
    assert "report a figure of other seeds" in " ".join(found.words) and "best" in found.marks
    assert len(found.pictures()) == 2
    for given in ("checkpoint", "text"):  # what is read lies in what would be replaced
        words = parsed(*world.words, out, "--overwrite")
        setattr(words, given, str(out / "g1-seed0" / "run.json"))
        with pytest.raises(UserError, match="holds what the command reads"):
            sweep.run(words)
    for name in names:
        test_page.parsed(out / name / "index.html")

    # other samples in the same folder would be another sweep; more guidance is the same one
    with pytest.raises(UserError, match="samples: 40 there, 50 here"):
        sweep.run(parsed(*world.words, out, "--samples", 50))
    before = len(world.drawn)
    sweep.run(parsed(*world.words, out, "--guidance", 1.5, 2))
    assert world.drawn[before:] == [(2.0, 0), (2.0, 1)]


def test_a_setting_that_is_none_is_found_before_anything_is_drawn(world, monkeypatch):
    with pytest.raises(UserError, match="at least 0"):
        sweep.run(parsed(*world.words, world.out / "sweep", "--guidance", 1, -1))
    monkeypatch.setattr(checkpoint, "read_meta", lambda _: {"kind": "tokenizer"})
    with pytest.raises(UserError, match="needs a generator"):
        sweep.run(parsed(*world.words, world.out / "sweep"))
    assert world.drawn == []
