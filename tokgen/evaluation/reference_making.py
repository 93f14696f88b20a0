"""Making a reference: a set of images, cut and seen as a protocol says, and what they are like.

The images are seen in runs, which of several processes each takes some of; the runs are joined in
their order, so that statistics have the same bits whoever saw which.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from tokgen import distributed, output, report, runtime
from tokgen.checkpoints import checkpoint
from tokgen.data import datasets, loader, npz, pixels, sources, unreadable, views
from tokgen.evaluation import (
    feature_extractors,
    local_classifier,
    made_images,
    protocols,
    references,
)
from tokgen.interfaces import UserError
from tokgen.metrics import moments

PART = 256  # images at a time
RUNS = 64  # into which a large set is divided, and so processes that can share it
NETWORK = "network.npz"  # of a local network that the first process trained, for the others
EXAMINED = 10_000  # images that the local network's accuracy is of, at most
SIZE = 256  # pixels of the published protocols' images


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a reference is made of, and where it goes.

    Attributes:
        data: an image folder, an .npz of images, or `tfds:NAME`.
        out: the .npz to write.
        protocol: a name of protocols.PROTOCOLS.
        weights: weight file of a published feature network.
        network: another reference whose local network is to be used.
        split: train, held_out or all; "" is the protocol's, of an .npz all.
        splits, data_dir, label: of a TFDS set, as datasets.from_path takes them.
        labels: what class folders mean.
        size: (side,) or (rows, columns) of the images in pixels; () is SIZE, of the local protocol
            the first image's.
        images: at most so many, evenly over the set; 0 is all.
        steps: to train the local network; None is as its recipe says.
        seed: of that training, and of which images are kept.
        overwrite: whether an earlier reference at `out` is replaced.

    Examples:
        >>> tokgen.ReferenceSettings("photographs", "reference.npz", size=(32,)).protocol
        'local'
    """

    data: str
    out: str
    protocol: str = "local"
    weights: str = ""
    network: str = ""
    split: str = ""
    splits: tuple[str, ...] = ("train", "test")
    data_dir: str = ""
    label: str = ""
    labels: str = ""
    size: tuple[int, ...] = ()
    images: int = 0
    steps: int | None = None
    seed: int = 0
    overwrite: bool = False


def make(settings: Settings) -> dict:
    """Statistics that samples are scored against: `tokgen reference`.

    Args:
        settings: what it is made of, and where it goes.

    Returns:
        The record of the reference, which lies in its file too.

    Raises:
        UserError: the images cannot be read, or the network's weights are others.

    Examples:
        >>> few = tokgen.ReferenceSettings("photographs", "reference.npz", size=(32,), steps=2)
        >>> record = tokgen.make_reference(few)
        >>> record["protocol"], record["size"]
        ('local', [32, 32])
    """
    check(settings)
    read = () if datasets.kind_of(settings.data) == "tfds" else (settings.data,)
    given = dict(overwrite=settings.overwrite, inputs=(*read, settings.weights, settings.network))
    file = output.file(settings.out, own=references.is_one, **given)
    with distributed.led("the file of the reference", file) as found:
        return _written(settings, pathlib.Path(distributed.decided(str, found)))


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    protocol = protocols.named(settings.protocol)
    if pathlib.Path(settings.out).suffix != ".npz":
        raise UserError(f"--out names an .npz file; found {settings.out}")
    steps = 1 if settings.steps is None else settings.steps
    if settings.images < 0 or steps < 1 or not 0 <= settings.seed < 2**32:
        raise UserError(
            "--images and --seed must be at least 0 and --steps at least 1; found "
            f"{settings.images}, {settings.seed}, {steps}"
        )
    if settings.network and protocol.extractor != "local":
        raise UserError(f"--network is of the local protocol; {settings.protocol} has --weights")


def _written(settings: Settings, file: pathlib.Path) -> dict:
    runtime.devices()
    protocol = protocols.named(settings.protocol)
    # an archive does not say what it is of
    unsaid = "all" if settings.data.endswith(".npz") else protocol.split or "train"
    split = settings.split or unsaid
    source = source_of(settings, split)
    datasets.check_filled(source, split)
    size = size_of(source, settings)
    datasets.tell(settings.data, **{split: source})
    distributed.check_alike({"data": source.fingerprint, "size": size})
    extractor = extractor_of(settings, source, size, file.parent)
    distributed.check_alike({"feature network": extractor.record["fingerprint"]})
    count = min(len(source), settings.images or len(source))
    index_N = sources.evenly(len(source), count)
    kept_n = index_N[np.random.default_rng(settings.seed).permutation(count)[: references.KEPT]]
    runs = seen(extractor, source, size, runs_of(index_N), kept_n, file.parent)
    record = {
        "protocol": settings.protocol,
        "dataset": settings.data,
        "fingerprint": source.fingerprint,
        "split": split,
        "labels": settings.labels,
        "available": len(source),
        "size": list(size),
        "crop": protocol.crop,
        "resize": "halvings by box, then bicubic to the shorter side (ADM)",
        "classes": list(source.classes),
        "extractor": extractor.record,
        "seed": settings.seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": checkpoint.versions(),
    }
    return distributed.decided(_saved, file, record, extractor, source, runs)


