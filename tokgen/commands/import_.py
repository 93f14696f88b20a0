"""Turn a published weight file into a checkpoint of tokgen, executing nothing in the file."""

from __future__ import annotations

import argparse
import difflib
import pathlib

import yaml

from tokgen import checkpoint, launch, report
from tokgen.interfaces import UserError
from tokgen.pretrained import system, transfer


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the published file (.bin, .pt, .ckpt, .safetensors, msgpack)")
    parser.add_argument("--system", required=True, help="what it is: " + ", ".join(importable()))
    parser.add_argument(
        "--config",
        default="",
        help="the published configuration (JSON or YAML), where sizes are not the published ones",
    )
    parser.add_argument("--out", required=True, help="folder of the checkpoint; must be new")
    parser.add_argument(
        "--opaque",
        action="store_true",
        help="step over objects of unknown classes in the file (training state of Lightning "
        "checkpoints); they are dropped, never called",
    )


def importable() -> list[str]:
    """The systems that there is something to train or sample from."""
    return sorted(name for name, found in system.known().items() if found.settings is not None)


def run(args: argparse.Namespace) -> None:
    """Write a checkpoint of step 0, with licence and hash of its source."""
    launch.devices()
    out, file = pathlib.Path(args.out), pathlib.Path(args.file)
    if (out / checkpoint.FOLDER).exists():
        raise UserError(f"{out} already holds checkpoints; choose a new --out")
    if args.system not in importable():
        near = difflib.get_close_matches(args.system, importable(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--system must be one of {', '.join(importable())}; found {args.system!r}{hint}"
        )
    published = _read(args.config) if args.config else {}
    options = {"unknown": "opaque"} if args.opaque else {}
    imported = transfer.read(file, args.system, published, **options)
    found = system.named(args.system)
    source = {
        "system": args.system,
        "file": file.name,
        "sha256": transfer.digest(file),
        "dtype": imported.dtype,
        "home": found.home,
        "licence": found.licence,
    }
    step = checkpoint.save_imported(out, imported, source)
    count = transfer.parameters(imported.module)
    layout = imported.module.layout
    tokens = f"{layout.length} tokens of {layout.vocab}" if layout else "continuous latents"
    average = "; the moving average is used" if imported.average is not None else ""
    report.say(f"{args.system}: {count:,} parameters, {tokens}{average}")
    for name in ("sha256", "licence", "home"):
        report.say(f"{name}: {source[name]}")
    if imported.aside:
        report.say(f"set aside, given back by an export: {', '.join(sorted(imported.aside)[:6])}")
    text = " --text DIR" if imported.config.decoder.get("text") else ""
    report.say(f"saved as {step}; try: tokgen reconstruct {out} IMAGES{text} --out DIR")


def _read(path: str) -> dict:
    try:
        published = yaml.safe_load(pathlib.Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(published, dict):
        raise UserError(f"--config {path} must hold a table of names and values")
    return published
