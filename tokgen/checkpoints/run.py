"""The work directory of a run: locked while it lasts, its checkpoints saved, resumed, forgotten.

A run keeps its checkpoints in `WORKDIR/checkpoints/STEP`; checkpoint.py says what one holds,
continuation.py who may go on from it. Saving, keeping and going back stand together, since each
must hold where another was killed half-way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import ml_collections
import orbax.checkpoint as ocp

from tokgen import distributed, output, parameters, records, report, storage
from tokgen.checkpoints import (
    checkpoint,
    continuation,
    finetuning,
    in_bucket,
    manifest,
    stream as streams,
)
from tokgen.config import building
from tokgen.errors import SharedError
from tokgen.interfaces import PyTree, TokenLayout, UserError
from tokgen.output import leases

PATIENCE = 24 * 3600  # seconds that a save may take: of a published model it is all of the import
LINGER = 5  # seconds that a save which was interrupted has to end
ASIDE = "set_aside"  # steps that a run went back behind


@contextlib.contextmanager
def lock(workdir: pathlib.Path, inputs: Sequence[str] = ()) -> Iterator[None]:
    """Hold the work directory. The system releases it when the process ends, however it ends.

    It lies in none of the `inputs`, which the run reads.
    """
    with distributed.led("the work directory", output.workdir(workdir, inputs)):
        yield


@dataclasses.dataclass(frozen=True)
class Saved:
    """What retention knows of a step: what its record on disk says, and nothing of how it came."""

    step: int
    figure: float | None  # held-out, less is better; None: not measured, or not finite
    stated: bool = False  # kept on purpose
    measured: bool = True  # whether its figures were noted; of a run without held-out images: none


def staying(found: Iterable[Saved], *, latest: int, best: int) -> set[int]:
    """The steps that stay: the latest, the best of those with a finite figure, the stated ones.

    A function of what is on disk alone, so that any number of restarts comes to the same. Of equal
    figures the later one is better. While the latest is not measured, the last that was stays too:
    measuring may refuse the latest, and this is the one to go back to.
    """
    found = sorted(found, key=lambda each: each.step, reverse=True)
    newest = [each.step for each in found[: max(1, latest)]]
    before = [each.step for each in found if each.measured][:1]
    finite = [s for s in found if s.figure is not None and math.isfinite(s.figure)]
    leading = sorted(finite, key=lambda each: (each.figure, -each.step))[: max(1, best)]
    stated = {each.step for each in found if each.stated}
    return {*newest, *before, *(each.step for each in leading), *stated}


@dataclasses.dataclass
class Run:
    """The checkpoints of one work directory."""

    workdir: pathlib.Path
    manager: ocp.CheckpointManager
    config: ml_collections.ConfigDict
    meta: dict
    stated: tuple[int, ...] = ()  # steps that are kept on purpose
    told: set[int] = dataclasses.field(default_factory=set)  # steps said to be damaged
    earlier: tuple[str, ...] = ()  # fingerprints that earlier versions gave the same data
    accept: tuple[str, ...] = ()  # what may differ from the run that is resumed: "data"
    fields: tuple[str, ...] = ()  # at the top of a config; others of a record are its file's own

    def folder(self, step: int) -> pathlib.Path:
        """Where a step lies."""
        return self.workdir / checkpoint.FOLDER / str(step)

    def is_held(self) -> bool:
        """Whether the work directory is this job's still: nothing is written to another's."""
        return leases.is_held(self.workdir)

    def save(
        self,
        states_by_name: dict[str, PyTree],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save a step; it is on disk when this returns. Without `metrics` they come later, `note`.

        UserError when it could not be written; the steps before it stand.
        """
        self.wait()
        leaves = parameters.paths(states_by_name)
        step = int(jax.device_get(leaves["model/step"]))
        state = ocp.args.StandardSave(checkpoint.named(leaves))
        meta = ocp.args.JsonSave(self._meta(step, metrics, manifest.of(leaves)))
        self._commit(step, state, meta)

    def save_stream(self, step: int, stream: streams.Stream, metrics: dict[str, float]) -> None:
        """As `save`, of arrays that arrive in pieces."""
        self.wait()
        state = streams.StateSave(stream.tree(checkpoint.name))
        meta = streams.RecordSave(lambda: self._meta(step, metrics, stream.manifest()))
        try:
            self._commit(step, state, meta, lambda: self._wait_for(stream))
        except BaseException:
            # Ctrl-C comes to this thread alone: the others would go on to the end of the file
            stream.stop()
            deadline = time.monotonic() + LINGER
            while self.manager.is_saving_in_progress() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._clear(step)
            raise

    def _wait_for(self, stream: streams.Stream) -> None:
        """Until a stream has ended, or its step has failed.

        Not by joining threads, as Orbax waits: Python takes one for ended where Ctrl-C comes.
        """
        while self.manager.is_saving_in_progress() and not stream.ended.wait(0.1):
            pass

    def _meta(self, step: int, metrics: dict[str, float] | None, found: dict[str, dict]) -> dict:
        """The record of a step whose manifest is `found`."""
        meta = {
            **self.meta,
            "format": checkpoint.FORMAT,
            "step": step,
            "config": building.plain(self.config),
            "metrics": None if metrics is None else records.finite(metrics),
            "versions": checkpoint.versions(),
            "manifest": found,
        }
        return meta | {"digest": manifest.digest(meta)}

    def _commit(
        self,
        step: int,
        state: ocp.args.CheckpointArgs,
        meta: ocp.args.CheckpointArgs,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a step whole, or nothing of it; `wait` is called while it is written."""
        in_bucket.prepare(self.folder(step))
        # told below in one message, and not in Orbax's and asyncio's tracebacks besides
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = _unheard
        try:
            self.manager.save(step, args=ocp.args.Composite(state=state, meta=meta))
            wait()
            self.manager.wait_until_finished()
        except UserError:
            self._clear(step)
            raise
        except (OSError, ValueError, *self._refusals()) as error:
            # the store tells of the disk, or of a bucket, in a ValueError
            told = ("os_error_code", storage.SCHEME, '"driver":"gcs"', "storage.googleapis.com")
            of_place = any(word in str(error) for word in told)
            of_place |= storage.is_remote(self.workdir) and storage.is_refusal(error)
            if isinstance(error, ValueError) and not of_place:
                raise
            self._clear(step)
            raise UserError(self._not_saved(step, error)) from error

    def _clear(self, step: int) -> None:
        """Remove what a save of a step left behind that never ended."""
        if not storage.is_remote(self.workdir):
            _clear(self.workdir)
        elif jax.process_index() == 0 and self.is_held():
            with contextlib.suppress(*self._refusals()):
                in_bucket.free(self.folder(step))

    def _refusals(self) -> tuple[type[Exception], ...]:
        return storage.refusals() if storage.is_remote(self.workdir) else ()

    def _not_saved(self, step: int, error: Exception) -> str:
        before = ", ".join(map(str, sorted(self.manager.all_steps()))) or "none"
        if self._refusals():
            return (
                f"step {step} could not be saved in {self.workdir / checkpoint.FOLDER}: "
                f"{storage.refused(error)}; steps saved before: {before}. The same command then "
                "goes on from the last of them"
            )
        reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        return (
            f"step {step} could not be saved in {self.workdir / checkpoint.FOLDER}: "
            f"{(reason or str(error)).partition(' [')[0]}; steps saved before: {before}. Make room "
            "or mend the disk; the same command then goes on from the last of them"
        )

    def note(self, step: int, figures: dict[str, float]) -> None:
        """Add its held-out figures to the record of a saved step; then others may make room."""
        self.wait()
        in_bucket.check(self.workdir)
        with storage.reached(self.workdir):
            if jax.process_index() == 0:
                checkpoint.note(self.folder(step), figures)
        self.wait()

    def wait(self) -> None:
        """Until the last save is committed and sealed; then what need not stay is deleted.

        UserError where a bucket refuses; what was saved stands.
        """
        with storage.reached(self.workdir):
            self.manager.wait_until_finished()
        for step in distributed.decided(self._leaving):
            self._delete(step)

    def _leaving(self) -> list[int]:
        """The steps that need not stay, by what their records say; all are sealed."""
        steps = sorted(self.manager.all_steps())
        with storage.reached(self.workdir):
            leases.check(self.workdir)
            for step in steps:
                manifest.seal(self.folder(step))
        keep = self.config.get("keep", {"latest": 1, "best": 1})  # an import may not train
        found, metas = [], {step: self._record(step) for step in steps}
        whole = {step: meta for step, meta in metas.items() if meta is not None}
        figures = dict(zip(whole, checkpoint.figures(list(whole.values())), strict=True))
        for step in steps:
            if step not in whole:  # what cannot be read is nobody's to delete
                found.append(Saved(step, None, stated=True, measured=False))
            else:
                stated, measured = step in self.stated, whole[step]["measured"]
                found.append(Saved(step, figures[step], stated, measured))
        if steps and metas[steps[-1]] is None:
            return []
        stay = staying(found, latest=keep["latest"], best=keep["best"])
        return [step for step in steps if step not in stay]

    def _delete(self, step: int) -> None:
        in_bucket.unmark(self.folder(step))
        with storage.reached(self.folder(step)):
            self.manager.delete(step)

    def _record(self, step: int) -> dict | None:
        """The record of a step; None where it cannot be read, which is said once."""
        try:
            return checkpoint.read_meta(self.folder(step))
        except storage.NotReached:  # nothing is known of it, and nothing deleted
            raise
        except UserError as error:
            if step not in self.told:
                self.told.add(step)
                report.say(f"{error}; it stays where it is")
            return None

    @contextlib.contextmanager
    def rescuing(self, states_by_name: dict[str, PyTree]) -> Iterator[None]:
        """What the user has to mend costs no step that was made: it is saved, then told."""
        try:
            yield
        except UserError as error:
            step = int(jax.device_get(parameters.paths(states_by_name)["model/step"]))
            # a save waits for all processes, and the others may be in their next step
            alone = jax.process_count() == 1
            if step == 0 or not (alone or isinstance(error, SharedError)):
                raise
            if step not in self.manager.all_steps():
                self.save(states_by_name)
                self.wait()
            raise type(error)(f"{error}; step {step} is saved in {self.workdir}") from error

    def close(self) -> None:
        """Commit what is under way."""
        self.wait()
        self.manager.close()


def _unheard(unraisable) -> None:
    """What a failed save leaves behind: writes that answer a loop that is gone."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _clear(workdir: pathlib.Path) -> None:
    """Remove what saves left behind that never ended: it is no step, and takes the room of one."""
    if jax.process_index():
        return
    for part in (workdir / checkpoint.FOLDER).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)


