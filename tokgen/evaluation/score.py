"""`tokgen evaluate --protocol`: from a command line to supply, network, figures and a page."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from tokgen import options, output, report, runtime
from tokgen.backbones import lpips
from tokgen.checkpoints import checkpoint
from tokgen.commands import sample
from tokgen.data import classes as names_, datasets, npz
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    made_images,
    metric_table,
    page,
    protocols,
    references,
    score_page,
)
from tokgen.interfaces import UserError
from tokgen.pretrained.formats import reader as weights_

SAMPLES = 1000  # where neither the protocol nor --samples says


def run(args: argparse.Namespace) -> None:
    """Score what the command line names, and write everything that says how."""
    check(args)
    protocol = protocols.named(args.protocol)
    with opened(args) as place:
        runtime.devices()
        reference, out = None, place.path
        if args.reference:
            reference = references.read(args.reference, args.assume)
        supply, classes = supply_of(args, protocol, out)
        count = count_of(args, protocol, supply)
        extractor = extractor_of(args, protocol, reference)
        if reference is not None:
            references.check(reference, args.protocol, extractor, size=supply.size, count=count)
            reference = with_features(reference, extractor)
        line, found = scored(args, supply, extractor, reference, count, classes, place)
        finish(place, line, found, supply, extractor, reference, count)
    print(table(line))


def opened(args: argparse.Namespace):
    """The folder of the score, reserved; gone on with where it is of this command line."""
    return output.growing(
        args.out,
        records=collect.RECORDS,
        record=collect.RUN,
        what="another evaluation",
        overwrite=args.overwrite,
        inputs=(args.reference, args.weights, args.data, args.tokenizer, args.text, *args.lpips),
    )


def finish(
    place: output.Folder, line: dict, found, supply, extractor, reference, count: int
) -> None:
    """Write the images, the page, and last the result: a folder that has one is finished."""
    out = place.path
    if isinstance(supply, made_images.Drawn):
        kept = supply.archive
        supply.keep(collect.archive(supply, out, count) if kept is None else kept.path)
        report.say(f"{place.target / supply.archive.path.name}: the images")
    shown = score_page.write(out, line, found, supply, extractor, reference)
    report.say(f"{place.target / shown.name}: a page to look at")
    collect.append(out, line)
    report.say(f"{place.target / collect.RESULTS}: the same as a line of JSON")


def check(args: argparse.Namespace) -> None:
    """Errors of the command line, before anything is loaded."""
    protocol = protocols.named(args.protocol)
    if not args.out:
        raise UserError(
            "a score needs --out DIR: what was seen is kept there, to go on after a kill"
        )
    if pathlib.Path(args.out).is_file():
        raise UserError(f"--out names the folder of a score; {args.out} is a file")
    place, out = (pathlib.Path(path).resolve() for path in (args.checkpoint, args.out))
    if place.is_dir() and (out == place or (place in out.parents and _is_pictures(place))):
        raise UserError(
            f"--out must not lie in what is scored, where it would be taken for a part of it; "
            f"found {args.out} in {args.checkpoint}"
        )
    if args.overwrite and out in place.parents:
        raise UserError(
            f"--overwrite would remove what is scored, {args.checkpoint}, which lies in --out "
            f"{args.out}; name another place for the score"
        )
    if args.samples < 0 or args.batch < 1 or not 0 <= args.seed < 2**32:
        raise UserError(
            "--samples must be at least 0, --batch at least 1, --seed in [0, 2**32); found "
            f"{args.samples}, {args.batch}, {args.seed}"
        )
    if not args.reference and not (protocol.paired or args.reconstruction):
        raise UserError(
            f"--protocol {args.protocol} compares with a reference: --reference FILE.npz, which "
            "tokgen reference DATA --out FILE.npz writes"
        )
    if not args.reference and protocol.extractor == "local":
        raise UserError(
            "the local network lies in a reference: --reference FILE.npz, which tokgen reference "
            "DATA --out FILE.npz writes"
        )


def supply_of(args: argparse.Namespace, protocol, out: pathlib.Path) -> tuple[object, int]:
    """(the images to be scored, how many classes their labels have)."""
    path = pathlib.Path(args.checkpoint)
    kind = _kind(args.checkpoint)
    if args.lpips and kind != "tokenizer":
        raise UserError("--lpips compares originals with reconstructions: give a tokenizer's")
    if not kind:
        if protocol.paired or args.reconstruction:
            raise UserError(
                f"--protocol {args.protocol} scores a tokenizer's reconstructions; {path} holds "
                "samples: give the tokenizer's checkpoint"
            )
        options.check_mode(args, options.EVALUATE, options.SAMPLES)
        given = given_images.given(path, args.accept, args.labels)
        if isinstance(given, npz.Archive):
            options.check(args, {"labels": "folders of images"})
        datasets.tell(
            str(path), all=given.source if isinstance(given, given_images.Pictures) else given
        )
        if 0 < args.samples < len(given):
            return given_images.Spread(given, args.samples), classes_of(given)
        return given, classes_of(given)
    if kind == "tokenizer":
        options.check_mode(args, options.EVALUATE, options.REPAINTED)
        supply = repainted(args)
        return supply, len(supply.source.classes)
    if protocol.paired or args.reconstruction:
        raise UserError(f"reconstructions are a tokenizer's; {path} holds a {kind}")
    options.check_mode(args, options.EVALUATE, options.DRAWN)
    return drawn(args, protocol, out)


def _is_pictures(place: pathlib.Path) -> bool:
    return not _kind(str(place)) and not (place / "samples.npz").exists()


def _kind(path: str) -> str:
    """ "tokenizer" or "generator" of a checkpoint; "" of samples."""
    place = pathlib.Path(path)
    if place.is_file() or (place.is_dir() and (place / "samples.npz").exists()):
        return ""
    try:
        step = checkpoint.find(path)
    except UserError as error:
        if place.is_dir():
            return ""
        raise UserError(f"{error}; need that, an .npz of images or a folder of images") from error
    return checkpoint.read_meta(step)["kind"]


def classes_of(given) -> int:
    """How many classes the labels of given samples may be of."""
    if isinstance(given, npz.Archive) and not given.classes:
        return 0 if given.label_N is None else int(given.label_N.max()) + 1
    return len(given.classes)


def drawn(args: argparse.Namespace, protocol, out: pathlib.Path) -> tuple[made_images.Drawn, int]:
    """A generator's samples, as many of each class."""
    loaded = checkpoint.load_generator(args.checkpoint, compute=sample.precision_of(args))
    tokenizer = checkpoint.load_tokenizer_of(loaded, args.tokenizer)
    settings, *prepared = sample.prepared(args, loaded)
    count = args.samples or protocol.samples or SAMPLES
    if loaded.module.cond == "text":
        if not args.text:
            raise UserError("the generator reads text: --text FILE.npz, as tokgen sample takes it")
        text = sample.captions(args.text)
        rows_N = np.arange(count) % len(text.mask_BT)
        cond = jax.tree.map(lambda leaf: leaf[rows_N], text)
    elif args.text:
        raise UserError(
            "--text is for a generator that reads text; found one of "
            f"{len(loaded.classes)} classes: leave it out"
        )
    else:
        cond = made_images.balanced(count, len(loaded.classes), args.seed)
    supply = made_images.Drawn(
        loaded,
        tokenizer,
        tuple(prepared),
        cond,
        settings=settings,
        preset=args.preset,
        seed=args.seed,
        batch=min(args.batch, collect.PART),
        each=collect.PART,
        folder=out / "images",
    )
    return supply, len(loaded.classes)


