"""The process that a program runs in: its devices and caches, signals, exit codes.

Exit codes: 0 done, 2 something the user can mend (one message, no traceback), 130 interrupted
(Ctrl-C, SIGINT), 141 when nobody reads what is printed (a closed pipe), 143 ended by SIGTERM. A
traceback is always a bug. Nothing heavy is imported before it is needed: a help text waits for
none of it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import io
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tokgen import coordination, launchers, options
from tokgen.errors import SharedError, UserError

T = TypeVar("T")
# Import name of an optional package -> the extra in pyproject.toml that installs it.
EXTRAS = {"simplejpeg": "fastdata", "gcsfs": "gcs", "gradio": "app"}

# By convention of shells, 128 and the number of the signal.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Stopped(BaseException):
    """A signal has ended the work; says how far it came. No error: nothing is to be mended."""

    def __init__(self, number: int, said: str):
        super().__init__(said)
        self.number = signal.Signals(number)


def call(
    program: str,
    run: Callable[[], None],
    fewer: Callable[[], str] = lambda: "--config.batch_size",
) -> int:
    """Call `run`; the exit code, after one message for an error that the user can mend.

    The training programs end through here too, so that every program fails in the same words, and
    all processes of a job together. `fewer` is asked for the option that says how many images are
    taken at a time; "" if none does.
    """
    code, line, trace = 0, "", None
    try:
        try:
            with _terminable():
                run()
        finally:
            sys.stdout.flush()
    except BaseException as error:
        job = coordination.job()
        found = _said(error, fewer)
        if found is None and job is None:
            raise
        if isinstance(error, SystemExit):
            found = error.code or 0, f"{job.called()} ended" if error.code else ""
        elif found is None:
            trace = error
            found = 1, f"{job.called()} ended in {type(error).__name__}: {error}"
        elif job is not None and found[0] == 2 and not isinstance(error, SharedError):
            found = 2, f"error: {job.called()}: {found[1].removeprefix('error: ')}"
        code, line = found[0], f"{program}: {found[1]}" if found[1] else ""
    if (job := coordination.job()) is not None:
        with _ending(job, program, code):
            job.end(code, line, lambda: trace and traceback.print_exception(trace))
    elif line:
        print(line, file=sys.stderr)
    return code


def _said(error: BaseException, fewer: Callable[[], str]) -> tuple[int, str] | None:
    """(exit code, what is said) of what ends a program; None of a bug."""
    if isinstance(error, KeyboardInterrupt):
        return CODES[signal.SIGINT], "interrupted"
    if isinstance(error, Stopped):
        return CODES[error.number], str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return None
        return 2, (
            f"error: this needs the package {package}, which is not installed; "
            f'remedy: pip install "tokgen[{EXTRAS[package]}]"'
        )
    if isinstance(error, UserError):
        from tokgen import report

        return 2, f"error: {report.printable(str(error))}"
    if isinstance(error, BrokenPipeError):
        _unheard()
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, OSError):
        from tokgen.output import failures

        if error.errno in failures.ENVIRONMENT:
            return 2, f"error: {failures.described(error, option='')}"
    if isinstance(error, MemoryError | RuntimeError):
        said = _exhausted(error, fewer)
        return (2, f"error: {said}") if said else None
    return None


def _exhausted(error: MemoryError | RuntimeError, fewer: Callable[[], str]) -> str:
    """What is to be said of an error that means no memory, or no room; empty for any other."""
    said = (str(error).strip() or "memory cannot be allocated").splitlines()[0][:300]
    if "No space left" in str(error):
        return f"the disk is full ({said}); make room and run the same command again"
    if not is_exhausted(error):
        return ""
    option = fewer()
    less = f"fewer images at a time with a smaller {option}, " if option else ""
    if option == "--config.batch_size":
        less = f"the batch in parts with --config.accumulate=2 (or 4, 8), or a smaller {option}, "
    return (
        f"this needs more memory than there is ({said}); remedy: {less}smaller images, or a "
        "machine with more"
    )


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that there is no memory, of the host or of a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


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


@contextlib.contextmanager
def _ending(job: coordination.Job, program: str, code: int) -> Iterator[None]:
    """A signal ends all processes of a job where this one is done (code 0) and waits for others.

    On the way out after an error nothing does: the others are to hear of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        if code == 0:
            said = "interrupted" if number == signal.SIGINT else "terminated"
            with contextlib.suppress(RuntimeError):  # jax is about to end this process
                job.break_off(CODES[number], f"{program}: {said}")

    before = {number: signal.signal(number, stop) for number in CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _unheard() -> None:
    """Nobody reads on, as in `tokgen matrix | head -1`: what is still to be said goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # streams that are no files
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())


def join(words: Sequence[str]) -> None:
    """Be one of the processes of a job, where a command line or a launcher says that this is one.

    The first thing that a program does: what is wrong with the rest of its words, all then hear.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.processes(parser)
    args, _ = parser.parse_known_args(words)
    given = {args.coordinator, args.processes, args.process} - {"", None}
    if (given or launchers.is_started()) and not {"-h", "--help"} & {*words}:
        from tokgen import distributed

        try:
            distributed.initialize(args)
        except (KeyboardInterrupt, Stopped) as end:
            # jax waits on for the others, in threads that would hold this process, and be loud
            number = end.number if isinstance(end, Stopped) else signal.SIGINT
            atexit.register(os._exit, CODES[number])
            raise


def parsed(parse: Callable[..., T], *args) -> T:
    """What `parse` makes of a command line; where it refuses, an error that all processes hear."""
    if coordination.job() is None:
        return parse(*args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(*args)
    except SystemExit as end:
        if not end.code:
            raise
        refusal = re.sub(r"(?s).*?^\S+: error: ", "", said.getvalue(), flags=re.M)
        said.truncate(0)
        raise UserError(refusal.strip()) from end
    finally:
        sys.stderr.write(said.getvalue())


def process() -> tuple[int, int]:
    """Which process of how many this is; no device is touched where it is one alone."""
    if "jax" not in sys.modules:
        return 0, 1
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def cache_folder() -> pathlib.Path:
    """Where compiled programs and local classifiers are kept between runs."""
    if os.environ.get("TOKGEN_CACHE"):
        return pathlib.Path(os.environ["TOKGEN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return pathlib.Path(base or pathlib.Path.home() / ".cache") / "tokgen"
    except RuntimeError:  # a user without a home, as in some containers
        return pathlib.Path(tempfile.gettempdir()) / f"tokgen-{os.getuid()}"


def release() -> None:
    """Give memory that is free back to the system; glibc keeps what lies between what is used.

    Pieces of a network, freed by other threads than those that asked for them, leave such memory
    behind. Nothing elsewhere: other allocators give it back, or can't.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def devices(batch_size: int = 0) -> None:
    """Set jax up before its first computation; on a CPU, a device per core that divides the batch.

    XLA's CPU threads leave a part of a second core idle on small networks: with the batch over a
    device per core, a tokenizer's step takes 0.7 of the time (benchmarks/RESULTS.md).
    """
    import jax

    from tokgen import report

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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    count = int(os.environ.get("JAX_NUM_CPU_DEVICES") or 8 * asked)
    if batch_size and not count:
        count = max(n for n in range(1, min(cores(), 8) + 1) if batch_size % n == 0)
        count = _counted(count)
    if count > 1:
        # XLA sizes its thread pool by NPROC. With one thread per device, programs with collectives
        # that are in flight together take each other's threads and wait for ever (jax 0.10.2).
        os.environ.setdefault("NPROC", str(max(4 * count, cores())))
    check_platform()


@contextlib.contextmanager
def over(mesh: str) -> Iterator[None]:
    """What is loaded, drawn and measured inside lies over the devices as `--mesh` says; "": over
    all, each with the whole of a network.

    Raises:
        UserError: it isn't three numbers, or other ones than there are devices.
    """
    import jax

    from tokgen import distributed, sharding

    if not mesh and not distributed.many():
        yield
        return
    sizes = options.sizes(mesh or "-1,1,1")
    devices()
    # each process of a job draws and measures on its own devices
    with jax.set_mesh(sharding.make_mesh(*sizes, devices=jax.local_devices())):
        yield


def _counted(count: int) -> int:
    """Ask jax for so many CPU devices; how many there are: once it has started they stay."""
    import jax

    if jax.config.jax_num_cpu_devices != count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            return jax.local_device_count()
    return count


def check_platform() -> None:
    """An error where the platform that was asked for, or a device that is here, cannot be used.

    This starts jax: the next computation would, and would end in jax's own words.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where no CUDA plugin is there
        asked = jax.config.jax_platforms or ""
        said = str(error).partition(" (set JAX_PLATFORMS")[0] or "jax has no plugin for it"
        found = said.splitlines()[0].rstrip(".")
        need = f"JAX_PLATFORMS={asked} needs such a device" if asked else "a device cannot be used"
        raise UserError(f"{need}; found: {found}; {_remedy(asked, said)}") from error
    if jax.process_count() > 1 and coordination.job() is None:
        raise UserError(
            f"jax sees the devices of {jax.process_count()} processes, and this one has not joined "
            "the others; say --coordinator, --processes and --process (docs/pods.md), or let it "
            "see its own devices alone (TPU_PROCESS_BOUNDS, TPU_VISIBLE_CHIPS)"
        )


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
