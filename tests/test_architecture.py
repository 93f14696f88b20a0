"""docs/architecture.md holds: its tree, its layers, and its walks, none of which turns back.

A line of a walk is "`a` calls `b` and `c`", and may go on ", and builds `d` by its name": files
of tokgen by their dotted names, without `tokgen.`.
"""

import ast
import functools
import importlib
import pathlib
import re

import pytest

from tests import test_imports
from tokgen.config import building

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTION = re.search(r"(?ms)^## \d+\. Walks\n(.*?)(?=^## )", TEXT)[1]
LINE = re.compile(
    r"^\d+\. `([\w.]+)` calls (.*?)(?:, and builds (.*?) by (?:its|their) names?)?[:.]? ?$"
)
NAME = re.compile(r"`([\w.]+)`")


def lines(words: str) -> list[tuple[str, list[str], list[str]]]:
    """(file, what it calls, what it builds by name) of every line of a walk."""
    found = []
    for item in re.split(r"\n(?=\d+\. )", words)[0 if words[:1].isdigit() else 1 :]:
        told = " ".join(item.split()).split(": ")[0]
        match = LINE.match(told)
        assert match, told
        a, called, built = match.groups()
        found.append((a, NAME.findall(called), NAME.findall(built or "")))
    return found


WALKS = {
    title: lines("\n" + words.strip())
    for title, words in re.findall(r"(?ms)^### (.*?)\n(.*?)(?=^### |\Z)", SECTION)
}
# Rooms that no batch and no image passes, with the reason.
BESIDE = {
    "pretrained": "weights come before the first step",
    "app": "a page around samples, edits and tokens",
    "demo": "a program that runs the others",
    "editing": "the way of samples, with tokens that are held",
    "edit_folder": "the same, into files",
    "zoo": "a table of names, asked before a checkpoint is found",
    "cli": "it chooses the command",
    "errors": "what is raised",
    "planning": "it looks at a step that is not taken",
    "chips": "a table of what devices can do",
    "flops": "it counts a program that is not run",
    "coordination": "what processes tell each other around a walk",
    "launchers": "it reads the environment",
    "choices": "it reads names in configs",
    "options": "it reads a command line",
    "output": "it holds the folder, not the images",
    "records": "files beside the arrays",
    "storage": "where a path leads",
    "runtime": "the process around a walk",
    "archives": "files that others give",
    "image_grid": "pictures for people",
    "image_generator": "samples and tokens, with networks that stay",
    "image_models": "the same",
    "image_tokenizer": "the same",
    "traces": "pictures for people",
    "metrics_log": "what is written of a step",
    "report": "what is said of it",
    "interfaces": "its words are everywhere",
    "ranges": "it checks arguments of constructors",
    "rng": "every room draws with it",
    "boundary": "every room asks it",
    "tokens": "the way of samples, of images in memory",
    "train_generator": "the other story, of tokens in the place of images",
}


def file_of(name: str) -> pathlib.Path:
    place = ROOT if name.startswith("train_") else ROOT / "tokgen"
    file = place.joinpath(*name.split("."))
    return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


@functools.cache
def imported(name: str) -> frozenset[str]:
    """The files of tokgen that a file imports, at any depth of its own code."""
    found = set()
    for _, _, module, symbol in test_imports.imports(ast.parse(file_of(name).read_text("utf-8"))):
        for target in (module, f"{module}.{symbol}" if symbol else ""):
            inner = target.removeprefix("tokgen.")
            if inner and inner != target and file_of(inner).is_file():
                found.add(inner)
    return frozenset(found)


@functools.cache
def reached(name: str) -> frozenset[str]:
    """All that a file leads to."""
    seen, left = set(), [name]
    while left:
        for other in imported(left.pop()) - seen:
            seen.add(other)
            left.append(other)
    return frozenset(seen)


def room(name: str) -> str:
    return name.partition(".")[0]


def test_both_walks_are_told():
    assert len(WALKS) == 2 and all(len(walk) >= 6 for walk in WALKS.values())


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_told_as_the_imports_are(title):
    for a, called, built in WALKS[title]:
        assert file_of(a).is_file(), a
        missing = [b for b in called if b not in imported(a)]
        assert not missing, f"{a} is said to call {missing}, and imports {sorted(imported(a))}"
        assert not built or a == "config.building", a
        for b in built:
            package, attribute = next(
                row[:2] for row in building.CLASSES.values() if row[0] == room(b)
            )
            assert hasattr(importlib.import_module(f"tokgen.{b}"), attribute), (b, package)


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_goes_on_and_never_turns_back(title):
    """Each file was called before it is told, and nothing that is called leads back to its room."""
    known = {WALKS[title][0][0]}
    for a, called, built in WALKS[title]:
        assert a in known, f"{a} is told before anything calls it"
        known |= {*called, *built}
        for b in (*called, *built):
            back = {other for other in reached(b) if room(other) == room(a)}
            assert room(a) == room(b) or not back, f"from {b} back to {sorted(back)}"


def test_every_room_is_passed_or_said_to_lie_beside():
    passed = {
        room(name) for walk in WALKS.values() for a, *many in walk for name in (a, *sum(many, []))
    }
    assert set(test_imports.RANK) - passed == set(BESIDE)


def test_the_tree_names_every_file():
    tree = re.search(r"(?ms)^## 2\. The tree\n(.*?)^### ", TEXT)[1]
    words = set(re.findall(r"\w+", tree))
    files = {file.stem for file in (ROOT / "tokgen").rglob("*.py")}
    # whose rooms say by what rule their files are named
    for folder in ("systems", "families", "commands", "zoo"):
        files -= {file.stem for file in (ROOT / "tokgen").rglob(f"{folder}/*.py")}
    assert files - words - {"__init__"} == set()


def test_the_layers_are_those_that_imports_are_held_against():
    told = re.search(r"(?ms)^### What may import what\n.*?\n\n((?:    [^\n]*\n)+)", TEXT)[1]
    assert [set(line.split()) for line in told.splitlines()] == [
        set(layer) for layer in reversed(test_imports.LAYERS)
    ]
