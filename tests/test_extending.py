"""The examples of docs/extending.md: each file, written into a package's path, and its use."""

import importlib
import pathlib
import re
import sys

import pytest

from tokgen import runtime

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
FILE = re.compile(r"# (tokgen/[\w/]+)/(\w+)\.py\n")
SECTIONS = {
    words.partition("\n")[0]: BLOCK.findall(words) for words in re.split(r"(?m)^## ", TEXT)[1:]
}


def test_every_section_has_a_file_and_its_use():
    kinds = ("quantizer", "order", "source of data", "discriminator", "frozen network")
    kinds = (*kinds, "published system", "metric")
    assert {title.split(" ", 1)[1] for title in SECTIONS} == set(kinds)
    for title, blocks in SECTIONS.items():
        assert len(blocks) == 2 and FILE.match(blocks[0]), title
        assert not FILE.match(blocks[1]), title


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_is_found_by_its_name_and_does_what_is_said(title, tmp_path, monkeypatch):
    text, use = SECTIONS[title]
    folder, name = FILE.match(text).groups()
    package = importlib.import_module(folder.replace("/", "."))
    assert not (ROOT / folder / f"{name}.py").exists()
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.chdir(ROOT)
    # jax is set up already, by conftest; it must not be set up once more
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    module = f"{package.__name__}.{name}"
    try:
        exec(compile(use, f"docs/extending.md, {title}", "exec"), {})
        assert module in sys.modules  # and what ran is this file
        assert pathlib.Path(sys.modules[module].__file__).parent == tmp_path
    finally:
        sys.modules.pop(module, None)
        vars(package).pop(name, None)
