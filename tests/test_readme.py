"""What the README and the notebooks print is true: code runs, commands parse, files are there."""

import argparse
import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import notebooks, recipes
from tokgen import cli, parameters as state, rng
from tokgen.config import building, reading
from tokgen.interfaces import TokenLayout
from tokgen.training import launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = (
    *("app", "architecture", "checkpoints", "data", "evaluation", "extending", "generators"),
    *("library", "tokenizers"),
)
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in TEXTS), "benchmarks/RESULTS.md"]
TOKENIZER, GENERATOR = "configs/tokenizer/shapes.py", "configs/generator/shapes.py"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(code: str, folder: pathlib.Path, **environment: str) -> str:
    """What code prints, in a process of its own, which has one device as a user's has."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    environment.pop("NPROC", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_training_example_learns(tmp_path):
    _, training, _ = blocks(README, "python")  # the first one is held by test_library
    (found,) = re.findall(r"^([\d.]+) dB after 300 steps$", run(training, tmp_path), re.MULTILINE)
    assert float(found) > 17  # 7 dB at the first step; the mean colour of each image gives 12


@pytest.fixture
def trained(tmp_path) -> pathlib.Path:
    """A folder with `runs/generator` and its tokenizer, tiny and as they started."""
    recipes.tiny(tmp_path, "raster")
    return tmp_path


def test_sampling_example_draws_eight_of_every_class(trained):
    *_, sampling = blocks(README, "python")
    run(sampling, trained, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # hardly more than compiling
    with Image.open(trained / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (10 * 66 + 2, 8 * 66 + 2, 3)
    drawn = pixels[2:66, 2:66], pixels[2:66, 68:132]
    assert np.any(drawn[0] != drawn[1])
    with Image.open(trained / "first.png") as picture:
        assert picture.size == (32, 32)


def test_examples_are_short():
    for block in blocks(README, "python"):
        lines = [line for line in block.splitlines() if line and "import" not in line]
        assert len(lines) <= 20


COMMANDS = [
    *(line for block in blocks(README, "sh") for line in block.splitlines()),
    *(line for name in notebooks.BOOKS for line in notebooks.commands(name)),
]


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a subcommand of `tokgen`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    cli.module(command).arguments(parser)
    return parser


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line):
    """Every option and every field of a config that is named exists and takes this value."""
    program, *words = shlex.split(line)
    if program == "tokgen":
        parser_of(words[0]).parse_args(words[1:])
        return
    assert program == "python" and (ROOT / words[0]).is_file()
    settings, _ = launch.parse(words[1:], "")
    assert ("generator" in settings) == (words[0] == "train_generator.py")


TOLD = re.compile(r"(?:tokgen \w|python train_|python benchmarks/)[^`\n]*")
SOURCES = [*(ROOT / "configs").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def told_commands(text: str) -> set[str]:
    """Commands of a text: indented lines, which a backslash continues, and code within lines."""
    lines = re.findall(r"^ {4}(\S.*)$", re.sub(r"\s*\\+\n\s+", " ", text), re.MULTILINE)
    within = (re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text))
    return {code for code in (*lines, *within) if TOLD.fullmatch(code)}


@pytest.mark.parametrize("document", [*DOCUMENTS, *(str(f.relative_to(ROOT)) for f in SOURCES)])
def test_commands_that_are_told_have_their_options_and_fields(document):
    """Of figures, too: whoever doubts one can measure it again. Capitals stand for something."""
    for command in told_commands((ROOT / document).read_text(encoding="utf-8")):
        words = [word for word in re.sub(r"[\[\]]", "", command).split() if word != "..."]
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[:2] == ["tokgen", "COMMAND"]:
            continue
        if words[0] == "tokgen":
            assert options <= set(parser_of(words[1])._option_string_actions), command
        elif words[1].startswith("benchmarks/"):
            program = (ROOT / words[1]).read_text(encoding="utf-8")
            for part in re.findall(r"^import (\w+)$", program, re.MULTILINE):
                if (ROOT / "benchmarks" / f"{part}.py").exists():  # it may add options
                    program += (ROOT / "benchmarks" / f"{part}.py").read_text(encoding="utf-8")
            assert all(f'"{option}"' in program for option in options), command
        elif "FILE" not in command.partition("--config ")[2].split(" ")[0]:
            kind = words[1].removeprefix("train_").removesuffix(".py")
            words = [word.removesuffix(":NAME") for word in words[2:]]
            some = {"--config": f"configs/{kind}/shapes.py", "--workdir": "DIR"}
            words += [w for name, path in some.items() if name not in options for w in (name, path)]
            launch.parse(words, "")


def test_own_folder_example_is_trained_at_its_size():
    (line,) = [line for line in COMMANDS if "data.path=flowers" in line]
    settings, _ = launch.parse(shlex.split(line)[2:], "")
    make = nnx.eval_shape(lambda: building.tokenizer(settings, rngs=rng.rngs(0)))
    assert settings.data.path == "flowers"
    assert make.layout.grids == ((16, 24),)


def test_every_command_is_told_with_options_that_it_has():
    rows = re.findall(r"^\| `tokgen (\w+)(.*)$", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(cli.COMMANDS)
    for name, rest in rows:
        options = set(parser_of(name)._option_string_actions)
        assert set(re.findall(r"--[\w-]+", rest)) <= options


ROW = re.compile(r"^\| `(configs/\S+)` \| ([\d,]+) \| (\d+) x (\d+) of (\d+)(, pyramid)? \|", re.M)


def counted(reference: str, layout: TokenLayout) -> tuple[int, TokenLayout]:
    """Parameters and layout of a config, from what it builds; of a generator, for a layout."""
    settings = reading.load(reference)

    def make():
        if "generator" in settings:
            return building.generator(settings, layout, 10, rngs=nnx.Rngs(0))
        return building.tokenizer(settings, rngs=nnx.Rngs(0))

    module = nnx.eval_shape(make)
    return state.count(state.split(module)[1]), module.layout


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_table_of_configs():
    rows = ROW.findall(README)
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py")}
    # recipes have their tables in their docstrings, tested beside them; the documents name them all
    told = set()
    for kind in ("tokenizer", "generator"):
        named = re.findall(rf"`(configs/{kind}/\w+\.py)`", document(f"docs/{kind}s.md"))
        told |= set(named)
    measured = {reference.partition(":")[0] for reference, *_ in rows}
    assert measured | told == files and not measured & told
    for reference, parameters, height, width, codes, scales in rows:
        grids = [(int(height), int(width))]
        while scales and grids[0] != (1, 1):
            grids.insert(0, (grids[0][0] // 2, grids[0][1] // 2))
        layout = TokenLayout((int(codes),), tuple(grids))
        assert counted(reference, layout) == (int(parameters.replace(",", "")), layout), reference


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    asked = {re.match(r"[\w-]+", line)[0] for line in asked}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w-]+)`", text.split("## Dependencies")[1]))
    assert asked - told == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_are_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    pattern = r"(?:docs|tests|tokgen|benchmarks|colab|configs)/[\w/]+\.(?:md|py|ipynb)"
    examples = set(re.findall(r"```python\n# (tokgen/[\w/]+\.py)\n", text))
    named = {name for name in re.findall(pattern, text) if not name.endswith("/mine.py")} - examples
    assert named or document in ("docs/checkpoints.md", "docs/data.md")
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_tables_of_recipes_say_what_the_recipes_say(kind):
    """Every published recipe is listed, with its paper and figures that its docstring has too."""
    text = (ROOT / "docs" / f"{kind}s.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `(configs/{kind}/\w+\.py)` \|(.*)\|$", text, re.MULTILINE)
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "configs" / kind).glob("*.py")}
    small = {f"configs/{kind}/{name}.py" for name in ("shapes", "cifar10", "cifar10_f4")}
    assert files - small == {path for path, _ in rows}
    for path, cells in rows:
        told = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert "arXiv" in told or "arXiv" not in cells, path
        figures = re.findall(r"\d+\.\d+(?![\d.]*[MB])", cells.split("arXiv:")[-1])
        missing = [figure for figure in figures if figure not in told]
        assert not missing, (path, missing)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_knows_a_machine(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert not re.search(r"/home/|/root/|/tmp/", text)
