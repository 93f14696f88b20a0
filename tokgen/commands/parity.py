"""Hold a fixture folder (published weights, inputs, outputs of the original code) against ours."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tokgen import options, report
from tokgen.errors import UserError

if TYPE_CHECKING:
    from tokgen.pretrained import parity


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with case.npz, config.json and the weight file")
    parser.add_argument("--system", default="", help="which system; default: the folder's name")
    parser.add_argument(
        "--opaque", action="store_true", help="step over objects of unknown classes in the file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per array")
    parser.add_argument("--arrays", default="", help="save what our model computed to this .npz")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier file of --arrays"
    )


def run(args: argparse.Namespace) -> None:
    """Print a line per array; an error when one fails or is not covered."""
    from tokgen.pretrained import parity

    if not args.arrays:
        options.check(args, {"overwrite": "the file that --arrays names"})
    found = parity.compare_fixture(
        args.folder,
        args.system,
        unknown="opaque" if args.opaque else "refuse",
        arrays=args.arrays,
        overwrite=args.overwrite,
    )
    if not args.json:
        print(f"{'array':<28} {'max abs':>9} {'max rel':>9} {'tolerance':>9}  verdict")
    for line in found.lines:
        print(json.dumps(record(line)) if args.json else text(line))
    name, path = found.folder.name, found.folder.path
    summary = ", ".join(f"{count} {verdict}" for verdict, count in found.counts.items())
    if not found.passed:
        sys.stdout.flush()
        raise UserError(f"{name} differs from {path}: {summary}")
    report.say(f"{name}: {summary}")


def record(line: parity.Line) -> dict:
    """A line as JSON."""
    return {
        "name": line.name,
        "max_abs_diff": line.absolute,
        "max_rel_diff": line.relative,
        "tolerance": line.tolerance,
        "verdict": line.verdict,
        **({"note": line.note} if line.note else {}),
    }


def text(line: parity.Line) -> str:
    """A line for the terminal."""
    figures = [line.absolute, line.relative, line.tolerance]
    shown = " ".join(f"{'' if f is None else format(f, '.2e'):>9}" for f in figures)
    note = f"  {line.note}" if line.note else ""
    return f"{line.name:<28} {shown}  {line.verdict}{note}"
