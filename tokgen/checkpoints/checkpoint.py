"""A step on disk: find it, read it, verify it.

Record and arrays are one file's matter, since neither is trusted without the other. The record is
told in today's words, whatever they were when it was written (config/migration.py).

A step holds the arrays of its TrainStates and a `meta` record in JSON: kind, config, layout,
classes, tokenizer, metrics, and the manifest. Orbax commits a step whole or not at all, but returns
flipped bytes and casts dtypes without a word; the manifest (a checksum, shape and dtype per leaf)
is compared on every restore.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import parameters, records, report, runtime, sharding, storage
from tokgen.checkpoints import manifest, pieces
from tokgen.config import migration
from tokgen.interfaces import PyTree, TokenLayout, UserError
from tokgen.pretrained import hub
from tokgen.zoo import model as zoo

FORMAT = 1
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # of damaged files
FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"  # what Orbax writes last of a step in a bucket
ENDED = "_CHECKPOINT_METADATA"  # of any step: in it Orbax notes when it was done
# what says in a bucket that a step is whole; removed in this order
MARKS = (manifest.SIZES, COMMITTED, ENDED)
TOGETHER = 2**27  # bytes of leaves that are read at the same time


def find(path: str | os.PathLike) -> pathlib.Path:
    """The step that CKPT means: a step itself, or the best step of a work directory.

    `hf://OWNER/NAME[/FOLDER]` is such a folder in a repository of the Hugging Face hub, which is
    fetched; a name of the zoo is the model that `tokgen pull` put into the cache: nothing is.
    """
    if str(path).startswith("hf://"):
        given = hub.folder(str(path))
    elif zoo.is_name(path):
        given = pulled(str(path))
        if not given.exists():
            raise UserError(_to_pull(str(path)))
    else:
        given = storage.path(path)
        if str(path) in zoo.known() and given.exists():
            _tell_local(str(path))
    with storage.reached(given):
        if not given.exists():
            raise UserError(f"no checkpoint at {given}: there is no such path{_no_name(str(path))}")
        for folder in (given, given / FOLDER):
            if storage.is_dir(folder) and not _is_step(folder):
                found = [s for s in folder.iterdir() if s.name.isdigit() and _is_step(s)]
                if found:
                    return _best(found)
            elif storage.is_dir(folder):
                return folder
    hidden = "; it hides the published model of that name: rename it, or run this elsewhere"
    raise UserError(
        f"no checkpoint at {given}: need a work directory with {FOLDER}/STEP inside, or one step"
        f"{hidden if str(path) in zoo.known() else ''}"
    )


def pulled(name: str) -> pathlib.Path:
    """Where a published model lies once it is pulled."""
    return runtime.cache_folder() / "models" / name


def _to_pull(name: str) -> str:
    model = zoo.named(name)
    return (
        f"{name} is a published model that was not fetched yet ({report.amount(model.size)}, "
        f"licence {model.licence}): tokgen pull {name} does that, in Python "
        f'tokgen.pull("{name}", yes=True)'
    )


def _no_name(path: str) -> str:
    """What is to be said of what may have been meant as a published model's name."""
    if path.rstrip(os.sep) in zoo.known():
        return f"; the published model is called {path.rstrip(os.sep)}, without a slash"
    if os.sep in path:
        return ""
    try:
        zoo.named(path)
    except UserError as error:
        return f"; {error}"


@functools.cache
def _tell_local(name: str) -> None:
    report.say(f"{name} is the one in this folder, not the published model of that name")


def _is_step(folder: pathlib.Path) -> bool:
    if storage.is_remote(folder):
        return is_committed(folder)
    return (folder / "meta").is_dir() or (folder / ENDED).exists()


def is_committed(step: pathlib.Path) -> bool:
    """Whether a step is there whole, as it was saved.

    In a bucket Orbax marks what it has written; a step that was copied there was sealed before.
    """
    if not storage.is_remote(step):
        return step.is_dir()
    return any((step / mark).exists() for mark in (manifest.SIZES, COMMITTED))


def is_ended(step: pathlib.Path) -> bool:
    """Whether Orbax wrote a step to its end, wherever that was; all of it may not be here."""
    try:
        with storage.asked(step):
            record = records.checked(records.load(step / ENDED), commit_timestamp_nsecs=int)
    except storage.NotReached:
        raise
    except (FileNotFoundError, ValueError):
        return False
    return record["commit_timestamp_nsecs"] > 0


