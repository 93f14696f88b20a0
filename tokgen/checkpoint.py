"""Save, verify, resume; load a tokenizer or a generator by path.

A run keeps its checkpoints in `WORKDIR/checkpoints/STEP`. A step holds the arrays of its
TrainStates and a `meta` record in JSON: kind, config, layout, classes, tokenizer, metrics, and the
manifest. Orbax commits a step whole or not at all, but returns flipped bytes and casts dtypes
without a word; the manifest (a checksum, shape and dtype per leaf) is compared on every restore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from tokgen import config as configs
from tokgen import manifest, rng, sharding
from tokgen import state as states
from tokgen.interfaces import PyTree, TokenLayout, UserError

FORMAT = 1
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # of damaged files
FOLDER = "checkpoints"

# Fields of a config that may change between a run and its continuation; all others decide what
# is trained, and a change is refused. Data may move: their fingerprint is compared.
FREE = (
    *("steps", "report.", "keep.", "mesh.", "strategy", "held_out.", "max_bad", "init_from"),
    *("data.path", "data.data_dir", "data.tokens", "data.tokenizer", "data.images", "data.text"),
)


# ---------------------------------------------------------------- the work directory


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


# ---------------------------------------------------------------- a run


@dataclasses.dataclass
class Run:
    """The checkpoints of one work directory."""

    workdir: pathlib.Path
    manager: ocp.CheckpointManager
    config: ml_collections.ConfigDict
    meta: dict

    def save(self, states_by_name: dict[str, states.TrainState], metrics: dict[str, float]) -> None:
        """Begin to save; the previous save is committed and announced first."""
        self.wait()
        leaves = states.paths(states_by_name)
        step = int(jax.device_get(states_by_name["model"].step))
        meta = {
            **self.meta,
            "format": FORMAT,
            "step": step,
            "config": configs.plain(self.config),
            "metrics": metrics,
            "versions": versions(),
            "manifest": manifest.of(leaves),
        }
        meta["digest"] = manifest.digest(meta)
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(leaves)), meta=ocp.args.JsonSave(meta)
            ),
            metrics=metrics,
        )

    def wait(self) -> None:
        """Until the last save is committed; raises what went wrong in the background."""
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            for step in self.manager.all_steps():
                manifest.seal(self.workdir / FOLDER / str(step))

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
) -> Run:
    """Open the checkpoints of a work directory; `best` is the metric of which less is better.

    `data` is the fingerprint of the training data. `tokenizer` and `tokens` say what a generator
    was trained with and on, see `reference`; `source` where imported weights come from. Steps of
    `kept` are never deleted to make room.
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
        (workdir / FOLDER).absolute(),
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
    return Run(workdir, manager, config, meta)


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
        step = run.workdir / FOLDER / str(steps[-1])
        meta = read_meta(step)
        _same_run(meta, run, step)
        leaves = _restore(step, states.paths(states_by_name), meta)
        return _unflatten(states_by_name, leaves), f"resumed step {steps[-1]} of {run.workdir}"
    if run.config.init_from:
        return _begun_from(find(run.config.init_from), run, states_by_name)
    return states_by_name, f"started a new run in {run.workdir}"


def _begun_from(
    step: pathlib.Path, run: Run, states_by_name: dict[str, states.TrainState]
) -> tuple[dict[str, states.TrainState], str]:
    """The states with the parameters of another run's step, or of an import."""
    meta = read_meta(step)
    notes = _same_tokens(meta, run, step)
    wanted = states.paths(states_by_name)
    there = {path.split("/")[0] for path in meta["manifest"]}
    # a critic that was not there begins as it was made
    taken = {
        path: leaf
        for path, leaf in wanted.items()
        if path.split("/")[0] in {"model", *there}
        and path.split("/")[1] in ("params", "ema", "stats")
    }
    if not any(path.startswith("model/ema/") for path in meta["manifest"]):
        # imported weights may have no average: it begins as the parameters
        taken = {p: leaf for p, leaf in taken.items() if p.split("/")[1] != "ema"}
    missing = sorted(set(taken) - set(meta["manifest"]))
    if missing:
        raise UserError(
            f"init_from {step} does not fit this config: it lacks {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}"
        )
    # a class table of another length, or a bias that counts classes, is read as it is there
    tables = {
        path: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
        for path, leaf in taken.items()
        if run.meta["kind"] == "generator" and path.endswith(("/labels/table", "/head/bias"))
        for shape in [tuple(meta["manifest"][path]["shape"])]
        if shape[0] != leaf.shape[0] and shape[1:] == leaf.shape[1:]
    }
    restored = _restore(step, taken | tables, meta)
    for path in tables:
        # codes before the classes, "no class" or the mask after them, where there are any
        before = TokenLayout.from_json(meta["layout"]).absent if path.endswith("/bias") else 0
        after = len(restored[path]) - before - len(meta["classes"])
        kept = jnp.r_[:before, len(restored[path]) - after : len(restored[path])]
        here = jnp.r_[:before, len(taken[path]) - after : len(taken[path])]
        mixed = taken[path].at[here].set(restored[path][kept])
        restored[path] = jax.device_put(mixed, taken[path].sharding)
    leaves = {**wanted, **restored}
    for path in set(wanted) - set(taken):
        name, part, *rest = path.split("/")
        if part == "ema":
            # a copy: a training step donates both
            leaves[path] = jnp.copy(leaves["/".join((name, "params", *rest))]).astype(jnp.float32)
    what = "; ".join([f"started from the parameters of {step}", *notes])
    return _unflatten(states_by_name, leaves), what