def _saved(
    file: pathlib.Path,
    record: Mapping,
    extractor: feature_extractors.Extractor,
    source: sources.RandomAccess,
    runs: Iterable[Mapping[str, np.ndarray]],
) -> dict:
    """Write the reference of what was seen of all runs; its record."""
    found = joined(runs, record["seed"])
    if not found.count:
        raise UserError(
            "0 images can be read, and a reference needs at least 1; is this a set of images?\n"
            f"{source.unreadable.listed()}"
        )
    kept = feature_extractors.arrays(extractor) if extractor.name == "local" else {}
    record = {
        **record,
        "count": found.count,
        "unreadable": source.unreadable.record(),
        "layers": found.widths,
    }
    references.save(file, record, found.moments, found.features, found.index_n, found.label_n, kept)
    return record


def source_of(settings: Settings, split: str) -> sources.RandomAccess:
    """The images that the settings name."""
    return datasets.from_path(
        *(settings.data, split),
        labels=settings.labels,
        splits=settings.splits,
        data_dir=settings.data_dir,
        label=settings.label,
    )


def size_of(source: sources.RandomAccess, settings: Settings) -> tuple[int, int]:
    """(rows, columns): what is asked for, or 256; of the local protocol, the first image's."""
    if settings.size:
        if len(settings.size) > 2 or min(settings.size) < 8:
            raise UserError(f"--size is one number or two, at least 8; found {list(settings.size)}")
        return (settings.size * 2)[0], (settings.size * 2)[1]
    if isinstance(source, npz.Source):
        return source.size
    if protocols.named(settings.protocol).extractor != "local":
        return SIZE, SIZE
    try:
        return tuple(sources.read(source, 0, 3)["image"].shape[:2])
    except pixels.BrokenImage as error:
        raise UserError(
            f"the size is that of the first image, and {unreadable.name_of(source, 0)} cannot be "
            f"read: {error}; repair it, or say --size"
        ) from error


def extractor_of(
    settings: Settings, source: sources.RandomAccess, size: tuple[int, int], folder: pathlib.Path
) -> feature_extractors.Extractor:
    """The protocol's feature network: from a file, of another reference, or trained now.

    By the first process of a job, which leaves it in `folder` for the others.
    """
    protocol = protocols.named(settings.protocol)
    if protocol.extractor != "local":
        found = feature_extractors.from_file(protocol.extractor, settings.weights)
        report.say(feature_extractors.described(found))
        return found
    if settings.weights:
        raise UserError("the local protocol trains its own network; leave --weights out")
    if settings.network:
        other = references.read(settings.network)
        if not other.network:
            raise UserError(f"{settings.network} holds no local network: it is of another protocol")
        return feature_extractors.from_arrays(other.network, other.record["extractor"])
    if distributed.share()[1] == 1:
        return _trained(settings, source, size)
    record = distributed.decided(_left, settings, source, size, folder / NETWORK)
    return feature_extractors.from_arrays(made_images.awaited_part(folder / NETWORK), record)


def _left(
    settings: Settings, source: sources.RandomAccess, size: tuple[int, int], file: pathlib.Path
) -> dict:
    """Train the local network, and write its arrays; its record."""
    found = _trained(settings, source, size)
    made_images.save_part(file, feature_extractors.arrays(found))
    return found.record


def _trained(
    settings: Settings, source: sources.RandomAccess, size: tuple[int, int]
) -> feature_extractors.Extractor:
    """The local network of a source's images, and how often it is right."""
    recipe = local_classifier.PHOTOGRAPHS
    if settings.steps is not None:
        recipe = dataclasses.replace(recipe, steps=settings.steps)
    taught = source
    if not isinstance(source, npz.Source):
        taught = source_of(settings, "train")
        unreadable.share(source, taught)
    found = feature_extractors.trained(taught, size, seed=settings.seed + 1, recipe=recipe)
    known = _accuracy(settings, found, source, size)
    what = "classes" if source.classes else "which way is up"
    report.say(
        f"the local network tells {what} on {100 * known['accuracy']:.1f} % of "
        f"{known['examined']} {known['images']}"
    )
    return dataclasses.replace(found, record={**found.record, **known})