def steps(folder: pathlib.Path) -> list[int]:
    """The numbers of the steps in a folder of checkpoints, in their order."""
    with storage.reached(folder):
        if not storage.is_dir(folder):
            return []
        return sorted(int(s.name) for s in folder.iterdir() if s.name.isdigit() and is_committed(s))


def _best(steps: list[pathlib.Path]) -> pathlib.Path:
    """The step of the lowest held-out figure; the latest where no figure is finite.

    Of steps without a finite figure, one that was not measured goes before one that was: a figure
    that is no number tells of weights that are none.
    """

    metas = [read_meta(step) for step in steps]

    def rank(row):
        _, meta, value = row
        return (value is None, bool(meta["metrics"]), value or 0.0, -meta["step"])

    return min(zip(steps, metas, figures(metas), strict=True), key=rank)[0]


def figures(metas: Sequence[dict]) -> list[float | None]:
    """The held-out figures of steps of a run, on one scale of which less is better.

    None where it is absent or not finite. Where one of the steps was measured when `l2` was taken
    from the mean of PSNR and not the mean of the errors, all are told as it was then.
    """
    then = any(map(_of_psnr, metas))
    return [_figure(meta, then) for meta in metas]


def _of_psnr(meta: dict) -> bool:
    """Whether an older version measured a step: it noted no error of its `l2`."""
    return meta["best"] == "l2" and "l2" in meta["metrics"] and "l2_error" not in meta["metrics"]


def _figure(meta: dict, then: bool) -> float | None:
    metrics, name = meta["metrics"], meta["best"]
    if name == "l2" and then and not _of_psnr(meta):
        psnr_db = _finite(metrics.get("psnr_db"))
        return None if psnr_db is None else 4 * 10 ** (-psnr_db / 10)
    return _finite(metrics.get(name))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def read_meta(step: pathlib.Path) -> dict:
    """The JSON record of a step, with the figures that were noted since (`measured`: if they were).

    UserError when it cannot be read, or is none.
    """
    try:
        with storage.asked(step):
            return _record(step)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(step, f"its record cannot be read ({error})") from error


def _record(step: pathlib.Path) -> dict:
    meta = records.checked(
        records.load(step / "meta" / "metadata"),
        **{"format": int, "digest": str, "kind": str, "step": int, "config": dict},
        **{"layout": (dict, type(None)), "classes": list, "best": str, "manifest": dict},
        metrics=(dict, type(None)),
    )
    if meta["format"] != FORMAT:
        raise UserError(
            f"checkpoint {step} has format {meta['format']}; this tokgen reads {FORMAT}"
        )
    if meta.pop("digest") != manifest.digest(meta):
        raise ValueError("it does not match its digest")
    for path, entry in meta["manifest"].items():
        try:
            records.checked(entry, shape=list, dtype=str, checksum=str)
            jnp.dtype(entry["dtype"])
            if not all(type(size) is int and 0 <= size < 2**40 for size in entry["shape"]):
                raise ValueError(f"a shape of {records.shown(entry['shape'])}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} of its manifest: {error}") from error
    if meta["layout"] is not None:
        try:
            TokenLayout.from_json(meta["layout"])  # its bounds are checked here, before any work
        except UserError as error:
            raise ValueError(str(error)) from error
    noted = _noted(step) if meta["metrics"] is None else meta["metrics"]
    return _migrated(meta) | {
        "metrics": migration.metrics(noted or {}),
        "measured": noted is not None,
    }


def _migrated(meta: dict) -> dict:
    """A record in today's words; `written` says under which path an array of another one lies."""
    paths = {path: migration.parameter(path) for path in meta["manifest"]}
    return meta | {
        "config": migration.config(meta["config"]),
        "best": next(iter(migration.metrics({meta["best"]: None}))),
        "manifest": {paths[path]: entry for path, entry in meta["manifest"].items()},
        "written": {now: then for then, now in paths.items() if now != then},
    }


def note(step: pathlib.Path, figures: dict[str, float]) -> None:
    """Write the held-out figures of a step that is saved already."""
    figures = records.finite(figures)
    content = {"figures": figures, "digest": manifest.digest(figures)}
    manifest.put(step, manifest.FIGURES, records.text(content))


