"""What is in a checkpoint; with --verify, every array is read and compared with its manifest."""

from __future__ import annotations

import argparse
import json

from tokgen import checkpoint, launch, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a work directory, or one step of it")
    parser.add_argument("--verify", action="store_true", help="read and check every array")
    parser.add_argument("--config", action="store_true", help="print the config inside, as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the record of a step."""
    step = checkpoint.find(args.checkpoint)
    meta = checkpoint.read_meta(step)
    if args.verify:
        launch.devices()  # for nothing else: another process may have an accelerator for itself
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
        "tokenizer": (meta["tokenizer"] or {}).get("path", "itself"),
        "source": ", ".join(f"{k} {v}" for k, v in (meta.get("source") or {}).items()) or "trained",
        "versions": ", ".join(f"{k} {v}" for k, v in meta["versions"].items()),
        "arrays": f"{len(meta['manifest'])}{', all verified' if args.verify else ''}",
    }
    for name, value in rows.items():
        print(f"{name:<11} {value}")
    report.say("the config inside: tokgen checkpoint CKPT --config")


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
