"""What `--classes` means, and what it refuses."""

import pytest

from tokgen.commands import sample
from tokgen.interfaces import UserError

CLASSES = ("cat", "dog", "hot-dog", "7")


@pytest.mark.parametrize(
    ("text", "labels"),
    [("", [0, 1, 2, 3]), ("cat", [0]), ("1-2", [1, 2]), ("hot-dog,0", [2, 0]), ("7", [3])],
)
def test_classes(text, labels):
    assert sample.chosen(text, CLASSES) == labels


@pytest.mark.parametrize("text", ["4", "-1", "2-1", "0-9", "bird", "cat,,dog"])
def test_classes_out_of_range_are_refused(text):
    with pytest.raises(UserError, match="class"):
        sample.chosen(text, CLASSES)


def test_unconditional_model_has_one_label():
    assert sample.chosen("", ()) == [0]
    with pytest.raises(UserError, match="unconditional"):
        sample.chosen("cat", ())
