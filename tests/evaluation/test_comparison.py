"""Runs that may not be compared are refused in one message; marks, plots and samples of others."""

import json

import numpy as np
import pytest

from tests.evaluation import test_page
from tokgen.data import npz
from tokgen.evaluation import collect, comparison
from tokgen.interfaces import UserError


def line(fid=10.0, half=1.0, *, weight=1.5, seed=7, **more) -> dict:
    """A result; the interval of its distance is `half` to either side."""
    metrics = {
        "fid": {"value": fid, "low": fid - half, "high": fid + half},
        "kid": {"value": fid, "error": half / comparison.DEVIATES},
        "precision": {"value": 0.5 + fid / 100},
        "recall": {"value": 0.7 - fid / 100},
        "codebook_perplexity": {"value": 3.0},
    }
    images = {
        "checkpoint": "/runs/a",
        "fingerprint": "f" * 64,
        "settings": {"temperature": 1.0, "weight": weight},
    }
    found = test_page.result(metrics=metrics, images=images, seed=seed, samples=40)
    return found | more


def folder(path, *lines, label_N=None, gray=0):
    """A folder of tokgen evaluate: results, and images of a run's gray plus their number."""
    path.mkdir()
    for one in lines:
        collect.append(path, one)
    if label_N is not None:
        gray_N = (gray + np.arange(len(label_N))).astype(np.uint8)[:, None, None, None]
        image_N443 = np.broadcast_to(gray_N, (len(label_N), 4, 4, 3))
        np.savez(path / "samples.npz", arr_0=image_N443, arr_1=label_N)
    return str(path)


def run(*folders, out, every=False):
    print(comparison.listed(comparison.compare(folders, str(out), every=every)))


def test_every_difference_is_named_at_once(tmp_path):
    """One message, with what differs and who has it."""
    first = line()
    other = line(
        protocol="adm-50k",
        samples=41,
        size=[8, 8],
        reference={"dataset": "cats", "digest": "9" * 64},
        extractor={"name": "local", "fingerprint": "8" * 64},
    )
    paths = [folder(tmp_path / name, one) for name, one in zip("ab", (first, other), strict=True)]
    with pytest.raises(UserError) as caught:
        run(*paths, out=tmp_path / "out")
    for part in ("protocol: local (a), adm-50k (b)", "reference: ", "d" * 16, "cats " + "9" * 16,
                 "e" * 16, "8" * 16, "40 (a), 41 (b)", "4x4 (a), 8x8 (b)"):  # fmt: skip
        assert part in str(caught.value), part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "cmmd"},
        {"samples": 41},
        {"size": [4, 8]},
        {"reference": {"dataset": "x", "digest": "9" * 64}},
        {"extractor": {"name": "local", "fingerprint": "8" * 64}},
    ],
)
def test_any_single_difference_forbids(change):
    comparison.check({"a": line(), "b": line(20.0, seed=8)})
    with pytest.raises(UserError, match="cannot be compared") as caught:
        comparison.check({"a": line(), "b": line(), "c": line(**change)})
    assert str(caught.value).count(";") == 1 and "(a, b)" in str(caught.value)


def test_reconstructions_of_other_originals_are_not_compared():
    own = {"reference": {"dataset": "the originals themselves"}}
    made = [line(**own) for _ in range(3)]
    for one, images in zip(made, "112", strict=True):
        one["images"]["images"] = images
    comparison.check({"a": made[0], "b": made[1]})
    with pytest.raises(UserError, match="reference: the originals themselves 1"):
        comparison.check({"a": made[0], "b": made[2]})


def test_ties_lie_within_the_joint_interval():
    """The root of the sum of squares of both halves: 5 for 3 and 4."""
    lines = {"worse": line(15.01, 4.0), "best": line(10.0, 3.0), "near": line(14.99, 4.0)}
    for metric in ("fid", "kid"):
        assert comparison.marks(lines, metric) == {"best": "best", "near": "tie"}
    # larger is better, and without an interval nothing is told apart
    assert comparison.marks(lines, "precision") == {"worse": "best"}
    assert comparison.marks(lines, "recall") == {"best": "best"}
    equal = comparison.marks(lines, "codebook_perplexity")
    assert sorted(equal.values()) == ["best", "tie", "tie"]
    del lines["best"]["metrics"]["fid"]
    assert comparison.marks(lines, "fid") == {"near": "best", "worse": "tie"}


