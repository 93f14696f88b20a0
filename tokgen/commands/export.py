"""Write a checkpoint as safetensors with its config, and in the published form of its system."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from tokgen import output, report, runtime

if TYPE_CHECKING:
    import numpy as np

    from tokgen.pretrained import transfer

RECORDS = {"config.json": ("config", "layout", "fingerprint")}
SUFFIXES = {"torch": ".bin", "safetensors": ".safetensors", "flax": ".msgpack"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a work directory, or one step of it")
    parser.add_argument("--out", required=True, help="folder to write to; must be new or empty")
    output.arguments(parser)
    parser.add_argument(
        "--system",
        default="",
        help="also write the keys of this published system; default: the one it was imported from",
    )


def run(args: argparse.Namespace) -> None:
    """model.safetensors (our names, the weights that are used), config.json, the published file."""
    given = dict(overwrite=args.overwrite, inputs=(args.checkpoint,))
    with output.folder(args.out, records=RECORDS, **given) as out:
        told = _exported(args, out.path)
    for line in told:
        report.say(line)


def _exported(args: argparse.Namespace, out: pathlib.Path) -> list[str]:
    """Write all of it; what is to be said."""
    from tokgen import parameters
    from tokgen.checkpoints import imported as imports
    from tokgen.config import building
    from tokgen.pretrained import system
    from tokgen.pretrained.formats import writer

    runtime.devices()
    loaded, imported = imports.load_imported(args.checkpoint)
    source = loaded.meta.get("source") or {}
    name = args.system or source.get("system", "")
    # before anything is written: the form may not fit
    published = _published(imported, name, source) if name else {}
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
        "which": "params" if imported.average is None else "ema",
        "source": source,
    }
    writer.write(out / imports.OURS, arrays, form="safetensors")
    (out / imports.CONFIG).write_text(json.dumps(record, indent=2) + "\n")
    told = [f"{args.out}: {imports.OURS} ({len(arrays)} arrays) and {imports.CONFIG}"]
    if name:
        found = system.named(name)
        file = out / _name(source, name, f"{name}{SUFFIXES[found.form]}")
        if file.name.lower() == imports.OURS:
            file = out / name / file.name
            file.parent.mkdir(exist_ok=True)
        form = "safetensors" if file.suffix == ".safetensors" else found.form
        if form == "safetensors" and file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            form = "torch"
        if form == "safetensors":
            # it has no entries: what is used is what is written
            published = {(): published.popitem()[1]}
        writer.write_entries(file, published, form=form)
        place = pathlib.Path(args.out) / file.relative_to(out)
        count = sum(map(len, published.values()))
        told.append(f"{place}: {count} arrays under the keys of {name}{_entries(published)}")
        if imported.average is not None and len(published) == 1 and found.average is None:
            told.append(f"they are the averaged weights: files of {name} hold one set")
    return told


def _published(
    imported: transfer.Imported, name: str, source: dict
) -> dict[tuple[str, ...], dict[str, np.ndarray]]:
    """Arrays under their published names, by the entries that hold them; what is used comes last.

    An import has the entries that its file had, if they lie on its surface.
    """
    from tokgen.pretrained import system, transfer

    found, form = system.named(name), imported.form
    same = name == source.get("system")
    own = form.entry if same and form.entry is not None and "." not in form.entry else None
    wrap = found.wrap if own is None else tuple(filter(None, [own]))
    published = {wrap: transfer.publish(imported, name)}
    average = transfer.publish_average(imported, name)
    if average:
        entry = (same and form.average) or found.averaged
        published[tuple(entry.split("."))] = average
    return published


def _entries(published: dict[tuple[str, ...], dict]) -> str:
    named = [".".join(entry) for entry in published if entry]
    return f", in the entries {' and '.join(named)}" if len(published) > 1 else ""


def _name(source: dict, system: str, default: str) -> str:
    """What the published file is called: as the one that was imported, if that is a mere name."""
    from tokgen import archives
    from tokgen.checkpoints import imported as imports

    name = source.get("file") or default
    if system != source.get("system"):
        return default
    if isinstance(name, str) and archives.is_plain(name) and name.lower() != imports.CONFIG:
        return name
    report.say(f"the record names its file {name!r:.100}, which is not used: written as {default}")
    return default
