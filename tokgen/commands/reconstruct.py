"""Images through a tokenizer and back: originals beside reconstructions, and figures."""

from __future__ import annotations

import argparse
import pathlib

from tokgen import options, output, report
from tokgen.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="of a tokenizer: a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("images", help="an image, or a folder of images")
    parser.add_argument("--out", required=True, help="folder for pairs.png and figures.json")
    parser.add_argument(
        "--text",
        default="",
        help="for a decoder that reads text: folder with all.npy, a row of features per image in "
        "the order of their paths",
    )
    output.arguments(parser)
    parser.add_argument("--number", type=int, default=1000, help="at most so many images")
    parser.add_argument("--shown", type=int, default=32, help="pairs in the picture")
    parser.add_argument(
        "--batch", type=int, default=0, help="images at a time; default: by their size"
    )
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16"), help="of the networks"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what is no tokenizer, no image, and a place that is taken."""
    from tokgen.checkpoints import pulling
    from tokgen.evaluation import reconstructions

    pulling.check_kind(args.checkpoint, "tokenizer")
    output.check_folder(args.out, records=reconstructions.RECORDS, overwrite=args.overwrite)
    if not pathlib.Path(args.images).exists():
        raise UserError(
            f"an image, or a folder of images, is needed at {args.images}; found nothing"
        )


def run(args: argparse.Namespace) -> None:
    """Write the pairs, print the metrics."""
    from tokgen.evaluation import reconstructions

    metrics = reconstructions.reconstruct(
        args.checkpoint,
        args.images,
        args.out,
        text=args.text,
        count=args.number,
        shown=args.shown,
        batch=args.batch,
        precision=args.precision,
        overwrite=args.overwrite,
    )
    for name, value in metrics.items():
        print(report.row(name, value))
    pairs = pathlib.Path(args.out) / reconstructions.PAIRS
    report.say(f"{pairs}: each original with its reconstruction to the right")