def _noted(step: pathlib.Path) -> dict | None:
    file = step / manifest.FIGURES
    try:
        with storage.reached(step):
            if not file.exists():
                return None
            content = records.checked(records.load(file), figures=dict, digest=str)
        if content["digest"] != manifest.digest(content["figures"]):
            raise ValueError("they do not match their digest")
    except storage.NotReached:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(step, f"its figures in {file.name} cannot be read ({error})") from error
    return content["figures"]


def is_whole(step: pathlib.Path) -> bool:
    """Whether the record can be read, and every file has the size that it was saved with."""
    try:
        with storage.asked(step):
            _record(step)
    except storage.NotReached:
        raise
    except (OSError, ValueError):
        return False
    return not manifest.misfit(step)


def _damaged(step: pathlib.Path, what: str) -> UserError:
    name = step.parent.parent.name
    if name in zoo.known() and storage.resolved(step.parent.parent) == pulled(name).resolve():
        return UserError(
            f"checkpoint {step} is damaged: {what}; tokgen pull {name} --remove, then tokgen pull "
            f"{name}, brings it anew"
        )
    with storage.reached(step.parent):
        siblings = [s for s in step.parent.iterdir() if s.name.isdigit() and s != step]
    whole = sorted((s.name for s in siblings if is_whole(s)), key=int)
    earlier = [name for name in whole if step.name.isdigit() and int(name) < int(step.name)]
    other = f"use another step ({', '.join(whole)})" if whole else "train it again"
    if earlier:
        other = (
            f"use an earlier step ({', '.join(whole)}): give CKPT as {step.parent}/{earlier[-1]}"
        )
        other += f", or train on from it with --from {earlier[-1]}, which sets the later ones aside"
    return UserError(f"checkpoint {step} is damaged: {what}; {other}, or restore it from a copy")


def restore(step: pathlib.Path, wanted: dict[str, Any], meta: dict) -> dict[str, jax.Array]:
    """Leaves of a step, verified, with the shapes, dtypes and shardings of `wanted`."""
    return dict(restored(step, wanted, meta))


def restored(
    step: pathlib.Path, wanted: dict[str, Any], meta: dict
) -> Iterator[tuple[str, jax.Array]]:
    """As `restore`, leaf by leaf: who lets go of them has few in memory at a time."""
    record, names = meta["manifest"], _named(step, wanted, meta)
    logging.getLogger("absl").setLevel(logging.ERROR)
    import orbax.checkpoint as ocp  # slow to import, and for resuming alone

    folder, checkpointer = storage.absolute(step / "state"), ocp.PyTreeCheckpointer()
    with _readable(step):
        # the store cuts and fills arrays to any size that is asked for, without a word
        stored = checkpointer.metadata(folder).item_metadata
        for path, leaf in wanted.items():
            if tuple(stored[names[path]].shape) != tuple(leaf.shape):
                raise ValueError(f"{path} is {stored[names[path]].shape} there, not {leaf.shape}")
    for group in _groups(wanted):
        target = {
            names[path]: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for path, leaf in group.items()
        }
        with _readable(step):
            found = checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
            leaves = {path: found.pop(names[path]) for path in group}
        sums = manifest.of(leaves)
        wrong = [path for path in group if sums[path]["checksum"] != record[path]["checksum"]]
        if wrong:
            raise _damaged(
                step, f"the checksum of {', '.join(wrong[:3])} does not match its manifest"
            )
        for path in group:
            yield path, leaves.pop(path)
        # Orbax's futures refer to each other, and to what they read
        if sum(map(_bytes, group.values())) > TOGETHER // 4:
            gc.collect()


def in_pieces(
    step: pathlib.Path, wanted: Mapping[str, Any], meta: dict, apart: Collection[str]
) -> Iterator[pieces.Piece]:
    """Leaves of a step as `pieces.read` gives them."""
    names = _named(step, wanted, meta)
    with _readable(step):
        yield from pieces.read(
            *(storage.resolved(step / "state"), wanted, meta["manifest"]),
            *(names.__getitem__, apart),
        )


