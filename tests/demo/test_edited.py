"""Edits on the page are of the classes asked for, and gray lies over what is drawn anew."""

import numpy as np
import pytest

from tests import recipes
from tokgen import runtime
from tokgen.data import shapes
from tokgen.demo import edited
from tokgen.evaluation import local_classifier

SIDE = 2 * 32 + 2  # an image of a sheet, with its gap


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    recipes.tiny(folder, "masked")  # which compiles soonest
    return folder / "runs"


def test_edits_are_held_against_the_class_that_was_asked_for(runs, monkeypatch):
    seen = []

    def rings(classifier, image_NHW3):
        seen.append(image_NHW3)
        return np.full(len(image_NHW3), shapes.CLASSES.index("ring"))

    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    monkeypatch.setattr(local_classifier, "predictions", rings)
    places, kinds = (runs / "generator", runs / "tokenizer"), ("left", "classes", "grow")
    shares, sheets = edited.measure(*places, None, kinds, 3, rows=2)
    # of eight classes one; of disc, ring, square, frame, and again, the two discs
    assert shares == {"left": 0.125, "classes": 0.25} and list(sheets) == list(kinds)
    real = shapes.Source(split="held_out").batch([0, 1, 2, 3, 10, 11, 12, 13])
    edge = np.ones((32, 32), bool)
    edge[8:24, 8:24] = False
    assert (seen[1][:, edge] == real[:, edge]).all() and (seen[1] != real).any()
    assert (seen[0][:4, :, 16:] == real[:4, :, 16:]).all()
    assert sheets["left"].shape == (2 * SIDE + 2, 2 * SIDE + 2, 3)
    assert sheets["grow"].shape == (2 * SIDE + 2, 4 * SIDE - 2, 3)


@pytest.mark.parametrize("kind", edited.KINDS)
def test_images_of_every_kind_are_as_many_and_may_become_what_they_shall(kind):
    classes = edited.KINDS[kind].classes
    index_N, label_N = edited.chosen(classes)
    assert len(index_N) == len(set(index_N)) == edited.IMAGES
    for index, label in zip(index_N, label_N, strict=True):
        name = shapes.CLASSES[index % len(shapes.CLASSES)]
        assert shapes.CLASSES[label] == (classes[name] if classes else name)
