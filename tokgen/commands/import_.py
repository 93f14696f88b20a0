"""Turn a published weight file into a checkpoint of tokgen, executing nothing in the file."""

from __future__ import annotations

import argparse
import difflib
import pathlib

import yaml

from tokgen import checkpoint, imports, launch, records, report
from tokgen.interfaces import UserError
from tokgen.pretrained import reader, system, transfer


LARGEST_YAML = 2**20  # characters; it is slow to read


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="the published file (.bin, .pt, .ckpt, .safetensors, msgpack), the index of one in "
        "parts (.index.json), a folder that holds one; or a folder that tokgen export wrote",
    )
    parser.add_argument(
        "--system",
        default="",
        help=f"what it is: {', '.join(importable())}; needless for what tokgen export wrote",
    )
    parser.add_argument(
        "--entry",
        default="",
        metavar="NAME",
        help="which entry of the file holds the weights, as ema or trainer.var_wo_ddp, where the "
        "one that is taken by itself is not the one meant",
    )
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
    launch.devices()
    out, file = pathlib.Path(args.out), pathlib.Path(args.file)
    if (out / checkpoint.FOLDER).exists():
        raise UserError(f"{out} already holds checkpoints; choose a new --out")
    if not args.system and imports.is_export(file):
        _import_export(args, file, out)
        return
    if args.system not in importable():
        near = difflib.get_close_matches(args.system, importable(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--system must be one of {', '.join(importable())}; found {args.system!r}{hint}"
        )
    found, tokenizer = system.named(args.system), None
    if not file.exists():
        raise UserError(
            f"no file {file}; the published ones of {args.system} are {', '.join(found.files)} "
            f"at {found.home}"
            if found.home
            else f"no file {file}; of {args.system} no weights are published"
        )
    if args.tokenizer and found.tokens is None:
        raise UserError(f"--tokenizer is for generators; {args.system} is a tokenizer itself")
    if args.tokenizer:
        tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    if not args.config and (file.is_dir() or file.name.endswith(reader.INDEX)):
        beside = (file if file.is_dir() else file.parent) / "config.json"
        args.config = str(beside) if beside.is_file() else ""
        report.say(f"the configuration is {beside}" if args.config else "no config.json beside it")
    published = _read(args.config) if args.config else {}
    options = {"unknown": "opaque"} if args.opaque else {}
    imported = transfer.read(
        file, args.system, published, overrides=args.set, entry=args.entry, **options
    )
    source = {
        "system": args.system,
        "file": pathlib.Path(reader.located(file)).name.removesuffix(reader.INDEX),
        "sha256": transfer.digest(file),
        "home": found.home,
        "licence": found.licence,
    }
    step = imports.save_imported(out, imported, source, tokenizer)
    count = transfer.parameters(imported.module)
    average = "; the moving average is used" if imported.average is not None else ""
    report.say(f"{args.system}: {count:,} parameters, {_tokens(imported)}{average}")
    for name in ("sha256", "licence", "home"):
        report.say(f"{name}: {source[name]}")
    for note in imported.notes:
        report.say(note)
    if imported.aside:
        report.say(f"set aside, given back by an export: {', '.join(sorted(imported.aside)[:6])}")
    report.say(f"saved as {step}; try: {_next(imported, out, tokenizer)}")


def _import_export(args: argparse.Namespace, file: pathlib.Path, out: pathlib.Path) -> None:
    """A checkpoint of what `tokgen export` wrote."""
    given = [name for name in ("config", "entry", "set", "opaque") if getattr(args, name)]
    if given:
        raise UserError(
            f"{file} is an export of tokgen, which says all of itself: leave out --{given[0]}, or "
            "name the published file in it with --system"
        )
    imported, record = imports.of_export(file)
    tokenizer = checkpoint.load_tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None and imported.kind != "generator":
        raise UserError(f"--tokenizer is for generators; {file} is a tokenizer itself")
    source = record.get("source")
    source = source if isinstance(source, dict) else {}
    step = imports.save_imported(out, imported, source, tokenizer, tuple(record["classes"]))
    count = transfer.parameters(imported.module)
    report.say(f"{imported.kind} of tokgen: {count:,} parameters, {_tokens(imported)}")
    report.say(f"saved as {step}; try: {_next(imported, out, tokenizer)}")


def _tokens(imported: transfer.Imported) -> str:
    """What its tokens are."""
    if imported.layout is None:
        return "continuous latents"
    classes = f", {imported.classes} classes" if imported.classes else ""
    return f"{imported.layout.length} tokens of {imported.layout.vocab}{classes}"


def _next(imported: transfer.Imported, out: pathlib.Path, tokenizer) -> str:
    """What can be done with it."""
    if imported.kind == "generator":
        where = "" if tokenizer else " --tokenizer CKPT (its tokenizer, which must be named)"
        return f"tokgen sample {out} --out DIR{where}"
    text = " --text DIR" if imported.config.decoder.get("text") else ""
    return f"tokgen reconstruct {out} IMAGES{text} --out DIR"


def _read(path: str) -> dict:
    try:
        try:
            published = records.load(pathlib.Path(path))
        except ValueError:  # JSON first: YAML takes its 1e-06 for a word
            with open(path, encoding="utf-8") as file:
                published = yaml.safe_load(file.read(LARGEST_YAML))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(published, dict):
        raise UserError(f"--config {path} must hold a table of names and values")
    return published
