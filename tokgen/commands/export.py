"""Write a checkpoint as safetensors with its config, and in the published form of its system."""

from __future__ import annotations

import argparse

from tokgen import options, output, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("--out", required=True, help="folder to write to; must be new or empty")
    output.arguments(parser)
    parser.add_argument(
        "--system",
        default="",
        help="also write the keys of this published system; default: the one it was imported from",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a place that is taken."""
    from tokgen.checkpoints import exporting

    output.check_folder(args.out, records=exporting.RECORDS, overwrite=args.overwrite)


def run(args: argparse.Namespace) -> None:
    """model.safetensors (our names, the weights that are used), config.json, the published file."""
    from tokgen.checkpoints import exporting

    made = exporting.export_checkpoint(
        args.checkpoint, args.out, args.system, overwrite=args.overwrite
    )
    report.say(f"{made.out}: {exporting.OURS} ({made.arrays} arrays) and {exporting.CONFIG}")
    if made.system:
        named = [entry for entry in made.entries if entry]
        entries = f", in the entries {' and '.join(named)}" if len(made.entries) > 1 else ""
        count = sum(made.entries.values())
        report.say(f"{made.file}: {count} arrays under the keys of {made.system}{entries}")
    for note in made.notes:
        report.say(note)
