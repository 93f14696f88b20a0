"""Images into features, part by part, kept as they come; and the results of scores, on disk.

A folder holds all of it: `run.json` says what is measured, `parts/` what was seen of the images so
far, `results.jsonl` a line per finished evaluation. Killed at any point, the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tokgen import distributed, output, records, report
from tokgen.checkpoints import checkpoint
from tokgen.evaluation import (
    feature_extractors,
    given_images,
    made_images,
    metric_table,
    protocols,
    references,
    sample_parts,
)
from tokgen.interfaces import UserError
from tokgen.metrics import bootstrap, codebook, metric, moments as moments_

FORMAT = 2
# Words of results and of RUN in format 1 -> today's
FIRST_WORDS = {"supply": "images", "figures": "metrics"}
PART = 64  # images that a kill can cost
RESULTS = "results.jsonl"
RUN = "run.json"  # what a folder is an evaluation of
RECORDS = {RUN: ("protocol", "size")}


@dataclasses.dataclass(frozen=True)
class Found:
    """What was seen of all images; arrays lead with them.

    `features` and `original` are by layer, `values` by measure, `counts` per symbol of a token.
    """

    features: dict[str, np.ndarray]
    original: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    label_N: np.ndarray
    digest_N: np.ndarray
    constant_N: np.ndarray


@contextlib.contextmanager
def opened(out: str | os.PathLike, *, what: str, **about) -> Iterator[output.Folder]:
    """A folder that grows (`output.growing`), for this process alone, or this job."""
    about |= dict(record=RUN, what=what)
    with distributed.led(f"the folder of {what}", output.growing(out, **about)) as found:
        if not distributed.many():
            yield found
            return
        told = [str(found.target), str(found.path)] if found else []
        target, path = json.loads(distributed.gathered("where it is", json.dumps(told))[0])
        elsewhere = pathlib.Path(target), pathlib.Path(path)
        yield found or output.Folder(*elsewhere, "--out", RUN, what, staged=False)


def collect(
    images: given_images.Images,
    extractor: feature_extractors.Extractor,
    out: pathlib.Path,
    count: int,
) -> None:
    """See `count` of the images, but for those that were seen before: this process's share."""
    bounds = _bounds(count)
    missing = distributed.decided(_missing, images, out, bounds)
    share, shares = distributed.share()
    own = [bounds[number] for number in np.array_split(np.asarray(missing, int), shares)[share]]
    left = sum(stop - start for start, stop in own)
    what = "evaluate" if shares == 1 else f"evaluate, share {share + 1}/{shares}"
    total, done = (left, 0) if shares > 1 else (count, count - left)
    with distributed.shared(), report.bar(total, initial=done, unit="image", what=what) as bar:
        for start, stop in own:
            part = seen(images.part(start, stop), extractor, start)
            made_images.save_part(_file(out, images, start, stop), part)
            bar.update(stop - start)


def _bounds(count: int) -> list[tuple[int, int]]:
    """The first image of each part, and the one after its last."""
    return [(start, min(start + PART, count)) for start in range(0, count, PART)]


def _missing(
    images: given_images.Images, out: pathlib.Path, bounds: Sequence[tuple[int, int]]
) -> list[int]:
    """The parts that are not there, by their places."""
    files = [_file(out, images, *each) for each in bounds]
    return [n for n, file in enumerate(files) if made_images.loaded_part(file) is None]


