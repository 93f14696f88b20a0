"""What is said to the person at the terminal: progress, one line, tables of numbers.

Light: a help text may import it. tqdm is imported where there is a terminal to draw a bar on.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tqdm

EVERY, MINUTE = 30, 60  # seconds between lines in a log file, and those that a rate is of
_silent = False  # of the processes of one job, one speaks


def silence(whether: bool = True) -> None:
    """Say nothing from now on: another process of the same job says it. Errors are said by all."""
    global _silent
    _silent = whether


def bar(
    total: int,
    *,
    initial: int = 0,
    unit: str = "step",
    what: str = "",
    shown: bool = True,
    delay: float = 0,
) -> tqdm.tqdm | Lines:
    """A progress bar with speed and time to go; in a log file a line now and then.

    Nothing is shown of what takes less than `delay` seconds.
    """
    shown = shown and not _silent
    if not sys.stderr.isatty() and not notebook():
        return Lines(total, initial=initial, unit=unit, what=what, shown=shown, delay=delay)
    import tqdm

    return tqdm.tqdm(
        total=total,
        disable=not shown,
        initial=initial,
        unit=unit,
        desc=what,
        dynamic_ncols=True,
        mininterval=0.2,
        maxinterval=1,
        smoothing=0.05,
        delay=delay,
    )


def notebook() -> bool:
    """Whether this process is a notebook's, which draws bars although it is no terminal."""
    return "ipykernel" in sys.modules


class Lines:
    """Progress in a log file: what tqdm's bars offer, as a line every EVERY seconds and at the end.

    `generator: 1200/8000 steps, 14.2 steps/s, ETA 0:07:59, loss 5.31`; the rate is that of the
    last minute. `n` may be set: work that is taken back.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        what: str = "",
        shown: bool = True,
        delay: float = 0,
        clock: Callable[[], float] | None = None,
    ):
        self.total, self.unit, self.shown, self.delay = total, unit, shown, delay
        self.clock = clock or time.monotonic
        self.name = f"{what}: " if what else ""
        self.n, self.postfix = initial, ""
        self.started = self.told = self.clock()
        self.did = 0
        self.seen = collections.deque([(self.started, initial)])  # about one a second, of a minute

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """So much more is done."""
        now, self.n, self.did = self.clock(), self.n + n, self.did + n
        if self.n - n < self.seen[-1][1]:  # taken back: what was before is no part of the rate
            self.seen.clear()
            self.seen.append((now, self.n))
        if now - self.seen[-1][0] >= 1:
            self.seen.append((now, self.n))
        while len(self.seen) > 1 and self.seen[1][0] <= now - MINUTE:
            self.seen.popleft()
        if self.shown and now - self.told >= EVERY:
            self.told = now
            say(f"{self.name}{self._done()}, {self._ahead(now)}{self._more()}")

    def set_postfix_str(self, text: str) -> None:
        """What the next line ends in."""
        self.postfix = text

    def close(self) -> None:
        """The last line: what was done, in which time."""
        now = self.clock()
        if self.shown and self.did and now - self.started >= self.delay:
            rate = self.did / max(now - self.started, 1e-9)
            say(f"{self.name}{self._done()} in {_span(now - self.started)}, {self._speed(rate)}")
        self.shown = False

    def _done(self) -> str:
        return f"{self.n}/{self.total} {self.unit}s"

    def _more(self) -> str:
        return f", {self.postfix}" if self.postfix else ""

    def _ahead(self, now: float) -> str:
        then, done = self.seen[0]
        rate = (self.n - done) / max(now - then, 1e-9)
        if rate <= 0:
            return "no end in sight"
        return f"{self._speed(rate)}, ETA {_span((self.total - self.n) / rate)}"

    def _speed(self, rate: float) -> str:
        if 0 < rate < 1:
            return f"{1 / rate:.3g} s/{self.unit}"
        return f"{rate:.3g} {self.unit}s/s"


def _span(seconds: float) -> str:
    """`1:02:03`, with days where there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))


def printable(text: str) -> str:
    """A text without what a name out of a file may hold to confuse a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def say(text: str) -> None:
    """A line for the person at the terminal, above a progress bar if one runs.

    Where nobody listens any more, the work goes on: a terminal that was closed, a full log disk.
    """
    if _silent:
        return
    text = printable(text)
    with contextlib.suppress(OSError):
        if sys.stderr.isatty() or notebook():
            import tqdm

            tqdm.tqdm.write(text, file=sys.stderr)
        else:  # tqdm would blank out a line that isn't there
            print(text, file=sys.stderr, flush=True)


def result(text: str) -> None:
    """What a command was asked for, on the standard output; of the processes of a job, once."""
    if not _silent:
        print(text)


def amount(size: float) -> str:
    """`1.241 GB` of a number of bytes."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.4g} GB"


def table(leaves: Mapping[str, Any]) -> str:
    """Parameters by path: shape, number, sharding; and their sum."""
    rows = []
    for path, leaf in leaves.items():
        spec = getattr(getattr(leaf, "sharding", None), "spec", None)
        laid = "" if spec is None or not any(spec) else str(tuple(spec))
        rows.append((path, "x".join(map(str, leaf.shape)), f"{leaf.size:,}", laid))
    rows.append(("total", "", f"{sum(leaf.size for leaf in leaves.values()):,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{p:<{widths[0]}}  {s:>{widths[1]}}  {n:>{widths[2]}}  {laid}".rstrip()
        for p, s, n, laid in rows
    )


def row(name: str, value: float | int | None) -> str:
    """A figure for the terminal; what there is none of is none, and what is small is not 0."""
    if not isinstance(value, float):
        return f"{name:<20} {'none' if value is None else value}"
    digits = f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"
    return f"{name:<20} {digits}"


def metrics(values: Mapping[str, float], names: Sequence[str]) -> str:
    """`psnr_db 25.31, codebook_usage 0.998` of those that are there."""
    return ", ".join(f"{name} {values[name]:.4g}" for name in names if values.get(name) is not None)
