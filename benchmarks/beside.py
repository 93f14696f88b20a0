"""Two programs measured turn by turn on one core: ours, and a peer's.

Each is a process that stays (`machine.serve`): it builds its network, calls it once, and then once
whenever it is asked. They are asked in turn, so that what else runs on the machine slows both
alike, and the figure is the median of the ratios of neighbouring turns. "first" is the first call,
compiling included; "peak" the most memory that the process ever held; "of best" the seconds in
which this core could do it at best (`roofline`, with its rates of that very minute), as a share of
what it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import machine

HERE = pathlib.Path(__file__).parent
PRECISIONS = ("float32", "bfloat16")
# One thread, whatever the library: the clock of a barrier on a shared machine measures the others
ALONE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


class Failed(Exception):
    """A process ended before it had said what was asked; the last that it printed."""


class Process:
    """A program that is called whenever it is asked."""

    def __init__(self, command: Sequence[str], core: int | None):
        pinned = ["taskset", "-c", str(core)] if core is not None else []
        # a pipe that nobody empties would stop it
        self.noise = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*pinned, *command],
            env=os.environ | ALONE,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
        )
        self.first = self._said()
        self.cpus, self.peak = [], self.first["peak"]

    def turn(self) -> float:
        """CPU seconds of one call."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self._said()
        self.cpus.append(said["cpu"])
        self.peak = said["peak"]
        return said["cpu"]

    def end(self) -> None:
        """Let it go."""
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()

    def _said(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.noise.seek(0)
        told = self.noise.read().strip().splitlines() or ["nothing was printed"]
        raise Failed(told[-1])


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer's own way of doing a row's task: its name in peers.py, and which of its ways."""

    task: str
    ways: tuple[str, ...] = ("eager",)
    ours: bool = False  # it runs on jax, in this very environment


def arguments(parser: argparse.ArgumentParser) -> None:
    """What a table beside the peers is told."""
    parser.add_argument("--peers", metavar="DIR", help="checkouts of the peers, by their names")
    parser.add_argument("--python", metavar="PATH", help="a Python with torch, for the peers")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these of the table")
    parser.add_argument("--pairs", type=int, default=3, help="turns of each of the two")
    parser.add_argument("--core", type=int, help="the core that both run on; default: any")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)


def table(
    program: str, rows: dict[str, Peer | None], dtypes: Sequence[str], told: argparse.Namespace
) -> None:
    """Print a line for every row and dtype: ours, the best of the peer's ways, their ratio."""
    chosen = told.rows or list(rows)
    unknown = [name for name in chosen if name not in rows]
    if unknown:
        sys.exit(f"no row is called {', '.join(unknown)}; there are: {'; '.join(rows)}")
    print(
        f"{'task':26}{'dtype':10}{'ours CPU s':24}{'first':>7}{'peak MiB':>9}{'of best':>9}   "
        f"{'peer':9}{'CPU s':24}{'first':>7}{'peak MiB':>9}  peer / ours",
        flush=True,
    )
    for name in chosen:
        for dtype in dtypes:
            print(_row(program, name, rows[name], dtype, told), flush=True)


def _row(program: str, name: str, peer: Peer | None, dtype: str, told: argparse.Namespace) -> str:
    own = [sys.executable, str(HERE / program), "--serve", name, "--precision", dtype]
    own += ["--quick"] if told.quick else []
    lead = f"{name:26}{dtype:10}"
    try:
        ours = Process(own, told.core)
    except Failed as failed:
        return f"{lead}failed: {failed}"
    others, ratios, failures = {}, {}, []
    for way in peer.ways if peer and told.peers else ():
        python = sys.executable if peer.ours else told.python
        command = [python, str(HERE / "peers.py"), peer.task, "--checkouts", told.peers]
        try:
            other = Process([*command, "--dtype", dtype, "--way", way], told.core)
            others[way] = other
            ratios[way] = [1 / (ours.turn() / other.turn()) for _ in range(told.pairs)]
            other.end()
        except Failed as failed:
            failures.append(f"{way} failed: {failed}")
    while len(ours.cpus) < told.pairs:
        ours.turn()
    ours.end()
    least = ours.first["least"]
    share = f"{least / statistics.median(ours.cpus):9.0%}" if least else f"{'-':>9}"
    said = f"{lead}{_figures(ours)}{share}   "
    if not ratios:
        return said + "; ".join(failures)
    best = min(ratios, key=lambda way: statistics.median(ratios[way]))
    said += f"{best:9}{_figures(others[best])}  {machine.middle(ratios[best], 2)}"
    return "; ".join([said, *failures])


def _figures(process: Process) -> str:
    cost = machine.middle(process.cpus, 3)
    return f"{cost:24}{process.first['cpu']:7.1f}{process.peak:9.0f}"