def found_of(images: given_images.Images, out: pathlib.Path, count: int) -> Found:
    """What was seen of `count` images, by all processes."""
    return joined([made_images.awaited_part(_file(out, images, *each)) for each in _bounds(count)])


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Found:
    """What was seen of the images of all parts, of those that `seen` gives."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    summed = {
        name.removeprefix("counts/"): np.sum([part[name] for part in parts], axis=0)
        for name in whole
        if name.startswith("counts/")
    }
    below = references.below
    return Found(
        *(below(f"{name}/", whole) for name in ("features", "original", "values")),
        summed,
        whole.get("label", np.zeros(0, np.int32)),
        whole["digest"],
        whole["constant"],
    )


def _file(out: pathlib.Path, images: given_images.Images, start: int, stop: int) -> pathlib.Path:
    """Where what was seen of images lies: by their numbers, also where others come in between."""
    first = images.number(start) if isinstance(images, sample_parts.Growing) else start
    return out / "parts" / f"{first:07d}-{first + stop - start:07d}.npz"


def seen(
    part: Mapping[str, np.ndarray], extractor: feature_extractors.Extractor, start: int
) -> dict[str, np.ndarray]:
    """What is kept of a part: features and hashes in the place of images; `start` is the first."""
    kept = {
        "digest": given_images.digests(part["image"]),
        "constant": given_images.constants(part["image"]),
    }
    for name, prefix in (("image", "features"), ("original", "original")):
        if name in part:
            for layer, feature_ND in feature_extractors.features(extractor, part[name]).items():
                _check_finite(feature_ND, layer, start)
                kept[f"{prefix}/{layer}"] = feature_ND
    others = {n: a for n, a in part.items() if n not in ("image", "original")}
    return kept | others


def _check_finite(feature_ND: np.ndarray, layer: str, start: int) -> None:
    fine_N = np.isfinite(feature_ND).all(axis=1)
    if not fine_N.all():
        raise UserError(
            f"the layer {layer} is not finite for image {start + int(np.argmin(fine_N))}: look at "
            "that image, or at the network's weight file"
        )


def compared(
    found: Found,
    extractor: feature_extractors.Extractor,
    protocol: protocols.Protocol,
    reference: references.Reference | None,
    *,
    classes: int,
    accepted: Sequence[str],
    seed: int,
) -> metric.Compared:
    """What metrics are measured of; without a reference, the originals are it."""
    layers = [name for name in extractor.layers if not name.startswith("logits")]
    logits = next((name for name in extractor.layers if name.startswith("logits")), "")
    if reference is None:
        real = {name: found.original[name] for name in layers}
        kept = np.random.default_rng(seed).permutation(len(real[layers[0]]))
        kept = kept[: references.KEPT]
        moments = {name: moments_.Moments.of(rows) for name, rows in real.items()}
        real = {name: rows[kept] for name, rows in real.items()}
        label_n = found.label_N[kept] if len(found.label_N) else found.label_N
    else:
        real, moments = reference.features, reference.moments
        label_n = reference.label_n if reference.record.get("classes") else np.zeros(0, np.int32)
    return metric.Compared(
        layer=layers[0],
        logits=logits,
        features=found.features,
        reference=real,
        moments=moments,
        label_N=found.label_N,
        label_n=label_n,
        classes=classes,
        least=2 if "few" in accepted else None,
        seed=seed,
        neighbours=protocol.neighbours,
        most=protocol.compared,
        against=protocol.against,
        splits=protocol.splits,
    )


def of_pairs(found: Found, seed: int) -> dict[str, dict]:
    """Metrics of single reconstructions, their means with intervals; and of the codebook."""
    metrics = {}
    for name, value_N in found.values.items():
        if len(value_N) < 2:  # one image has no interval
            metrics[name] = {"value": float(np.mean(value_N))}
            continue
        interval = bootstrap.of_mean(value_N, seed=seed)
        metrics[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
    counts = [found.counts[name] for name in sorted(found.counts, key=int)]
    if counts:
        usage = [codebook.usage(count_V) for count_V in counts]
        perplexity = [codebook.perplexity(count_V) for count_V in counts]
        metrics["codebook_usage"] = {"value": float(np.mean(usage))}
        metrics["codebook_perplexity"] = {"value": float(np.mean(perplexity))}
        seen = int(counts[0].sum())
        expected = [1 - (1 - 1 / len(count_V)) ** seen for count_V in counts]
        metrics["codebook_usage"]["expected"] = float(np.mean(expected))
    return metrics


def record(identity: Mapping, metrics: Mapping, absent: Mapping, found: Found) -> dict:
    """One finished evaluation, as a line of JSON."""
    return {
        "format": FORMAT,
        **identity,
        "metrics": {name: _rounded(parts) for name, parts in metrics.items()},
        "absent": dict(absent),
        "suspicious": given_images.suspicious(found.digest_N, found.constant_N),
        "images_sha256": images_hash(found.digest_N),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": checkpoint.versions(),
    }


def images_hash(digest_N: np.ndarray) -> str:
    """A hash of all images, in their order."""
    return hashlib.sha256(b"".join(bytes(d).ljust(16, b"\0") for d in digest_N)).hexdigest()


def _rounded(parts: Mapping) -> dict:
    return {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in parts.items()}


def append(out: pathlib.Path, line: Mapping) -> None:
    """Add a result to the folder's results, whole or not at all; measured again, it stays one."""
    file = out / RESULTS
    before = _lines(file) if file.exists() else []
    if before and _untimed(migrated(before[-1])) == _untimed(json.loads(records.text(line))):
        return
    records.save(file, "".join(f"{records.text(each)}\n" for each in [*before, line]))


