"""Reference statistics of a set of images, to be scored against under a protocol."""

from __future__ import annotations

import argparse

from tokgen import options, output, report, runtime
from tokgen.evaluation import protocols


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="image folder, an .npz of images, or tfds:NAME")
    parser.add_argument("--out", required=True, help="the reference to write, an .npz")
    output.arguments(parser)
    parser.add_argument(
        "--protocol", default="local", help=f"{', '.join(protocols.PROTOCOLS)} (default local)"
    )
    parser.add_argument("--weights", default="", help="weight file of a published network")
    parser.add_argument(
        "--network", default="", help="another reference whose local network is to be used"
    )
    parser.add_argument("--split", default="", help="train, held_out or all; default: the protocol")
    parser.add_argument(
        "--splits", default="train,test", help="a TFDS set's names of the first two"
    )
    parser.add_argument("--data-dir", default="", help="where TFDS keeps its sets")
    parser.add_argument("--label", default="", help="a TFDS set's feature that is the label")
    options.labels(parser, "folders")
    parser.add_argument(
        "--size", type=int, nargs="*", default=[], help="pixels, or rows and columns, of the images"
    )
    parser.add_argument("--images", type=int, default=0, help="at most so many; default: all")
    parser.add_argument(
        "--steps",
        type=int,
        help="to train the local network; default: as its recipe says",
    )
    parser.add_argument("--seed", type=int, default=0)
    options.processes(parser)


def run(args: argparse.Namespace) -> None:
    """Measure the images and write what they are like."""
    from tokgen.data import datasets
    from tokgen.evaluation import reference_making

    settings = reference_making.Settings(
        data=args.data,
        out=args.out,
        protocol=args.protocol,
        weights=args.weights,
        network=args.network,
        split=args.split,
        splits=tuple(args.splits.split(",")),
        data_dir=args.data_dir,
        label=args.label,
        labels=args.labels,
        size=tuple(args.size),
        images=args.images,
        steps=args.steps,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    reference_making.check(settings)
    idle, kind = {}, datasets.kind_of(args.data)
    if kind != "tfds":
        idle |= dict.fromkeys(("splits", "data_dir", "label"), "sets of TFDS, as tfds:NAME")
    if kind == "npz":
        idle["labels"] = "folders and sets of TFDS"
    options.check(args, idle)
    local = protocols.named(args.protocol).extractor == "local"
    if options.is_given(args, "steps") and (args.network or not local):
        report.say("--steps has no effect: no network is trained, it is there already")
    with runtime.over(""):
        record = reference_making.make(settings)
    widths = ", ".join(f"{name} {width}" for name, width in record["layers"].items())
    rows, columns = record["size"]
    report.say(
        f"{args.out}: {record['count']} images of {args.data} ({record['split']}), {rows} x "
        f"{columns}, seen by {record['extractor']['name']} ({widths}); compare with it: tokgen "
        f"evaluate SAMPLES --protocol {args.protocol} --reference {args.out}"
    )
