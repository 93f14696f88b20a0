"""The page of a demo that is not finished: there from the first minute, written after every stage.

It lies where the finished one will, unless an earlier demo is there, which stays until the new one
is whole: then it grows beside that. A demo that is gone on with begins with the stages it had.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

from tokgen import records, report
from tokgen.demo import page
from tokgen.evaluation import page as pages

MARK = '<meta name="tokgen" content="unfinished demo">\n'
REFRESH = '<meta http-equiv="refresh" content="20">\n'
SECONDS = "stages.json"  # of what is done, in the unfinished demo's folder
# Picture -> (folder of its run, files of which the last is shown, what it shows)
PICTURES = {
    "tokenizer": ("reconstructions-*.png", "Held-out images, each with what the tokenizer makes."),
    "generator": ("samples-*.png", "Samples of the generator, a row per class, as it ended."),
}


class Page:
    """An unfinished demo's page; as a context it says at an error that the demo was stopped."""

    def __init__(self, out: str | os.PathLike):
        self.file = pathlib.Path(os.path.realpath(out)) / pages.NAME
        self.folder: pathlib.Path | None = None  # that is being filled, once it is
        self.seconds: dict[str, float] = {}
        self._before = ""

    def __enter__(self) -> Page:
        # what a killed demo left is no result: its place counts as empty
        if _is_alone(self.file):
            self._before = self.file.read_text()
            self.file.unlink()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            return
        if self.folder is None and self._before and not self.file.exists():
            pages.save(self.file, self._before)
        elif self.folder is not None and self.folder.is_dir():
            self._write("", "")

    def begin(self, folder: pathlib.Path, stages: Sequence[str]) -> None:
        """The first page of a demo that is made in `folder`, of these stages."""
        self.folder, self.stages = folder, stages
        if self.file.parent.is_dir() and set(os.listdir(self.file.parent)) - {folder.name, ".lock"}:
            self.file = folder / pages.NAME
        with contextlib.suppress(OSError, ValueError):
            self.seconds = dict(records.load(folder / SECONDS))
        report.say(f"the page grows while this trains: {self.file}")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, added to what it took before a kill, and write the page around it."""
        self._write(name, REFRESH)
        began, before = time.monotonic(), self.seconds.pop(name, 0.0)
        yield
        self.seconds[name] = round(before + time.monotonic() - began, 1)
        records.save(self.folder / SECONDS, json.dumps(self.seconds))
        self._write("", REFRESH)

    def finished(self) -> None:
        """Make room for the whole result."""
        self.file.unlink(missing_ok=True)
        (self.folder / SECONDS).unlink(missing_ok=True)

    def _write(self, now: str, refresh: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        pages.save(self.file, document(self.folder, self.stages, self.seconds, now, refresh))


def document(
    folder: pathlib.Path,
    stages: Sequence[str],
    seconds: Mapping[str, float],
    now: str,
    refresh: str,
) -> str:
    """The page of what is there so far; `now` is the stage that runs, "" where none does."""
    if refresh:
        told = pages.text(
            "This page grows: it is written again after every stage, and looks for that every 20 "
            "seconds. If the demo was killed, the same command goes on where it was."
        )
    else:
        told = pages.text("The demo was stopped; the same command goes on where it was.", "alarm")
    rows = []
    for name in stages:
        state = f"done in {page.lasted(seconds[name])}" if name in seconds else "to come"
        rows.append((name, "now" if name == now else state))
    parts = [told, pages.table((), rows)]
    for whose, (files, words) in PICTURES.items():
        parts += _of_run(folder / whose, whose, files, words)
    parts.append(
        pages.text(
            "A tokenizer learns to write images as tokens, a generator to write such tokens for a "
            "class; a classifier, a small network trained on real shapes alone, will say which "
            "class it sees in what is drawn. Samples of every class, figures, decodes step by "
            "step, edits and what to do next come with the last stage."
        )
    )
    return pages.document(f"{page.TITLE} (not finished)", parts, head=MARK + refresh + page.STYLE)


def _of_run(run: pathlib.Path, whose: str, files: str, words: str) -> list[str]:
    """The last picture of a training, and its curves, as far as they are there."""
    found = {f"{whose}_curves": run / "curves.png"}
    drawn = sorted((run / "images").glob(files))
    if drawn:
        found[whose] = drawn[-1]

    def picture(name: str, text: str) -> str:
        address = pages.file_uri(found[name])
        return f'<img src="{address}" alt="{html.escape(text)}">'

    parts = [pages.text(words), picture(whose, words)] if drawn else []
    if found[f"{whose}_curves"].exists():
        parts.append(page.curves(whose, picture))
    return [pages.section(f"The {whose} so far", *parts)] if parts else []


def _is_alone(file: pathlib.Path) -> bool:
    """Whether a folder holds an unfinished page, and nothing else."""
    with contextlib.suppress(OSError):
        names = set(os.listdir(file.parent)) - {".part", ".lock"}
        if names == {file.name} and file.is_file():
            with open(file, "rb") as opened:
                return MARK.encode() in opened.read(10_000)
    return False