def repainted(args: argparse.Namespace) -> made_images.Repainted:
    """A tokenizer's reconstructions of held-out images."""
    loaded = checkpoint.load_tokenizer(args.checkpoint, compute=args.precision or "")
    source = datasets.image_source(
        loaded.config, args.data, args.split, labels=args.labels, doubtful="drop"
    )
    what = datasets.called(loaded.config.get("data", {}), args.data)
    datasets.tell(what, **{args.split: source})
    datasets.check_filled(source, args.split)
    protocol = protocols.named(args.protocol)
    count = args.samples or protocol.samples or len(source)
    distances = {}
    if args.lpips:
        weights = {}
        for file in args.lpips:
            weights |= weights_.network(file)
        network = lpips.from_weights(weights)
        distances[f"lpips_{trunk_of(network)}"] = network
    supply = made_images.Repainted(loaded, source, count=count, distances=distances)
    if args.precision:  # what was begun without a word of it goes on
        supply.identity["precision"] = args.precision
    return supply


def trunk_of(network) -> str:
    """ "vgg" or "alex", by the trunk of an LPIPS."""
    return "alex" if "alex" in type(network.trunk).__name__.lower() else "vgg"


def count_of(args: argparse.Namespace, protocol, supply) -> int:
    """How many images are scored: what --samples says, the protocol's number, or all."""
    wanted = args.samples or protocol.samples or len(supply)
    if not protocol.samples and getattr(supply, "unreadable", 0):
        wanted = min(wanted, len(supply))  # the others are told, and left out
    if protocol.samples and wanted != protocol.samples:
        raise UserError(
            f"{args.protocol} is defined for {protocol.samples} samples; --samples asks for "
            f"{wanted}: leave it out, or score under the protocol local or cmmd"
        )
    if wanted > len(supply):
        raise UserError(
            f"{args.protocol} needs {wanted} images; found {len(supply)}: give more"
            + ("" if protocol.samples else f", or say --samples {len(supply)}")
        )
    return wanted


def extractor_of(args: argparse.Namespace, protocol, reference) -> feature_extractors.Extractor:
    """The protocol's feature network: of the file that --weights names, or of the reference."""
    if protocol.extractor == "local":
        if args.weights:
            raise UserError(
                "the local protocol's network lies in its reference; leave --weights out"
            )
        if not reference.network:
            raise UserError(
                f"{args.reference} holds no local network: it is of the protocol "
                f"{reference.record['protocol']}, not {args.protocol}"
            )
        return feature_extractors.from_arrays(reference.network, reference.record["extractor"])
    found = feature_extractors.from_file(protocol.extractor, args.weights)
    report.say(feature_extractors.described(found))
    return found