def start(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    *,
    kind: str,
    layout: TokenLayout | None,
    classes: tuple[str, ...],
    best: str,
    data: str,
    tokenizer: dict | None = None,
    tokens: dict | None = None,
    source: dict | None = None,
    kept: tuple[int, ...] = (),
    held_out: str = "",
    earlier: tuple[str, ...] = (),
    accept: tuple[str, ...] = (),
    fields: tuple[str, ...] = (),
) -> Run:
    """Open the checkpoints of a work directory; `best` is the metric of which less is better.

    `data` and `held_out` are fingerprints of the images, `earlier` those of `data` by old versions;
    `accept` says what may have changed all the same. `tokenizer` and `tokens` say what a generator
    was trained with and on, see `checkpoint.reference`; `source` where imported weights come from.
    Steps of `kept` are never deleted to make room. `fields` are all that a config may have at its
    top: a run that began with others had them for its config file alone (none: all are compared).
    """
    in_bucket.check(workdir)
    with storage.reached(workdir):
        if not storage.is_remote(workdir):
            _clear(workdir)
        elif jax.process_index() == 0:
            in_bucket.settle(workdir / checkpoint.FOLDER)
        # it deletes nothing: its policies know the figures of this process alone, and a figure that
        # is not finite pushes out a better one
        manager = ocp.CheckpointManager(
            storage.absolute(workdir / checkpoint.FOLDER),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=PATIENCE),
                create=True,
            ),
        )
    meta = {
        "kind": kind,
        "layout": layout.to_json() if layout else None,
        "classes": list(classes),
        "data": data,
        "held_out": held_out,
        "tokenizer": tokenizer,
        "tokens": tokens,
        "best": best,
        "source": source,
    }
    run = Run(workdir, manager, config, meta, kept, earlier=earlier, accept=accept, fields=fields)
    with storage.reached(workdir):
        _agree(run)
    return run


