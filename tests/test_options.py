"""An option that has no effect in the mode that is asked for is refused, by every command."""

import argparse
import ast
import pathlib

import pytest

from tokgen import cli, options, runtime
from tokgen.checkpoints import checkpoint
from tokgen.evaluation import (
    checkpoint_validation,
    given_images,
    inputs,
    references,
    score_settings,
)

ROOT = pathlib.Path(options.__file__).parent
JOB = {"coordinator", "processes", "process", "wait"}  # who the others of a job are
ALWAYS = {"checkpoint", "out", *JOB}  # of tokgen evaluate, in every mode


def parser_of(command):
    parser = argparse.ArgumentParser()
    cli.module(command).arguments(parser)
    return parser


def optional(command):
    return [a for a in parser_of(command)._actions if a.option_strings and a.dest != "help"]


def words(action):
    """The option with a value that it takes, its default where it has one."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    value = action.choices[0] if action.choices else action.default
    if isinstance(value, list):
        value = None
    fallback = {int: 1, float: 1.0}.get(action.type, "x")
    fallback = "1,1,-1" if action.dest == "mesh" else fallback  # another is refused before all
    return [action.option_strings[0], str(fallback if value in (None, "") else value)]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_stands_on_the_command_line_is_given_at_whatever_value(command):
    parser = parser_of(command)
    needed = [a for a in parser._actions if a.required and a.dest != "help"]
    base = [word for a in needed for word in (words(a) if a.option_strings else ["x"])]
    for action in optional(command):
        if not action.required:
            found = options.given(parser, [*base, *words(action)])
            assert found == {a.dest for a in needed} | {action.dest}, action.dest
    # and the parser is as it was
    assert vars(parser.parse_args(base)).keys() == {a.dest for a in parser._actions} - {"help"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_read_somewhere(command):
    """By the file of its command, or by those that several commands share."""
    shared = [*(f"commands/{name}.py" for name in ("sample", "evaluate")), "distributed.py"]
    text = "".join(
        (ROOT / file).read_text() for file in [f"commands/{cli.file(command)}.py", *shared]
    )
    read = {
        node.attr
        for node in ast.walk(ast.parse(text.replace("from __future__ import annotations", "")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args"
    }
    assert {a.dest for a in optional(command)} <= read


def test_tokgen_evaluate_says_of_every_option_when_it_has_an_effect():
    named = {action.dest for action in optional("evaluate")}
    assert named - ALWAYS == options.EVALUATE.keys()


class Reached(Exception):
    """All options were taken."""


@pytest.fixture
def faked(monkeypatch):
    """The commands with nothing behind them: what is reached is told."""

    def reached(*_, **__):
        raise Reached

    def of(kind):
        monkeypatch.setattr(checkpoint, "find", lambda path: pathlib.Path(path))
        monkeypatch.setattr(checkpoint, "read_meta", lambda step: {"kind": kind})
        monkeypatch.setattr(score_settings, "kind_of", lambda path: kind)

    for module, name in (
        (checkpoint_validation, "tokenizer"),
        (checkpoint_validation, "generator"),
        (inputs, "reconstructed"),
        (inputs, "drawn"),
        (given_images, "given"),
    ):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(references, "read", lambda *_: None)
    monkeypatch.setattr(runtime, "devices", lambda *_: None)
    monkeypatch.setattr(runtime, "join", lambda words: None)
    return of


SCORE = ["--protocol", "local", "--reference", "r.npz"]
MODES = {
    options.TOKENIZER: ("tokenizer", []),
    options.GENERATOR: ("generator", []),
    options.SAMPLES: ("", SCORE),
    options.RECONSTRUCTED: ("tokenizer", SCORE),
    options.DRAWN: ("generator", SCORE),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_option_of_tokgen_evaluate_in_every_mode(mode, faked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, base = MODES[mode]
    faked(kind)
    for number, action in enumerate(optional("evaluate")):
        if action.dest == "protocol":  # it is what makes the mode
            continue
        used = action.dest in ALWAYS or mode in options.EVALUATE[action.dest]
        line = ["evaluate", "ckpt", *base, *words(action)]
        if base and action.dest != "out":
            line += ["--out", f"out{number}"]
        if used:
            with pytest.raises(Reached):
                cli.main(line)
        else:
            assert cli.main(line) == 2, line
            said = capsys.readouterr().err
            # a generator is told first that it has no reconstructions
            told = options.spelled(action.dest) in said or "reconstructions" in said
            assert told and "Traceback" not in said, said
