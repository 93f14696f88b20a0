"""Imported weights as a checkpoint, and what an export needs of it.

An import is a run of one step, 0. Arrays of the published file that have no place in our model lie
in a file of their own in the step, so that an export can give them back.
"""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp
import optax

from tokgen import checkpoint, runs
from tokgen import state as states
from tokgen.pretrained import reader, transfer, writer

ASIDE = "aside.safetensors"


def save_imported(
    workdir: pathlib.Path,
    imported: transfer.Imported,
    source: dict,
    tokenizer: checkpoint.Loaded | None = None,
) -> pathlib.Path:
    """A checkpoint of step 0; its folder. `tokenizer` is the one that a generator's tokens are of.

    Classes of a generator are named by their numbers: a published file has no names.
    """
    made_by = None
    if tokenizer is not None:
        checkpoint.check_layout(tokenizer, imported.layout, "the generator")
        made_by = checkpoint.reference(tokenizer.step, workdir)
        made_by |= {"fingerprint": tokenizer.fingerprint}
    _, params, stats = states.split(imported.module)
    average = None if imported.average is None else states.split(imported.average)[1]
    zero = jnp.zeros((), jnp.int32)
    state = states.TrainState(zero, zero, params, stats, optax.EmptyState(), average)
    with runs.lock(workdir):
        run = runs.start(
            workdir,
            imported.config,
            kind=imported.kind,
            layout=imported.layout,
            classes=tuple(str(number) for number in range(imported.classes)),
            best="imported",
            data="",
            tokenizer=made_by,
            source=source,
        )
        run.save({"model": state}, {"imported": 0.0})
        run.manager.wait_until_finished()
        step = workdir / checkpoint.FOLDER / "0"
        if imported.aside:
            writer.write(step / ASIDE, imported.aside, form="safetensors")
        run.close()
    return step


def load_imported(path: str | os.PathLike) -> tuple[checkpoint.Loaded, transfer.Imported]:
    """(a network for use, the same with live and averaged weights apart and what lay aside)."""
    loaded = checkpoint.load(path)
    has = {p.split("/")[1] for p in loaded.meta["manifest"] if p.startswith("model/")}
    live = checkpoint.load(path, which="params").module if "ema" in has else loaded.module
    average = loaded.module if "ema" in has else None
    file = loaded.step / ASIDE
    aside = reader.read(file) if file.exists() else {}
    dtype = (loaded.meta.get("source") or {}).get("dtype", "float32")
    return loaded, transfer.Imported(
        config=loaded.config,
        module=live,
        average=average,
        aside=aside,
        dtype=dtype,
        layout=loaded.layout,
        classes=len(loaded.classes),
    )
