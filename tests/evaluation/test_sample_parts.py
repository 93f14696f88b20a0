"""A score of samples that are being drawn: of those that are there, and gone on with."""

import os
import shutil

import numpy as np
import pytest

from tests.evaluation import test_collect, test_feature_extractors
from tokgen import records
from tokgen.data import npz
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    sample_parts,
    score as scores,
    score_settings,
)
from tokgen.interfaces import UserError

TOTAL, EACH, PART = 60, 4, 8  # of a span of a score, two parts
RECORD = {"total": TOTAL, "kinds": 3, "size": [16, 16], "names": ["cat", "dog", "owl"], "seed": 1}
image_NHW3 = test_feature_extractors.pictures(TOTAL, seed=9)
label_N = (np.arange(TOTAL) % 3).astype(np.int32)
reference = test_collect.reference


@pytest.fixture
def small(monkeypatch):
    for where, name, value in test_collect.fakes()[4:]:
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(sample_parts, "EACH", EACH)


@pytest.fixture
def folder(tmp_path, small):
    """A folder that is being filled, without a part yet."""
    out = tmp_path / "drawn"
    out.mkdir()
    records.save(out / "samples.json", records.text(RECORD | {"checkpoint": "here"}))
    return out


def draw(out, *spans):
    """The parts of some spans of images."""
    for low, high in spans:
        for start in range(low, high, EACH):
            own = slice(start, min(start + EACH, TOTAL))
            part = {"image": image_NHW3[own], "label": label_N[own]}
            sample_parts.save(out, start, part | {"tokens": label_N[own], "near": label_N[own]})


def put_together(out):
    with given_images.writing(out / "samples.npz", image_NHW3.shape, label_N) as add:
        add(image_NHW3)
    told = RECORD | {"checkpoint": "there", "sha256": "a", "near_ties": []}
    records.save(out / "samples.json", records.text(told))
    shutil.rmtree(out / "parts")


def test_what_is_there_by_number_and_by_place(folder, monkeypatch):
    with pytest.raises(UserError, match="none of its 60 images yet.*wait for tokgen sample"):
        sample_parts.Growing(folder, RECORD, PART)
    draw(folder, (8, 24), (28, 32), (56, 60), (40, 48))
    images = sample_parts.Growing(folder, RECORD, PART)
    number = [*range(8, 24), *range(40, 48), *range(56, 60)]  # of 24 to 32 a part is missing
    assert [images.number(i) for i in range(len(images))] == number
    assert images.told().startswith("28 of the 60 images that ")
    for start, stop in ((0, 8), (8, 16), (3, 5), (4, 28), (16, 24), (24, 28), (0, 28)):
        part = images.part(start, stop)
        np.testing.assert_array_equal(part["image"], image_NHW3[number[start:stop]])
        np.testing.assert_array_equal(part["label"], label_N[number[start:stop]])
    draw(folder, (0, 60))
    put_together(folder)  # meanwhile
    real, opened = npz.Archive, []
    monkeypatch.setattr(npz, "Archive", lambda *words: opened.append(words) or real(*words))
    for start, stop in ((8, 16), (16, 24), (20, 28)):
        part = images.part(start, stop)
        np.testing.assert_array_equal(part["image"], image_NHW3[number[start:stop]])
        np.testing.assert_array_equal(part["label"], label_N[number[start:stop]])
    assert len(opened) == 1  # and not read from its beginning for every part


def test_a_part_that_goes_while_it_is_read_is_none(folder, monkeypatch):
    draw(folder, (0, 8))
    file, getsize = sample_parts.file(folder, 4), os.path.getsize

    def gone(path):
        file.unlink()
        return getsize(path)

    monkeypatch.setattr(os.path, "getsize", gone)
    assert sample_parts.load(folder, 4, 8) is None


def test_a_part_is_whole_and_checked(folder):
    draw(folder, (0, 8))
    (folder / "parts" / ".0000008.npz.host.1.part").write_bytes(b"PK")
    assert sample_parts.there(folder) == {0, 4}
    file = folder / "parts" / "0000004.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(UserError, match="0000004.npz is damaged.*remove it, and it is made again"):
        sample_parts.Growing(folder, RECORD, PART).part(0, 8)


