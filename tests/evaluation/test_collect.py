"""A run of drawing and scoring that is killed anywhere ends as one that was not; folders are whose.

The generator is a die, the tokenizer paints its tokens; the local network is drawn by numpy.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.evaluation import test_feature_extractors, test_made_images, test_page
from tokgen.checkpoints import checkpoint, run as runs
from tokgen.commands import evaluate
from tokgen.evaluation import (
    collect,
    feature_extractors,
    made_images,
    metric_table,
    protocols,
    references,
    score as scores,
    score_page,
)
from tokgen.interfaces import UserError
from tokgen.metrics import codebook, moments
from tokgen.sampling import drawing

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT, PART = 48, 8
METRICS = ("sfid", "is", "precision", "recall", "class_accuracy")


class Killed(BaseException):
    """What no part of a program expects."""


def parsed(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    return parser.parse_args([str(word) for word in words])


def scoring_of(reference, out, *words) -> argparse.Namespace:
    """The command line that scores the die."""
    given = ("--protocol", "local", "--reference", reference, "--out", out, "--seed", 5)
    return parsed("runs/dice", *given, "--samples", COUNT, "--accept", "few", *words)


def fakes() -> list[tuple]:
    """(where, name, value) that put the die in the place of a checkpoint, and make parts small."""
    tokenizer = test_made_images.loaded(test_made_images.Painter(), fingerprint="p" * 64)
    generator = test_made_images.loaded(test_made_images.Dice())
    local = dataclasses.replace(protocols.PROTOCOLS["local"], metrics=METRICS)
    return [
        (checkpoint, "find", lambda path: generator.step),
        (checkpoint, "read_meta", lambda step: generator.meta),
        (checkpoint, "load_generator", lambda path, compute="": generator),
        (checkpoint, "load_tokenizer_of", lambda loaded, path="": tokenizer),
        (protocols, "PROTOCOLS", protocols.PROTOCOLS | {"local": local}),
        (collect, "PART", PART),
        (feature_extractors, "EACH", 1),
    ]


@pytest.fixture
def die(monkeypatch):
    for where, name, value in fakes():
        monkeypatch.setattr(where, name, value)


def write_reference(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A local reference of what the die draws under another seed."""
    network = test_feature_extractors.local(seed=seed)
    network = dataclasses.replace(
        network, record=network.record | {"classes": list(test_made_images.CLASSES)}
    )
    label_n = np.arange(60) % 3
    draw = np.random.default_rng(2)
    gray_NHW = draw.integers(0, 80, (60, 4, 4)) + 60 * label_n[:, None, None]
    image_NHW3 = np.kron(gray_NHW, np.ones((1, 4, 4)))[..., None].repeat(3, 3).astype(np.uint8)
    found = feature_extractors.features(network, image_NHW3)
    layers = ("pooled", "spatial")
    record = {
        "protocol": "local",
        "dataset": "dice",
        "fingerprint": "0" * 64,
        "split": "train",
        "count": 60,
        "size": [16, 16],
        "crop": "center",
        "classes": list(test_made_images.CLASSES),
        "extractor": network.record,
        "layers": {name: found[name].shape[1] for name in layers},
    }
    references.save(
        path,
        record,
        {name: moments.Moments.of(found[name]) for name in layers},
        {name: found[name] for name in layers},
        np.arange(60),
        label_n,
        feature_extractors.arrays(network),
    )
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pathlib.Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractors, "EACH", 1)
        return write_reference(tmp_path_factory.mktemp("reference") / "dice.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reference) -> pathlib.Path:
    """The folder of an evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in fakes():
            patch.setattr(where, name, value)
        scores.run(scoring_of(reference, out))
    return out


def contents(out: pathlib.Path) -> dict[str, bytes]:
    """What must come out the same, to the byte: images and what was seen of them."""
    files = [out / "samples.npz", *sorted((out / "parts").iterdir())]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def last(out: pathlib.Path) -> dict:
    """The last result, without the time."""
    line = collect.results(out)[-1]
    return {name: value for name, value in line.items() if name != "time"}


# In one folder after another: where a run dies, at which call of it
DEATHS = [
    (drawing, "draw", 1),  # before anything is drawn
    (made_images.os, "fsync", 1),  # amid writing the first images
    (feature_extractors, "features", 1),  # images are kept, and not seen yet
    (made_images.os, "fsync", 2),  # amid writing what was seen
    (drawing, "draw", 2),  # between two parts
    (made_images, "save_part", 3),
    (made_images, "loaded_part", 14),  # amid joining the parts
    (metric_table, "score", 1),
    (made_images.Drawn, "part", 3),  # amid writing all images
    (made_images.shutil, "rmtree", 1),  # all images are written, the parts still there
    (score_page, "write", 1),
    (collect, "append", 1),  # before the result is written down
]


def test_a_run_killed_at_every_turn_ends_as_one_that_was_not(tmp_path, die, reference, whole):
    out, deaths = tmp_path / "out", []
    for where, name, nth in DEATHS:
        calls, real = [], getattr(where, name)

        def dying(*words, calls=calls, real=real, nth=nth, **options):
            calls.append(1)
            if len(calls) == nth:
                raise Killed
            return real(*words, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, name, dying)
            scores.run(scoring_of(reference, out))
        left = list(out.rglob("*.part"))
        for part in left:  # what a machine that loses power leaves
            part.write_bytes(part.read_bytes()[:-100])
        deaths.append(len(left))
        assert not (out / collect.RESULTS).exists()
    assert sum(deaths) >= 2 and len(deaths) >= 10
    scores.run(scoring_of(reference, out))
    assert contents(out) == contents(whole) and len(contents(whole)) == 1 + COUNT // PART
    assert last(out) == last(whole) and len(collect.results(out)) == 1
    assert not list(out.rglob("*.part")) and not (out / "images").exists()


SCRIPT = """
import os, sys, time
from tests.evaluation import test_collect
for where, name, value in test_collect.fakes():
    setattr(where, name, value)
save = test_collect.made_images.save_part
def slow(*words):
    save(*words)
    time.sleep(0.2)
test_collect.made_images.save_part = slow
test_collect.scores.run(test_collect.scoring_of(*sys.argv[1:]))
"""


@pytest.mark.long
def test_a_process_that_is_killed_on_another_number_of_devices(tmp_path, die, reference, whole):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for parts in (2, 4):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(reference), str(out)],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 200
        while len(list(out.glob("parts/*.npz"))) < parts and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert parts <= len(list(out.glob("parts/*.npz"))) < COUNT // PART
    scores.run(scoring_of(reference, out))
    assert contents(out) == contents(whole) and last(out) == last(whole)


def test_images_and_labels_of_the_archive(whole):
    drawn = test_made_images.drawn(whole.parent / "again", COUNT, batch=32).part(0, COUNT)
    with np.load(whole / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(archive["arr_0"], drawn["image"])
        np.testing.assert_array_equal(archive["arr_1"], drawn["label"])
        assert archive["arr_1"].dtype == np.int64


def test_the_result_says_what_was_measured(whole, reference):
    line = collect.results(whole)[-1]
    assert set(line) == {
        *("format", "protocol", "samples", "supply", "size", "extractor", "reference", "seed"),
        *("figures", "absent", "suspicious", "images_sha256", "time", "versions"),
    }
    assert set(line["figures"]) | set(line["absent"]) == set(METRICS)
    assert (line["protocol"], line["samples"], line["size"]) == ("local", COUNT, [16, 16])
    read = references.read(reference)
    assert line["reference"]["digest"] == read.digest
    assert line["reference"]["path"] == str(reference.resolve())
    assert line["extractor"]["fingerprint"] == read.record["extractor"]["fingerprint"]
    assert line["supply"]["fingerprint"] == "d" * 64 and line["supply"]["seed"] == 5
    assert line["suspicious"] == {"duplicates": 0, "constant": 0}
    text = (whole / collect.RESULTS).read_text()
    assert "Infinity" not in text and "NaN" not in text and text.endswith("}\n")


def test_given_as_an_archive_the_same_images_score_the_same(tmp_path, die, reference, whole):
    """From a file, and in parts of another size: to the last digit that is written."""
    words = (whole / "samples.npz", "--protocol", "local", "--reference", reference, "--seed", 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "PART", 20)
        scores.run(parsed(*words, "--out", tmp_path, "--accept", "few"))
    once = last(tmp_path)
    assert once["figures"] == last(whole)["figures"]
    assert once["images_sha256"] == last(whole)["images_sha256"]


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--seed", 6), "seed: 5 there, 6 here"),
        (("--samples", 40), "samples: 48 there, 40 here"),
        (("--temperature", 0.5), "supply.settings.temperature: 1.0 there, 0.5 here"),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(die, reference, whole, words, difference):
    before = contents(whole)
    with pytest.raises(UserError, match="holds another evaluation.*use another --out") as caught:
        scores.run(scoring_of(reference, whole, *words))
    assert difference in str(caught.value)
    assert contents(whole) == before and len(collect.results(whole)) == 1


def test_another_checkpoint_or_reference_is_refused(tmp_path, die, monkeypatch, reference, whole):
    other = write_reference(tmp_path / "other.npz", seed=1)
    with pytest.raises(UserError, match=r"extractor\.fingerprint: \w+ there, \w+ here"):
        scores.run(scoring_of(other, whole))
    trained = test_made_images.loaded(test_made_images.Dice(), fingerprint="e" * 64)
    monkeypatch.setattr(checkpoint, "load_generator", lambda path, compute="": trained)
    with pytest.raises(UserError, match=r"supply\.fingerprint: d{64} there, e{64} here"):
        scores.run(scoring_of(reference, whole))


def test_a_folder_with_samples_of_something_else_is_refused(tmp_path, die, reference):
    """Or those would be scored under the name of this checkpoint."""
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((COUNT, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="samples.npz of something else.*another --out"):
        scores.run(scoring_of(reference, tmp_path))


def test_a_damaged_part_is_named_and_made_again_once_removed(tmp_path, die, reference, whole):
    out = tmp_path / "out"
    scores.run(scoring_of(reference, out))
    file = sorted((out / "parts").iterdir())[2]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{file.name} is damaged.*remove it, and it is made again"):
        scores.run(scoring_of(reference, out))
    file.unlink()
    scores.run(scoring_of(reference, out))
    assert contents(out) == contents(whole)
    assert last(out) == last(whole) and len(collect.results(out)) == 1
    (out / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        scores.run(scoring_of(reference, out))


def test_a_second_run_in_the_same_folder_waits_its_turn(tmp_path, die, reference):
    with runs.lock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        scores.run(scoring_of(reference, tmp_path))


def test_results_are_appended_whole_and_read_back(tmp_path, capfd):
    line = test_page.result()
    for number in range(3):
        collect.append(tmp_path, line | {"number": number})
    # measured once more, it is the same result
    collect.append(tmp_path, line | {"number": 2, "time": "later"})
    assert [one["number"] for one in collect.results(tmp_path)] == [0, 1, 2]
    assert collect.results(tmp_path / collect.RESULTS) == collect.results(tmp_path)
    with pytest.raises(UserError, match="no results at"):
        collect.results(tmp_path / "nothing")
    whole = (tmp_path / collect.RESULTS).read_text()
    (tmp_path / collect.RESULTS).write_text(whole + json.dumps(line)[:-3])
    assert len(collect.results(tmp_path)) == 3
    assert "the last line was cut off" in capfd.readouterr().err
    collect.append(tmp_path, line | {"number": 3})  # in its place
    assert [one["number"] for one in collect.results(tmp_path)] == [0, 1, 2, 3]
    (tmp_path / collect.RESULTS).write_text(json.dumps(line)[:-3] + "\n" + whole)
    with pytest.raises(UserError, match="line 1: .*remove the line"):
        collect.results(tmp_path)
    for text in ("", '{"loss": 1}\n', "[1]\n", "[" * 10**5):
        (tmp_path / collect.RESULTS).write_text(text)
        with pytest.raises(UserError, match="no results of this version|cannot be read as results"):
            collect.results(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *(dict(figures=None), dict(figures={"fid": 3.0}), dict(figures={"fid": {}}), dict(size=3)),
        *(dict(figures={"fid": {"value": "3"}}), dict(supply=[]), dict(supply={"settings": None})),
        *(dict(reference={"dataset": None}), dict(extractor=None), dict(absent=7), dict(seed="x")),
    ],
)
def test_a_result_of_other_types_is_one_message(tmp_path, change):
    collect.append(tmp_path, test_page.result(**change))
    with pytest.raises(UserError, match="holds no results of tokgen evaluate: "):
        collect.results(tmp_path)


def test_a_figure_that_is_not_finite_is_absent(tmp_path):
    """Written by this version, or as NaN by one before: no reader meets it, and it is no best."""
    figures = {"fid": {"value": math.nan, "low": 1.0, "high": 2.0}, "is": {"value": 3.0}}
    figures["precision"] = {"value": 0.5, "low": math.nan, "high": 0.7}
    (tmp_path / collect.RESULTS).write_text(json.dumps(test_page.result(figures=figures)) + "\n")
    collect.append(tmp_path, test_page.result(figures=figures) | {"seed": 8})
    for line in collect.results(tmp_path):
        assert line["figures"] == {"is": {"value": 3.0}, "precision": {"value": 0.5}}
        assert line["absent"]["fid"].startswith(metric_table.NOT_FINITE)

    def refused(word):
        raise AssertionError(f"{word} is no JSON")

    last_line = (tmp_path / collect.RESULTS).read_text().splitlines()[-1]
    json.loads(last_line, parse_constant=refused)


def test_features_that_are_not_finite_name_their_image(tmp_path, monkeypatch):
    def broken(extractor, image_NHW3):
        rows_ND = np.ones((len(image_NHW3), 2), np.float32)
        rows_ND[image_NHW3[:, 0, 0, 0] == 13] = np.nan
        return {"pooled": rows_ND}

    class Numbered:
        def part(self, start, stop):
            numbers = np.arange(start, stop, dtype=np.uint8)[:, None, None, None]
            return {"image": np.broadcast_to(numbers, (stop - start, 4, 4, 3))}

    monkeypatch.setattr(feature_extractors, "features", broken)
    monkeypatch.setattr(collect, "PART", PART)
    with pytest.raises(UserError, match="layer pooled is not finite for image 13"):
        collect.collect(Numbered(), None, tmp_path, 20)
    found = collect.collect(Numbered(), None, tmp_path / "few", 12)
    assert len(found.digest_N) == 12 and found.constant_N.all() and not len(found.label_N)


def test_figures_of_reconstructions():
    value_N = np.random.default_rng(0).normal(30, 2, 50)
    counts = {"0": np.array([5, 0, 3, 2]), "1": np.array([10, 0])}
    found = collect.Found(*({}, {}, {"psnr_db": value_N}, counts), *(np.zeros(50),) * 3)
    figures = collect.of_pairs(found, 0)
    psnr = figures["psnr_db"]
    assert psnr["value"] == pytest.approx(value_N.mean()) and psnr["low"] < psnr["value"]
    half = 1.96 * value_N.std(ddof=1) / 50**0.5
    assert psnr["high"] - psnr["low"] == pytest.approx(2 * half, rel=0.15)
    assert figures["codebook_usage"]["value"] == (3 / 4 + 1 / 2) / 2
    wanted = [1 - (1 - 1 / size) ** 10 for size in (4, 2)]
    assert figures["codebook_usage"]["expected"] == pytest.approx(np.mean(wanted))
    perplexity = np.mean([codebook.perplexity(count_V) for count_V in counts.values()])
    assert figures["codebook_perplexity"]["value"] == perplexity
