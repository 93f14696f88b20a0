"""From a command line to a checked config, devices and a locked work directory."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence

import ml_collections

from tokgen import coordination, distributed, options, report, runtime, storage
from tokgen.checkpoints import checkpoint, pulling, run as runs
from tokgen.config import reading
from tokgen.interfaces import UserError
from tokgen.nn import precision
from tokgen.zoo import model as zoo

REPEAT = 2.0  # seconds in which a signal that comes again is the same request


@dataclasses.dataclass(frozen=True)
class Request:
    """What a training run is asked for.

    Attributes:
        workdir: where the run is kept; one that stands there goes on.
        accept: what may differ from the run that stands there, "data" or nothing.
        back: the step to go on from, later ones are set aside; None: the latest.
    """

    settings: ml_collections.ConfigDict
    workdir: pathlib.Path
    accept: tuple[str, ...] = ()
    back: int | None = None


def parse(
    argv: Sequence[str], description: str
) -> tuple[ml_collections.ConfigDict, argparse.Namespace]:
    """(config with its overrides, options) of a training program's command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=PATH[:variant] --workdir=DIR [--from=STEP] [--yes] "
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
    options.processes(parser)
    options.consent(parser)
    arguments, rest = parser.parse_known_args(argv)
    overrides, iterator = [], iter(rest)
    for text in iterator:
        if not text.startswith("--config."):
            parser.error(f"unknown argument {text!r}; fields of the config are --config.NAME=VALUE")
        name = text.removeprefix("--config.")
        overrides.append(name if "=" in name else f"{name}={next(iterator, '')}")
    return reading.load(arguments.config, overrides), arguments


def _named(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder for the run")
    try:
        return storage.path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _checkpoints(settings: ml_collections.ConfigDict) -> list[str]:
    """The fields of a config that are CKPTs."""
    data = settings.get("data", {})
    return [settings.get("init_from", ""), settings.get("teacher", ""), data.get("tokenizer", "")]


def _pictures(settings: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[str]:
    """Folders of images that a new run reads: its own would be taken for a part of them."""
    with storage.reached(workdir):
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
        self.number, self.at, self.passed = 0, 0.0, False
        for number in runtime.CODES:
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.at > REPEAT:
            if coordination.job() is not None:  # the others hear of it
                raise runtime.Stopped(number, "ended at once; the step that was saved last stands")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.at = number, now
            report.say(
                "stopping after this step; a checkpoint is being saved (again: stop at once)"
            )

    def agreed(self) -> bool:
        """Whether to end after this step. Asked once a step: where many processes train one model,
        all come to the same answer here, whichever of them was asked.
        """
        job = coordination.job()
        if job is None:
            return bool(self.number)
        if self.number and not self.passed:
            self.passed = True
            job.ask(self.number)
        return job.stops()

    def end(self, said: str) -> None:
        """Where a run ends: says how far it came; a `runtime.Stopped` when it was asked to end."""
        distributed.together("saved")  # who leaves first ends the others
        job = coordination.job()
        if number := self.number if job is None else job.stopped:
            raise runtime.Stopped(number, f"{said}; the same command goes on from there")
        report.say(said)


def run(
    story: Callable[[Request], None],
    check: Callable[[ml_collections.ConfigDict], None],
    description: str,
) -> None:
    """A training program: a user's mistake ends in one message and exit code 2.

    `check` looks at the config before a work directory or a device is touched.
    """

    def told() -> None:
        runtime.join(sys.argv[1:])
        settings, arguments = runtime.parsed(parse, sys.argv[1:], description)
        check(settings)
        options_ = {name: value for name, value in vars(arguments).items() if name != "process"}
        distributed.check_alike(
            {"config": settings.to_dict(), "option": options_, "version": checkpoint.versions()}
            | {"platform": distributed.platform()}
        )
        if distributed.many():
            # before anything asks who is there: jax counts its devices once
            runtime.devices(settings.batch_size // distributed.count())
            distributed.check_devices()
        for named in _checkpoints(settings):
            if zoo.is_name(named):
                # first: an import starts jax, which counts its devices once
                runtime.devices(settings.batch_size)
                # every process: hosts may have caches of their own
                pulling.pull(named, yes=arguments.yes)
        with runs.lock(arguments.workdir, _pictures(settings, arguments.workdir)):
            if arguments.start is not None:
                distributed.first(runs.check_whole, arguments.workdir, arguments.start)
            runtime.devices(settings.batch_size)
            precision.asked(settings.precision.compute)
            accept = ("data",) if arguments.accept_data else ()
            story(Request(settings, arguments.workdir, accept, arguments.start))

    sys.exit(runtime.call(pathlib.Path(sys.argv[0]).name, told))
