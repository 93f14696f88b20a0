"""The notebooks of colab/: their cells, and a run of one from top to bottom."""

import ast
import json
import os
import pathlib
import re
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BOOKS = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((ROOT / "colab").glob("*.ipynb"))
}


def cells(name: str, kind: str) -> dict[str, str]:
    """{id: text} of the cells of a kind."""
    found = (cell for cell in BOOKS[name]["cells"] if cell["cell_type"] == kind)
    return {cell["id"]: "".join(cell["source"]) for cell in found}


def settings(name: str) -> dict[str, Any]:
    """What the cell `settings` of a notebook sets: plain values by name."""
    found = {}
    for line in ast.parse(cells(name, "code").get("settings", "")).body:
        names, values = line.targets[0], ast.literal_eval(line.value)
        several = isinstance(names, ast.Tuple)
        found |= (
            zip((n.id for n in names.elts), values, strict=True) if several else {names.id: values}
        )
    return found


def commands(name: str, **changed: Any) -> list[str]:
    """The command lines of a notebook, with its settings, or others, for what is in braces."""
    values, found = settings(name) | changed, []
    for cell in cells(name, "code").values():
        for line in cell.replace("\\\n", " ").splitlines():
            line = re.sub(r"^!(?:[A-Z_]+=\S+ +)*", "!", line)  # variables before a command
            if line.startswith(("!tokgen ", "!python train_")) and "--version" not in line:
                found.append(re.sub(r"\{(\w+)\}", lambda name: str(values[name[1]]), line[1:]))
    return found


def checkout(folder: pathlib.Path) -> None:
    """Make a folder look as a checkout does to a notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("train_tokenizer.py", "train_generator.py", "configs"):
        if not (folder / file).exists():
            (folder / file).symlink_to(ROOT / file)


def executed(name: str, folder: pathlib.Path, changed: str = "", **environment: str):
    """A notebook after it has run in `folder`, which stands for the checkout.

    `changed` is run after its cell `settings`, as whoever changes settings would. What the first
    cell does is tested in tests/test_notebooks.py: here the package is this one.
    """
    nbclient = pytest.importorskip("nbclient", reason="notebooks run with nbclient: make test-all")
    import nbformat

    checkout(folder)
    book = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        if cell.id == "install":
            cell.source = "import os\nimport pathlib\nimport shutil\n"
        elif cell.id == "settings":
            cell.source += f"\n{changed}"
    path = os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"]))
    python = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "JAX_NUM_CPU_DEVICES")}
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(book, timeout=1200, allow_errors=True, resources=where)
    client.execute(env=kept | dict(PATH=path, PYTHONPATH=python) | environment)
    for cell in book.cells:  # `!` says nothing of a command that failed
        assert "error:" not in said(book, cell.id), said(book, cell.id)
        for output in cell.get("outputs", []):
            assert output.output_type != "error", "\n".join(output.traceback)
    return book


def said(book, ident: str) -> str:
    """What a cell has printed, and the text of its result."""
    (cell,) = (cell for cell in book.cells if cell.id == ident)
    found = []
    for output in cell.get("outputs", []):
        found.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "".join(found)


def pictures(book) -> dict[str, list[str]]:
    """{id: types} of the pictures that cells show."""
    found = {}
    for cell in book.cells:
        for output in cell.get("outputs", []):
            types = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            found.setdefault(cell.id, []).extend(types)
    return {ident: types for ident, types in found.items() if types}