def _same_tokens(meta: dict, run: Run, step: pathlib.Path) -> list[str]:
    """What is to be told of tokens and classes; refuses a generator of other tokens."""
    if meta["kind"] != run.meta["kind"]:
        raise UserError(
            f"init_from {step} holds a {meta['kind']}; this program trains a {run.meta['kind']}"
        )
    if meta["kind"] != "generator":
        return []
    notes = []
    if meta["layout"] != run.meta["layout"]:
        raise UserError(
            f"init_from {step} writes tokens of {TokenLayout.from_json(meta['layout'])}; these "
            f"are of {TokenLayout.from_json(run.meta['layout'])}: pretokenize with the tokenizer "
            "of that model"
        )
    old, new = meta["tokenizer"], run.meta["tokenizer"]
    if old is None or new is None:
        notes.append("its tokenizer is not recorded, only the layouts were compared")
    elif old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"init_from {step} was made with another tokenizer: need the fingerprint "
            f"{old['fingerprint'][:16]} ({old['path']}), found {new['fingerprint'][:16]} "
            f"({new['path']}); run tokgen pretokenize with the tokenizer of the imported model"
        )
    there, here = meta["classes"], run.meta["classes"]
    if len(there) != len(here):
        notes.append(f"the class table is new: {len(there)} classes there, {len(here)} here")
    elif there != here:
        names = [", ".join(classes[:3]) for classes in (there, here)]
        notes.append(f"the class table is kept, by number: {names[0]} ... are now {names[1]} ...")
    return notes


def latest(run: Run) -> int | None:
    """The last step that a run has saved."""
    return max(run.manager.all_steps(), default=None)


def metrics(run: Run, step: int) -> dict[str, float]:
    """The figures that were saved with a step; none where it is gone."""
    folder = run.workdir / FOLDER / str(step)
    return read_meta(folder)["metrics"] if folder.exists() else {}


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
        if a != b:
            changes.append(f"  {name}: {str(a)[:200]} there, {str(b)[:200]} here")
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


# ---------------------------------------------------------------- reading


def find(path: str | os.PathLike) -> pathlib.Path:
    """The step that CKPT means: a step itself, or the best step of a work directory.

    `hf://OWNER/NAME[/FOLDER]` is such a folder in a repository of the Hugging Face hub.
    """
    given = _downloaded(str(path)) if str(path).startswith("hf://") else pathlib.Path(path)
    if not given.exists():
        raise UserError(f"no checkpoint at {given}: there is no such path")
    for folder in (given, given / FOLDER):
        if folder.is_dir() and not _is_step(folder):
            found = [s for s in folder.iterdir() if s.name.isdigit() and _is_step(s)]
            if found:
                return _best(found)
        elif folder.is_dir():
            return folder
    raise UserError(
        f"no checkpoint at {given}: need a work directory with {FOLDER}/STEP inside, or one step"
    )


