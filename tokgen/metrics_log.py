"""The metrics of a run: lines of JSON and TensorBoard events in its work directory, and curves."""

from __future__ import annotations

import math
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tokgen import image_grid, records, report, storage

LOG = "metrics.jsonl"
# What of a line is of the clock and the machine, and differs from run to run
PACE = ("seconds", "images_per_second", "mfu", "waited", "memory_gb")
EVERY = 60.0  # seconds after which a bucket has what was logged


def opened(workdir: pathlib.Path, *, is_held: Callable[[], bool] = lambda: True, **how) -> AnyLog:
    """The metrics of a run, `Log`; of several processes, one writes them.

    Into a bucket only while `is_held` says that the place is this job's.
    """
    if jax.process_index():
        return Nowhere()
    return InBucket(workdir, is_held, **how) if storage.is_remote(workdir) else Log(workdir, **how)


class Nowhere:
    """What a process that does not write has in the place of a `Log`."""

    def scalars(self, step: int, values: Mapping[str, Any], *, split: str = "train") -> None:
        """Process 0 writes them."""

    def image(self, step: int, name: str, image_HW3: np.ndarray) -> None:
        """Process 0 writes it."""

    def splits(self, step: int) -> list[str]:
        """Process 0 knows them."""
        return []

    def keep(self) -> None:
        """Nothing is here."""

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
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir, self.started = workdir, time.monotonic()
        _drop_after(workdir / LOG, step, measured, told)
        self.file = open(workdir / LOG, "a", buffering=1)  # noqa: SIM115  (closed by close)
        # TensorBoard hides what earlier files have of that step and later ones
        taken_again = step and step + 1
        self.events = _event_writer()(str(workdir / "tensorboard"), purge_step=taken_again)

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

    def splits(self, step: int) -> list[str]:
        """Of what there are lines at a step."""
        return [record["split"] for record in read(self.workdir) if record["step"] == step]

    def keep(self) -> None:
        """What was logged is where it stays."""

    def close(self) -> None:
        """Write the curves and release the files."""
        self.file.close()
        self.events.close()
        curves(self.workdir)


class InBucket:
    """A `Log` of a run in a bucket, where nothing is appended to: on this host, and copied there.

    Once a minute, and with `keep`. What is resumed is a step, so `keep` is called before one is
    saved: then no line of a step is lost with this host.
    """

    def __init__(self, workdir: pathlib.Path, is_held: Callable[[], bool], **how):
        self.workdir, self.is_held, self.copied = workdir, is_held, {}
        self.folder = tempfile.TemporaryDirectory(prefix="tokgen-log-")
        self.here = pathlib.Path(self.folder.name)
        with storage.reached(workdir):
            if (workdir / LOG).exists():
                storage.download(workdir / LOG, self.here / LOG)
        self.log, self.copying, self.ended = (
            Log(self.here, **how),
            threading.Lock(),
            threading.Event(),
        )
        threading.Thread(target=self._copy_along, name="log", daemon=True).start()

    def scalars(self, step: int, values: Mapping[str, Any], *, split: str = "train") -> None:
        """As `Log.scalars`."""
        self.log.scalars(step, values, split=split)

    def image(self, step: int, name: str, image_HW3: np.ndarray) -> None:
        """As `Log.image`."""
        self.log.image(step, name, image_HW3)

    def splits(self, step: int) -> list[str]:
        """As `Log.splits`."""
        return self.log.splits(step)

    def keep(self) -> None:
        """Copy what was logged; a bucket that cannot be reached is told, and tried again."""
        with self.copying:
            for file in sorted(self.here.rglob("*")):
                if file.suffix == ".part" or not file.is_file():
                    continue
                changed = file.stat().st_mtime_ns
                if self.copied.get(file) == changed:
                    continue
                if not self.is_held():  # whoever saves says so
                    return
                try:
                    # what is there now: others write on meanwhile
                    storage.save(self.workdir / file.relative_to(self.here), file.read_bytes())
                except storage.refusals() as error:
                    report.say(f"{self.workdir}: {file.name} could not be copied there: {error}")
                    return
                self.copied[file] = changed

    def _copy_along(self) -> None:
        while not self.ended.wait(EVERY):
            self.keep()

    def close(self) -> None:
        """Write the curves, and copy the rest."""
        self.log.close()
        self.ended.set()
        self.keep()
        self.folder.cleanup()


AnyLog = Log | InBucket | Nowhere


def _event_writer() -> type:
    """The writer of tensorboardX, which would import Google's client where it is installed.

    That takes longer than all else here, and is for addresses that it is never given.
    """
    client = "google.cloud.storage"
    absent = sys.modules.setdefault(client, None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules[client]
    return SummaryWriter


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
            if name in ("step", "split", "seconds") or name.endswith(("_error", "_low", "_high")):
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
