"""Beginning from another's parameters: of a run, or of imported weights (`init_from`)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import parameters
from tokgen.checkpoints import checkpoint
from tokgen.data import classes
from tokgen.interfaces import PyTree, TokenLayout, UserError


def begun_from(
    step: pathlib.Path, here: dict, states_by_name: dict[str, PyTree]
) -> tuple[dict[str, PyTree], str]:
    """(states with the parameters of another run's step or of an import, what was done).

    `here` is the record of the run that begins: its kind, layout, tokenizer and classes.
    """
    meta = checkpoint.read_meta(step)
    notes = _same_tokens(meta, here, step)
    wanted = parameters.paths(states_by_name)
    there = {path.split("/")[0] for path in meta["manifest"]}
    # a discriminator that was not there begins as it was made
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
    # a class table of other classes, or a bias that counts them, is read as it is there
    moved = _moved(meta["classes"], here["classes"]) if here["kind"] == "generator" else None
    tables = {
        path: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
        for path, leaf in taken.items()
        if moved is not None and path.endswith(("/labels/table", "/head/bias"))
        for shape in [tuple(meta["manifest"][path]["shape"])]
        if shape[0] >= _before(path, meta) + len(meta["classes"]) and shape[1:] == leaf.shape[1:]
    }
    restored = checkpoint.restore(step, taken | tables, meta)
    if wrong := checkpoint.not_finite(restored):
        raise UserError(
            f"init_from {step} holds numbers that are not finite, in {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: begin from another step"
        )
    for path in tables:
        # codes before the classes, "no class" or the mask after them, where there are any
        before, (old, new) = _before(path, meta), moved
        after = len(restored[path]) - before - len(meta["classes"])
        kept, rows = (
            np.r_[:before, before + np.array(own, int), total - after : total]
            for own, total in ((old, len(restored[path])), (new, len(taken[path])))
        )
        mixed = taken[path].at[rows].set(restored[path][kept])
        restored[path] = jax.device_put(mixed, taken[path].sharding)
    leaves = {**wanted, **restored}
    for path in set(wanted) - set(taken):
        name, part, *rest = path.split("/")
        if part == "ema":
            # a copy: a training step donates both
            leaves[path] = jnp.copy(leaves["/".join((name, "params", *rest))]).astype(jnp.float32)
    what = "; ".join([f"started from the parameters of {step}", *notes])
    return checkpoint.unflatten(states_by_name, leaves), what


def _before(path: str, meta: dict) -> int:
    """The rows of an array before those of the classes."""
    return TokenLayout.from_json(meta["layout"]).absent if path.endswith("/bias") else 0


def _moved(old: Sequence[str], new: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """(rows there, rows here) of the classes that both have; None where all stay, by number."""
    numbers = [classes.counted(names) for names in (old, new)]
    same = sorted(old) == sorted(new)
    if old == new or (len(old) == len(new) and any(numbers) and not same):
        return None
    if all(numbers) and not same:
        return [], []
    rows = classes.common(old, new)
    if classes.of_imagenet(old) and len(old) == len(new) and rows[0] == rows[1]:
        # no name says otherwise: the thousand in their usual order, in words of their own
        return None
    return rows


def _same_tokens(meta: dict, here: dict, step: pathlib.Path) -> list[str]:
    """What is to be told of tokens and classes; refuses a generator of other tokens."""
    if meta["kind"] != here["kind"]:
        raise UserError(
            f"init_from {step} holds a {meta['kind']}; this program trains a {here['kind']}"
        )
    if meta["kind"] != "generator":
        return []
    notes = []
    if meta["layout"] != here["layout"]:
        raise UserError(
            f"init_from {step} writes tokens of {TokenLayout.from_json(meta['layout'])}; these "
            f"are of {TokenLayout.from_json(here['layout'])}: pretokenize with the tokenizer "
            "of that model"
        )
    old, new = meta["tokenizer"], here["tokenizer"]
    if old is None or new is None:
        notes.append("its tokenizer is not recorded, only the layouts were compared")
    elif old["fingerprint"] != new["fingerprint"]:
        raise UserError(
            f"init_from {step} was made with another tokenizer: need the fingerprint "
            f"{old['fingerprint'][:16]} ({old['path']}), found {new['fingerprint'][:16]} "
            f"({new['path']}); run tokgen pretokenize with the tokenizer of the imported model"
        )
    old, new = meta["classes"], here["classes"]
    moved = _moved(old, new)
    if moved is None and old != new:
        names = [", ".join(names[:3]) for names in (old, new)]
        notes.append(f"the class table is kept, by number: {names[0]} ... are now {names[1]} ...")
    elif moved and moved[0]:
        what = "all" if len(moved[1]) == len(new) else f"{len(moved[1])} of {len(new)}"
        notes.append(f"the class table is kept by name: {what} classes; the order is another one")
        if what != "all":
            notes[-1] = f"the class table is kept by name: {what} classes, the others begin anew"
    elif moved:
        notes.append(f"the class table is new: {len(old)} classes there, {len(new)} here")
    return notes