def _downloaded(reference: str) -> pathlib.Path:
    """A folder of a hub repository, fetched into the hub's own cache (extra `hub`)."""
    import huggingface_hub

    owner, name, *inside = [*reference.removeprefix("hf://").split("/"), ""]
    folder = "/".join(inside).strip("/")
    if not owner or not name:
        raise UserError(f"a hub reference is hf://OWNER/NAME[/FOLDER]; found {reference}")
    try:
        root = huggingface_hub.snapshot_download(
            f"{owner}/{name}", allow_patterns=[f"{folder}/**"] if folder else None
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot fetch {reference}: {error}") from error
    return pathlib.Path(root) / folder


def _is_step(folder: pathlib.Path) -> bool:
    return (folder / "meta").is_dir() or (folder / "_CHECKPOINT_METADATA").exists()


def _best(steps: list[pathlib.Path]) -> pathlib.Path:
    """The step of the lowest held-out figure; the latest where none was measured."""

    def rank(step):
        meta = read_meta(step)
        value = meta["metrics"].get(meta["best"], float("inf"))
        return (value if np.isfinite(value) else float("inf"), -meta["step"])

    return min(steps, key=rank)


def read_meta(step: pathlib.Path) -> dict:
    """The JSON record of a step."""
    try:
        meta = json.loads((step / "meta" / "metadata").read_text())
        if meta["format"] != FORMAT:
            raise UserError(
                f"checkpoint {step} has format {meta['format']}; this tokgen reads {FORMAT}"
            )
        if meta.pop("digest") != manifest.digest(meta):
            raise ValueError("it does not match its digest")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(step, f"its record cannot be read ({error})") from error


def _damaged(step: pathlib.Path, what: str) -> UserError:
    siblings = sorted(
        (s.name for s in step.parent.iterdir() if s.name.isdigit() and s != step), key=int
    )
    other = f"use an earlier step ({', '.join(siblings)})" if siblings else "train it again"
    return UserError(f"checkpoint {step} is damaged: {what}; {other}, or restore it from a copy")


def _restore(step: pathlib.Path, wanted: dict[str, Any], meta: dict) -> dict[str, jax.Array]:
    """Leaves of a step, verified, with the shapes, dtypes and shardings of `wanted`."""
    if wrong := manifest.misfit(step):
        raise _damaged(step, wrong)
    record, problems = meta["manifest"], []
    for path, leaf in wanted.items():
        if path not in record:
            problems.append(f"{path}: absent there, {tuple(leaf.shape)} here")
            continue
        there = (tuple(record[path]["shape"]), record[path]["dtype"])
        if there != (tuple(leaf.shape), str(leaf.dtype)):
            problems.append(f"{path}: {there} there, {(tuple(leaf.shape), str(leaf.dtype))} here")
    if problems:
        shown = "\n  ".join(problems[:10])
        raise UserError(f"checkpoint {step} holds other arrays than this model:\n  {shown}")
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for path, leaf in wanted.items()
    }
    names = _named(target)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        found = ocp.PyTreeCheckpointer().restore(
            (step / "state").absolute(),
            args=ocp.args.PyTreeRestore(
                item=names,
                restore_args=ocp.checkpoint_utils.construct_restore_args(names),
                partial_restore=True,
            ),
        )
        leaves = {path: found[_name(path)] for path in wanted}
    except Exception as error:
        # Orbax raises this very class for an array that it cannot read
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise _damaged(step, f"its arrays cannot be read ({first})") from error
    sums = manifest.of(leaves)
    wrong = [path for path in wanted if sums[path]["checksum"] != record[path]["checksum"]]
    if wrong:
        raise _damaged(step, f"the checksum of {', '.join(wrong[:3])} does not match its manifest")
    return leaves


def verify(step: pathlib.Path) -> None:
    """Read every array of a step and compare it with the manifest."""
    meta = read_meta(step)
    whole = sharding.replicated(sharding.make_mesh())
    wanted = {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
        for path, entry in meta["manifest"].items()
    }
    _restore(step, wanted, meta)


def _name(path: str) -> str:
    return path.replace("/", ".")  # a slash would become a folder in the store


def _named(leaves: dict[str, Any]) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in leaves.items()}


def _unflatten(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    ordered = [leaves[path] for path in states.paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), ordered)


# ---------------------------------------------------------------- loading for use


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network loaded for use, with what its checkpoint says of it."""

    module: nnx.Module
    config: ml_collections.ConfigDict
    layout: TokenLayout | None  # None: a continuous bottleneck
    classes: tuple[str, ...]
    step: pathlib.Path
    meta: dict
    fingerprint: str


def load_tokenizer(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The tokenizer of a checkpoint, with its averaged weights; `compute` overrides the dtype."""
    return load(path, "tokenizer", compute=compute)


