"""Hold a fixture folder (published weights, inputs, outputs of the original code) against ours."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
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
    place = contextlib.nullcontext()
    if not args.arrays:
        options.check(args, {"overwrite": "the file that --arrays names"})
    if args.arrays:
        there = sorted(pathlib.Path(args.folder).glob("*"))
        inputs = [file for file in there if file.suffix != ".npz" or file.name == "case.npz"]
        given = dict(option="--arrays", overwrite=args.overwrite, inputs=inputs)
        place = output.file(args.arrays, **given)
    with place as file:
        folder, lines = _held(args, file)
    _tell(args, folder, lines)


def _held(args: argparse.Namespace, file: pathlib.Path | None) -> tuple[parity.Folder, list]:
    """(the fixture, a line per array); with a file, what our model computed goes there."""
    import numpy as np

    from tokgen.pretrained import parity

    runtime.check_platform()
    unknown = "opaque" if args.opaque else "refuse"
    folder = parity.Folder(args.folder, args.system, unknown)
    lines, computed = parity.hold(folder)
    if file is not None:
        with open(file, "wb") as opened:
            np.savez_compressed(opened, **computed)
    return folder, lines


def _tell(args: argparse.Namespace, folder: parity.Folder, lines: list) -> None:
    """Print them; an error where one fails."""
    from tokgen.pretrained import parity

    if not args.json:
        print(f"{'array':<28} {'max abs':>9} {'max rel':>9} {'tolerance':>9}  verdict")
    for line in lines:
        print(json.dumps(record(line)) if args.json else text(line))
    counts = {
        verdict: sum(line.verdict == verdict for line in lines) for verdict in parity.VERDICTS
    }
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if counts["fail"] or counts["uncovered"]:
        sys.stdout.flush()
        raise UserError(f"{folder.name} differs from {folder.path}: {summary}")
    report.say(f"{folder.name}: {summary}")


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
