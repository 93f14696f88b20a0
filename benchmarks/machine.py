"""What every benchmark prints about itself, and how all of them measure time and memory."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence


def header(packages: Sequence[str], devices: str = "") -> str:
    """Date, versions, hardware and load, in one line: what a figure is worth nothing without."""
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{today}; Python {platform.python_version()} {versions}; {processor()}, "
        f"{os.cpu_count()} cores{', ' if devices else ''}{devices}; load {load}"
    )


def processor() -> str:
    """The name of the processor, where the system tells."""
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def devices() -> str:
    """How many of which devices jax has. This starts jax, which may take an accelerator whole."""
    import jax

    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def measured(way: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds by the clock and seconds of the CPU (all threads together), once per repeat.

    `way` must wait for what it started: `jax.block_until_ready`.
    """
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        way()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return walls, cpus


def middle(values: Sequence[float], places: int = 1) -> str:
    """The median, with the least and the most."""
    least, most = min(values), max(values)
    return f"{statistics.median(values):.{places}f} ({least:.{places}f} to {most:.{places}f})"


def peak_mib() -> float:
    """The most memory that this process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


def serve(make: Callable[[], tuple[Callable[[], object], Callable[[], float | None]]]) -> None:
    """The side of a process that `beside` measures.

    `make` gives what is to be called, and what says in how many seconds this machine could do it at
    best (None where nobody knows). It is called once, and then once per line of the standard input.
    What it took goes out as lines of JSON; whatever else is printed goes to the standard error.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        way, least = make()
        said = {"first": True}
        while said or sys.stdin.readline():
            (wall,), (cpu,) = measured(way, 1)
            said |= {"wall": wall, "cpu": cpu, "peak": peak_mib()}
            if said.pop("first", False):
                said["least"] = least()
            print(json.dumps(said), file=out)
            said = {}
