"""From a command line to a checked config, devices and a locked work directory."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence

import jax
import ml_collections

from tokgen import cli, config, report, runs


def cache_folder() -> pathlib.Path:
    """Where compiled programs and the demo's judge are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("TOKGEN_CACHE") or pathlib.Path(base) / "tokgen")


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def devices(batch_size: int = 0) -> None:
    """Set jax up before its first computation; on a CPU, a device per core that divides the batch.

    XLA's CPU threads leave a part of a second core idle on small networks: with the batch over a
    device per core, a tokenizer's step takes 0.7 of the time (benchmarks/RESULTS.md).
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    count = int(os.environ.get("JAX_NUM_CPU_DEVICES") or 8 * asked)
    if batch_size and not count:
        count = max(n for n in range(1, min(cores(), 8) + 1) if batch_size % n == 0)
        jax.config.update("jax_num_cpu_devices", count)
    if count > 1:
        # XLA sizes its thread pool by NPROC. With one thread per device, programs with collectives
        # that are in flight together take each other's threads and wait for ever (jax 0.10.2).
        os.environ.setdefault("NPROC", str(max(4 * count, cores())))


def parse(argv: Sequence[str], description: str) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """(config with its overrides, work directory) of a training program's command line."""
    arguments, overrides = _arguments(argv, description)
    return config.load(arguments.config, overrides), arguments.workdir


def accepted(argv: Sequence[str], description: str) -> tuple[str, ...]:
    """What may have changed since a run was stopped, by its command line: "data" or nothing."""
    return ("data",) if _arguments(argv, description)[0].accept_data else ()


def _arguments(argv: Sequence[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """(the arguments, the config's overrides) of a training program's command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=PATH[:variant] --workdir=DIR [--config.FIELD=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a config file, as configs/tokenizer/x.py")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="where the run is kept")
    parser.add_argument(
        "--accept-data",
        action="store_true",
        help="go on with images that were repaired, removed or added since the run was stopped",
    )
    arguments, rest = parser.parse_known_args(argv)
    overrides, iterator = [], iter(rest)
    for text in iterator:
        if not text.startswith("--config."):
            parser.error(f"unknown argument {text!r}; fields of the config are --config.NAME=VALUE")
        name = text.removeprefix("--config.")
        overrides.append(name if "=" in name else f"{name}={next(iterator, '')}")
    return arguments, overrides


class Stop:
    """True once the process was asked to end: the loop finishes its step, saves, and returns."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked:  # the second time: at once, the previous checkpoint stands
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        report.say("stopping after this step; a checkpoint is being saved (again: stop at once)")
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def run(story: Callable[..., None], description: str) -> None:
    """A training program: a user's mistake ends in one message and exit code 2.

    Its `story` is told the config, the work directory, and what may have changed.
    """

    def told() -> None:
        settings, workdir = parse(sys.argv[1:], description)
        devices(settings.batch_size)
        with runs.lock(workdir):
            story(settings, workdir, accepted(sys.argv[1:], description))

    sys.exit(cli.call(pathlib.Path(sys.argv[0]).name, told))
