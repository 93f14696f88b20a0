"""The page of one score: its metrics, how they were made, and the images they are of."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tokgen.data import datasets, pixels, sources, views
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    metric_table,
    page,
    protocols,
    references,
)
from tokgen.interfaces import UserError
from tokgen.metrics import memorisation, metric

CLASSES, SHOWN = 10, 8  # rows of classes, images of a row
PAIRS = 4  # pairs of a row
NEAREST = 20  # samples shown beside their nearest training image


def write(
    out: pathlib.Path,
    line: Mapping,
    found: collect.Found,
    images: given_images.Images,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
) -> pathlib.Path:
    """Write the page of a result, of the images that it is of."""
    if found.values:
        pictures = [_reconstructions(line, found, images)]
    else:
        pictures = [
            _samples(line, found, images),
            _nearest(line, found, images, extractor, reference),
        ]
    parts = [
        page.section("Metrics", _metrics(line)),
        page.section("Read beside them", *(page.text(words, "alarm") for words in warnings(line))),
        *pictures,
        page.section("What was measured", made(line)),
    ]
    title = f"{name_of(line)}: {line['protocol']}"
    return page.save(out / page.NAME, page.document(title, parts))


def _metrics(line: Mapping) -> str:
    """The table of a result's metrics."""
    head = ("metric", "value", "interval or error", "better is", "read beside")
    return page.table(head, metric_table.rows(line), "notes")


def made(line: Mapping) -> str:
    """The table of what was measured, of what, by what."""
    protocol = protocols.PROTOCOLS.get(line["protocol"])
    about = f"{line['protocol']}: {protocol.about}" if protocol else line["protocol"]
    so_far = f" of {line['total']} that will be there," if "total" in line else ""
    images = f"{line['samples']}{so_far} of {_by(line['size'])} pixels"
    rows = [("protocol", about), ("images", images)]
    for part, name in (("images", "scored"), ("reference", "reference"), ("extractor", "network")):
        for key, value in line[part].items():
            shown = _by(value) if key == "size" else metric_table.plain(value)
            rows.append((f"{name}: {key.replace('_', ' ')}", shown))
    rows += [("seed", metric_table.plain(line["seed"])), ("time", line["time"])]
    rows += [
        ("versions", metric_table.plain(line["versions"])),
        ("images, sha256", line["images_sha256"]),
    ]
    return page.table((), rows, "long")


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def warnings(line: Mapping) -> list[str]:
    """What a reader must know before believing the metrics."""
    found, values = [], line["metrics"]
    for name, what in (("duplicates", "copies of another one"), ("constant", "of one colour")):
        if line["suspicious"].get(name):
            found.append(f"{line['suspicious'][name]} of {line['samples']} images are {what}.")
    distance = values.get("fid", {})
    if distance.get("bias", 0) > 0.1 * distance.get("value", np.inf):
        found.append(
            f"About {distance['bias']:.3g} of the Frechet distance {distance['value']:.4g} is made "
            "by the number of samples alone: compare it at this number only."
        )
    if line["samples"] <= distance.get("features", 0):
        found.append("There are no more samples than features: the covariance is incomplete.")
    if "is" in values:
        score = values["is"]
        found.append(
            f"The Inception Score is of parts of {score['part']} images in a mixed order (number "
            f"of parts: {score['parts']}); parts of another size, or sorted by class, give another."
        )
    if line["reference"].get("assumed"):
        found.append("The reference says nothing of itself: --assume said what it is.")
    return found


def name_of(line: Mapping) -> str:
    """What a result is of, for a title."""
    images = line["images"]
    return str(images.get("checkpoint") or images.get("samples") or "samples")


def gathered(images: given_images.Images, index_n: Sequence[int], count: int) -> np.ndarray:
    """Images by their numbers, by way of the parts that a score of `count` of them has.

    What is made is kept by the bounds of its part: others would be made anew.
    """
    index_n = np.asarray(index_n, np.int64)
    first_n = index_n // collect.PART * collect.PART
    kept = {}
    for start in np.unique(first_n).tolist():
        part = images.part(start, min(start + collect.PART, count))["image"]
        kept |= {int(i): part[i - start] for i in index_n[first_n == start]}
    return np.stack([kept[int(i)] for i in index_n])


