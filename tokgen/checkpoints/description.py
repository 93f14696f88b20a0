"""What a checkpoint says of itself, for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib

from tokgen import runtime
from tokgen.checkpoints import checkpoint


@dataclasses.dataclass(frozen=True)
class Description:
    """A step, in words.

    Attributes:
      step: its folder.
      rows: {what: words} of its record.
      arrays: how many it has.
      config: the config inside.
    """

    step: pathlib.Path
    rows: dict[str, str]
    arrays: int
    config: dict


def describe(path: str | os.PathLike, *, verify: bool = False) -> Description:
    """The step of a work directory, or one step; with `verify`, after every array was checked."""
    step = checkpoint.find(path)
    meta = checkpoint.read_meta(step)
    if verify:
        runtime.devices()  # for nothing else: another process may have an accelerator for itself
        checkpoint.verify(step)
    parameters = sum(
        math.prod(entry["shape"])
        for path, entry in meta["manifest"].items()
        if path.startswith("model/params/")
    )
    rows = {
        "step": str(step),
        "kind": meta["kind"],
        "parameters": f"{parameters:,}",
        "layout": json.dumps(meta["layout"]),
        "classes": f"{len(meta['classes'])}: {', '.join(meta['classes'][:12])}",
        "metrics": ", ".join(
            f"{k} {'none' if v is None else f'{v:.4g}'}" for k, v in meta["metrics"].items()
        ),
        "data": ", ".join([meta["data"][:16], *map(_change, meta.get("data_changes", ()))])
        or "none",
        "tokenizer": (meta["tokenizer"] or {}).get("path", "itself"),
        "source": _source(meta.get("source") or {}) or "trained",
        "versions": ", ".join(f"{k} {v}" for k, v in meta["versions"].items()),
        "arrays": f"{len(meta['manifest'])}{', all verified' if verify else ''}",
    }
    return Description(step, rows, len(meta["manifest"]), meta["config"])


def _change(change: dict) -> str:
    """Data that were left; where training went on with the same images, what else was other."""
    other = " and ".join(name for name in ("held_out", "classes") if name in change)
    what = change["from"][:16] if change["from"] != change["to"] else f"other {other}"
    return f"{what} up to step {change['step']}"


def _source(source: dict) -> str:
    """Where an import is from; of the dtypes of single arrays only how many there are."""
    named = {
        name: f"{sum(map(len, value.values()))} arrays" if isinstance(value, dict) else value
        for name, value in source.items()
    }
    return ", ".join(f"{name} {value}" for name, value in named.items())
