"""Reference statistics of a set of images, to be scored against under a protocol."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.errors import UserError
from tokgen.evaluation import protocols

if TYPE_CHECKING:
    import numpy as np

    from tokgen.data import loader
    from tokgen.evaluation import feature_extractors

PART = 256  # images at a time
EXAMINED = 10_000  # images that the local network's accuracy is of, at most
SIZE = 256  # pixels of the published protocols' images


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


def run(args: argparse.Namespace) -> None:
    """Measure the images and write what they are like."""
    from tokgen.data import datasets
    from tokgen.evaluation import references

    protocol = protocols.named(args.protocol)
    out = pathlib.Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out names an .npz file; found {args.out}")
    steps = 1 if args.steps is None else args.steps
    if args.images < 0 or steps < 1 or not 0 <= args.seed < 2**32:
        raise UserError(
            "--images and --seed must be at least 0 and --steps at least 1; found "
            f"{args.images}, {args.seed}, {steps}"
        )
    if args.network and protocol.extractor != "local":
        raise UserError(f"--network is of the local protocol; {args.protocol} has --weights")
    idle = {}
    if datasets.kind_of(args.data) != "tfds":
        idle |= dict.fromkeys(("splits", "data_dir", "label"), "sets of TFDS, as tfds:NAME")
    if datasets.kind_of(args.data) == "npz":
        idle["labels"] = "folders and sets of TFDS"
    options.check(args, idle)
    if options.is_given(args, "steps") and (args.network or protocol.extractor != "local"):
        report.say("--steps has no effect: no network is trained, it is there already")
    data = () if datasets.kind_of(args.data) == "tfds" else (args.data,)
    given = dict(overwrite=args.overwrite, inputs=(*data, args.weights, args.network))
    with output.file(args.out, own=references.is_one, **given) as file:
        told = _written(args, protocol, file)
    report.say(told)


def _written(args: argparse.Namespace, protocol: protocols.Protocol, file: pathlib.Path) -> str:
    """Measure the images and write the reference; what is to be said."""
    from tokgen.checkpoints import checkpoint
    from tokgen.data import datasets
    from tokgen.evaluation import feature_extractors, references

    runtime.devices()
    # an archive does not say what it is of
    unsaid = "all" if args.data.endswith(".npz") else protocol.split or "train"
    split = args.split or unsaid
    source = _source(args, split)
    datasets.check_filled(source, split)
    size = size_of(source, args)
    datasets.tell(args.data, **{split: source})
    extractor = extractor_of(args, protocol, source, size)
    count = min(len(source), args.images or len(source))
    index_N = evenly(len(source), count)
    batches = passing(source, size, index_N)
    found = measured(extractor, batches, index_N, args.seed)
    layers, sums, features, kept_n, label_n, count = found
    kept = feature_extractors.arrays(extractor) if extractor.name == "local" else {}
    record = {
        "protocol": args.protocol,
        "dataset": args.data,
        "fingerprint": source.fingerprint,
        "split": split,
        "labels": args.labels,
        "count": count,
        "available": len(source),
        "unreadable": batches.unreadable.record(),
        "size": list(size),
        "crop": protocol.crop,
        "resize": "halvings by box, then bicubic to the shorter side (ADM)",
        "classes": list(source.classes),
        "extractor": extractor.record,
        "layers": layers,
        "seed": args.seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": checkpoint.versions(),
    }
    references.save(file, record, sums, features, kept_n, label_n, kept)
    widths = ", ".join(f"{name} {width}" for name, width in layers.items())
    return (
        f"{args.out}: {count} images of {args.data} ({split}), {size[0]} x {size[1]}, seen by "
        f"{extractor.name} ({widths}); compare with it: tokgen evaluate SAMPLES --protocol "
        f"{args.protocol} --reference {args.out}"
    )


def _source(args: argparse.Namespace, split: str):
    """The images that DATA names."""
    from tokgen.data import datasets

    splits = tuple(args.splits.split(","))
    return datasets.from_path(
        *(args.data, split),
        labels=args.labels,
        splits=splits,
        data_dir=args.data_dir,
        label=args.label,
    )


def size_of(source, args: argparse.Namespace) -> tuple[int, int]:
    """(rows, columns): what --size says, or 256; of the local protocol, the first image's."""
    from tokgen.data import npz, pixels as images, sources, unreadable

    if args.size:
        if len(args.size) > 2 or min(args.size) < 8:
            raise UserError(f"--size is one number or two, at least 8; found {args.size}")
        return (args.size * 2)[0], (args.size * 2)[1]
    if isinstance(source, npz.Source):
        return source.size
    if protocols.named(args.protocol).extractor != "local":
        return SIZE, SIZE
    try:
        return tuple(sources.read(source, 0, 3)["image"].shape[:2])
    except images.BrokenImage as error:
        raise UserError(
            f"the size is that of the first image, and {unreadable.name_of(source, 0)} cannot be "
            f"read: {error}; repair it, or say --size"
        ) from error