def _accuracy(
    settings: Settings,
    extractor: feature_extractors.Extractor,
    source: sources.RandomAccess,
    size: tuple[int, int],
) -> dict:
    """The network's accuracy, on which images and how many; held-out ones if there are any."""
    try:
        held_out, which = source_of(settings, "held_out"), "held-out images"
    except UserError:
        held_out, which = source, "its own images"
    if isinstance(source, npz.Source) or not len(held_out):
        held_out, which = source, "its own images"
    unreadable.share(source, held_out)
    accuracy, count = feature_extractors.accuracy(extractor, held_out, size, count=EXAMINED)
    return {"images": which, "examined": count, "accuracy": accuracy}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was seen of a set.

    Attributes:
        widths: layer -> how many features it has.
        moments: layer -> Moments of all images.
        features: layer -> float32 [n, D] of some images, in a mixed order.
        index_n, label_n: which these are, and their labels.
        count: how many images could be read.
    """

    widths: dict[str, int]
    moments: dict[str, moments.Moments]
    features: dict[str, np.ndarray]
    index_n: np.ndarray
    label_n: np.ndarray
    count: int


def runs_of(index_N: np.ndarray) -> list[np.ndarray]:
    """Indices in runs of whole parts, of at most RUNS: the same ones whoever sees them."""
    length = PART * max(1, -(-len(index_N) // (RUNS * PART)))
    return [index_N[first : first + length] for first in range(0, len(index_N), length)]


def seen(
    extractor: feature_extractors.Extractor,
    source: sources.RandomAccess,
    size: tuple[int, int],
    runs: Sequence[np.ndarray],
    kept_n: np.ndarray,
    folder: pathlib.Path,
) -> Iterator[dict[str, np.ndarray]]:
    """What is seen of those images of each run that can be read, run by run.

    Of several processes each sees its share first, and leaves it in `folder`.
    """
    share, shares = distributed.share()
    own = np.array_split(np.arange(len(runs)), shares)[share]
    found = _each(extractor, source, size, [runs[number] for number in own], kept_n)
    if shares == 1:
        return found
    with distributed.shared():
        for number, arrays in zip(own, found, strict=True):
            made_images.save_part(folder / f"{number:02d}.npz", arrays)
    source.unreadable.gather()
    files = (folder / f"{number:02d}.npz" for number in range(len(runs)))
    return map(made_images.awaited_part, files)


def _each(
    extractor: feature_extractors.Extractor,
    source: sources.RandomAccess,
    size: tuple[int, int],
    runs: Sequence[np.ndarray],
    kept_n: np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    """Moments of each run, and the features of those of its images that are in `kept_n`."""
    names = tuple(name for name in extractor.layers if not name.startswith("logits"))
    view = views.fixed("center", size, 3)  # ADM's crop
    with report.bar(sum(map(len, runs)), unit="image", what="reference") as bar:
        for run in runs:
            sums = {name: moments.Accumulator() for name in names}
            kept, count = [], 0
            how = dict(batch_size=PART, indices=run, least=0, last=False)
            for part in loader.once(source, view, **how):
                found = feature_extractors.features(extractor, part["image"], names)
                rows_n = np.flatnonzero(np.isin(part["index"], kept_n))
                own = {"label": part["label"][rows_n], "index": part["index"][rows_n]}
                for name, feature_ND in found.items():
                    sums[name].add(feature_ND)
                    own[f"features/{name}"] = feature_ND[rows_n]
                kept.append(own)
                count += len(part["image"])
                bar.update(len(part["image"]))
            arrays = {n: np.concatenate([part[n] for part in kept]) for n in (kept or [{}])[0]}
            for name in names if count else ():
                for field, array in sums[name].moments().arrays().items():
                    arrays[f"moments/{name}/{field}"] = array
            yield {"count": np.asarray(count), **arrays}
    source.unreadable.tell(unreadable.LEFT_OUT)


def joined(runs: Iterable[Mapping[str, np.ndarray]], seed: int) -> Measured:
    """What was seen of all runs, in their order; what is kept in a mixed one."""
    total: dict[str, moments.Moments] = {}
    kept, count = [], 0
    for run in runs:
        count += int(run["count"])
        if not run["count"]:
            continue
        below = references.below
        kept.append({"label": run["label"], "index": run["index"]} | below("features/", run))
        for name in below("features/", run):
            found = moments.Moments.from_arrays(below(f"moments/{name}/", run))
            total[name] = total[name].merge(found) if name in total else found
    everything = {n: np.concatenate([part[n] for part in kept]) for n in (kept or [{}])[0]}
    which_n = everything.pop("index", np.zeros(0, np.int64))
    order_n = np.random.default_rng(seed + 1).permutation(len(which_n))
    label_n = everything.pop("label", np.zeros(0, np.int32))
    return Measured(
        widths={name: len(found.mean_D) for name, found in total.items()},
        moments=total,
        features={name: rows_nD[order_n] for name, rows_nD in everything.items()},
        index_n=which_n[order_n],
        label_n=label_n[order_n],
        count=count,
    )
