"""A checkpoint written for others: safetensors with its config, and the published form.

OURS has our names and the weights that are used; CONFIG builds the model, and says which they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import ml_collections
import numpy as np
from flax import nnx

from tokgen import archives, output, parameters, records, rng, runtime
from tokgen.checkpoints import imported as imports, loading
from tokgen.config import building, migration
from tokgen.errors import UserError
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap, system as systems, transfer
from tokgen.pretrained.formats import reader, writer

OURS, CONFIG = "model.safetensors", "config.json"
RECORDS = {CONFIG: ("config", "layout", "fingerprint")}
SUFFIXES = {"torch": ".bin", "safetensors": ".safetensors", "flax": ".msgpack"}

Entries = dict[tuple[str, ...], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        out: the folder.
        arrays: how many lie in OURS.
        system: whose published form was written too; "" for none.
        file: the file of that form.
        entries: how many arrays lie in each of its entries, dotted; "" is the outermost.
        notes: what is to be told besides.
    """

    out: pathlib.Path
    arrays: int
    system: str = ""
    file: pathlib.Path | None = None
    entries: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export_checkpoint(
    path: str | os.PathLike, out: str | os.PathLike, system: str = "", *, overwrite: bool = False
) -> Export:
    """Write a checkpoint for others: safetensors with its config, and the published file.

    Args:
        path: the checkpoint: a work directory, or one step of it.
        out: the folder of OURS, CONFIG and that file.
        system: whose published form is written; "": of what it was imported from, if anything.
        overwrite: replace an earlier export.

    Returns:
        Export: what was written.

    Raises:
        UserError: the model has not the form of the system, or `out` is not free.

    Examples:
        >>> export = tokgen.export_checkpoint("runs/tokenizer", "exported")
        >>> sorted(path.name for path in export.out.iterdir())
        ['config.json', 'model.safetensors']
    """
    with output.folder(out, records=RECORDS, overwrite=overwrite, inputs=(path,)) as place:
        runtime.devices()
        loaded, imported = imports.load_imported(path)
        source = loaded.meta.get("source") or {}
        system = system or source.get("system", "")
        # before anything is written: the form may not fit
        published = _published(imported, system, source) if system else {}
        count = _write_ours(place.path, loaded, averaged=imported.average is not None)
        if not system:
            return Export(place.target, count)
        name, notes = _name(source, system)
        file, published = _write_published(place.path, name, system, published)
    if imported.average is not None and len(published) == 1:
        if systems.named(system).average is None:
            notes += (f"they are the averaged weights: files of {system} hold one set",)
    entries = {".".join(entry): len(arrays) for entry, arrays in published.items()}
    file = place.target / file.relative_to(place.path)
    return Export(place.target, count, system, file, entries, notes)


def _write_ours(out: pathlib.Path, loaded: loading.Loaded, *, averaged: bool) -> int:
    """OURS and CONFIG; how many arrays there are."""
    _, params, stats = parameters.split(loaded.module)
    arrays = {
        f"{name}.{path.replace('/', '.')}": leaf
        for name, tree in (("params", params), ("stats", stats))
        for path, leaf in parameters.paths(tree).items()
    }
    record = {
        "config": building.plain(loaded.config),
        "layout": loaded.layout.to_json() if loaded.layout else None,
        "classes": list(loaded.classes),
        "fingerprint": loaded.fingerprint,
        "which": "ema" if averaged else "params",
        "source": loaded.meta.get("source") or {},
    }
    writer.write(out / OURS, arrays, form="safetensors")
    (out / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
    return len(arrays)


def _write_published(
    out: pathlib.Path, name: str, system: str, published: Entries
) -> tuple[pathlib.Path, Entries]:
    """(the file, what it holds): the suffix of its name says how it is written."""
    found, file = systems.named(system), out / name
    if file.name.lower() == OURS:
        file = out / system / file.name
        file.parent.mkdir(exist_ok=True)
    form = "safetensors" if file.suffix == ".safetensors" else found.form
    if form == "safetensors" and file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        form = "torch"
    if form == "safetensors":
        # it has no entries: what is used is what is written
        published = {(): list(published.values())[-1]}
    writer.write_entries(file, published, form=form)
    return file, published


def _published(imported: transfer.Imported, system: str, source: dict) -> Entries:
    """Arrays under their published names, by the entries that hold them; what is used comes last.

    An import has the entries that its file had, if they lie on its surface.
    """
    found, form = systems.named(system), imported.form
    same = system == source.get("system")
    own = form.entry if same and form.entry is not None and "." not in form.entry else None
    wrap = found.wrap if own is None else tuple(filter(None, [own]))
    published = {wrap: transfer.publish(imported, system)}
    average = transfer.publish_average(imported, system)
    if average:
        entry = (same and form.average) or found.averaged
        published[tuple(entry.split("."))] = average
    return published


def _name(source: dict, system: str) -> tuple[str, tuple[str, ...]]:
    """(what the published file is called, what is to be told of it).

    As the one that was imported, if that is a mere name.
    """
    default = f"{system}{SUFFIXES[systems.named(system).form]}"
    name = source.get("file") or default
    if system != source.get("system"):
        return default, ()
    if isinstance(name, str) and archives.is_plain(name) and name.lower() != CONFIG:
        return name, ()
    told = f"the record names its file {name!r:.100}, which is not used: written as {default}"
    return default, (told,)


# ---------------------------------------------------------------- reading it again


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


def read(path: pathlib.Path) -> tuple[transfer.Fitting, dict]:
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
    config = ml_collections.ConfigDict(migration.config(record["config"]))
    classes = record["classes"]

    def make():
        if "generator" in config:
            return building.generator(config, layout, len(classes), rngs=rng.rngs(0))
        return building.tokenizer(config, rngs=rng.rngs(0))

    if "generator" in config and layout is None or not all(isinstance(c, str) for c in classes):
        raise UserError(f"{folder / CONFIG} must state the layout and the classes of a generator")
    module = nnx.eval_shape(make)
    _, params, stats = parameters.split(module)
    rows = [
        keymap.row(f"{name}.{place.replace('/', '.')}", place)
        for name, tree in (("params", params), ("stats", stats))
        for place in parameters.paths(tree)
    ]
    weights = {_place(key): array for key, array in reader.lying(folder / OURS).items()}
    keymap.check(module, rows, weights, source=str(folder / OURS))
    source = record.get("source")
    form = imports.form_of(source if isinstance(source, dict) else {}, str(folder))
    found = transfer.Fitting(
        config,
        module,
        tuple(rows),
        weights,
        weights if record.get("which") == "ema" else {},
        str(folder / OURS),
        {},
        form,
        layout,
        len(classes) if "generator" in config else 0,
    )
    return found, record