def _named(step: pathlib.Path, wanted: Mapping[str, Any], meta: dict) -> dict[str, str]:
    """What leaves are called in the store; an error where it does not hold them as wanted."""
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
    # arrays have the names there that they were written with
    return {path: name(meta.get("written", {}).get(path, path)) for path in wanted}


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _groups(wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Leaves that are read together: a leaf, or several of TOGETHER bytes at most."""
    group, taken = {}, 0
    for path, leaf in wanted.items():
        size = _bytes(leaf)
        if group and taken + size > TOGETHER:
            yield group
            group, taken = {}, 0
        group[path] = leaf
        taken += size
    if group:
        yield group


@contextlib.contextmanager
def _readable(step: pathlib.Path) -> Iterator[None]:
    """What the store raises of damaged files, as one message; a bucket that refuses is another."""
    try:
        with storage.asked(step):
            yield
    except storage.NotReached:
        raise
    except Exception as error:
        # Orbax raises this very class for an array that it cannot read
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):
            raise
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise _damaged(step, f"its arrays cannot be read ({first})") from error


def resumed(step: pathlib.Path, wanted: dict[str, Any], meta: dict) -> dict[str, jax.Array]:
    """As `restore`, of a whole training state that an older version may have written.

    Moments and averages are cast to the dtype that they have now; a count that was not kept there
    begins as it is in `wanted`.
    """
    record = meta["manifest"]
    there = {p: a for p, a in wanted.items() if p in record or not p.endswith("/skips")}
    cast = {
        path: as_recorded(leaf, record.get(path))
        for path, leaf in there.items()
        if path.split("/")[1:2] in (["opt_state"], ["ema"])
    }
    leaves = restore(step, there | cast, meta)
    leaves |= {path: leaves[path].astype(there[path].dtype) for path in cast}
    return wanted | leaves


def as_recorded(leaf: Any, entry: dict | None) -> Any:
    """A leaf to be read in the dtype that it was saved with, where both are floating."""
    kinds = (leaf.dtype, jnp.dtype(entry["dtype"]) if entry else leaf.dtype)
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, kinds[1], sharding=leaf.sharding)


def verify(step: pathlib.Path) -> None:
    """Read every array of a step and compare it with the manifest; its networks are finite."""
    meta = read_meta(step)
    whole = sharding.replicated(sharding.current())
    wanted = {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
        for path, entry in meta["manifest"].items()
    }
    wrong = [p for path, leaf in restored(step, wanted, meta) for p in not_finite({path: leaf})]
    if wrong:
        raise UserError(
            f"checkpoint {step} holds numbers that are not finite, in {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: it was read as it was "
            "written, but nothing of use comes of it; use another step, or import it again"
        )


def not_finite(leaves: dict[str, jax.Array]) -> list[str]:
    """The paths of those parameters, averages and statistics that are not finite throughout."""
    parts = ("params", "ema", "stats")
    fine = {p: jnp.isfinite(a).all() for p, a in leaves.items() if p.split("/")[1] in parts}
    return [path for path, found in jax.device_get(fine).items() if not found]


def name(path: str) -> str:
    """Of a leaf in the store."""
    return path.replace("/", ".")  # a slash would become a folder in the store


def named(leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves under the names that they have in the store."""
    return {name(path): leaf for path, leaf in leaves.items()}


def unflatten(tree: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    """A tree like `tree` of leaves by path."""
    ordered = [leaves[path] for path in parameters.paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), ordered)


def reference(path: str | os.PathLike, workdir: pathlib.Path) -> dict:
    """How a checkpoint refers to a folder: also relative to its run, so that both may move."""
    path, workdir = (storage.resolved(storage.path(place)) for place in (path, workdir))
    remote = storage.is_remote(path)
    # between this host and a bucket, or two buckets, there is no way but the whole path
    apart = remote != storage.is_remote(workdir)
    apart |= remote and storage.bucket(path) != storage.bucket(workdir)
    return {"path": str(path), "relative": str(path) if apart else os.path.relpath(path, workdir)}


def referred(record: dict, step: pathlib.Path) -> pathlib.Path:
    """Where a folder lies that a checkpoint refers to: beside the run first, if both moved."""
    run, relative = step.parent.parent, record["relative"]
    if storage.is_remote(run) or storage.is_remote(relative) or storage.is_remote(record["path"]):
        apart = storage.is_remote(relative) or os.path.isabs(relative)
        near = storage.path(relative if apart else f"{run}/{relative}")
        return near if near.exists() else storage.path(record["path"])
    near = run / relative
    # os.path: a path out of a record may be none at all
    return near if os.path.exists(near) else pathlib.Path(record["path"])


def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    from importlib import metadata

    names = ("tokgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
