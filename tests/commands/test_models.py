"""`tokgen models`: a table that fits a terminal, everything of one, and the same for programs."""

import json
import re
import subprocess
import sys

import pytest

from tests import command_line
from tokgen import cli
from tokgen.checkpoints import checkpoint
from tokgen.commands import models
from tokgen.zoo import model as zoo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path))
    return tmp_path


def said(capsys, *words) -> str:
    capsys.readouterr()
    assert command_line.call("models", *words) == 0
    found = capsys.readouterr()
    assert not found.err
    return found.out


def names(table: str) -> list[str]:
    return re.findall(r"^[ *] ([a-z][\w-]+) ", table, re.MULTILINE)


def of(kind: str) -> list[str]:
    return [name for name, model in zoo.known().items() if model.kind == kind]


@pytest.mark.parametrize(("words", "kind"), [((), "generator"), (("--tokenizers",), "tokenizer")])
def test_the_table_has_every_row_and_fits_a_terminal(capsys, words, kind):
    table = said(capsys, *words)
    assert names(table) == of(kind)
    assert all(len(line) <= 100 and line == line.rstrip() for line in table.splitlines())
    head, *rows = [line for line in table.splitlines() if line.startswith("  ")]
    assert ("rFID" in head) == (kind == "tokenizer") and "FID" in head
    for line in rows:
        name, parameters, size, unit, fid, pixels, *_ = line.removeprefix("*").split()
        model = zoo.named(name)
        assert float(parameters[:-1]) == pytest.approx(
            model.parameters / {"M": 1e6, "B": 1e9}[parameters[-1]], rel=5e-3
        )
        nbytes = float(size) * {"MB": 1e6, "GB": 1e9}[unit]
        assert nbytes == pytest.approx(model.size, rel=5e-3)
        assert fid == "-" if model.fid is None else float(fid) == model.fid
        assert pixels == str(model.pixels)
        assert model.licence in line and line.endswith(model.tokenizer or model.licence)


def test_a_system_or_a_family(capsys):
    assert names(said(capsys, "--system", "rar")) == ["rar-b", "rar-l", "rar-xl", "rar-xxl"]
    assert names(said(capsys, "--system", "maskbit_lfqbert"))[0] == "maskbit-10bit"
    both = said(capsys, "--system", "titok")
    assert {"titok-l32", "titok-tokenizer-l32"} < set(names(both)) and "(r)FID" in both
    assert names(said(capsys, "--system", "titok", "--tokenizers"))[-1].startswith("titok-token")


def test_what_is_here_is_marked(capsys, cache):
    assert "*" not in said(capsys)
    (cache / "models" / "rar-b").mkdir(parents=True)
    assert models.folder("rar-b") == checkpoint.pulled("rar-b")
    table = said(capsys)
    assert re.findall(r"^\* (\S+)", table, re.MULTILINE)[0] == "rar-b" and str(cache) in table
    assert "tokgen pull" not in said(capsys, "rar-b")
    assert json.loads(said(capsys, "rar-b", "--json"))["rar-b"]["here"] == str(
        cache / "models" / "rar-b"
    )


@pytest.mark.parametrize("name", zoo.known())
def test_everything_of_one(name):
    """Every command that is named there has these options."""
    model = zoo.named(name)
    text = models.described(name, model)
    fields = [model.file, model.licence, model.paper, f"{model.parameters:,}", model.system]
    assert all(field in text for field in (*fields, *model.overrides, model.text, model.otherwise))
    *before, last = models.commands(name, model)
    fetched = [line for line in before if line.startswith("# fetch ")]
    assert bool(fetched) == bool(model.address) and text.endswith(last)
    assert not fetched or fetched[-1] == f"# fetch {model.address}"
    assert all(len(line) <= 100 for line in text.splitlines())
    command = last.split()[1]
    options = cli._parser_of(command)._option_string_actions
    assert set(re.findall(r"--[a-z-]+", last)) <= set(options) and name in last


def test_the_same_for_programs(capsys):
    found = json.loads(said(capsys, "--json"))
    assert list(found) == list(zoo.known())
    for name, row in found.items():
        model = zoo.named(name)
        assert row["kind"] == model.kind and row["here"] is None
        assert tuple(row["overrides"]) == model.overrides and row["fid"] == model.fid
    assert list(json.loads(said(capsys, "--json", "--tokenizers"))) == of("tokenizer")


def test_a_typo_is_told_with_the_nearest(capfd):
    assert "did you mean rar-xl or" in command_line.refused(capfd, "models", "rar-x")
    assert "did you mean 'rar'" in command_line.refused(capfd, "models", "--system", "rarr")


def test_options_without_an_effect_are_refused(capfd):
    none = command_line.refused(capfd, "models", "--system", "rar", "--tokenizers")
    assert "of rar no tokenizer has a name" in none
    for words in (("--system", "rar"), ("--tokenizers",)):
        assert "the whole table" in command_line.refused(capfd, "models", "rar-b", *words)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (999_600, "1.00M"), (71_883_403, "71.9M")]
    + [(99_960_000, "100M"), (2_010_020_356, "2.01B"), (10**13, "10000B")],
)
def test_numbers_have_three_digits(number, text):
    assert models.counted(number) == text


def test_the_command_needs_no_jax():
    code = (
        "import sys; from tokgen import cli; cli.main(['models']); cli.main(['models', 'rar-b']);"
        "print(*{'jax', 'flax', 'numpy', 'ml_collections'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "" and "rar-xxl" in done.stdout
