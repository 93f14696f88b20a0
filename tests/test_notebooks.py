"""The notebooks: their first cells are one, their code parses and runs, and pictures are shown."""

import ast
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest

from tests import loopback, notebooks, published, recipes
from tokgen import image_grid
from tokgen.data import shapes

ROOT, BOOKS = notebooks.ROOT, notebooks.BOOKS
EVERY = pytest.mark.parametrize("name", BOOKS)


# ---------------------------------------------------------------- how they are kept


@EVERY
def test_notebook_is_version_4_without_outputs(name):
    book = BOOKS[name]
    assert (book["nbformat"], book["nbformat_minor"] >= 5) == (4, True)
    assert book["metadata"]["kernelspec"]["language"] == "python"
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names)
    for cell in book["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert len(cell["source"]) <= 25, cell["id"]


@EVERY
def test_notebook_cells_parse_and_import_what_exists(name):
    codes = notebooks.cells(name, "code").values()
    assert len(codes) >= 5
    for cell in codes:
        code = re.sub(r"^( *)[!%].*$", r"\1pass", cell.replace("\\\n", " "), flags=re.MULTILINE)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tokgen"):
                for alias in node.names:
                    importlib.import_module(f"{node.module}.{alias.name}")


@EVERY
def test_no_notebook_knows_a_machine(name):
    text = json.dumps(BOOKS[name])
    assert not re.search(r"/home/|/root/|/tmp/", text)


@EVERY
def test_notebooks_begin_alike(name):
    """With the cell that the tests below run."""
    ours, first = notebooks.cells(name, "code"), notebooks.cells("quickstart", "code")
    assert [*ours][:2] == ["install", "check"]
    assert [ours[ident] for ident in ("install", "check")] == [
        first[ident] for ident in ("install", "check")
    ]
    assert (
        notebooks.cells(name, "markdown")["install-title"]
        == (notebooks.cells("quickstart", "markdown")["install-title"])
    )


def test_every_notebook_is_in_the_readme():
    told = re.findall(r"`colab/(\w+)\.ipynb`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {*told} == {*BOOKS}


# ---------------------------------------------------------------- the first cell


INSTALL = notebooks.cells("quickstart", "code")["install"]


def run(code, folder, **environment) -> str:
    """What code prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("inside", ["", "tokgen-main"])
def test_the_install_cell_finds_the_checkout_in_a_zip_also_when_it_runs_again(tmp_path, inside):
    """With a folder in it or without; what is installed is what the machine has."""
    code, pip = INSTALL.rpartition("%pip")[::2]
    assert pip.split() == "install -q -e {target} -c constraints.txt".split()
    (tmp_path / "checkout" / inside).mkdir(parents=True)
    for name in ("train_tokenizer.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / inside / name)
    shutil.make_archive(str(tmp_path / "tokgen"), "zip", tmp_path / "checkout")
    (tmp_path / "bin").mkdir()
    twice = f"{code}\n{code}\nprint(pathlib.Path.cwd().relative_to({str(tmp_path)!r}), target)"
    place = "tokgen/tokgen-main" if inside else "tokgen"
    for tpu, gpu, target in ((0, 0, "."), (0, 1, ".[cuda12]"), (1, 0, ".[tpu]")):
        shutil.rmtree(tmp_path / "tokgen", ignore_errors=True)
        if gpu:
            (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
            (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
        else:
            (tmp_path / "bin" / "nvidia-smi").unlink(missing_ok=True)
        named = {"TPU_ACCELERATOR_TYPE": "v5litepod-1"} if tpu else {}
        said = run(twice, tmp_path, PATH=str(tmp_path / "bin"), **named).splitlines()
        assert said[-1] == f"{place} {target}" and said[0] == said[1]
        assert target.strip(".[]") in extras() | {""}, "not in pyproject.toml"


def extras() -> set[str]:
    """The names of the optional dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["project"]["optional-dependencies"])


def test_the_install_cell_says_what_it_needs(tmp_path):
    with pytest.raises(AssertionError, match="SOURCE, or upload tokgen.zip"):
        run(INSTALL.rpartition("%pip")[0], tmp_path)


# ---------------------------------------------------------------- from top to bottom


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_quickstart(tmp_path):
    book = notebooks.executed("quickstart", tmp_path, "TOKENIZER_STEPS, GENERATOR_STEPS = 20, 20")
    shown = notebooks.pictures(book)
    assert [*shown] == ["tokenizer-look", "sample-look", "python", "likelihood"]
    assert "bits_per_token" in notebooks.said(book, "generator-evaluate")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_published_models(tmp_path):
    """By their names, from a hub on the loopback that has small files in the published form."""
    names = {"next scale": "var-d16", "autoregressive": "rar-b", "masked": "maskbit-14bit"}
    rows, files = published.rows(tmp_path / "files", *names.values())
    rows = {name: dataclasses.asdict(row) for name, row in rows.items()}
    changed = f"""
from tokgen.zoo import model as zoo
MODELS, NUMBER = {names!r}, 1
rows = {{name: zoo.Model(**row) for name, row in {rows!r}.items()}}
zoo.known = lambda: rows
"""
    with loopback.serving() as hub:
        hub.files |= files
        where = dict(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "hub"))
        where |= dict(TOKGEN_CACHE=str(tmp_path / "cache"))
        book = notebooks.executed("published_models", tmp_path / "here", changed, **where)
    shown = notebooks.pictures(book)
    assert [*shown] == [
        *("first", "side", "guidance", "guidance-scales", "temperature", "steps", "trace")
    ]
    assert shown["trace"] == ["image/gif"] * 3 and len(shown["side"]) == 3
    assert "var-d16" in notebooks.said(book, "sizes")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_editing(tmp_path):
    recipes.tiny(tmp_path, "masked", "next_scale")
    changed = """
MODEL, PYRAMID, NUMBER = "runs/generator", "runs/next_scale", 2
CLASS, OTHER = "ring", "disc"
"""
    book = notebooks.executed("editing", tmp_path, changed)
    edits = ("inpainting", "stroke", "half", "class", "outpainting", "variation", "scales")
    shown = notebooks.pictures(book)
    assert [*shown] == ["photo", *edits]
    assert len(shown["variation"]) == 3 and len(shown["scales"]) == 2
    assert notebooks.said(book, "kept") == "bytes kept: True\n"
    assert "2 edits of 1 image, 32 x 64 pixels" in notebooks.said(book, "outpainting")
    assert (tmp_path / "edited.png").exists()