def load_generator(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The generator of a checkpoint, with its averaged weights; `compute` overrides the dtype."""
    return load(path, "generator", compute=compute)


def load_tokenizer_of(generator: Loaded, path: str = "") -> Loaded:
    """The tokenizer that a generator was trained with; `path` says where it lies now, if moved."""
    wanted = generator.meta["tokenizer"]
    if wanted is None:  # imported alone
        if not path:
            raise UserError(
                f"generator {generator.step} was imported without its tokenizer; say where that "
                "is with --tokenizer PATH"
            )
        tokenizer = load_tokenizer(path)
        check_layout(tokenizer, generator.layout, f"generator {generator.step}")
        return tokenizer
    place = pathlib.Path(path) if path else referred(wanted, generator.step)
    if not place.exists():
        raise UserError(
            f"the tokenizer of {generator.step} is not at {place}; say where it is now with "
            "--tokenizer PATH"
        )
    tokenizer = load_tokenizer(place)
    check_tokenizer(tokenizer, wanted["fingerprint"], f"generator {generator.step}")
    return tokenizer


def reference(path: str | os.PathLike, workdir: pathlib.Path) -> dict:
    """How a checkpoint refers to a folder: also relative to its run, so that both may move."""
    path = pathlib.Path(path).resolve()
    return {"path": str(path), "relative": os.path.relpath(path, workdir.resolve())}


def referred(record: dict, step: pathlib.Path) -> pathlib.Path:
    """Where a folder lies that a checkpoint refers to: beside the run first, if both moved."""
    near = step.parent.parent / record["relative"]
    return near if near.exists() else pathlib.Path(record["path"])


def check_tokenizer(tokenizer: Loaded, fingerprint: str, whose: str) -> None:
    """An error when tokens were made by another tokenizer."""
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{whose} was made with another tokenizer: its tokenizer's fingerprint is "
            f"{fingerprint[:16]}, that of {tokenizer.step} is {tokenizer.fingerprint[:16]}; use "
            "the tokenizer that made it, or run tokgen pretokenize and train again"
        )


def check_layout(tokenizer: Loaded, layout: TokenLayout, whose: str) -> None:
    """An error when a tokenizer's tokens cannot be those of a generator."""
    if tokenizer.layout != layout:
        raise UserError(
            f"{whose} writes tokens of {layout}, the tokenizer {tokenizer.step} has "
            f"{tokenizer.layout}; use the tokenizer that its tokens are of, imported with the same "
            "size and grouping of bits"
        )


def load(path: str | os.PathLike, kind: str = "", *, compute: str = "", which: str = "") -> Loaded:
    """The network of a checkpoint, an error when it is not of `kind`.

    `which` weights: "params" or "ema"; the averaged ones where there are, unless it says.
    """
    step = find(path)
    meta = read_meta(step)
    if kind and meta["kind"] != kind:
        raise UserError(f"{step} holds a {meta['kind']}; need the checkpoint of a {kind}")
    config = ml_collections.ConfigDict(meta["config"])
    if compute:
        config.precision.compute = compute
    layout = TokenLayout.from_json(meta["layout"]) if meta["layout"] else None
    classes = tuple(meta["classes"])
    key = rng.key(0, "init")
    if meta["kind"] == "tokenizer":

        def make():
            return configs.tokenizer(config, rngs=nnx.Rngs(key))
    else:

        def make():
            return configs.generator(config, layout, len(classes), rngs=nnx.Rngs(key))

    graph, params, stats = states.split(nnx.eval_shape(make))
    averaged = any(p.startswith("model/ema/") for p in meta["manifest"])
    which = which or ("ema" if averaged else "params")
    mesh = sharding.make_mesh()
    whole = sharding.replicated(mesh)
    wanted = {f"model/{which}/{p}": leaf for p, leaf in states.paths(params).items()}
    wanted.update({f"model/stats/{p}": leaf for p, leaf in states.paths(stats).items()})
    wanted = {
        p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
        for p, leaf in wanted.items()
    }
    leaves = _restore(step, wanted, meta)
    params, stats = (
        _unflatten(tree, {p: leaves[f"model/{name}/{p}"] for p in states.paths(tree)})
        for tree, name in ((params, which), (stats, "stats"))
    )
    return Loaded(
        module=states.merge(graph, params, stats),
        config=config,
        layout=layout,
        classes=classes,
        step=step,
        meta=meta,
        fingerprint=fingerprint(meta, which),
    )


def fingerprint(meta: dict, which: str) -> str:
    """What a network computes, as a hash: its weights and the sections that shape it."""
    used = {
        path: entry
        for path, entry in meta["manifest"].items()
        if path.startswith((f"model/{which}/", "model/stats/"))
    }
    sections = ("view", "encoder", "quantizer", "decoder", "pixels", "generator")
    shape = {name: meta["config"].get(name) for name in sections}
    record = json.dumps([used, shape, meta["layout"]], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    from importlib import metadata

    names = ("tokgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
