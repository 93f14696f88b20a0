"""What is in a checkpoint; with --verify, every array is read and compared with its manifest."""

from __future__ import annotations

import argparse
import json

from tokgen import report, runtime


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a work directory, or one step of it")
    parser.add_argument("--verify", action="store_true", help="read and check every array")
    parser.add_argument("--config", action="store_true", help="print the config inside, as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the record of a step."""
    from tokgen.checkpoints import checkpoint

    step = checkpoint.find(args.checkpoint)
    meta = checkpoint.read_meta(step)
    if args.verify:
        runtime.devices()  # for nothing else: another process may have an accelerator for itself
        checkpoint.verify(step)
    if args.config:
        if args.verify:
            report.say(f"{step}: {len(meta['manifest'])} arrays, all verified")
        print(json.dumps(meta["config"], indent=2))
        return
    parameters = sum(
        _size(entry["shape"])
        for path, entry in meta["manifest"].items()
        if path.startswith("model/params/")
    )
    rows = {
        "step": step,
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
        "arrays": f"{len(meta['manifest'])}{', all verified' if args.verify else ''}",
    }
    for name, value in rows.items():
        print(f"{name:<11} {value}")
    report.say("the config inside: tokgen checkpoint CKPT --config")


def _change(change: dict) -> str:
    """Data that were left; where training went on with the same images, what else was other."""
    other = " and ".join(name for name in ("held_out", "classes") if name in change)
    what = change["from"][:16] if change["from"] != change["to"] else f"other {other}"
    return f"{what} up to step {change['step']}"


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _source(source: dict) -> str:
    """Where an import is from; of the dtypes of single arrays only how many there are."""
    named = {
        name: f"{sum(map(len, value.values()))} arrays" if isinstance(value, dict) else value
        for name, value in source.items()
    }
    return ", ".join(f"{name} {value}" for name, value in named.items())
