"""Classes meet by name; what is told of a set; names that any file system takes."""

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.data import classes, sources

NUMBERS = tuple(map(str, range(3)))


def test_numbers_are_in_the_order_of_numbers():
    assert classes.ordered(["10", "2", "1"]) == ["1", "2", "10"]
    assert classes.ordered(["01", "1", "00"]) == ["00", "01", "1"]
    assert classes.ordered(["10", "2", "b"]) == ["10", "2", "b"]
    assert classes.ordered([]) == []


@pytest.mark.parametrize(
    ("found", "known", "labels", "said"),
    [
        (("a", "b"), ("a", "b"), [0, 1], ""),
        (("b", "c"), ("a", "b", "c"), [1, 2], ""),
        (("0", "1", "2"), ("2", "0", "1"), [1, 2, 0], ""),
        (("Cat", "dog"), ("DOG", "cat"), [1, 0], "other case"),
        (("x", "y", "z"), NUMBERS, [0, 1, 2], "x as 0 to z as 2"),
        (NUMBERS, ("x", "y", "z"), [0, 1, 2], "0 as x to 2 as z"),
        (("x",), (), [0], "not used"),
        ((), (), [0], ""),
    ],
)
def test_labels_cross_by_name(found, known, labels, said):
    label_C, note = classes.matched(found, known, "there", "here")
    np.testing.assert_array_equal(label_C, labels)
    assert said in note and bool(said) == bool(note)


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (("cat", "dog"), ("dog", "wolf")),
        (("cat", "dog"), ("cat",)),
        (("1", "2"), ("cat", "dog")),
        (("1", "2", "3"), NUMBERS),
        (("cat", "dog"), NUMBERS),
        ((), ("cat",)),
        (("a", "A"), ("a", "b")),
    ],
)
def test_other_classes_are_refused(found, known):
    with pytest.raises(interfaces.UserError, match="there must be among those of here"):
        classes.matched(found, known, "there", "here")


def source(count, names=(), counts=None, **more):
    methods = {"__len__": lambda self: count, "classes": names, "counts": counts}
    return type("S", (sources.RandomAccess,), methods | more)


def test_what_a_program_tells():
    train = source(39, ("cat", "dog"), np.array([20, 19]), unread={"x": {".heic": 10, ".txt": 2}})()
    held_out = source(1, ("cat", "dog"), np.array([0, 1]), unread={"x": {".heic": 10, ".txt": 2}})()
    around = sources.Around(held_out)
    assert classes.told("flowers", {"train": train, "held_out": around}).splitlines() == [
        "flowers: 2 classes (cat 20, dog 20); train 39, held out 1",
        "held out has no image of 1 class: cat",
        "12 files were not read: 10 .heic, 2 .txt",
    ]
    many = source(1000, tuple(map(str, range(1000))))()
    text = classes.told("x", {"all": many})
    assert text == "x: 1000 classes (0, 1, 2, 3, 4, 5, 6, 7 ... (992 more)); all 1000"
    nothing = classes.told("x", {"train": source(2)(), "held_out": source(0)()})
    assert nothing.splitlines()[0] == "x: no classes; train 2, held out 0"
    assert "nothing is held out" in nothing


def test_names_become_parts_of_file_names():
    names = ("a b/c", "", "日" * 200, "..", "3", "\udcff", "CON")
    found = [classes.file_name(n, names) for n in range(len(names))]
    assert found[0] == "class0-a_b_c" and found[1] == "class1" and found[3] == "class3"
    assert classes.file_name(3, ("0", "1", "2", "3")) == "class3"
    assert classes.file_name(9, ()) == "class9"
    assert len(set(found)) == len(names) and all(len(n.encode()) < 60 for n in found)
    assert all("/" not in name and name.isprintable() for name in found)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (1, [1]),
        (np.int32(2), [2]),
        ("cat", [0]),
        ("cat, fat", [2]),  # a name, whatever it holds
        ("1-2", [1, 2]),
        ([2, "cat", 2], [2, 0, 2]),
        (["cat, fat", "0-1"], [2, 0, 1]),
        (np.array([1, 1]), [1, 1]),
        (range(3), [0, 1, 2]),
        ("", [0, 1, 2]),
    ],
)
def test_classes_are_chosen_as_on_the_command_line_or_as_labels(wanted, labels):
    assert classes.chosen(wanted, ("cat", "dog", "cat, fat")) == labels


def test_a_number_is_a_label_and_a_text_a_name():
    old = ("1", "2", "3")
    assert classes.chosen(1, old) == [1] and classes.chosen("1", old) == [0]
    assert classes.chosen(["1", 1], old) == [0, 1]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (3, "labels are 0 to 2 .*found 3"),
        (-1, "labels are 0 to 2"),
        (1.0, "found 1.0"),
        (True, "found True"),
        (None, "found None"),
        ([], "at least one class"),
        ([""], "found ''"),
        (np.array([0.5]), "found 0.5"),
        (np.array([[1]]), r"found \[1\]"),
        (b"cat", "found b'cat'"),
        ({"cat": 1}, "found {'cat': 1}"),
    ],
)
def test_what_names_no_class_is_refused(wanted, said):
    with pytest.raises(interfaces.UserError, match=said):
        classes.chosen(wanted, ("cat", "dog", "cow"))
    with pytest.raises(interfaces.UserError, match="unconditional"):
        classes.chosen(1, ())
