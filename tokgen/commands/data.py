"""What is understood of a set of images: splits, classes, counts, sizes, and what cannot be read.

The headers of all files are read; with --scan full every image is decoded, on all cores, or every
record of token shards is checked.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import TYPE_CHECKING

from tokgen import options, report
from tokgen.errors import UserError

if TYPE_CHECKING:
    from tokgen.data import scan


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
    from tokgen.data import classes, datasets, token_header

    shards = (pathlib.Path(args.data) / token_header.HEADER).exists()
    idle = {}
    if datasets.kind_of(args.data) != "tfds":
        idle |= dict.fromkeys(("splits", "data_dir", "label"), "sets of TFDS, as tfds:NAME")
    else:
        idle["held_out"] = "folders without splits"
    if args.scan != "full":
        idle["channels"] = "images that are decoded, by --scan full"
    if shards:
        idle |= dict.fromkeys(("held_out", "channels", "labels"), "images, not for token shards")
    options.check(args, idle)
    if shards:
        _shards(args)
        return
    if datasets.kind_of(args.data) == "npz":
        raise UserError(
            f"{args.data} holds pixels, of which nothing is decoded and no part is held out; give "
            "an image folder, tfds:NAME or a folder of token shards"
        )
    sources = {"train": _source(args, "train")}
    try:
        sources["held_out"] = _source(args, "held_out")
    except UserError as error:  # a set without such a part can be looked at all the same
        report.say(str(error))
    print(classes.told(args.data, sources))
    total, looked, broken = 0, 0, {}
    for split, source in sources.items():
        found = _scanned(source, args)
        unreadable = source.unreadable
        total, looked = total + len(source), looked + found.count
        broken |= unreadable.files()
        told = f", {len(unreadable)} unreadable" if found.count else ""
        print(f"{split:<9} {len(source):,} images{told}")
        if found.sizes:
            print(f"{'':9} rows x columns: {_sizes(found.sizes)}")
            forms = sorted(found.forms.items(), key=lambda item: -item[1])
            print(f"{'':9} formats: {', '.join(f'{form} {count:,}' for form, count in forms)}")
        print(f"{'':9} fingerprint {source.fingerprint[:16]}", end="")
        print(f", all bytes {found.sha256[:16]}" if found.sha256 else "")
    for name, reason in broken.items():
        print(f"unreadable  {name}: {reason}")
    if args.scan == "full":
        print(f"{total:,} images decoded, {len(broken)} of them cannot be read")
    elif not looked:
        print(
            f"{total:,} images, none of them looked at: the set has no files whose headers could "
            "be read alone; --scan full decodes every image"
        )
    else:
        print(
            f"{total:,} images by their headers, {len(broken)} of them cannot be read; --scan full "
            "decodes every image"
        )


def _source(args: argparse.Namespace, split: str):
    """A part of the images that DATA names."""
    from tokgen.data import datasets

    splits = tuple(args.splits.split(","))
    return datasets.from_path(
        *(args.data, split),
        labels=args.labels,
        splits=splits,
        data_dir=args.data_dir,
        label=args.label,
        held_out=args.held_out,
    )


def _scanned(source, args: argparse.Namespace) -> scan.Found:
    from tokgen.data import scan

    if args.scan == "full":
        return scan.full(source, args.channels)
    return scan.headers(source)


def _sizes(sizes: dict[tuple[int, int], int]) -> str:
    most = sorted(sizes.items(), key=lambda item: -item[1])
    told = [f"{rows} x {columns} ({count:,})" for (rows, columns), count in most[:5]]
    if len(most) > 5:
        least, largest = (
            min(sizes, key=lambda s: s[0] * s[1]),
            max(sizes, key=lambda s: s[0] * s[1]),
        )
        told.append(
            f"and {len(most) - 5} others, from {least[0]} x {least[1]} to {largest[0]} x "
            f"{largest[1]}"
        )
    return ", ".join(told)


def _shards(args: argparse.Namespace) -> None:
    """What the header of a token set says; with --scan full, what its records hold."""
    from tokgen.data import classes, token_header, token_shards

    sources, wrong = {}, {}
    for split in token_header.SPLITS:
        try:
            sources[split] = token_shards.Source(args.data, split=split, verify=args.scan == "full")
        except UserError as error:
            wrong[split] = error
    if not sources:
        raise next(iter(wrong.values()))
    for error in wrong.values():
        report.say(str(error))
    print(classes.told(args.data, sources))
    for split, source in sources.items():
        print(
            f"{split:<9} {len(source):,} images in {len(source.views)} views, "
            f"{len(source.missing)} without tokens"
        )
        for name, reason in source.missing.values():
            print(f"unreadable  {name}: {reason}")
