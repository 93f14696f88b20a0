"""The metrics of a run: lines of JSON and TensorBoard events in its work directory, and curves."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tokgen import image_grid, records, report

LOG = "metrics.jsonl"


def opened(workdir: pathlib.Path, **how) -> Log | Nowhere:
    """The metrics of a run, `Log`; of several processes, one writes them."""
    return Log(workdir, **how) if jax.process_index() == 0 else Nowhere()


class Nowhere:
    """What a process that does not write has in the place of a `Log`."""

    def scalars(self, step: int, values: Mapping[str, Any], *, split: str = "train") -> None:
        """Process 0 writes them."""

    def image(self, step: int, name: str, image_HW3: np.ndarray) -> None:
        """Process 0 writes it."""

    def close(self) -> None:
        """Nothing is open."""


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
        """Lines after `step` are taken again; its held-out metrics too where not `measured`.

        `told` tells a line of an earlier version in today's names of its metrics.
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
        image_grid.save_png(folder / f"{name}-{step:07d}.png", image_HW3)
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
    return records.lines(file, "the log of a run", remedy, say=report.say, step=int, split=str)


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
