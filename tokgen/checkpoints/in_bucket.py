"""The steps of a run in a bucket: which are whole, how they go, and when nothing may be written.

A folder of a bucket is there while any object of it is, and is not renamed: a step says by its
marks (`checkpoint.MARKS`) that it is whole. Before a step is saved, noted or deleted its place is
asked for: another job may hold it by now. Of local folders nothing is done here.
"""

from __future__ import annotations

import pathlib
import time

from tokgen import distributed, report, storage
from tokgen.checkpoints import checkpoint, manifest
from tokgen.output import leases

COPYING = 600.0  # seconds for which a step without a record of its end may be one that is copied


def check(workdir: pathlib.Path) -> None:
    """An error, of all processes, where the work directory may be another job's by now."""
    if storage.is_remote(workdir):
        distributed.first(leases.check, workdir)


def prepare(step: pathlib.Path) -> None:
    """Before a step is saved: its place is this job's, and free. Else an error of all processes."""

    def act() -> None:
        leases.check(step.parent.parent)
        with storage.reached(step):
            free(step)

    if storage.is_remote(step):
        distributed.first(act)


def unmark(step: pathlib.Path) -> None:
    """Before a step is deleted: a kill leaves no half of one that says it is whole.

    As `prepare`, an error where the place is not this job's.
    """

    def act() -> None:
        leases.check(step.parent.parent)
        with storage.reached(step):
            storage.unmark(step, checkpoint.MARKS)

    if storage.is_remote(step):
        distributed.first(act)


def free(step: pathlib.Path) -> None:
    """Remove what lies in the place of a step and was not written to its end."""
    if storage.names(step) and not _is_done(step):
        _remove(step)


def settle(folder: pathlib.Path) -> None:
    """Of the steps in a folder: remove those that were not written to their end.

    One that was copied there lacks the mark that Orbax looks for. It is whole if its seal says so,
    or, where the run was killed before it sealed it, if it was written to its end. One that is
    being copied there lacks the record of its end until it comes.
    """
    for step in (folder / name for name in storage.names(folder) if name.isdigit()):
        if (step / checkpoint.COMMITTED).exists():
            continue
        if not _is_done(step):
            if _may_be_copied(step):
                report.say(
                    f"{step} was not written to its end, or is being copied there; it is left out, "
                    f"and a run that starts in {COPYING / 60:.0f} minutes removes it"
                )
            else:
                _remove(step)
        elif wrong := manifest.misfit(step):
            report.say(f"{step} is left as it is: {wrong}")
        else:
            storage.save(step / checkpoint.COMMITTED, b"copied from elsewhere")


def _is_done(step: pathlib.Path) -> bool:
    return checkpoint.is_committed(step) or checkpoint.is_ended(step)


def _may_be_copied(step: pathlib.Path) -> bool:
    """Whether the record of its end may come: of what Orbax writes here, it is there first."""
    recent = time.time() - storage.changed(step) < COPYING
    return recent and not (step / checkpoint.ENDED).exists()


def _remove(step: pathlib.Path) -> None:
    report.say(f"{step} was not written to its end, and is removed")
    step.rmtree(missing_ok=True)
