"""The `tokgen` program: subcommands, help, exit codes.

Exit codes: 0 done, 2 something the user can mend (one message, no traceback), 130 interrupted
(Ctrl-C, SIGINT), 141 when nobody reads what is printed (a closed pipe), 143 ended by SIGTERM. A
traceback is always a bug. Nothing heavy is imported before a subcommand is chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import itertools
import keyword
import os
import platform
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence

# Name of the file in tokgen/commands -> its line in the help, which is shown without importing it.
COMMANDS = {
    "demo": "train a tokenizer and a generator on procedural shapes; write a page to look at",
    "data": "show what is understood of a set of images, and which cannot be read",
    "pretokenize": "turn images into token shards with a trained tokenizer",
    "sample": "draw images with a trained generator",
    "reconstruct": "put images through a tokenizer and show them beside the originals",
    "evaluate": "measure reconstructions or held-out likelihood; score samples under a protocol",
    "reference": "make the statistics that samples are scored against",
    "compare": "put scored runs side by side: a table, plots, samples of the same seeds",
    "sweep": "score guidance, temperature and steps on shared seeds; the best, with error bars",
    "import": "turn published weights into a checkpoint",
    "export": "write a checkpoint as safetensors, and in the form of its published system",
    "parity": "hold published weights and outputs against our model, array by array",
    "matrix": "show which generator fits which tokenizer, and why the others do not",
    "checkpoint": "show what is in a checkpoint, and verify it",
}

# Import name of an optional package -> the extra in pyproject.toml that installs it.
EXTRAS = {"simplejpeg": "fastdata", "huggingface_hub": "hub"}

# By convention of shells, 128 and the number of the signal.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(BaseException):
    """A signal has ended the work; says how far it came. No error: nothing is to be mended."""

    def __init__(self, number: int, said: str):
        super().__init__(said)
        self.number = signal.Signals(number)


# What the figures of a run may depend on.
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
        print(f"tokgen: error: {_unknown(name)}", file=sys.stderr)
        return 2
    return call(f"tokgen {name}", lambda: _run(name, rest))


def call(program: str, run: Callable[[], None]) -> int:
    """Call `run`; the exit code, after one message for an error that the user can mend.

    The training programs end through here too, so that every program fails in the same words.
    """
    try:
        try:
            with _terminable():
                run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return CODES[signal.SIGINT]
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return CODES[stopped.number]
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        print(
            f"{program}: error: this needs the package {package}, which is not installed; "
            f'remedy: pip install "tokgen[{extra}]"',
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        # here and not above: interfaces imports jax, and a help text must not wait for it
        from tokgen import interfaces

        if not isinstance(error, interfaces.UserError):
            raise
        from tokgen import report

        print(f"{program}: error: {report.printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _unheard()
        return 128 + signal.SIGPIPE
    except OSError as error:
        from tokgen import output

        if error.errno not in output.ENVIRONMENT:
            raise
        print(f"{program}: error: {output.described(error, option='')}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        said = _exhausted(program, error)
        if not said:
            raise
        print(f"{program}: error: {said}", file=sys.stderr)
        return 2
    return 0


def _exhausted(program: str, error: MemoryError | RuntimeError) -> str:
    """What is to be said of an error that means no memory, or no room; empty for any other."""
    said = (str(error).strip() or "memory cannot be allocated").splitlines()[0][:300]
    if "No space left" in str(error):
        return f"the disk is full ({said}); make room and run the same command again"
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    name, option = program.removeprefix("tokgen "), "--config.batch_size"
    if name in COMMANDS:
        option = "--batch" if "--batch " in _parser_of(name).format_help() else ""
    fewer = f"fewer images at a time with a smaller {option}, " if option else ""
    return (
        f"this needs more memory than there is ({said}); remedy: {fewer}smaller images, or a "
        "machine with more"
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does: files are closed, one line is said."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        signal.signal(number, signal.SIG_DFL)  # the second time at once
        raise Stopped(number, "terminated")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unheard() -> None:
    """Nobody reads on, as in `tokgen matrix | head -1`: what is still to be said goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # streams that are no files
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


def versions() -> str:
    """Versions of tokgen, Python and of the packages that a figure may depend on, one a line."""
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


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(COMMANDS)}"
    return f"there is no command {name!r}; {remedy}"


def _run(name: str, words: Sequence[str]) -> None:
    parser = _parser_of(name)
    args = parser.parse_args(words)
    # after the help, which must not wait for jax
    from tokgen import options

    args.given = options.given(parser, words)
    module(name).run(args)


def _parser_of(name: str) -> argparse.ArgumentParser:
    command = module(name)
    parser = argparse.ArgumentParser(
        prog=f"tokgen {name}", description=command.__doc__, allow_abbrev=False
    )
    command.arguments(parser)
    return parser


def module(name: str) -> types.ModuleType:
    """The file of a subcommand; `import`, a word of Python's own, is in `import_.py`."""
    return importlib.import_module(f"tokgen.commands.{file(name)}")


def file(name: str) -> str:
    """The name of that file, without its ending."""
    return f"{name}_" if keyword.iskeyword(name) else name


if __name__ == "__main__":
    sys.exit(main())