def extractor_of(args, protocol, source, size) -> feature_extractors.Extractor:
    """The protocol's feature network: from a file, of another reference, or trained now."""
    from tokgen.data import npz, unreadable
    from tokgen.evaluation import feature_extractors, local_classifier, references

    if protocol.extractor != "local":
        found = feature_extractors.from_file(protocol.extractor, args.weights)
        report.say(feature_extractors.described(found))
        return found
    if args.weights:
        raise UserError("the local protocol trains its own network; leave --weights out")
    if args.network:
        other = references.read(args.network)
        if not other.network:
            raise UserError(f"{args.network} holds no local network: it is of another protocol")
        return feature_extractors.from_arrays(other.network, other.record["extractor"])
    recipe = local_classifier.PHOTOGRAPHS
    if args.steps is not None:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    taught = source
    if not isinstance(source, npz.Source):
        taught = _source(args, "train")
        unreadable.share(source, taught)
    found = feature_extractors.trained(taught, size, seed=args.seed + 1, recipe=recipe)
    names = ("images", "examined", "accuracy")
    known = dict(zip(names, _accuracy(args, found, source, size), strict=True))
    what = "classes" if source.classes else "which way is up"
    report.say(
        f"the local network tells {what} on {100 * known['accuracy']:.1f} % of "
        f"{known['examined']} {known['images']}"
    )
    return dataclasses.replace(found, record={**found.record, **known})


def _accuracy(args, extractor, source, size) -> tuple[str, int, float]:
    """(which images, how many, the network's accuracy on them); held-out ones if there are any."""
    from tokgen.data import npz, unreadable
    from tokgen.evaluation import feature_extractors

    try:
        held_out, which = _source(args, "held_out"), "held-out images"
    except UserError:
        held_out, which = source, "its own images"
    if isinstance(source, npz.Source) or not len(held_out):
        held_out, which = source, "its own images"
    unreadable.share(source, held_out)
    accuracy, count = feature_extractors.accuracy(extractor, held_out, size, count=EXAMINED)
    return which, count, accuracy


def evenly(length: int, count: int) -> np.ndarray:
    """`count` of so many indices, evenly over a set that may be sorted by class."""
    import numpy as np

    return np.arange(count) * length // count


def passing(source, size: tuple[int, int], index_N: np.ndarray) -> loader.Batches:
    """The images in parts, by ADM's centre crop."""
    from tokgen.data import loader, pixels as images

    view = images.fixed("center", size, 3)
    return loader.once(source, view, batch_size=PART, indices=index_N)


def measured(extractor, parts: Iterator[dict], index_N: np.ndarray, seed: int) -> tuple:
    """(widths of the layers, moments, features of some images, which these are, labels, count).

    Of those of `index_N` that could be read: `count` is how many.
    """
    import numpy as np

    from tokgen.evaluation import feature_extractors, references
    from tokgen.metrics import moments

    count = len(index_N)
    kept_n = index_N[np.random.default_rng(seed).permutation(count)[: references.KEPT]]
    names = [name for name in extractor.layers if not name.startswith("logits")]
    sums = {name: moments.Accumulator() for name in names}
    kept, labels, which, measured_ = {name: [] for name in names}, [], [], 0
    with report.bar(count, unit="image", what="reference") as bar:
        for part in parts:
            found = feature_extractors.features(extractor, part["image"], tuple(names))
            rows_n = np.flatnonzero(np.isin(part["index"], kept_n))
            for name, feature_ND in found.items():
                sums[name].add(feature_ND)
                kept[name].append(feature_ND[rows_n])
            labels.append(part["label"][rows_n])
            which.append(part["index"][rows_n])
            measured_ += len(part["image"])
            bar.update(len(part["image"]))
    which_n = np.concatenate(which)
    order_n = np.random.default_rng(seed + 1).permutation(len(which_n))
    features = {name: np.concatenate(found)[order_n] for name, found in kept.items()}
    widths = {name: features[name].shape[1] for name in names}
    statistics = {name: found.moments() for name, found in sums.items()}
    label_n = np.concatenate(labels)[order_n]
    return widths, statistics, features, which_n[order_n], label_n, measured_