def migrated(record: dict) -> dict:
    """A result, or what RUN says of one, in today's words; one of today stays as it is."""
    renamed = {FIRST_WORDS.get(name, name): part for name, part in record.items()}
    return renamed | ({"format": FORMAT} if record.get("format") == 1 else {})


def _untimed(line: dict) -> str:
    return json.dumps({n: v for n, v in line.items() if n != "time"}, sort_keys=True)


def _lines(file: pathlib.Path) -> list[dict]:
    remedy = "remove the line, or measure again into another --out"
    return records.lines(file, "results of tokgen evaluate", remedy, say=report.say)


def results(path: pathlib.Path) -> list[dict]:
    """The results of a folder, or of a file."""
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no results at {path}: need a folder that tokgen evaluate wrote")
    found = [migrated(line) for line in _lines(file)]
    if not found or any(line.get("format") != FORMAT for line in found):
        raise UserError(f"{file} holds no results of this version of tokgen evaluate")
    try:
        return [_checked(line) for line in found]
    except ValueError as error:
        raise UserError(f"{file} holds no results of tokgen evaluate: {error}") from error


def _checked(line: dict) -> dict:
    """A result whose parts have the types that readers count on; ValueError otherwise."""
    records.checked(
        line,
        **{"protocol": str, "samples": int, "size": list, "seed": (int, type(None)), "time": str},
        **{"images": dict, "reference": dict, "extractor": dict, "metrics": dict, "absent": dict},
        **{"suspicious": dict, "images_sha256": str, "versions": dict},
    )
    records.checked(line["reference"], dataset=str)
    records.checked(line["extractor"], name=str, fingerprint=str)
    settings = {"settings": dict} if "settings" in line["images"] else {}
    records.checked(line["images"], **settings)
    number = (int, float, type(None))
    for found in line["metrics"].values():
        parts = {"low", "high", "error", "features"} & set(records.checked(found, value=number))
        records.checked(found, **dict.fromkeys(parts, number))
    # results of earlier versions may hold what JSON has no word for
    metrics, absent = metric_table.settled(line["metrics"], line["absent"])
    return line | {"metrics": metrics, "absent": absent}


def archive(images: given_images.Images, out: pathlib.Path, count: int) -> pathlib.Path:
    """All images as `samples.npz` (arr_0, arr_1: ADM's form), written part by part."""
    first = images.part(0, min(PART, count))
    bounds = [(start, min(start + PART, count)) for start in range(0, count, PART)]
    label_N = None
    if "label" in first:
        label_N = np.concatenate([images.part(*bound)["label"] for bound in bounds])
    with given_images.writing(
        out / "samples.npz", (count, *first["image"].shape[1:]), label_N
    ) as add:
        for bound in bounds:
            add(images.part(*bound)["image"])
    return out / "samples.npz"
