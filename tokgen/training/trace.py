"""`config.profile = (first, last)`: what hosts and devices did in these steps, for a viewer."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax

from tokgen import report, storage
from tokgen.interfaces import PyTree, UserError

FOLDER = "profile"


class Trace:
    """A trace of some steps by jax's profiler, in the work directory; of process 0 alone.

    Args:
        steps: (first, last) of them, counted from 1; () for none.
    """

    def __init__(self, steps: Sequence[int], workdir: pathlib.Path):
        self.steps, self.folder = tuple(steps), workdir / FOLDER
        self.first = 0  # of those that are being traced
        if self.steps and storage.is_remote(workdir):
            raise UserError(
                f"config.profile={self.steps} writes a trace to a disk of this host; found a "
                f"work directory in a bucket, {workdir}: profile a short run in a local one"
            )

    def told(self, done: int) -> None:
        """A run goes on after so many steps: what lies behind it is not traced."""
        if self.steps and self.steps[1] <= done:
            report.say(
                f"config.profile={self.steps} has no effect: the run goes on after step {done}"
            )

    def before(self, done: int) -> None:
        """So many steps are done; the next may be one that is traced."""
        if self.steps and not self.first and self.steps[0] <= done + 1 <= self.steps[1]:
            if jax.process_index() == 0:
                jax.profiler.start_trace(str(self.folder))
                self.first = done + 1

    def after(self, done: int, figures: PyTree) -> None:
        """So many steps are done, the last with these figures; it may have been the last traced."""
        if self.first and done >= self.steps[1]:
            jax.block_until_ready(figures)
            self.stop()

    def stop(self) -> None:
        """Write what was traced, also where a run ends before its time."""
        if not self.first:
            return
        first, self.first = self.first, 0
        jax.profiler.stop_trace()
        report.say(
            f"a trace of the steps from {first} on is in {self.folder}: open it with "
            f"xprof --logdir {self.folder} (pip install xprof), or its "
            "*.trace.json.gz at https://ui.perfetto.dev"
        )