def test_curves_join_runs_that_differ_in_guidance_only():
    lines = {
        "a": line(3.0, weight=1.0),
        "b": line(2.0, 0.5, weight=2.0),
        "c": line(5.0, weight=2.0),
        "d": line(9.0, weight=[1.0, 2.0]),  # one per symbol: no place on an axis
    }
    lines["c"]["images"]["settings"]["temperature"] = 0.5
    (series,) = comparison.guided(lines).values()
    assert sorted(series) == [(1.0, 3.0, 1.0), (2.0, 2.0, 0.5)]
    lines["e"] = line(4.0, weight=3.0)
    lines["e"]["images"]["settings"]["temperature"] = 0.5
    assert sorted(map(len, comparison.guided(lines).values())) == [2, 2]
    assert comparison.guided({"a": lines["a"]}) == {}


def test_page_table_and_samples_side_by_side(tmp_path, capsys):
    label_N = np.arange(40) % 3
    paths = [
        folder(tmp_path / "a", line(99.0), line(10.0, 3.0), label_N=label_N, gray=0),
        folder(tmp_path / "b", line(14.0, 4.0, weight=2.0), label_N=label_N, gray=100),
        folder(tmp_path / test_page.EVIL.replace("/", ""), line(20.0, weight=3.0)),
    ]
    run(*paths, out=tmp_path / "out")
    found = test_page.parsed(tmp_path / "out" / "index.html")
    words = " ".join(found.words)
    assert "10 best" in words and "14 tie" in words and "99" not in words
    assert "same seed and class" in words and "No samples are kept of <scr" in words
    assert {"best", "tie"} <= set(found.marks)
    *plots, cat, _, dog = found.pictures()
    assert len(plots) == 2
    step = 4 * 16 + 2
    for label, sheet in ((0, cat), (2, dog)):
        for row, gray in enumerate((0, 100)):
            middle = sheet[2 + row * step + step // 2, 2 + step // 2 :: step, 0]
            assert middle.tolist() == [gray + label + 3 * n for n in range(8)]
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["protocol"] == "local" and record["marks"]["fid"] == {"a": "best", "b": "tie"}
    assert record["runs"]["a"]["metrics"]["fid"]["value"] == 10.0
    shown = capsys.readouterr().out
    assert "10 *" in shown and "14 =" in shown


def test_samples_of_other_seeds_have_nothing_in_common(tmp_path):
    draws = np.random.default_rng(0)
    paths = [
        folder(tmp_path / n, line(seed=s), label_N=draws.integers(0, 2, 40))
        for s, n in enumerate("ab")
    ]
    run(*paths, out=tmp_path / "out")
    found = test_page.parsed(tmp_path / "out" / "index.html")
    assert "nothing in common" in " ".join(found.words)


def test_samples_that_were_scored_from_an_archive_are_shown_if_unchanged(tmp_path):
    folder(tmp_path / "given", label_N=np.zeros(40, int))
    file = tmp_path / "given" / "samples.npz"

    scored = line(images=npz.Archive(file).identity)
    assert len(comparison._images_of(scored, tmp_path)) == 40
    scored["images"]["bytes"] += 1
    assert comparison._images_of(scored, tmp_path) is None
    assert comparison._images_of(line(), tmp_path) is None


def test_names_tell_folders_apart(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
    paths = [folder(tmp_path / name / "run", line(), line(8.0)) for name in "xy"]
    assert list(comparison.read(paths)[0]) == ["x/run", "y/run"]
    lines, folders = comparison.read(paths, every=True)
    assert list(lines) == ["x/run #1", "x/run #2", "y/run #1", "y/run #2"]
    assert folders["x/run #2"] == (tmp_path / "x" / "run").resolve()
    assert lines["y/run #2"]["metrics"]["fid"]["value"] == 8.0


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["a"], "two results"), (["a", "./a"], "named twice"), (["a", "nowhere"], "no results at")],
)
def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a", line())
    with pytest.raises(UserError, match=message):
        run(*paths, out=tmp_path / "out")
