"""Turn a published weight file into a checkpoint of tokgen, executing nothing in the file."""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from tokgen import options, output, report

if TYPE_CHECKING:
    from tokgen.checkpoints import importing
    from tokgen.pretrained import transfer


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
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="of a generator: the checkpoint of its tokenizer",
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


def check(args: argparse.Namespace) -> None:
    """Refuse what is no file of the system, what is no tokenizer, and a place that is taken."""
    from tokgen.checkpoints import exporting, importing, pulling

    file = pathlib.Path(args.file)
    if args.system or not exporting.is_export(file):
        importing.check(file, args.system, args.tokenizer)
    pulling.check_kind(args.tokenizer, "tokenizer")
    output.check_folder(args.out, records={})


def run(args: argparse.Namespace) -> None:
    """Write a checkpoint of step 0, with licence and hash of its source."""
    from tokgen.checkpoints import importing

    made = importing.import_file(
        args.file,
        args.out,
        args.system,
        config=args.config,
        entry=args.entry,
        overrides=args.set,
        unknown="opaque" if args.opaque else "refuse",
        tokenizer=args.tokenizer,
    )
    for line in _told(made, args.system):
        report.say(line)


def _told(made: importing.Import, system: str) -> list[str]:
    """What is to be said of it."""
    average = "; the moving average is used" if system and made.fitting.average else ""
    what = system or f"{made.fitting.kind} of tokgen"
    lines = [f"{what}: {made.parameters:,} parameters, {_tokens(made.fitting)}{average}"]
    if system:
        lines += [f"{name}: {made.source[name]}" for name in ("sha256", "licence", "home")]
    lines += made.notes
    if made.fitting.aside:
        names = ", ".join(sorted(made.fitting.aside)[:6])
        lines.append(f"set aside, given back by an export: {names}")
    return [*lines, f"saved as {made.step}; try: {_next(made)}"]


def _tokens(model: transfer.Fitting) -> str:
    """What its tokens are."""
    if model.layout is None:
        return "continuous latents"
    classes = f", {model.classes} classes" if model.classes else ""
    return f"{model.layout.length} tokens of {model.layout.vocab}{classes}"


def _next(made: importing.Import) -> str:
    """What can be done with it."""
    model = made.fitting
    if model.kind == "generator":
        where = "" if made.tokenizer else " --tokenizer CKPT"
        named = "" if made.tokenizer else " (its tokenizer must be named)"
        # a few images: a thousand classes would take hours
        few = f" --classes 0-{min(4, model.classes) - 1}" if model.classes else ""
        if model.network.cond == "text":
            few = " --text FILE.npz"
        return f"tokgen sample {made.out} --out DIR{where}{few} --number 2{named}"
    text = " --text DIR" if model.config.decoder.get("text") else ""
    return f"tokgen reconstruct {made.out} IMAGES{text} --out DIR"
