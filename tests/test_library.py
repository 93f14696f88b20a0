"""What stands in `dir(tokgen)`: documented, typed, light, and true to the examples told of it."""

import doctest
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import typing
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest

import tokgen
from tests import published, recipes
from tokgen import runtime
from tokgen.evaluation import feature_extractors

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
# What `load` gives
HANDLES = ("tokgen.image_generator", "tokgen.image_tokenizer")
# Each goes on with what the one before wrote; a classifier is trained, and compiles long.
SCORES = ("make_reference", "score", "compare", "sweep")


def documented() -> dict[str, object]:
    """Every public function and class by its name, and the methods of what `load` gives."""
    found = {}
    for name in tokgen.__all__:
        entry = found[name] = getattr(tokgen, name)
        if inspect.isclass(entry) and entry.__module__ in HANDLES:
            methods = {part: value for part, value in vars(entry).items() if part[0] != "_"}
            methods = {part: value for part, value in methods.items() if inspect.isfunction(value)}
            found |= {f"{name}.{part}": value for part, value in methods.items()}
    return found


ENTRIES = documented()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """The folder that examples are told in: three runs, a photo, a folder of photographs."""
    folder = tmp_path_factory.mktemp("library")
    recipes.tiny(folder, "raster", "masked")
    published.rows(folder, "rar-b")
    draw = np.random.default_rng(0)
    photo = draw.integers(0, 256, (48, 64, 3), np.uint8)
    PIL.Image.fromarray(photo).save(folder / "photo.png")
    for name in ("disc", "ring"):
        (folder / "photographs" / name).mkdir(parents=True)
        for number in range(8):
            image = PIL.Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8))
            image.save(folder / "photographs" / name / f"{number}.png")
    return folder


@pytest.fixture
def there(place, monkeypatch) -> Iterator[None]:
    """In that folder, with the devices that conftest chose, and a hub that has small files."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    small, files = published.rows(place, "rar-b")
    with published.served(published.KNOWN | small, files, place, monkeypatch):
        yield


def failures(name: str) -> str:
    """What is wrong with the examples of a docstring; there is one at least."""
    words = {"tokgen": tokgen, "np": np, "PIL": PIL, "pathlib": pathlib}
    text = inspect.getdoc(ENTRIES[name])
    examples = doctest.DocTestParser().get_doctest(text, words, name, None, 0)
    assert examples.examples, f"{name} has no example"
    said = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(examples, out=said.append)
    return "".join(said)


# Methods have the examples of functions nearly; pulling by name is tested beside `pulling`.
SLOW = {name for name in ENTRIES if "." in name} | {"load", "pull", "import_file", "validate"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in SLOW))
        for name in ENTRIES
        if name not in SCORES
    ],
)
def test_examples_of_docstrings_are_true(name, there):
    assert failures(name) == ""


@pytest.mark.long
def test_examples_of_scores_are_true(there, monkeypatch):
    monkeypatch.setattr(feature_extractors, "EACH", 2)
    for name in SCORES:
        assert failures(name) == ""


def test_a_false_example_is_found(there, monkeypatch):
    monkeypatch.setitem(ENTRIES, "wrong", type("Wrong", (), {"__doc__": ">>> 1 + 1\n3\n"}))
    assert "Got:\n    2" in failures("wrong")
    monkeypatch.setitem(ENTRIES, "none", type("None_", (), {"__doc__": "No example."}))
    with pytest.raises(AssertionError, match="no example"):
        failures("none")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_docstring_says_what_goes_in_and_what_comes_out(name):
    """One line first; arguments, returns and errors by name, where there are more than one."""
    entry = ENTRIES[name]
    text = inspect.getdoc(entry)
    first = text.split("\n\n")[0]
    assert len(first.splitlines()) == 1 and first.endswith((".", ":")), first
    if not inspect.isfunction(inspect.unwrap(entry)):
        return
    taken = [part for part in inspect.signature(entry).parameters if part != "self"]
    if len(taken) > 2:
        section = re.search(r"(?ms)^Args:\n(.*?)(?=^\w|\Z)", text)[1]
        told = set(re.findall(r"\w+", " ".join(re.findall(r"(?m)^    ([\w, ]+):", section))))
        assert set(taken) <= told, set(taken) - told


@pytest.mark.parametrize("name", ENTRIES)
def test_everything_public_is_annotated(name):
    entry = inspect.unwrap(ENTRIES[name])
    if inspect.isclass(entry):
        return
    signature = inspect.signature(entry)
    bare = [p.name for p in signature.parameters.values() if p.annotation is inspect._empty]
    assert set(bare) <= {"self"} and signature.return_annotation is not inspect._empty
    assert "return" in typing.get_type_hints(entry)  # and names that exist


def test_import_takes_less_than_a_third_of_a_second():
    """The quickest of three: another process may have the core."""
    code = "import time; t = time.perf_counter(); import tokgen; print(time.perf_counter() - t)"
    run = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    took = [float(subprocess.run([sys.executable, "-c", code], **run).stdout) for _ in range(3)]
    assert min(took) < 0.3


def test_dir_lists_what_is_meant_to_be_called_and_nothing_else():
    listed = [name for name in dir(tokgen) if not name.startswith("__")]
    assert listed == sorted(tokgen.__all__)


def test_help_tells_the_way_in():
    said = pydoc.plain(pydoc.render_doc(tokgen))
    for words in ("tokgen.load(", "class ImageGenerator", "log_likelihood(", "sample("):
        assert words in said


@pytest.mark.long
def test_the_page_is_true_from_top_to_bottom(there):
    words = {}
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)
    assert len(blocks) >= 7
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/library.md, block {number}", "exec"), words)
    assert pathlib.Path("ring.png").exists() and pathlib.Path("pairs.png").exists()
    assert words["log_p_N"].shape == (2,) and words["best"] in words["model"].classes


def test_the_first_example_of_the_readme_draws_a_published_model(there):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"(?ms)^```python\n(.*?)^```$", readme)[1]
    exec(compile(block, "README.md, the first block", "exec"), {})
    with PIL.Image.open("dog.png") as picture:
        assert picture.size == (8, 8)


def test_the_page_names_all_that_is_public():
    told = set(re.findall(r"\w+", PAGE))
    module_level = {"Loaded", "SamplingChoice", "Samples", "encode", "decode", "reconstruct"}
    module_level |= {name for name in tokgen.__all__ if name.endswith("Settings")}
    module_level |= {"load_tokenizer", "load_tokenizer_of", "save_png"}
    assert set(tokgen.__all__) - told <= module_level
