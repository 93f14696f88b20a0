"""The process that a program runs in: its devices and caches, signals, exit codes.

Exit codes: 0 done, 2 something the user can mend (one message, no traceback), 130 interrupted
(Ctrl-C, SIGINT), 141 when nobody reads what is printed (a closed pipe), 143 ended by SIGTERM. A
traceback is always a bug. Nothing heavy is imported before it is needed: a help text waits for
none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

from tokgen.errors import UserError

# Import name of an optional package -> the extra in pyproject.toml that installs it.
EXTRAS = {"simplejpeg": "fastdata", "gcsfs": "gcs"}

# What launchers tell every process: how many there are, or what they are together.
LAUNCHERS = (
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JOBSET_NAME"),
    *("TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"),
)
TPUS = ("/dev/accel0", "/dev/vfio/0")  # of a host of a pod, which jax asks about the others

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

    The training programs end through here too, so that every program fails in the same words.
    `fewer` is asked for the option that says how many images are taken at a time; "" if none does.
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
    except UserError as error:
        from tokgen import report

        print(f"{program}: error: {report.printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _unheard()
        return 128 + signal.SIGPIPE
    except OSError as error:
        from tokgen.output import failures

        if error.errno not in failures.ENVIRONMENT:
            raise
        print(f"{program}: error: {failures.described(error, option='')}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        said = _exhausted(error, fewer)
        if not said:
            raise
        print(f"{program}: error: {said}", file=sys.stderr)
        return 2
    return 0


def _exhausted(error: MemoryError | RuntimeError, fewer: Callable[[], str]) -> str:
    """What is to be said of an error that means no memory, or no room; empty for any other."""
    said = (str(error).strip() or "memory cannot be allocated").splitlines()[0][:300]
    if "No space left" in str(error):
        return f"the disk is full ({said}); make room and run the same command again"
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    option = fewer()
    less = f"fewer images at a time with a smaller {option}, " if option else ""
    return (
        f"this needs more memory than there is ({said}); remedy: {less}smaller images, or a "
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


def is_launched(args: argparse.Namespace) -> bool:
    """Whether something says that this process is one of several: an option, or a launcher."""
    given = {args.coordinator, args.processes, args.process} - {"", None}
    told = any(os.environ.get(name, "1") not in ("", "1") for name in LAUNCHERS)
    return bool(given) or told or any(os.path.exists(device) for device in TPUS)


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
    sizes = (mesh or "-1,1,1").split(",")
    if len(sizes) != 3 or not all(size.strip().lstrip("-").isdigit() for size in sizes):
        raise UserError(f"--mesh must be three numbers, DATA,FSDP,TENSOR, as 2,1,4; found {mesh!r}")
    devices()
    # each process of a job draws and measures on its own devices
    with jax.set_mesh(sharding.make_mesh(*map(int, sizes), devices=jax.local_devices())):
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