def rows_of(label_N: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """{class: its first images}, of classes evenly over all; without labels one row, -1."""
    if not len(label_N):
        return {-1: np.arange(min(count, CLASSES * SHOWN))}
    known = np.unique(label_N[:count])
    chosen = known[sources.evenly(len(known), CLASSES)]
    return {int(label): np.flatnonzero(label_N[:count] == label)[:SHOWN] for label in chosen}


def class_name(label: int, names: Sequence[str]) -> str:
    """What a row of images is called."""
    if label < 0:
        return "the first samples"
    return names[label] if label < len(names) else f"class {label}"


def names_of(
    line: Mapping, label_N: np.ndarray, images: given_images.Images | None = None
) -> tuple[str, ...]:
    """The names of the classes: the images' own; or the network's, where it has as many."""
    own = () if images is None else images.classes
    known = line["extractor"].get("classes") or ()
    as_many = len(label_N) and len(known) == int(np.max(label_N)) + 1
    return tuple(map(str, own or (known if as_many else ())))


def _samples(line: Mapping, found: collect.Found, images: given_images.Images) -> str:
    """A sheet of each class."""
    rows = rows_of(found.label_N, line["samples"])
    names = names_of(line, found.label_N, images)
    shown = gathered(images, np.concatenate(list(rows.values())), line["samples"])
    parts, start = [], 0
    for label, index_n in rows.items():
        sheet = page.sheet(shown[start : start + len(index_n)], SHOWN)
        parts.append(page.picture(sheet, class_name(label, names)))
        start += len(index_n)
    told = page.text("The first of each class in the order of their numbers, none picked.", "faint")
    return page.section("Samples", told, *parts)


def nearest(compared: metric.Compared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, their nearest kept real images, similarity), those most alike first."""
    real_nD = compared.real_nD
    found = memorisation.report(compared.samples_ND, real_nD[:2], real_nD, NEAREST)
    return found.sample_N, found.training_N, found.similarity_N


def _nearest(
    line: Mapping,
    found: collect.Found,
    images: given_images.Images,
    extractor: feature_extractors.Extractor,
    reference: references.Reference | None,
) -> str:
    """The samples that are most like a real image, each beside it."""
    title = "Samples beside their nearest real image"
    if reference is None or extractor.layers[0] not in reference.features:
        why = "None are shown: the reference holds no features of single images."
        return page.section(title, page.text(why, "faint"))
    compared = collect.compared(
        found,
        extractor,
        protocols.named(line["protocol"]),
        reference,
        classes=0,
        accepted=(),
        seed=line["seed"],
    )
    sample_n, real_n, similarity_n = nearest(compared)
    told = (
        f"The {len(sample_n)} samples most like one of {len(compared.reference[compared.layer])} "
        "real images, most alike first: the sample on the left, the real image on the right. "
        f"Cosine similarity of {compared.layer}: {similarity_n[0]:.4f} to {similarity_n[-1]:.4f}. "
        "Pairs that are the same picture are copies."
    )
    seen, why = _real(reference)
    if seen is None:
        told = f"The real images cannot be shown: {why}. Of the samples most like one of them, "
        told += f"the cosine similarity of {compared.layer} is {similarity_n[0]:.4f} at most."
        return page.section(title, page.text(told, "faint"))
    shown = gathered(images, sample_n, line["samples"])
    both = np.stack([shown, seen(real_n)], axis=1).reshape(-1, *shown.shape[1:])
    sheet = page.picture(page.sheet(both, 2 * PAIRS), "sample, real image")
    return page.section(title, page.text(told, "faint"), sheet)


def _real(reference: references.Reference) -> tuple:
    """(a function from numbers of kept images to pixels, "") or (None, why there is none)."""
    record = reference.record
    if record.get("assumed"):
        kept = references.images_of(reference.path)
        if kept is None:
            return None, f"{reference.path.name} holds no images"
        return lambda rows_n: gathered(kept, rows_n, len(kept)), ""
    dataset, size = record["dataset"], tuple(record["size"])
    if datasets.kind_of(dataset) == "tfds":
        return None, f"{dataset} is not opened for a page"
    try:
        # what was written before has no word of labels
        labels = record.get("labels", "")
        source = datasets.from_path(dataset, record["split"], labels=labels)
    except UserError as error:
        return None, f"its data set is not there any more: {error}"
    if record["fingerprint"] not in (source.fingerprint, *source.earlier):
        return None, f"{dataset} is not what it was when the reference was made"
    index_n = reference.index_n
    return lambda rows_n: np.stack([_pixels(source, int(i), size) for i in index_n[rows_n]]), ""


def _pixels(source: sources.RandomAccess, index: int, size: tuple[int, int]) -> np.ndarray:
    """An image of the reference as it was seen; gray, and told, where it cannot be read now."""
    try:
        found = sources.read(source, index, 3)["image"]
    except pixels.BrokenImage as error:
        record = source.unreadable
        record.add(index, str(error))
        record.tell("the page shows them gray")
        return np.full((*size, 3), 128, np.uint8)
    return views.fixed("center", size, 3)(found, np.random.default_rng(0))


def _reconstructions(line: Mapping, found: collect.Found, images: given_images.Images) -> str:
    """The worst, the best, and the first reconstructions, each beside its original."""
    value_N = found.values["psnr_db"]
    order_N = np.argsort(value_N, kind="stable")
    each = max(1, min(2 * PAIRS, len(order_N) // 4))
    chosen = {
        "worst": order_N[:each],
        "best": order_N[::-1][:each],
        "the first, in a mixed order": np.arange(min(2 * each, len(order_N))),
    }
    # one pass of the size that was compiled already, of these images only
    picked = copy.copy(images)
    index_n = np.concatenate(list(chosen.values()))
    length = min(collect.PART, line["samples"])
    picked.index_N = images.index_N[np.resize(index_n, max(length, len(index_n)))]
    part, sheets, start = picked.part(0, len(picked.index_N)), [], 0
    for name, index_n in chosen.items():
        rows = slice(start, start + len(index_n))
        both = np.stack([part["original"][rows], part["image"][rows]], axis=1)
        sheet = page.sheet(both.reshape(-1, *both.shape[2:]), 2 * PAIRS)
        db = f"{value_N[index_n].min():.2f} to {value_N[index_n].max():.2f} dB PSNR"
        sheets.append(page.picture(sheet, f"{name}: {db}"))
        start += len(index_n)
    told = page.text("Each original on the left, its reconstruction on the right.", "faint")
    return page.section("Reconstructions", told, *sheets)
