"""A run of drawing and scoring that is killed anywhere ends as one that was not; folders are whose.

The generator is a die, the tokenizer paints its tokens; the local network is drawn by numpy.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.evaluation import test_feature_extractors, test_made_images, test_page
from tokgen import distributed
from tokgen.checkpoints import checkpoint, loading, run as runs
from tokgen.evaluation import (
    collect,
    feature_extractors,
    made_images,
    metric_table,
    protocols,
    references,
    score as scores,
    score_page,
    score_settings,
)
from tokgen.interfaces import UserError
from tokgen.metrics import codebook, moments
from tokgen.sampling import drawing, presets

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT, PART = 48, 8
METRICS = ("sfid", "is", "precision", "recall", "class_accuracy")


class Killed(BaseException):
    """What no part of a program expects."""


def scoring_of(reference, out, **more) -> score_settings.Settings:
    """The settings that score the die."""
    given = dict(scored="runs/dice", samples=COUNT) | more
    return score_settings.Settings(
        protocol="local",
        reference=str(reference),
        out=str(out),
        accept=("few",),
        **({"seed": 5} | given),
    )


def fakes() -> list[tuple]:
    """(where, name, value) that put the die in the place of a checkpoint, and make parts small."""
    tokenizer = test_made_images.loaded(test_made_images.Painter(), fingerprint="p" * 64)
    generator = test_made_images.loaded(test_made_images.Dice())
    local = dataclasses.replace(protocols.PROTOCOLS["local"], metrics=METRICS)
    return [
        (checkpoint, "find", lambda path: generator.step),
        (checkpoint, "read_meta", lambda step: generator.meta),
        (loading, "load_to_draw", lambda path, compute="": generator),
        (loading, "load_to_decode", lambda loaded, path="": tokenizer),
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
        scores.score(scoring_of(reference, out))
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
            scores.score(scoring_of(reference, out))
        left = list(out.rglob("*.part"))
        for part in left:  # what a machine that loses power leaves
            part.write_bytes(part.read_bytes()[:-100])
        deaths.append(len(left))
        assert not (out / collect.RESULTS).exists()
    assert sum(deaths) >= 2 and len(deaths) >= 10
    scores.score(scoring_of(reference, out))
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
test_collect.scores.score(test_collect.scoring_of(*sys.argv[1:]))
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
    scores.score(scoring_of(reference, out))
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
        *("format", "protocol", "samples", "images", "size", "extractor", "reference", "seed"),
        *("metrics", "absent", "suspicious", "images_sha256", "time", "versions"),
    }
    assert set(line["metrics"]) | set(line["absent"]) == set(METRICS)
    assert (line["protocol"], line["samples"], line["size"]) == ("local", COUNT, [16, 16])
    read = references.read(reference)
    assert line["reference"]["digest"] == read.digest
    assert line["reference"]["path"] == str(reference.resolve())
    assert line["extractor"]["fingerprint"] == read.record["extractor"]["fingerprint"]
    assert line["images"]["fingerprint"] == "d" * 64 and line["images"]["seed"] == 5
    assert line["suspicious"] == {"duplicates": 0, "constant": 0}
    text = (whole / collect.RESULTS).read_text()
    assert "Infinity" not in text and "NaN" not in text and text.endswith("}\n")


def test_given_as_an_archive_the_same_images_score_the_same(tmp_path, die, reference, whole):
    """From a file, and in parts of another size: to the last digit that is written."""
    given = scoring_of(reference, tmp_path, scored=str(whole / "samples.npz"), samples=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "PART", 20)
        scores.score(given)
    once = last(tmp_path)
    assert once["metrics"] == last(whole)["metrics"]
    assert once["images_sha256"] == last(whole)["images_sha256"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"samples": 40}, "samples: 48 there, 40 here"),
        (
            {"sampling": presets.Choice(temperature=0.5)},
            "images.settings.temperature: 1.0 there, 0.5 here",
        ),
    ],
)
def test_a_folder_of_another_evaluation_is_refused(die, reference, whole, change, difference):
    before = contents(whole)
    with pytest.raises(UserError, match="holds another evaluation.*use another --out") as caught:
        scores.score(scoring_of(reference, whole, **change))
    assert difference in str(caught.value)
    assert contents(whole) == before and len(collect.results(whole)) == 1


def test_another_checkpoint_or_reference_is_refused(tmp_path, die, monkeypatch, reference, whole):
    other = write_reference(tmp_path / "other.npz", seed=1)
    with pytest.raises(UserError, match=r"extractor\.fingerprint: \w+ there, \w+ here"):
        scores.score(scoring_of(other, whole))
    trained = test_made_images.loaded(test_made_images.Dice(), fingerprint="e" * 64)
    monkeypatch.setattr(loading, "load_to_draw", lambda path, compute="": trained)
    with pytest.raises(UserError, match=r"images\.fingerprint: d{64} there, e{64} here"):
        scores.score(scoring_of(reference, whole))


def test_a_folder_with_samples_of_something_else_is_refused(tmp_path, die, reference):
    """Or those would be scored under the name of this checkpoint."""
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((COUNT, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="samples.npz of something else.*another --out"):
        scores.score(scoring_of(reference, tmp_path))


def test_a_damaged_part_is_named_and_made_again_once_removed(tmp_path, die, reference, whole):
    out = tmp_path / "out"
    scores.score(scoring_of(reference, out))
    file = sorted((out / "parts").iterdir())[2]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{file.name} is damaged.*remove it, and it is made again"):
        scores.score(scoring_of(reference, out))
    file.unlink()
    scores.score(scoring_of(reference, out))
    assert contents(out) == contents(whole)
    assert last(out) == last(whole) and len(collect.results(out)) == 1
    (out / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        scores.score(scoring_of(reference, out))


def test_a_second_run_in_the_same_folder_waits_its_turn(tmp_path, die, reference):
    with runs.lock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        scores.score(scoring_of(reference, tmp_path))


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
        *(dict(metrics=None), dict(metrics={"fid": 3.0}), dict(metrics={"fid": {}}), dict(size=3)),
        *(dict(metrics={"fid": {"value": "3"}}), dict(images=[]), dict(images={"settings": None})),
        *(dict(reference={"dataset": None}), dict(extractor=None), dict(absent=7), dict(seed="x")),
    ],
)
def test_a_result_of_other_types_is_one_message(tmp_path, change):
    collect.append(tmp_path, test_page.result(**change))
    with pytest.raises(UserError, match="holds no results of tokgen evaluate: "):
        collect.results(tmp_path)


def test_a_figure_that_is_not_finite_is_absent(tmp_path):
    """Written by this version, or as NaN by one before: no reader meets it, and it is no best."""
    metrics = {"fid": {"value": math.nan, "low": 1.0, "high": 2.0}, "is": {"value": 3.0}}
    metrics["precision"] = {"value": 0.5, "low": math.nan, "high": 0.7}
    (tmp_path / collect.RESULTS).write_text(json.dumps(test_page.result(metrics=metrics)) + "\n")
    collect.append(tmp_path, test_page.result(metrics=metrics) | {"seed": 8})
    for line in collect.results(tmp_path):
        assert line["metrics"] == {"is": {"value": 3.0}, "precision": {"value": 0.5}}
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
    collect.collect(Numbered(), None, tmp_path / "few", 12)
    found = collect.found_of(Numbered(), tmp_path / "few", 12)
    assert len(found.digest_N) == 12 and found.constant_N.all() and not len(found.label_N)


def test_shares_are_of_every_part_that_is_not_there(tmp_path, monkeypatch):
    """Whatever an earlier run has left: none is seen twice, and none is missed."""
    asked = []

    class Gray:
        def part(self, start, stop):
            asked.append(start)
            return {"image": np.full((stop - start, 4, 4, 3), start, np.uint8)}

    monkeypatch.setattr(feature_extractors, "features", lambda *_: {})
    monkeypatch.setattr(collect, "PART", PART)
    made_images.save_part(collect._file(tmp_path, Gray(), 8, 16), {"digest": np.zeros(8)})
    missing = collect._missing(Gray(), tmp_path, collect._bounds(60))
    monkeypatch.setattr(distributed, "decided", lambda *_: missing)  # by process 0, once
    for share in range(3):
        monkeypatch.setattr(distributed, "share", lambda share=share: (share, 3))
        collect.collect(Gray(), None, tmp_path, 60)
    assert asked == [0, *range(16, 60, 8)]


def test_a_part_of_another_process_that_never_comes_is_said(tmp_path, monkeypatch):
    """As where every host has a disk of its own."""
    monkeypatch.setattr(distributed, "LATE", 0.0)
    with pytest.raises(UserError, match="0000000-0000012.npz.*on a file system that all see"):
        collect.found_of(np.zeros(12), tmp_path, 12)


def test_metrics_of_reconstructions():
    value_N = np.random.default_rng(0).normal(30, 2, 50)
    counts = {"0": np.array([5, 0, 3, 2]), "1": np.array([10, 0])}
    found = collect.Found(*({}, {}, {"psnr_db": value_N}, counts), *(np.zeros(50),) * 3)
    metrics = collect.of_pairs(found, 0)
    psnr = metrics["psnr_db"]
    assert psnr["value"] == pytest.approx(value_N.mean()) and psnr["low"] < psnr["value"]
    half = 1.96 * value_N.std(ddof=1) / 50**0.5
    assert psnr["high"] - psnr["low"] == pytest.approx(2 * half, rel=0.15)
    assert metrics["codebook_usage"]["value"] == (3 / 4 + 1 / 2) / 2
    wanted = [1 - (1 - 1 / size) ** 10 for size in (4, 2)]
    assert metrics["codebook_usage"]["expected"] == pytest.approx(np.mean(wanted))
    perplexity = np.mean([codebook.perplexity(count_V) for count_V in counts.values()])
    assert metrics["codebook_perplexity"]["value"] == perplexity


# ---------------------------------------------------------------- what earlier versions wrote


def first_words(record: dict) -> dict:
    """A record in the words of format 1."""
    then = {now: word for word, now in collect.FIRST_WORDS.items()}
    record = {then.get(name, name): part for name, part in record.items()}
    return record | ({"format": 1} if "format" in record else {})


def test_a_folder_that_an_earlier_version_began_goes_on(tmp_path, die, reference, whole):
    """Parts are not seen again, and a result that stands there already stays one."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    record = first_words(json.loads((out / collect.RUN).read_text()))
    assert "supply" in record
    (out / collect.RUN).write_text(json.dumps(record))
    line = json.loads((out / collect.RESULTS).read_text())
    (out / collect.RESULTS).write_text(json.dumps(first_words(line)) + "\n")
    assert last(out) == last(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractors, "features", None)
        patch.setattr(drawing, "draw", None)
        patch.setattr(score_page, "write", lambda *_: out / "index.html")
        scores.score(scoring_of(reference, out))
    assert len(collect.results(out)) == 1 and last(out) == last(whole)
    with pytest.raises(UserError, match="seed: 5 there, 6 here"):
        scores.score(scoring_of(reference, out, seed=6))


def test_results_of_the_first_format_are_read_in_todays_words(tmp_path):
    line = test_page.result()
    text = json.dumps(first_words(line)) + "\n" + json.dumps(line | {"seed": 8}) + "\n"
    assert '"figures"' in text
    (tmp_path / collect.RESULTS).write_text(text)
    first, second = collect.results(tmp_path)
    assert first == second | {"seed": 7} == line