def _agree(run: Run) -> None:
    """All processes know the same steps: which is the last decides where each of them goes on."""

    def steps() -> list[int]:
        run.manager.reload()
        return sorted(run.manager.all_steps())

    distributed.alike(f"the steps in {run.workdir / checkpoint.FOLDER}", steps)


def resume_or_start(run: Run, states_by_name: dict[str, PyTree]) -> tuple[dict[str, PyTree], str]:
    """(states, what was done). The whole policy, in this order:

    1. a checkpoint in the work directory: resume it, everything included;
    2. `config.init_from`: take its parameters (and average), fresh optimizer, step 0; a generator's
       class table may have other classes, and begins anew but for "no class";
    3. neither: the states as they were made.

    UserError when the disk has no room for one more checkpoint.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states_by_name))
    if steps := sorted(run.manager.all_steps()):
        step = run.folder(steps[-1])
        meta = checkpoint.read_meta(step)
        _same_run(meta, run, step)
        leaves = checkpoint.resumed(step, parameters.paths(states_by_name), meta)
        _take_over(meta, run)
        run.wait()  # what need not stay by now makes room first
        if steps[-1] < run.config.get("steps", 0):
            _room(run, size)
        return checkpoint.unflatten(
            states_by_name, leaves
        ), f"resumed step {steps[-1]} of {run.workdir}"
    if run.config.get("steps", 0):
        _room(run, size)
    if run.config.init_from:
        step = checkpoint.find(run.config.init_from)
        arrays = manifest.digest(checkpoint.read_meta(step)["manifest"])[:16]
        distributed.check_alike({"init_from": f"step {step.name}, arrays {arrays}"})
        return finetuning.begun_from(step, run.meta, states_by_name)
    return states_by_name, f"started a new run in {run.workdir}"


def _room(run: Run, size: int) -> None:
    """Tell, before any work, when the disk cannot hold the checkpoints that are to be kept."""
    if storage.is_remote(run.workdir):  # a bucket is never full
        return
    keep, steps = run.config.get("keep", {"latest": 1, "best": 1}), run.config.steps
    stated = sum(0 < step < steps for step in run.stated)
    # one more than stay: the new one is whole before another goes
    count = max(1, keep["latest"]) + max(1, keep["best"]) + stated + 1
    there = run.manager.all_steps()
    saves = math.ceil((steps - max(there, default=0)) / run.config.report.save) + stated
    missing = max(1, min(count - len(there), saves))
    free = shutil.disk_usage(run.workdir).free
    if free >= missing * size:
        return
    said = (
        f"a checkpoint of this run takes {report.amount(size)}, and up to {missing} more are kept "
        f"at a time (config.keep): {report.amount(missing * size)}; found {report.amount(free)} "
        f"free in {run.workdir}"
    )
    if free < size:
        raise UserError(f"{said}, not enough for one; make room, or use another --workdir")
    report.say(f"warning: {said}; make room, or keep fewer")


def check_whole(workdir: pathlib.Path, step: int) -> list[int]:
    """The steps of a work directory; UserError when `step` is not there, or not whole."""
    folder = workdir / checkpoint.FOLDER
    steps = checkpoint.steps(folder)
    if step not in steps or not checkpoint.is_whole(folder / str(step)):
        whole = [str(s) for s in steps if checkpoint.is_whole(folder / str(s))]
        found = "is damaged" if step in steps else "is not there"
        raise UserError(
            f"--from {step} needs a whole step of {folder}; it {found}, whole are "
            f"{', '.join(whole) or 'none'}"
        )
    return steps


def go_back(run: Run, step: int) -> None:
    """Set aside all steps after `step`, so that a run resumes there; nothing is deleted.

    They lie in `WORKDIR/set_aside` from then on. UserError, and all stay, when `step` is not there,
    not whole, or of another run.
    """
    with storage.reached(run.workdir):
        distributed.first(_set_aside, run, step)
        _agree(run)


def _set_aside(run: Run, step: int) -> None:
    steps = check_whole(run.workdir, step)
    _same_run(checkpoint.read_meta(run.folder(step)), run, run.folder(step))
    aside = run.workdir / ASIDE
    # the last first: a kill leaves a run
    for later in reversed([s for s in steps if s > step]):
        leases.check(run.workdir)
        aside.mkdir(exist_ok=True)
        names = (f"{later}{'' if n == 1 else f'.{n}'}" for n in itertools.count(1))
        target = next(aside / name for name in names if not (aside / name).exists())
        if storage.is_remote(target):
            storage.move(run.folder(later), target, checkpoint.MARKS)
        else:
            run.folder(later).rename(target)
        report.say(f"step {later} is set aside: {target}")


def latest(run: Run) -> int | None:
    """The last step that a run has saved."""
    return max(run.manager.all_steps(), default=None)


def classes(workdir: pathlib.Path, step: int | None = None) -> tuple[str, ...]:
    """The classes, in their order, of a step or the last that is saved; none where none is.

    As process 0 finds them: all give their images the same labels.
    """
    return tuple(distributed.decided(_classes, workdir, step))


def _classes(workdir: pathlib.Path, step: int | None) -> list[str]:
    folder = workdir / checkpoint.FOLDER
    steps = checkpoint.steps(folder)
    if not steps:
        return []
    try:
        last = max(steps) if step is None else step
        return checkpoint.read_meta(folder / str(last))["classes"]
    except storage.NotReached:
        raise
    except UserError:  # it is told when the step is read to go on from
        return []


def metrics(run: Run, step: int) -> dict[str, float]:
    """The figures that were saved with a step; none where it is gone."""
    folder = run.folder(step)
    with storage.reached(folder):
        return checkpoint.read_meta(folder)["metrics"] if folder.exists() else {}


def is_measured(run: Run, step: int) -> bool:
    """Whether a step is there, and its figures were noted; as process 0 finds it."""
    return distributed.decided(_is_measured, run.folder(step))


def _is_measured(folder: pathlib.Path) -> bool:
    with storage.reached(folder):
        return folder.exists() and checkpoint.read_meta(folder)["measured"]


def drop_after(run: Run, step: int) -> None:
    """Forget all later steps, the last first: a kill in between leaves a run to go on from.

    UserError before any is lost where the run could not go on from `step`; none where it is gone.
    """
    if step not in run.manager.all_steps():
        return
    if "data_changes" not in run.meta:  # a start that ends what a kill cut off
        newest = checkpoint.read_meta(run.folder(latest(run)))
        run.meta["data_changes"] = list(newest.get("data_changes", ()))
    if wrong := manifest.misfit(run.folder(step)):
        raise UserError(
            f"{run.folder(step)} is damaged: {wrong}; the run cannot go back there, and no later "
            "step is dropped: restore it from a copy, or go on from one of them with --from STEP"
        )
    _same_run(checkpoint.read_meta(run.folder(step)), run, run.folder(step))
    run.wait()
    for later in sorted(run.manager.all_steps(), reverse=True):
        if later > step:
            run._delete(later)


def _same_run(meta: dict, run: Run, step: pathlib.Path) -> None:
    """Refuse to go on from a step of another model, data set, batch size or seed."""
    continuation.check(
        meta,
        step,
        run.workdir,
        building.plain(run.config),
        run.meta,
        fields=run.fields,
        earlier=run.earlier,
        accept=run.accept,
    )


def _take_over(meta: dict, run: Run) -> None:
    """What a record says of data that were left goes on in later ones, with what is left now."""
    run.meta["data_changes"] = list(meta.get("data_changes", ()))
    change = {"step": meta["step"], "from": meta["data"], "to": run.meta["data"]}
    what = ["training images"] if meta["data"] not in (run.meta["data"], *run.earlier) else []
    there, here = meta.get("held_out"), run.meta["held_out"]
    if there and here and there != here:
        change["held_out"] = there
        what.append("held-out images")
    if meta["classes"] != run.meta["classes"]:
        change["classes"] = meta["classes"]
        what.append("classes")
    if what:
        run.meta["data_changes"].append(change)
        report.say(f"from step {meta['step']} on {run.workdir} has changed {', '.join(what)}")