def test_a_score_goes_on_with_what_has_come_in_the_meantime(
    folder, tmp_path, reference, monkeypatch, capsys
):
    settings = test_collect.scoring_of(reference, tmp_path / "out", scored=str(folder), samples=0)
    seen, real = [], feature_extractors.features

    def features(extractor, image_NHW3, *words):
        seen.append(len(image_NHW3))
        return real(extractor, image_NHW3, *words)

    monkeypatch.setattr(feature_extractors, "features", features)
    draw(folder, (0, 8), (24, 56))
    line = scores.score(settings)
    assert (line["samples"], line["total"], sum(seen)) == (40, 60, 40)
    assert "40 of the 60 images that" in capsys.readouterr().err
    assert "protocol local, 40 of 60 images" in scores.table(line)
    assert "40 of 60 that will be there" in (tmp_path / "out" / "index.html").read_text()
    scores.score(settings)  # nothing new: the same line
    assert len(collect.results(tmp_path / "out")) == 1 and sum(seen) == 40
    draw(folder, (0, 24))
    line = scores.score(settings)
    assert line["samples"] == 56 and sum(seen) == 56
    draw(folder, (56, 60))
    put_together(folder)
    line = scores.score(settings)
    assert line["samples"] == 60 and "total" not in line and sum(seen) == 60
    assert [each["samples"] for each in collect.results(tmp_path / "out")] == [40, 56, 60]
    # as if all had been there from the beginning
    alone = scores.score(
        test_collect.scoring_of(reference, tmp_path / "alone", scored=str(folder), samples=0)
    )
    assert alone["metrics"] == line["metrics"] and alone["images"] == line["images"]
    assert alone["images_sha256"] == line["images_sha256"]


def test_a_score_of_another_set_is_another_score(folder, tmp_path, reference):
    settings = test_collect.scoring_of(reference, tmp_path / "out", scored=str(folder), samples=0)
    draw(folder, (0, 40))
    scores.score(settings)
    records.save(folder / "samples.json", records.text(RECORD | {"seed": 2}))
    with pytest.raises(UserError, match="another evaluation.*\n.*images.drawn"):
        scores.score(settings)


def test_what_needs_all_waits_for_all(folder, tmp_path, reference, monkeypatch):
    told = "is defined for 60 samples|local needs 60 images; 40 of the 60 .*wait for tokgen sample"
    draw(folder, (0, 40))
    settings = dict(scored=str(folder), protocol="local", reference=str(reference))
    settings |= dict(out=str(tmp_path / "out"), accept=("few",))
    with pytest.raises(UserError, match=told):
        scores.score(score_settings.Settings(**settings, samples=60))
    line = scores.score(score_settings.Settings(**settings, samples=30))  # the first of them
    assert line["samples"] == 30 and "total" not in line
    with pytest.raises(UserError, match="--labels .it is for folders of images"):
        scores.score(score_settings.Settings(**settings, labels="none"))
    inside = settings | {"out": str(folder / "scores")}
    assert score_settings.kind_of(str(folder)) == ""
    score_settings.check(score_settings.Settings(**inside))


def test_some_of_a_set_are_the_same_while_it_is_filled_and_afterwards(folder, tmp_path, reference):
    draw(folder, (0, 40))
    settings = dict(scored=str(folder), protocol="local", reference=str(reference), samples=30)
    settings |= dict(accept=("few",), seed=0)
    line = scores.score(score_settings.Settings(**settings, out=str(tmp_path / "out")))
    draw(folder, (40, 60))
    put_together(folder)
    for place in ("out", "alone"):  # gone on with, and as if nothing had been there
        later = scores.score(score_settings.Settings(**settings, out=str(tmp_path / place)))
        assert later["images_sha256"] == line["images_sha256"] and later["samples"] == 30
        assert later["metrics"] == line["metrics"] and later["images"] == line["images"]
