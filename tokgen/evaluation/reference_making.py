"""Making a reference: a set of images, cut and seen as a protocol says, and what they are like."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping

import numpy as np

from tokgen import output, report, runtime
from tokgen.checkpoints import checkpoint
from tokgen.data import datasets, loader, npz, pixels, sources, unreadable, views
from tokgen.evaluation import feature_extractors, local_classifier, protocols, references
from tokgen.interfaces import UserError
from tokgen.metrics import moments

PART = 256  # images at a time
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
    with output.file(settings.out, own=references.is_one, **given) as file:
        return _written(settings, file)


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
    extractor = extractor_of(settings, source, size)
    count = min(len(source), settings.images or len(source))
    index_N = sources.evenly(len(source), count)
    batches = passing(source, size, index_N)
    found = measured(extractor, batches, index_N, settings.seed)
    kept = feature_extractors.arrays(extractor) if extractor.name == "local" else {}
    record = {
        "protocol": settings.protocol,
        "dataset": settings.data,
        "fingerprint": source.fingerprint,
        "split": split,
        "labels": settings.labels,
        "count": found.count,
        "available": len(source),
        "unreadable": batches.unreadable.record(),
        "size": list(size),
        "crop": protocol.crop,
        "resize": "halvings by box, then bicubic to the shorter side (ADM)",
        "classes": list(source.classes),
        "extractor": extractor.record,
        "layers": found.widths,
        "seed": settings.seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": checkpoint.versions(),
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
    settings: Settings, source: sources.RandomAccess, size: tuple[int, int]
) -> feature_extractors.Extractor:
    """The protocol's feature network: from a file, of another reference, or trained now."""
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


def passing(
    source: sources.RandomAccess, size: tuple[int, int], index_N: np.ndarray
) -> loader.Batches:
    """The images in parts, by ADM's centre crop."""
    view = views.fixed("center", size, 3)
    return loader.once(source, view, batch_size=PART, indices=index_N)


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


def measured(
    extractor: feature_extractors.Extractor,
    parts: Iterator[Mapping],
    index_N: np.ndarray,
    seed: int,
) -> Measured:
    """What is seen of those of `index_N` that can be read."""
    kept_n = index_N[np.random.default_rng(seed).permutation(len(index_N))[: references.KEPT]]
    names = [name for name in extractor.layers if not name.startswith("logits")]
    sums = {name: moments.Accumulator() for name in names}
    kept, labels, which, count = {name: [] for name in names}, [], [], 0
    with report.bar(len(index_N), unit="image", what="reference") as bar:
        for part in parts:
            found = feature_extractors.features(extractor, part["image"], tuple(names))
            rows_n = np.flatnonzero(np.isin(part["index"], kept_n))
            for name, feature_ND in found.items():
                sums[name].add(feature_ND)
                kept[name].append(feature_ND[rows_n])
            labels.append(part["label"][rows_n])
            which.append(part["index"][rows_n])
            count += len(part["image"])
            bar.update(len(part["image"]))
    which_n = np.concatenate(which)
    order_n = np.random.default_rng(seed + 1).permutation(len(which_n))
    features = {name: np.concatenate(found)[order_n] for name, found in kept.items()}
    return Measured(
        widths={name: features[name].shape[1] for name in names},
        moments={name: found.moments() for name, found in sums.items()},
        features=features,
        index_n=which_n[order_n],
        label_n=np.concatenate(labels)[order_n],
        count=count,
    )
