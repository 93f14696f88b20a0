"""The work directory of a run: locked while it lasts, its checkpoints saved, resumed, forgotten.

A run keeps its checkpoints in `WORKDIR/checkpoints/STEP`; tokgen/checkpoint.py says what one holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

import jax
import ml_collections
import orbax.checkpoint as ocp

from tokgen import checkpoint, finetuning, manifest, report
from tokgen import config as configs
from tokgen import state as states
from tokgen.interfaces import TokenLayout, UserError

# Fields of a config that may change between a run and its continuation; all others decide what
# is trained, and a change is refused. Data may move: their fingerprint is compared.
FREE = (
    *("steps", "report.", "keep.", "mesh.", "strategy", "held_out.", "max_bad", "init_from"),
    *("data.path", "data.data_dir", "data.tokens", "data.tokenizer", "data.images", "data.text"),
)


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the work directory. The system releases it when the process ends, however it ends."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "a+")  # noqa: SIM115  (held while the run lasts)
    except OSError as error:
        raise UserError(f"cannot write to the work directory {workdir}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"the work directory {workdir} is in use by {file.read().strip() or 'a process'}; "
                "wait for it, stop it, or use another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n")
        file.flush()
        yield


@dataclasses.dataclass
class Run:
    """The checkpoints of one work directory."""

    workdir: pathlib.Path
    manager: ocp.CheckpointManager
    config: ml_collections.ConfigDict
    meta: dict
    earlier: tuple[str, ...] = ()  # fingerprints that earlier versions gave the same data
    accept: tuple[str, ...] = ()  # what may differ from the run that is resumed: "data"

    def save(self, states_by_name: dict[str, states.TrainState], metrics: dict[str, float]) -> None:
        """Begin to save; the previous save is committed and announced first."""
        self.wait()
        leaves = states.paths(states_by_name)
        step = int(jax.device_get(states_by_name["model"].step))
        meta = {
            **self.meta,
            "format": checkpoint.FORMAT,
            "step": step,
            "config": configs.plain(self.config),
            "metrics": metrics,
            "versions": checkpoint.versions(),
            "manifest": manifest.of(leaves),
        }
        meta["digest"] = manifest.digest(meta)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(checkpoint.named(leaves)), meta=ocp.args.JsonSave(meta)
            ),
            metrics=metrics,
        )

    def wait(self) -> None:
        """Until the last save is committed; raises what went wrong in the background."""
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            for step in self.manager.all_steps():
                manifest.seal(self.workdir / checkpoint.FOLDER / str(step))

    def close(self) -> None:
        """Commit what is under way."""
        self.wait()
        self.manager.close()


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
    earlier: tuple[str, ...] = (),
    accept: tuple[str, ...] = (),
) -> Run:
    """Open the checkpoints of a work directory; `best` is the metric of which less is better.

    `data` is the fingerprint of the training data, `earlier` those that earlier versions gave it;
    `accept` says what may have changed all the same. `tokenizer` and `tokens` say what a generator
    was trained with and on, see `checkpoint.reference`; `source` where imported weights come from.
    Steps of `kept` are never deleted to make room.
    """
    # an imported config may describe a network and no training
    keep = config.get("keep", {"latest": 1, "best": 1})
    policy = ocp.checkpoint_managers.AnyPreservationPolicy(
        [
            ocp.checkpoint_managers.LatestN(n=max(1, keep["latest"])),
            # max_to_keep with best_fn would delete the newest step
            ocp.checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                n=max(1, keep["best"]),
                reverse=True,
            ),
            ocp.checkpoint_managers.CustomSteps(kept),
        ]
    )
    manager = ocp.CheckpointManager(
        (workdir / checkpoint.FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy, enable_async_checkpointing=True, create=True
        ),
    )
    meta = {
        "kind": kind,
        "layout": layout.to_json() if layout else None,
        "classes": list(classes),
        "data": data,
        "tokenizer": tokenizer,
        "tokens": tokens,
        "best": best,
        "source": source,
    }
    return Run(workdir, manager, config, meta, earlier=earlier, accept=accept)


def resume_or_start(
    run: Run, states_by_name: dict[str, states.TrainState]
) -> tuple[dict[str, states.TrainState], str]:
    """(states, what was done). The whole policy, in this order:

    1. a checkpoint in the work directory: resume it, everything included;
    2. `config.init_from`: take its parameters (and average), fresh optimizer, step 0; a generator's
       class table may have other classes, and begins anew but for "no class";
    3. neither: the states as they were made.
    """
    steps = sorted(run.manager.all_steps())
    if steps:
        step = run.workdir / checkpoint.FOLDER / str(steps[-1])
        meta = checkpoint.read_meta(step)
        _same_run(meta, run, step)
        leaves = checkpoint.restore(step, states.paths(states_by_name), meta)
        return checkpoint.unflatten(
            states_by_name, leaves
        ), f"resumed step {steps[-1]} of {run.workdir}"
    if run.config.init_from:
        step = checkpoint.find(run.config.init_from)
        return finetuning.begun_from(step, run.meta, states_by_name)
    return states_by_name, f"started a new run in {run.workdir}"


def latest(run: Run) -> int | None:
    """The last step that a run has saved."""
    return max(run.manager.all_steps(), default=None)


def metrics(run: Run, step: int) -> dict[str, float]:
    """The figures that were saved with a step; none where it is gone."""
    folder = run.workdir / checkpoint.FOLDER / str(step)
    return checkpoint.read_meta(folder)["metrics"] if folder.exists() else {}


def drop_after(run: Run, step: int) -> None:
    """Forget all later steps, the last first: a kill in between leaves a run to go on from."""
    run.wait()
    for later in sorted(run.manager.all_steps(), reverse=True):
        if later > step:
            run.manager.delete(later)


def _same_run(meta: dict, run: Run, step: pathlib.Path) -> None:
    """Refuse to go on with another model, data set, batch size or seed."""
    if meta["kind"] != run.meta["kind"]:
        raise UserError(
            f"{step} holds a {meta['kind']}; this program trains a {run.meta['kind']}: use another "
            "--workdir"
        )
    old = configs.flat(json.loads(json.dumps(meta["config"])))
    new = configs.flat(json.loads(json.dumps(configs.plain(run.config))))
    changes = [
        f"  {name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(FREE)
    ]
    for name in ("layout", "classes", "data", "tokenizer"):
        a, b = (json.loads(json.dumps(m[name])) for m in (meta, run.meta))
        if name == "tokenizer" and a and b:
            a, b = a["fingerprint"], b["fingerprint"]
        if a != b and not (name == "data" and (a in run.earlier or "data" in run.accept)):
            changes.append(f"  {name}: {str(a)[:200]} there, {str(b)[:200]} here")
    run.meta["data_changes"] = list(meta.get("data_changes", ()))
    if meta["data"] not in (run.meta["data"], *run.earlier) and "data" in run.accept:
        change = {"step": meta["step"], "from": meta["data"], "to": run.meta["data"]}
        run.meta["data_changes"].append(change)
        report.say(f"from step {meta['step']} on {run.workdir} is trained on changed data")
    if changes and all(line.startswith("  data: ") for line in changes):
        raise UserError(
            f"{run.workdir} holds a run on other images than these (names, labels, sizes or "
            "contents differ). If you repaired, removed or added some, go on with them by "
            "--accept-data; else give the images it began with, or another --workdir:\n"
            + "\n".join(changes)
        )
    if changes:
        raise UserError(
            "\n".join(
                [
                    f"{run.workdir} holds a run with another config; use its values, or another "
                    "--workdir:",
                    *changes,
                ]
            )
        )
