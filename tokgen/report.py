"""What people look at: a progress bar, metrics as JSONL and TensorBoard, grids, curves, a table."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from tokgen import records

LOG = "metrics.jsonl"
EVERY, MINUTE = 30, 60  # seconds between lines in a log file, and those that a rate is of


def bar(
    total: int, *, initial: int = 0, unit: str = "step", what: str = "", shown: bool = True
) -> tqdm.tqdm | Lines:
    """A progress bar with speed and time to go; where there is no terminal, a line now and then."""
    if not sys.stderr.isatty():
        return Lines(total, initial=initial, unit=unit, what=what, shown=shown)
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
    )


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
        clock: Callable[[], float] | None = None,
    ):
        self.total, self.unit, self.shown = total, unit, shown
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
        if self.shown and self.did:
            now = self.clock()
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
    text = printable(text)
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            tqdm.tqdm.write(text, file=sys.stderr)
        else:  # tqdm would blank out a line that isn't there
            print(text, file=sys.stderr, flush=True)


class Log:
    """The metrics of one run: lines of JSON and TensorBoard events in its work directory."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int = 0,
        measured: bool = True,
        told: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
    ):
        """Lines after `step` are taken again; its held-out figures too where not `measured`.

        `told` tells a line of an earlier version in today's names of its figures.
        """
        from tensorboardX import SummaryWriter

        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self.started = workdir, time.monotonic()
        _drop_after(workdir / LOG, step, measured, told)
        self.file = open(workdir / LOG, "a", buffering=1)  # noqa: SIM115  (closed by close)
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def scalars(self, step: int, values: Mapping[str, Any], *, split: str = "train") -> None:
        """One line of numbers; not finite ones become null, so that every reader copes."""
        # None: a figure that there is none of, as the standard error of one image
        numbers = {n: math.nan if value is None else float(value) for n, value in values.items()}
        kept = {name: significant(value) for name, value in numbers.items()}
        seconds = round(time.monotonic() - self.started, 1)
        record = {"step": step, "split": split, "seconds": seconds, **kept}
        self.file.write(records.text(record) + "\n")
        for name, value in numbers.items():
            if not math.isfinite(value):  # it would warn, of each
                continue
            self.events.add_scalar(f"{split}/{name}", value, step)

    def image(self, step: int, name: str, image_HW3: np.ndarray) -> None:
        """A picture as `images/NAME-STEP.png` and as a TensorBoard event."""
        folder = self.workdir / "images"
        folder.mkdir(exist_ok=True)
        save_png(folder / f"{name}-{step:07d}.png", image_HW3)
        three = np.repeat(image_HW3, 3, axis=-1) if image_HW3.shape[-1] == 1 else image_HW3
        self.events.add_image(name, three, step, dataformats="HWC")

    def close(self) -> None:
        """Write the curves and release the files."""
        self.file.close()
        self.events.close()
        curves(self.workdir)


def significant(value: float) -> float:
    """Seven significant digits, and counts whole: a rate of 1e-7 is not 0."""
    return value if value.is_integer() else float(f"{value:.7g}")


def _drop_after(file: pathlib.Path, step: int, measured: bool, told: Callable) -> None:
    """Forget lines of steps that a resumed run takes again, and a line that was cut off."""
    if not file.exists():
        return
    kept = [
        told(record)
        for record in read(file.parent)
        if record["step"] < step
        or (record["step"] == step and (measured or record["split"] != "held_out"))
    ]
    records.save(file, "".join(f"{records.text(record)}\n" for record in kept))


def read(workdir: pathlib.Path) -> list[dict]:
    """The records of a run."""
    file = workdir / LOG
    if not file.exists():
        return []
    remedy = "move it away: the run begins another one"
    return records.lines(file, "the log of a run", remedy, say=say, step=int, split=str)


def curves(workdir: pathlib.Path) -> pathlib.Path | None:
    """All curves of a run in one picture, `curves.png`: a panel per metric, a line per split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[str, list]] = {}
    for record in read(workdir):
        for name, value in record.items():
            if name in ("step", "split", "seconds") or name.endswith("_error"):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            lines.setdefault(name, {}).setdefault(record["split"], []).append(
                (record["step"], value)
            )
    # a constant tells nothing as a curve
    lines = {
        name: splits
        for name, splits in lines.items()
        if len({value for points in splits.values() for _, value in points}) > 1
    }
    if not lines:
        return None
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    for axis, (name, splits) in zip(axes.flat, sorted(lines.items()), strict=False):
        for split, points in sorted(splits.items()):
            x, y = zip(*points, strict=True)
            style = dict(marker="o", markersize=3) if len(points) < 30 else {}
            axis.plot(x, y, label=split.replace("_", " "), linewidth=1.2, **style)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    file = workdir / "curves.png"
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def grid(image_BHW3: np.ndarray, columns: int, *, gap: int = 2, scale: int = 1) -> np.ndarray:
    """Images [B, H, W, 3] in rows of `columns` on white; every pixel `scale` x `scale`."""
    image_BHW3 = np.repeat(np.repeat(np.asarray(image_BHW3), scale, axis=1), scale, axis=2)
    B, H, W, C = image_BHW3.shape
    rows = -(-B // columns)
    sheet = np.full(
        (rows * (H + gap) + gap, min(columns, B) * (W + gap) + gap, C), 255, image_BHW3.dtype
    )
    for i, image_HW3 in enumerate(image_BHW3):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image_HW3
    return sheet


def beside(left_BHW3: np.ndarray, right_BHW3: np.ndarray, pairs: int = 4, **look) -> np.ndarray:
    """A grid of pairs: the original on the left, what was made of it on the right."""
    both = np.stack([left_BHW3, right_BHW3], axis=1).reshape(-1, *np.shape(left_BHW3)[1:])
    return grid(both, 2 * pairs, **look)


def save_png(path: pathlib.Path, image_HW3: np.ndarray) -> None:
    """uint8 [H, W, 3 or 1] as PNG; the file appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    image_HW3 = image_HW3[..., 0] if image_HW3.shape[-1] == 1 else image_HW3
    Image.fromarray(image_HW3).save(part, format="PNG")
    part.replace(path)


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


def figures(values: Mapping[str, float], names: Sequence[str]) -> str:
    """`psnr_db 25.31, codebook_usage 0.998` of those that are there."""
    return ", ".join(f"{name} {values[name]:.4g}" for name in names if values.get(name) is not None)
