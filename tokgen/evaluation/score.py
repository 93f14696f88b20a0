"""A score: images, a feature network, metrics against a reference, and a page to look at.

`score` does all of it; `tokgen evaluate --protocol` is that and a command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tokgen import distributed, options, output, report, runtime
from tokgen.data import classes as names_
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    inputs,
    made_images,
    metric_table,
    protocols,
    references,
    sample_parts,
    score_page,
    score_settings,
)
from tokgen.interfaces import UserError
from tokgen.sampling import presets


def score(settings: score_settings.Settings) -> dict:
    """Samples, or a tokenizer's reconstructions, against a reference: `tokgen evaluate --protocol`.

    Args:
        settings: what is scored, against what, and where the result goes.

    Returns:
        The result, as a line of JSON: protocol, settings, versions, `metrics` by name. It is also
        written to the folder, with a page that shows it.

    Raises:
        UserError: what is scored and the reference cannot be compared, or are too few.

    Examples:
        >>> few = dict(reference="reference.npz", samples=16, accept=("few",))
        >>> line = tokgen.score(tokgen.ScoreSettings("runs/generator", "local", "scored", **few))
        >>> line["metrics"]["fid"]["value"] > 0
        True
    """
    score_settings.check(settings)
    score_settings.check_kind(settings)
    with opened(settings) as place:
        runtime.devices()
        reference = None
        if settings.reference:
            reference = references.read(settings.reference, settings.assume)
        images, classes = inputs.images_of(settings, place.path)
        if isinstance(images, made_images.Drawn):
            options.refuse(presets.without_effect(settings.sampling, images.sampler))
        count = inputs.count_of(settings, images)
        extractor = inputs.extractor_of(settings, reference)
        return measured(settings, images, classes, count, extractor, reference, place)


def opened(settings: score_settings.Settings):
    """The folder of the score, reserved; gone on with where it is of these settings."""
    return collect.opened(
        settings.out,
        records=collect.RECORDS,
        what="another evaluation",
        migrated=collect.migrated,
        overwrite=settings.overwrite,
        inputs=(
            *(settings.reference, settings.weights, settings.data, settings.tokenizer),
            *(settings.text, *settings.lpips),
        ),
    )


def measured(
    settings: score_settings.Settings,
    images: given_images.Images,
    classes: int,
    count: int,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
    place: output.Folder,
) -> dict:
    """The result of `count` images, of whose labels there are `classes`; all of it is written.

    Of several processes each sees its share, and the first measures and writes.
    """
    if reference is not None:
        references.check(reference, settings.protocol, extractor, size=images.size, count=count)
        reference = distributed.first(inputs.with_features, reference, extractor) or reference
    growing = isinstance(images, sample_parts.Growing) and count == len(images)
    identity = {
        "protocol": settings.protocol,
        "samples": images.total if growing else count,  # more will come, and belong to it
        "images": images.identity,
        "size": list(images.size),
        "extractor": extractor.record,
        "reference": described(reference),
        "seed": settings.seed,
    }
    if reference is not None:
        metrics = metric_table.of_protocol(settings.protocol)
        check_enough(metrics, settings.accept, reference, extractor.layers[0], count)
    distributed.check_alike(identity)
    distributed.first(place.claim, identity)
    collect.collect(images, extractor, place.path, count)
    how = settings, images, classes, count, extractor, reference, place, identity
    return distributed.decided(_finished, *how)


def _finished(
    settings: score_settings.Settings,
    images: given_images.Images,
    classes: int,
    count: int,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
    place: output.Folder,
    identity: Mapping,
) -> dict:
    """The result of what all processes have seen; it is written."""
    found = collect.found_of(images, place.path, count)
    given_images.check(
        given_images.suspicious(found.digest_N, found.constant_N), count, settings.accept
    )
    label_N, classes = labels_of(found.label_N, images.classes, classes, extractor, reference)
    compared = collect.compared(
        dataclasses.replace(found, label_N=label_N),
        extractor,
        protocols.named(settings.protocol),
        reference,
        classes=classes,
        accepted=settings.accept,
        seed=settings.seed,
    )
    metrics, absent = metric_table.score(compared, metric_table.of_protocol(settings.protocol))
    metrics = collect.of_pairs(found, settings.seed) | metrics
    line = collect.record(identity, metrics, absent, found)
    if count < identity["samples"]:
        line |= {"samples": count, "total": images.total}
    if isinstance(images, made_images.Reconstructed) and images.unreadable:
        line["unreadable"] = images.source.unreadable.record()
    _write(place, line, found, images, extractor, reference)
    return line


def _write(
    place: output.Folder,
    line: Mapping,
    found: collect.Found,
    images: given_images.Images,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
) -> None:
    """Write the images, the page, and last the result: a folder that has one is finished."""
    out = place.path
    if isinstance(images, made_images.Drawn):
        kept = images.archive
        whole = collect.archive(images, out, line["samples"]) if kept is None else kept.path
        images.keep(whole)
        report.say(f"{place.target / images.archive.path.name}: the images")
    shown = score_page.write(out, line, found, images, extractor, reference)
    report.say(f"{place.target / shown.name}: a page to look at")
    collect.append(out, line)
    report.say(f"{place.target / collect.RESULTS}: the same as a line of JSON")


def check_enough(
    metrics: Sequence[str],
    accepted: Sequence[str],
    reference: references.Reference,
    layer: str,
    count: int,
    remedy: str = "--accept few",
) -> None:
    """An error where a metric would be refused of so many images, before any is seen."""
    found = reference.moments[layer]
    for name in metrics:
        least = metric_table.named(name).least
        if min(count, found.count) < least:
            raise UserError(
                f"{name} needs {least} images or more of each set; found {count} samples and "
                f"{found.count:g} of the reference: give more"
            )
    if "few" in accepted or not {"fid", "mifid"} & {*metrics}:  # one is made of the other
        return
    if min(count, found.count) <= found.width:
        raise UserError(
            f"a Frechet distance of {found.width} features needs more images than that of either "
            f"set, better ten times as many; found {count} samples and {found.count:g} of the "
            f"reference: give more, or say {remedy}"
        )


def labels_of(
    label_N: np.ndarray,
    names: Sequence[str],
    classes: int,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
) -> tuple[np.ndarray, int]:
    """(labels as the network and the reference count them, how many classes); 0: of others.

    `names` are those of the labels, () where they have none. Classes agree by name; numbers, which
    .npz files have, agree with anything that has as many.
    """
    known = tuple(extractor.record.get("classes", ()))
    real = () if reference is None else tuple(reference.record.get("classes", ()))
    target = known or real
    if not classes:
        return label_N, classes
    if not target and extractor.record.get("name") == "local":
        report.say(
            "no metrics by class: the reference has no classes, and its network tells which way "
            "an image is up"
        )
        return label_N, 0
    if not target:
        return label_N, classes
    names = tuple(names)
    if (known and real and real != known) or (not names and classes > len(target)):
        return label_N, 0
    if not names and names_.numbered(target) and not names_.counted(target):
        report.say(
            "no metrics by class: the labels are numbers without names, and the classes of the "
            f"reference are numbers in an order of their own, {names_.listed(target)}; give a "
            "folder with class folders, or one that tokgen sample wrote"
        )
        return label_N, 0
    if not names:
        return label_N, len(target)
    try:
        label_C, said = names_.matched(names, target, "the samples", "the reference")
    except UserError as error:
        report.say(f"no metrics by class: {error}")
        return label_N, 0
    if said:
        report.say(said)
    return label_C[label_N], len(target)


def described(reference: references.Reference | None) -> dict:
    """What a result says of its reference."""
    if reference is None:
        return {"dataset": "the originals themselves"}
    kept = ("dataset", "split", "count", "size", "crop", "assumed", "digest")
    record = {name: reference.record[name] for name in kept if name in reference.record}
    return {"path": str(reference.path.resolve()), **record}


def table(line: Mapping) -> str:
    """A result for the terminal: every metric with its interval and what it stands beside."""
    reference = line["reference"]
    of = f" of {line['total']}" if "total" in line else ""
    rows = [
        f"protocol {line['protocol']}, {line['samples']}{of} images, {line['extractor']['name']} "
        f"{line['extractor']['fingerprint'][:12]}, reference {reference['dataset']} "
        f"{reference.get('split', '')} ({reference.get('count', line['samples'])})"
    ]
    for title, value, interval, _, notes in metric_table.rows(line):
        told = f" ({interval})" if interval else ""
        more = f": {notes}" if value == "none" else f"; {notes}" if notes else ""
        rows.append(f"{title:<28} {value}{told}{more}")
    return "\n".join(rows)
