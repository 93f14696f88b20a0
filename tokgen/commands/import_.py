"""Turn a published weight file into a checkpoint of tokgen, executing nothing in the file."""

from __future__ import annotations

import argparse
import difflib
import json
import pathlib

import yaml

from tokgen import checkpoint, imports, launch, output, report
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
        "--tokenizer", default="", help="of a generator: the checkpoint of its tokenizer"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of our config that changes no weight, as view.size=384,384 for images of "
        "another size, or quantizer.groups=7,7 for bits as two symbols; may be repeated",
    )
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
    out, file = pathlib.Path(args.out), pathlib.Path(args.file)
    if (out / checkpoint.FOLDER).exists():
        raise UserError(f"{out} already holds checkpoints; choose a new --out")
    if args.system not in importable():
        near = difflib.get_close_matches(args.system, importable(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--system must be one of {', '.join(importable())}; found {args.system!r}{hint}"
        )
    found = system.named(args.system)
    if not file.exists():
        raise UserError(
            f"no file {file}; the published ones of {args.system} are {', '.join(found.files)} "
            f"at {found.home}"
            if found.home
            else f"no file {file}; of {args.system} no weights are published"
        )
    if args.tokenizer and found.tokens is None:
        raise UserError(f"--tokenizer is for generators; {args.system} is a tokenizer itself")
    inputs = (file if file.is_file() else "", args.tokenizer, args.config)
    with output.folder(args.out, records={}, inputs=inputs) as place:
        told = _imported(args, found, place)
    for line in told:
        report.say(line)


def _imported(args: argparse.Namespace, found: system.System, place: output.Folder) -> list[str]:
    """Read the file and write the checkpoint; what is to be said."""
    launch.devices()
    file, tokenizer = pathlib.Path(args.file), None
    if args.tokenizer:
        tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    published = _read(args.config) if args.config else {}
    options = {"unknown": "opaque"} if args.opaque else {}
    imported = transfer.read(file, args.system, published, overrides=args.set, **options)
    source = {
        "system": args.system,
        "file": file.name,
        "sha256": transfer.digest(file),
        "dtype": imported.dtype,
        "home": found.home,
        "licence": found.licence,
    }
    step = imports.save_imported(place.path, imported, source, tokenizer)
    count = transfer.parameters(imported.module)
    average = "; the moving average is used" if imported.average is not None else ""
    told = [f"{args.system}: {count:,} parameters, {_tokens(imported)}{average}"]
    told += [f"{name}: {source[name]}" for name in ("sha256", "licence", "home")]
    if imported.aside:
        told.append(f"set aside, given back by an export: {', '.join(sorted(imported.aside)[:6])}")
    step = place.target / step.relative_to(place.path)
    told.append(f"saved as {step}; try: {_next(imported, place.target, tokenizer)}")
    return told


def _tokens(imported: transfer.Imported) -> str:
    """What its tokens are."""
    if imported.layout is None:
        return "continuous latents"
    classes = f", {imported.classes} classes" if imported.classes else ""
    return f"{imported.layout.length} tokens of {imported.layout.vocab}{classes}"


def _next(imported: transfer.Imported, out: pathlib.Path, tokenizer) -> str:
    """What can be done with it."""
    if imported.kind == "generator":
        where = "" if tokenizer else " --tokenizer CKPT"
        named = "" if tokenizer else " (its tokenizer must be named)"
        # a few images: a thousand classes would take hours
        few = f" --classes 0-{min(4, imported.classes) - 1}" if imported.classes else ""
        if getattr(imported.module, "cond", "label") == "text":
            few = " --text FILE.npz"
        return f"tokgen sample {out} --out DIR{where}{few} --number 2{named}"
    text = " --text DIR" if imported.config.decoder.get("text") else ""
    return f"tokgen reconstruct {out} IMAGES{text} --out DIR"


def _read(path: str) -> dict:
    try:
        text = pathlib.Path(path).read_text()
        try:
            published = json.loads(text)
        except ValueError:  # JSON first: YAML takes its 1e-06 for a word
            published = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(published, dict):
        raise UserError(f"--config {path} must hold a table of names and values")
    return published
