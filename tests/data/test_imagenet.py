"""ImageNet's classes: as many, in the order of labels, and names that `--classes` can take."""

import pathlib
import re

import pytest
import tensorflow_datasets as tfds

from tokgen import interfaces
from tokgen.data import classes, imagenet

COUNTED = tuple(map(str, range(1000)))


def test_a_thousand_of_each_in_the_order_of_wnids():
    assert len(imagenet.NAMES) == len(imagenet.SYNSETS) == 1000
    assert list(imagenet.SYNSETS) == sorted(set(imagenet.SYNSETS))
    assert all(re.fullmatch(r"n[01]\d{7}", wnid) for wnid in imagenet.SYNSETS)


def test_wnids_are_those_of_tensorflow_datasets():
    listed = pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012/labels.txt"
    assert listed.read_text().split() == list(imagenet.SYNSETS)


def test_names_are_apart_however_they_are_typed():
    assert len({classes.spoken(name) for name in imagenet.NAMES}) == 1000
    for name in imagenet.NAMES:
        assert re.fullmatch(r"[A-Za-z][A-Za-z '-]*[A-Za-z]", name), name
    for label in (0, 134, 264, 474, 639, 744, 836, 999):
        name = imagenet.NAMES[label]
        for text in (name, name.upper(), name.replace(" ", "_"), imagenet.SYNSETS[label]):
            assert classes.labels_of(text, imagenet.NAMES) == [label]
        assert classes.labels_of(name, imagenet.SYNSETS) == [label]


@pytest.mark.parametrize(
    ("label", "name"),
    # spread over the list, from memory of what published samples are labelled with
    [
        (0, "tench"),
        (22, "bald eagle"),
        (88, "macaw"),
        (134, "crane bird"),
        (207, "golden retriever"),
        (250, "Siberian husky"),
        (281, "tabby"),
        (360, "otter"),
        (387, "lesser panda"),
        (388, "giant panda"),
        (417, "balloon"),
        (474, "cardigan"),
        (517, "construction crane"),
        (562, "fountain"),
        (628, "liner"),
        (717, "pickup"),
        (805, "soccer ball"),
        (933, "cheeseburger"),
        (972, "cliff"),
        (980, "volcano"),
        (985, "daisy"),
        (999, "toilet tissue"),
    ],
)
def test_labels_that_everybody_knows(label, name):
    assert imagenet.NAMES[label] == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("golden retreiver", "did you mean golden retriever"),
        ("panda", "did you mean lesser panda or giant panda"),
        ("crane", "did you mean crane bird or construction crane"),
        ("n99999999", "need ids 0 to 999"),
        ("", "unknown class ''; need ids"),
    ],
)
def test_what_is_no_class_is_told_with_the_nearest(text, said):
    with pytest.raises(interfaces.UserError, match=re.escape(said)) as refused:
        classes.labels_of(f"0,{text}", imagenet.NAMES)
    assert len(str(refused.value)) < 1000


def test_a_name_that_may_be_two_is_refused():
    assert classes.labels_of("Hot-Dog", ("hot dog", "dog")) == [0]
    assert classes.labels_of("a-b", ("a b", "a-b")) == [1]
    with pytest.raises(interfaces.UserError, match="may be any of a b, a-b"):
        classes.labels_of("A b", ("a b", "a-b"))


def test_wnids_and_names_meet():
    for found, known in (
        (imagenet.SYNSETS, imagenet.NAMES),
        (imagenet.NAMES, imagenet.SYNSETS),
    ):
        label_C, said = classes.matched(found, known, "there", "here")
        assert label_C.tolist() == list(range(1000)) and "ImageNet's" in said
        label_C, _ = classes.matched(found[207:3:-50], known, "there", "here")
        assert label_C.tolist() == list(range(207, 3, -50))
    with pytest.raises(interfaces.UserError, match="must be among those of here"):
        classes.matched(("n01440764", "n99999999"), imagenet.NAMES, "there", "here")


def test_numbers_meet_imagenets_names_in_their_order():
    """What an import without names gave: labels cross by number."""
    for pair in ((COUNTED, imagenet.NAMES), (imagenet.NAMES, COUNTED)):
        label_C, said = classes.matched(*pair, "there", "here")
        assert label_C.tolist() == list(range(1000)) and "numbers" in said