def with_features(reference, extractor) -> references.Reference:
    """ADM's references hold images in the place of features: they are seen now."""
    if reference.features or not reference.record.get("assumed"):
        return reference
    images = references.images_of(reference.path)
    if images is None:
        return reference
    count = min(len(images), references.KEPT)
    layers = tuple(name for name in extractor.layers if not name.startswith("logits"))
    parts = []
    with report.bar(count, unit="image", what="reference") as bar:
        for start in range(0, count, collect.PART):
            stop = min(start + collect.PART, count)
            part = images.part(start, stop)["image"]
            parts.append(feature_extractors.features(extractor, part, layers))
            bar.update(stop - start)
    found = {name: np.concatenate([part[name] for part in parts]) for name in layers}
    return references.replaced(reference, found)


def scored(
    args, supply, extractor, reference, count: int, classes: int, place: output.Folder
) -> tuple[dict, collect.Found]:
    """(the result as a line, what was seen)."""
    protocol = protocols.named(args.protocol)
    identity = {
        "protocol": args.protocol,
        "samples": count,
        "supply": supply.identity,
        "size": list(supply.size),
        "extractor": extractor.record,
        "reference": described(reference),
        "seed": args.seed,
    }
    if reference is not None:
        check_enough(args, reference, extractor.layers[0], count)
    place.claim(identity)
    found = collect.collect(supply, extractor, place.path, count)
    given_images.check(
        given_images.suspicious(found.digest_N, found.constant_N), count, args.accept
    )
    label_N, classes = labels_of(found.label_N, supply, classes, extractor, reference)
    compared = collect.compared(
        dataclasses.replace(found, label_N=label_N),
        extractor,
        protocol,
        reference,
        classes=classes,
        accepted=args.accept,
        seed=args.seed,
    )
    figures, absent = metric_table.score(compared)
    figures = collect.of_pairs(found, args.seed) | figures
    line = collect.record(identity, figures, absent, found)
    if getattr(supply, "unreadable", 0):
        line["unreadable"] = supply.source.unreadable.record()
    return line, found


def check_enough(args, reference, layer: str, count: int) -> None:
    """An error where a Frechet distance would be refused, before any image is seen."""
    if "fid" not in protocols.named(args.protocol).metrics or "few" in args.accept:
        return
    found = reference.moments[layer]
    if min(count, found.count) <= found.width:
        raise UserError(
            f"a Frechet distance of {found.width} features needs more images than that of either "
            f"set, better ten times as many; found {count} samples and {found.count:g} of the "
            "reference: give more, or say --accept few"
        )


def labels_of(
    label_N: np.ndarray, supply, classes: int, extractor, reference
) -> tuple[np.ndarray, int]:
    """(labels as the network and the reference count them, how many classes); 0: of others.

    Classes agree by name; numbers, which .npz files have, agree with anything that has as many.
    """
    known = tuple(extractor.record.get("classes", ()))
    real = () if reference is None else tuple(reference.record.get("classes", ()))
    target = known or real
    if not classes or not target:
        return label_N, classes
    names = tuple(getattr(supply, "classes", ()))
    if (known and real and real != known) or (not names and classes > len(target)):
        return label_N, 0
    if not names and names_.numbered(target) and not names_.counted(target):
        report.say(
            "no figures by class: the labels are numbers without names, and the classes of the "
            f"reference are numbers in an order of their own, {names_.listed(target)}; give a "
            "folder with class folders, or one that tokgen sample wrote"
        )
        return label_N, 0
    if not names:
        return label_N, len(target)
    try:
        label_C, said = names_.matched(names, target, "the samples", "the reference")
    except UserError as error:
        report.say(f"no figures by class: {error}")
        return label_N, 0
    if said:
        report.say(said)
    return label_C[label_N], len(target)


def described(reference) -> dict:
    """What a result says of its reference."""
    if reference is None:
        return {"dataset": "the originals themselves"}
    kept = ("dataset", "split", "count", "size", "crop", "assumed", "digest")
    record = {name: reference.record[name] for name in kept if name in reference.record}
    return {"path": str(reference.path.resolve()), **record}


def table(line: Mapping) -> str:
    """A result for the terminal: every figure with its interval and what it stands beside."""
    reference = line["reference"]
    rows = [
        f"protocol {line['protocol']}, {line['samples']} images, {line['extractor']['name']} "
        f"{line['extractor']['fingerprint'][:12]}, reference {reference['dataset']} "
        f"{reference.get('split', '')} ({reference.get('count', line['samples'])})"
    ]
    for name, figure in line["figures"].items():
        value, interval, notes = page.cells(name, figure)
        told = f" ({interval})" if interval else ""
        rows.append(f"{page.title_of(name):<28} {value}{told}{'; ' if notes else ''}{notes}")
    for name, why in line["absent"].items():
        rows.append(f"{page.title_of(name):<28} none: {why}")
    return "\n".join(rows)
