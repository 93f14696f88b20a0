"""What is understood of a set of images: splits, classes, counts, sizes, and what cannot be read.

The headers of all files are read; with --scan full every image is decoded, on all cores, or every
record of token shards is checked.
"""

from __future__ import annotations

import argparse

from tokgen import options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="image folder, tfds:NAME, or a folder of token shards")
    parser.add_argument(
        "--scan",
        default="headers",
        choices=("headers", "full"),
        help="headers (default): names, sizes and headers; full: every image is decoded, or every "
        "record of token shards checked",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.02,
        help="share that is kept aside of a folder without splits (default 0.02, as in configs)",
    )
    parser.add_argument(
        "--splits", default="train,test", help="a TFDS set's names of its two parts"
    )
    parser.add_argument("--data-dir", default="", help="where TFDS keeps its sets")
    parser.add_argument("--label", default="", help="a TFDS set's feature that is the label")
    options.labels(parser, "folders")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="1 or 3 (default)")


def run(args: argparse.Namespace) -> None:
    """Print it; all files that cannot be read by name."""
    from tokgen.data import description

    kind = description.kind_of(args.data)
    idle = {}
    if kind != "tfds":
        idle |= dict.fromkeys(("splits", "data_dir", "label"), "sets of TFDS, as tfds:NAME")
    else:
        idle["held_out"] = "folders without splits"
    if args.scan != "full":
        idle["channels"] = "images that are decoded, by --scan full"
    if kind == "tokens":
        idle |= dict.fromkeys(("held_out", "channels", "labels"), "images, not for token shards")
    options.check(args, idle)
    found = description.lines(
        args.data,
        scanned=args.scan,
        labels=args.labels,
        splits=args.splits.split(","),
        data_dir=args.data_dir,
        label=args.label,
        held_out=args.held_out,
        channels=args.channels,
    )
    for line in found:
        print(line)
