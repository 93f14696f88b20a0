"""The `tokgen` program: its subcommands and their help; runtime.py says how a program ends.

Nothing heavy is imported before a subcommand is chosen.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import keyword
import platform
import sys
import types
from collections.abc import Sequence

from tokgen import choices, coordination, options, runtime

# Name of the file in tokgen/commands -> its line in the help, which is shown without importing it.
COMMANDS = {
    "demo": "train a tokenizer and a generator on procedural shapes; write a page to look at",
    "data": "show what is understood of a set of images, and which cannot be read",
    "pretokenize": "turn images into token shards with a trained tokenizer",
    "sample": "draw images with a trained generator",
    "app": "serve a page to play with: draw, edit, compare, look at tokens, in a browser",
    "edit": "draw parts of images anew: in-painting, out-painting, variations, finer scales",
    "reconstruct": "put images through a tokenizer and show them beside the originals",
    "evaluate": "measure reconstructions or held-out likelihood; score samples under a protocol",
    "reference": "make the statistics that samples are scored against",
    "compare": "put scored runs side by side: a table, plots, samples of the same seeds",
    "sweep": "score guidance, temperature and steps on shared seeds; the best, with error bars",
    "plan": "say what training or drawing needs before it runs: memory, time, mesh, cost",
    "models": "list the published models that have a name, or say everything of one",
    "pull": "fetch a published model by name, with its tokenizer, into the cache",
    "import": "turn published weights into a checkpoint",
    "export": "write a checkpoint as safetensors, and in the form of its published system",
    "parity": "hold published weights and outputs against our model, array by array",
    "matrix": "show which generator fits which tokenizer, and why the others do not",
    "checkpoint": "show what is in a checkpoint, and verify it",
}


# What the metrics of a run may depend on.
REPORTED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = list(itertools.takewhile(lambda word: word.startswith("-"), words))
    parser = _parser()
    if parser.parse_args(options).version:
        print(versions())
        return 0
    if len(options) == len(words):
        parser.print_help(sys.stderr)
        return 2
    name, *rest = words[len(options) :]
    if name not in COMMANDS:
        print(f"tokgen: error: {choices.refusal(COMMANDS, name, 'the command')}", file=sys.stderr)
        return 2
    return runtime.call(f"tokgen {name}", lambda: _run(name, rest), lambda: _fewer(name))


def versions() -> str:
    """Versions of tokgen, Python and of the packages that a metric may depend on, one a line."""
    lines = [f"tokgen {_version('tokgen')}", f"python {platform.python_version()}"]
    return "\n".join([*lines, *(f"{package} {_version(package)}" for package in REPORTED)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="tokgen",
        usage="tokgen [--help] [--version] COMMAND ...",
        description="Images into discrete tokens, and tokens into images.",
        epilog="\n".join(
            ["commands:", *lines, "", "`tokgen COMMAND --help` says what a command takes."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    return parser


def _fewer(name: str) -> str:
    """The option of a command that says how many images are taken at a time; "" if none does."""
    return "--batch" if "--batch " in _parser_of(name).format_help() else ""


def _run(name: str, words: Sequence[str]) -> None:
    parser = _parser_of(name)
    if options.may_be_many(parser):
        runtime.join(words)
    args = runtime.parsed(parser.parse_args, words)
    args.given = options.given(parser, words)
    command = module(name)
    if coordination.job() is not None:
        _check_job(name, args)
    # what is refused anyway is refused before something is fetched for it
    if hasattr(command, "check"):
        command.check(args)
    for argument in options.checkpoints(parser):
        asked = getattr(args, argument)
        several = isinstance(asked, list)
        found = [_place(one, args.yes) for one in (asked if several else [asked])]
        setattr(args, argument, found if several else found[0])
    command.run(args)


def _check_job(name: str, args: argparse.Namespace) -> None:
    """An error, the same on all, where the processes of a job were not started alike."""
    from tokgen import distributed

    own = ("process", "given")  # a set is told in another order by each process
    asked = {option: value for option, value in vars(args).items() if option not in own}
    versions_ = dict(line.split(" ", 1) for line in versions().splitlines())
    told = {"command": name, "option": asked, "version": versions_}
    distributed.check_alike(told | {"platform": distributed.platform()})
    runtime.devices()
    distributed.check_devices()


def _place(checkpoint: str, yes: bool) -> str:
    """A CKPT as a path: of a published model that is named, its folder, pulled if need be."""
    from tokgen.zoo import model

    if not model.is_name(checkpoint):
        return checkpoint
    from tokgen.checkpoints import pulling

    return str(pulling.pull(checkpoint, yes=yes))


def _parser_of(name: str) -> argparse.ArgumentParser:
    command = module(name)
    parser = argparse.ArgumentParser(
        prog=f"tokgen {name}", description=command.__doc__, allow_abbrev=False
    )
    command.arguments(parser)
    if options.checkpoints(parser):
        options.consent(parser)
    return parser


def module(name: str) -> types.ModuleType:
    """The file of a subcommand; `import`, a word of Python's own, is in `import_.py`."""
    return importlib.import_module(f"tokgen.commands.{file(name)}")


def file(name: str) -> str:
    """The name of that file, without its ending."""
    return f"{name}_" if keyword.iskeyword(name) else name


if __name__ == "__main__":
    sys.exit(main())
