"""Turn a published weight file into a checkpoint of tokgen, executing nothing in the file."""

from __future__ import annotations

import argparse
import difflib
import pathlib
from typing import TYPE_CHECKING

from tokgen import output, records, report, runtime
from tokgen.errors import UserError

if TYPE_CHECKING:
    from tokgen.pretrained import transfer

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
        help="the published system that it is of, as in docs/tokenizers.md and docs/generators.md; "
        "needless for what tokgen export wrote",
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
    from tokgen.pretrained import system

    return sorted(name for name, found in system.known().items() if found.settings is not None)


def run(args: argparse.Namespace) -> None:
    """Write a checkpoint of step 0, with licence and hash of its source."""
    from tokgen.checkpoints import imported as imports

    file = pathlib.Path(args.file)
    exported = not args.system and imports.is_export(file)
    if not exported:
        _check(args, file)
    inputs = (file if file.is_file() else "", args.tokenizer, args.config)
    with output.folder(args.out, records={}, inputs=inputs) as place:
        runtime.devices()
        told = _of_export(args, place) if exported else _imported(args, place)
    for line in told:
        report.say(line)


def _check(args: argparse.Namespace, file: pathlib.Path) -> None:
    """Refuse what cannot be imported, before anything is read."""
    from tokgen.checkpoints import imported as imports
    from tokgen.pretrained import system

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
    if imports.is_export(file):
        raise UserError(
            f"{file} is an export of tokgen: leave out --system, or name the published file in it"
        )


def _imported(args: argparse.Namespace, place: output.Folder) -> list[str]:
    """Read the file and write the checkpoint; what is to be said."""
    from tokgen.checkpoints import checkpoint
    from tokgen.pretrained import system, transfer
    from tokgen.pretrained.formats import reader

    file, found = pathlib.Path(args.file), system.named(args.system)
    tokenizer = checkpoint.load_tokenizer(args.tokenizer) if args.tokenizer else None
    config, told = args.config, []
    beside = (file if file.is_dir() else file.parent) / "config.json"
    if not config and (file.is_dir() or file.name.endswith(reader.INDEX)) and beside.is_file():
        config, told = str(beside), [f"the configuration is {beside}"]
    published = _read(config) if config else {}
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
    average = "; the moving average is used" if imported.average is not None else ""
    count = transfer.parameters(imported.module)
    told.append(f"{args.system}: {count:,} parameters, {_tokens(imported)}{average}")
    told += [f"{name}: {source[name]}" for name in ("sha256", "licence", "home")]
    told += imported.notes
    if imported.aside:
        told.append(f"set aside, given back by an export: {', '.join(sorted(imported.aside)[:6])}")
    return [*told, _saved(place, imported, source, tokenizer)]


def _of_export(args: argparse.Namespace, place: output.Folder) -> list[str]:
    """A checkpoint of what `tokgen export` wrote; what is to be said."""
    from tokgen.checkpoints import checkpoint, imported as imports
    from tokgen.pretrained import transfer

    given = [name for name in ("config", "entry", "set", "opaque") if getattr(args, name)]
    if given:
        raise UserError(
            f"{args.file} is an export of tokgen, which says all of itself: leave out "
            f"--{given[0]}, or name the published file in it with --system"
        )
    imported, record = imports.of_export(pathlib.Path(args.file))
    if args.tokenizer and imported.kind != "generator":
        raise UserError(f"--tokenizer is for generators; {args.file} is a tokenizer itself")
    tokenizer = checkpoint.load_tokenizer(args.tokenizer) if args.tokenizer else None
    source = record.get("source")
    source = source if isinstance(source, dict) else {}
    count = transfer.parameters(imported.module)
    told = f"{imported.kind} of tokgen: {count:,} parameters, {_tokens(imported)}"
    return [told, _saved(place, imported, source, tokenizer, tuple(record["classes"]))]


def _saved(place: output.Folder, imported: transfer.Imported, *rest) -> str:
    """Write the checkpoint; where it is and what can be done with it."""
    from tokgen.checkpoints import imported as imports

    step = imports.save_imported(place.path, imported, *rest)
    step = place.target / step.relative_to(place.path)
    return f"saved as {step}; try: {_next(imported, place.target, rest[1])}"


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
        if imported.module.cond == "text":
            few = " --text FILE.npz"
        return f"tokgen sample {out} --out DIR{where}{few} --number 2{named}"
    text = " --text DIR" if imported.config.decoder.get("text") else ""
    return f"tokgen reconstruct {out} IMAGES{text} --out DIR"


def _read(path: str) -> dict:
    import yaml

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
