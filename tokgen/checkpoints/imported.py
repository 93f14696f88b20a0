"""Imported weights as a checkpoint, and what an export needs of it.

An import is a run of one step, 0. Arrays of the published file that have no place in our model lie
in a file of their own in the step, so that an export can give them back.
"""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp
import ml_collections
from flax import nnx

from tokgen import parameters, records
from tokgen.checkpoints import checkpoint, run as runs
from tokgen.config import building as configs, migration
from tokgen.interfaces import TokenLayout, UserError
from tokgen.pretrained import entries, keymap, transfer
from tokgen.pretrained.formats import reader, writer

ASIDE = "aside.safetensors"
OURS, CONFIG = "model.safetensors", "config.json"  # of an export


def save_imported(
    workdir: pathlib.Path,
    imported: transfer.Imported,
    source: dict,
    tokenizer: checkpoint.Loaded | None = None,
    classes: tuple[str, ...] = (),
) -> pathlib.Path:
    """A checkpoint of step 0; its folder. `tokenizer` is the one that a generator's tokens are of.

    Classes of a generator are named by their numbers where `classes` has no names for them: a
    published file has none.
    """
    made_by = None
    if tokenizer is not None:
        checkpoint.check_layout(tokenizer, imported.layout, "the generator")
        made_by = checkpoint.reference(tokenizer.step, workdir)
        made_by |= {"fingerprint": tokenizer.fingerprint}
    _, params, stats = parameters.split(imported.module)
    average = None if imported.average is None else parameters.split(imported.average)[1]
    zero = jnp.zeros((), jnp.int32)
    # the paths of a TrainState, without what an optimizer would keep
    state = dict(step=zero, skipped=zero, params=params, stats=stats)
    state |= {} if average is None else {"ema": average}
    with runs.lock(workdir):
        run = runs.start(
            workdir,
            imported.config,
            kind=imported.kind,
            layout=imported.layout,
            classes=classes or tuple(str(number) for number in range(imported.classes)),
            best="imported",
            data="",
            tokenizer=made_by,
            source=source | _recorded(imported.form),
        )
        run.save({"model": state}, {"imported": 0.0})
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
    return loaded, transfer.Imported(
        config=loaded.config,
        module=live,
        average=average,
        aside=aside,
        form=_form(loaded.meta.get("source") or {}, str(loaded.step)),
        layout=loaded.layout,
        classes=len(loaded.classes),
    )


def _recorded(form: entries.Form) -> dict:
    """How the published file was written, for the record: names of arrays by their dtype."""
    said = {
        "dtypes": _grouped(form.dtypes),
        "entry": form.entry,
        "average": form.average,
        "average_dtype": form.average_dtype if form.average is not None else "",
        "average_dtypes": _grouped(form.average_dtypes),
        "written": form.written,
    }
    return {"dtype": form.dtype} | {k: v for k, v in said.items() if v or k == "entry"}


def _grouped(dtypes: dict[str, str]) -> dict[str, list[str]]:
    return {
        dtype: sorted(key for key, found in dtypes.items() if found == dtype)
        for dtype in sorted(set(dtypes.values()))
    }


def _form(source: dict, where: str) -> entries.Form:
    """The form that a record states; of imports that did not state it, what they did."""
    fields = {}
    try:
        for name in ("dtype", "entry", "average", "average_dtype", "written"):
            if source.get(name) is not None:
                fields[name] = records.checked(source, **{name: str})[name]
                if not fields[name].isprintable():
                    raise ValueError(f"{name} is no name")
        for name in ("dtypes", "average_dtypes"):
            groups = records.checked(source, **{name: dict})[name] if name in source else {}
            fields[name] = {key: dtype for dtype, keys in groups.items() for key in keys}
            if not all(isinstance(key, str) for key in fields[name]):
                raise ValueError(f"{name} must be names by dtype")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the record of {where} does not say how its file was written: {error}"
        ) from error
    return entries.Form(**fields)


def is_export(path: pathlib.Path) -> bool:
    """Whether a path is a folder that `tokgen export` wrote, or its weight file."""
    folder = path if path.is_dir() else path.parent
    if not (folder / OURS).is_file() or (path.is_file() and path.name != OURS):
        return False
    try:
        records.checked(records.load(folder / CONFIG), config=dict, fingerprint=str)
    except (OSError, ValueError):
        return False
    return True


def _place(key: str) -> str:
    """The name that an array of an export has today."""
    path = migration.parameter("model/" + key.replace(".", "/"))
    return path.removeprefix("model/").replace("/", ".")


def of_export(path: pathlib.Path) -> tuple[transfer.Imported, dict]:
    """(the network of an export's own file, its record): what was used, so no live weights apart.

    An average stays one, so that the network has the fingerprint that it had.
    """
    folder = path if path.is_dir() else path.parent
    record = records.read(
        folder / CONFIG, "the config of an export", "export it again", config=dict, classes=list
    )
    try:
        layout = TokenLayout.from_json(record["layout"]) if record.get("layout") else None
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} states no layout of tokens: {error!r:.200}") from error
    config, classes = (
        ml_collections.ConfigDict(migration.config(record["config"])),
        record["classes"],
    )

    def make():
        if "generator" in config:
            return configs.generator(config, layout, len(classes), rngs=nnx.Rngs(0))
        return configs.tokenizer(config, rngs=nnx.Rngs(0))

    if "generator" in config and layout is None or not all(isinstance(c, str) for c in classes):
        raise UserError(f"{folder / CONFIG} must state the layout and the classes of a generator")
    module = nnx.eval_shape(make)
    _, params, stats = parameters.split(module)
    rows = [
        keymap.row(f"{name}.{place.replace('/', '.')}", place)
        for name, tree in (("params", params), ("stats", stats))
        for place in parameters.paths(tree)
    ]
    weights = {_place(key): array for key, array in reader.read(folder / OURS).items()}
    network = keymap.fill(module, rows, weights, source=str(folder / OURS))
    average = network if record.get("which") == "ema" else None
    source = record.get("source")
    form = _form(source if isinstance(source, dict) else {}, str(folder))
    imported = transfer.Imported(
        config, network, average, {}, form, layout, len(classes) if "generator" in config else 0
    )
    return imported, record
