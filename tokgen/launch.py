"""From a command line to a checked config, devices and a locked work directory."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import ml_collections

from tokgen import checkpoint, cli, config, report, runs
from tokgen.interfaces import UserError

REPEAT = 2.0  # seconds in which a signal that comes again is the same request


def cache_folder() -> pathlib.Path:
    """Where compiled programs and the demo's judge are kept between runs."""
    if os.environ.get("TOKGEN_CACHE"):
        return pathlib.Path(os.environ["TOKGEN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(base or pathlib.Path.home() / ".cache") / "tokgen"
    except RuntimeError:  # a user without a home, as in some containers
        return pathlib.Path(tempfile.gettempdir()) / f"tokgen-{os.getuid()}"


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def devices(batch_size: int = 0) -> None:
    """Set jax up before its first computation; on a CPU, a device per core that divides the batch.

    XLA's CPU threads leave a part of a second core idle on small networks: with the batch over a
    device per core, a tokenizer's step takes 0.7 of the time (benchmarks/RESULTS.md).
    """
    compiled = cache_folder() / "xla"
    try:
        compiled.mkdir(parents=True, exist_ok=True)
        writable = os.access(compiled, os.W_OK)
    except OSError:
        writable = False
    if writable:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    else:
        report.say(f"compiled programs are not kept: {compiled} cannot be written (TOKGEN_CACHE)")
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
    check_platform()


def check_platform() -> None:
    """An error where the platform that was asked for, or a device that is here, cannot be used.

    This starts jax: the next computation would, and would end in jax's own words.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where no CUDA plugin is there
        asked = jax.config.jax_platforms or ""
        said = str(error).partition(" (set JAX_PLATFORMS")[0] or "jax has no plugin for it"
        found = said.splitlines()[0].rstrip(".")
        need = f"JAX_PLATFORMS={asked} needs such a device" if asked else "a device cannot be used"
        raise UserError(f"{need}; found: {found}; {_remedy(asked, said)}") from error


def _remedy(asked: str, said: str) -> str:
    """What helps against a platform that cannot be used."""
    other = "unset JAX_PLATFORMS to take what is there, or set it to cpu"
    if "in use" in said or "lockfile" in said:
        return "stop the process that has it, or set JAX_PLATFORMS=cpu for this one"
    if "libtpu" in said:
        return f"on a TPU host pip install 'tokgen[tpu]'; else {other}"
    if not {"cuda", "gpu"} & set(asked.split(",")):
        return other
    if "plugin" in said or "known backends" in said:
        return f"for an NVIDIA GPU pip install 'tokgen[cuda13]' (or cuda12); else {other}"
    return f"see with nvidia-smi whether a GPU and its driver are there; else {other}"


def parse(
    argv: Sequence[str], description: str
) -> tuple[ml_collections.ConfigDict, argparse.Namespace]:
    """(config with its overrides, options) of a training program's command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=PATH[:variant] --workdir=DIR [--from=STEP] "
        "[--config.FIELD=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a config file, as configs/tokenizer/x.py")
    parser.add_argument("--workdir", required=True, type=_named, help="where the run is kept")
    parser.add_argument(
        "--accept-data",
        action="store_true",
        help="go on with images that were repaired, removed or added since the run was stopped",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=int,
        metavar="STEP",
        help="resume at this step of the work directory; later ones are set aside, not deleted",
    )
    arguments, rest = parser.parse_known_args(argv)
    overrides, iterator = [], iter(rest)
    for text in iterator:
        if not text.startswith("--config."):
            parser.error(f"unknown argument {text!r}; fields of the config are --config.NAME=VALUE")
        name = text.removeprefix("--config.")
        overrides.append(name if "=" in name else f"{name}={next(iterator, '')}")
    return config.load(arguments.config, overrides), arguments


def _named(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder for the run")
    return pathlib.Path(text)


def _pictures(settings: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[str]:
    """Folders of images that a new run reads: its own would be taken for a part of them."""
    if (workdir / checkpoint.FOLDER).exists():
        return []
    data = settings.get("data", {})
    return [str(data.get(name) or "") for name in ("path", "images")]


class Stop:
    """Hears SIGTERM and SIGINT: the loop then finishes its step, saves it, and ends.

    A terminal and a wrapper may both pass on one request, so what repeats it within two seconds is
    the same one. A later repetition ends the process at once; the previous checkpoint stands.
    """

    def __init__(self):
        self.number, self.at = 0, 0.0
        for number in cli.CODES:
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.at > REPEAT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.at = number, now
            report.say(
                "stopping after this step; a checkpoint is being saved (again: stop at once)"
            )

    def agreed(self) -> bool:
        """Whether to end after this step. Asked once a step: where many processes train one model,
        this is the place where all must come to the same answer.
        """
        return bool(self.number)

    def end(self, said: str) -> None:
        """Where a run ends: says how far it came; a `cli.Stopped` when it was asked to end."""
        if self.number:
            raise cli.Stopped(self.number, f"{said}; the same command goes on from there")
        report.say(said)


def run(
    story: Callable[..., None],
    check: Callable[[ml_collections.ConfigDict], None],
    description: str,
) -> None:
    """A training program: a user's mistake ends in one message and exit code 2.

    Its `story` is told the config, the work directory, what may have changed, and the step to go
    back to. `check` looks at the config before a work directory or a device is touched.
    """

    def told() -> None:
        settings, arguments = parse(sys.argv[1:], description)
        check(settings)
        with runs.lock(arguments.workdir, _pictures(settings, arguments.workdir)):
            if arguments.start is not None:
                runs.check_whole(arguments.workdir, arguments.start)
            devices(settings.batch_size)
            accept = ("data",) if arguments.accept_data else ()
            story(settings, arguments.workdir, accept, arguments.start)

    sys.exit(cli.call(pathlib.Path(sys.argv[0]).name, told))