FEW = "--config.steps=10 --config.report.save=10 --config.held_out.images=32"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_mesh_of_eight(tmp_path):
    one = "--config.report.scalars=5 --config.held_out.samples=0 --config.generator.depth=1"
    changed = f"""
TOKENIZER = "{FEW} --config.data.count=200"
OPTIONS = "{FEW} {one} --config.generator.unroll=1"
"""
    book = notebooks.executed("tpu", tmp_path, changed)
    assert notebooks.said(book, "devices").split() == [f"cpu:{number}" for number in range(8)]
    assert "mesh data 2, fsdp 2, tensor 2" in notebooks.said(book, "tensor")
    _, *rows = notebooks.said(book, "same").splitlines()
    assert len(rows) == 2
    for row in rows:
        _, *losses = map(float, row.split())
        assert len(losses) == 3 and np.ptp(losses) < 1e-4
    assert notebooks.said(book, "sample-same").startswith("100.00% of the tokens are the same")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_evaluation(tmp_path):
    changed = """
TOKENIZER_STEPS, GENERATOR_STEPS = 20, 20
IMAGES, SAMPLES, REFERENCE_STEPS, TEMPERATURES = 400, 200, 40, "0.7 1"
"""
    book = notebooks.executed("evaluate", tmp_path, changed)
    assert re.search(r"^fid +\d", notebooks.said(book, "metrics"), re.MULTILINE)
    refusals = notebooks.said(book, "refused").split("\n\n")[:3]
    assert all("needs its weight file: --weights FILE" in refusal for refusal in refusals)
    assert len(list((tmp_path / "runs" / "swept").glob("t*-seed0"))) == 2


MINE = dict(SIZE=32, WIDTHS="16,", SAVE=5, TOKENIZER_STEPS=12, GENERATOR_STEPS=6)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_your_images_go_on_after_a_session_was_killed(tmp_path):
    """From a zip; a run again finds all that there is, and adds what is asked for since."""
    images = shapes.Source(count=60)
    for number in range(60):
        label = images[number]["label"]
        place = tmp_path / "pictures" / ("round" if label < 5 else "edged") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image_grid.save_png(place, images[number]["image"])
    shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "pictures")
    shutil.unpack_archive(tmp_path / "mine.zip", tmp_path / "here" / "images")
    notebooks.checkout(tmp_path / "here")
    command, *_ = [one for one in notebooks.commands("your_images", **MINE) if "tokenizer" in one]
    run = tmp_path / "here" / "runs" / "mine" / "tokenizer"
    with subprocess.Popen(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as killed:
        while not (run / "checkpoints" / "5").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    shutil.rmtree(tmp_path / "here" / "images")  # what is not on Drive goes with a session
    changed = "".join(f"{name} = {value!r}\n" for name, value in MINE.items())
    book = notebooks.executed("your_images", tmp_path / "here", f"ZIP = '../mine.zip'\n{changed}")
    assert "resumed step" in notebooks.said(book, "tokenizer")
    assert "2 classes (edged" in notebooks.said(book, "data")
    shown = notebooks.pictures(book)
    assert [*shown] == ["look", "tokenizer-look", "sample", "trace"]
    more = f"{changed}GENERATOR_STEPS = 8\n"
    book = notebooks.executed("your_images", tmp_path / "here", more)
    assert "resumed step 6" in notebooks.said(book, "generator")
    assert "step 8 of 8" in notebooks.said(book, "generator")


def test_a_zip_that_comes_after_a_run_without_one_is_unpacked_and_wholly(tmp_path, monkeypatch):
    """Shapes are not drawn in its place, and what was unpacked in part is not taken for it."""
    monkeypatch.chdir(tmp_path)
    cell = notebooks.cells("your_images", "code")["images"]
    known = dict(pathlib=pathlib, shutil=shutil, SIZE=16)
    few, source = dict(count=4), shapes.Source
    monkeypatch.setattr(shapes, "Source", lambda **how: source(**how | few))
    exec(cell, first := known | dict(ZIP="", FOLDER="images"))
    assert len(list((tmp_path / "shapes").rglob("*.png"))) == 4
    assert first["FOLDER"] == "shapes" and not (tmp_path / "images").exists()
    (tmp_path / "some" / "daisy").mkdir(parents=True)
    (tmp_path / "some" / "daisy" / "1.png").touch()
    shutil.make_archive("some", "zip", tmp_path / "some")
    (tmp_path / "images.part").mkdir()
    (tmp_path / "images.part" / "cut.png").touch()
    exec(cell, second := known | dict(ZIP="some.zip", FOLDER="images"))
    found = [path.name for path in (tmp_path / "images").rglob("*.png")]
    assert second["FOLDER"] == "images" and found == ["1.png"]
