"""What is in a checkpoint; with --verify, every array is read and compared with its manifest."""

from __future__ import annotations

import argparse
import json

from tokgen import options, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("--verify", action="store_true", help="read and check every array")
    parser.add_argument("--config", action="store_true", help="print the config inside, as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the record of a step, or its config."""
    from tokgen.checkpoints import description

    found = description.describe(args.checkpoint, verify=args.verify)
    if args.config:
        if args.verify:
            report.say(f"{found.step}: {found.arrays} arrays, all verified")
        print(json.dumps(found.config, indent=2))
        return
    for name, words in found.rows.items():
        print(f"{name:<11} {words}")
    report.say("the config inside: tokgen checkpoint CKPT --config")
