"""What a score is made of: the images that its settings name, and the network that sees them."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from tokgen import distributed, options, report
from tokgen.backbones import lpips
from tokgen.checkpoints import checkpoint, loading
from tokgen.data import captioned, datasets, npz
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    made_images,
    protocols,
    references,
    sample_parts,
    score_settings,
)
from tokgen.interfaces import UserError
from tokgen.pretrained.formats import reader as weights_
from tokgen.sampling import presets

SAMPLES = 1000  # of a generator, where neither the protocol nor the settings say


# ---------------------------------------------------------------- the images


def images_of(
    settings: score_settings.Settings, out: pathlib.Path
) -> tuple[given_images.Images, int]:
    """(the images to be scored, how many classes their labels have)."""
    # of all processes: what is at a path may change meanwhile
    kind = distributed.decided(score_settings.check_kind, settings)
    if not kind:
        return given(settings)
    if kind == "tokenizer":
        images = reconstructed(settings)
        return images, len(images.source.classes)
    return drawn(settings, out)


def given(settings: score_settings.Settings) -> tuple[given_images.Images, int]:
    """(images of a file or a folder; classes).

    Of fewer than all, some evenly over them; of a folder of `tokgen sample --total`, whose order is
    a mixed one, those that are there first, as long as it is filled and afterwards.
    """
    # of all processes: tokgen sample may finish at any moment
    told, whole = distributed.decided(_filled, settings.scored)
    if told is not None and not whole:
        options.refuse({"labels": "folders of images"} if settings.labels else {})
        images = sample_parts.Growing(settings.scored, told, collect.PART)
        report.say(f"{images.told()}: a score is of these; the same command later goes on")
        return images, len(images.classes) or images.kinds
    images = given_images.given(settings.scored, settings.accept, settings.labels)
    pictures = isinstance(images, given_images.Pictures)
    datasets.tell(settings.scored, all=images.source if pictures else images)
    if told is not None:  # a score that was begun while it was filled goes on
        images.identity = sample_parts.identity(settings.scored, told)
    elif 0 < settings.samples < len(images):  # they may be sorted; what was drawn is mixed
        return given_images.Spread(images, settings.samples), classes_of(images)
    return images, classes_of(images)


def _filled(path: str) -> tuple[dict | None, bool]:
    """What a folder of `tokgen sample --total` says of itself, and whether it is filled."""
    return sample_parts.record(path), (pathlib.Path(path) / sample_parts.WHOLE).exists()


def classes_of(images: npz.Archive | given_images.Pictures) -> int:
    """How many classes the labels of given images may be of."""
    if isinstance(images, npz.Archive) and not images.classes:
        return 0 if images.label_N is None else int(images.label_N.max()) + 1
    return len(images.classes)


def drawn(settings: score_settings.Settings, out: pathlib.Path) -> tuple[made_images.Drawn, int]:
    """A generator's samples, as many of each class."""
    choice, precision = settings.sampling, settings.precision
    if not precision:
        meta = checkpoint.read_meta(checkpoint.find(settings.scored))
        precision = presets.precision(meta, choice)
    # laid out once and not for every part, which would hold the network twice
    loaded = loading.load_to_draw(settings.scored, compute=precision)
    tokenizer = loading.load_to_decode(loaded, settings.tokenizer)
    chosen, *prepared = presets.choose(
        loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes
    )
    count = settings.samples or protocols.named(settings.protocol).samples or SAMPLES
    if loaded.module.cond == "text":
        if not settings.text:
            raise UserError("the generator reads text: --text FILE.npz, as tokgen sample takes it")
        text = captioned.conditions(settings.text)
        rows_N = np.arange(count) % len(text.mask_BT)
        cond = jax.tree.map(lambda leaf: leaf[rows_N], text)
    elif settings.text:
        raise UserError(
            "--text is for a generator that reads text; found one of "
            f"{len(loaded.classes)} classes: leave it out"
        )
    else:
        cond = made_images.balanced(count, len(loaded.classes), settings.seed)
    images = made_images.Drawn(
        loaded,
        tokenizer,
        tuple(prepared),
        cond,
        settings=chosen,
        preset=choice.preset,
        seed=settings.seed,
        batch=min(settings.batch, collect.PART),
        each=collect.PART,
        folder=out / "images",
    )
    return images, len(loaded.classes)


def reconstructed(settings: score_settings.Settings) -> made_images.Reconstructed:
    """A tokenizer's reconstructions of held-out images."""
    loaded = loading.load_to_code(settings.scored, compute=settings.precision)
    source = datasets.image_source(
        loaded.config, settings.data, settings.split, labels=settings.labels, doubtful="drop"
    )
    what = datasets.called(loaded.config.get("data", {}), settings.data)
    datasets.tell(what, **{settings.split: source})
    datasets.check_filled(source, settings.split)
    count = settings.samples or protocols.named(settings.protocol).samples or len(source)
    distances = {}
    if settings.lpips:
        weights = {}
        for file in settings.lpips:
            weights |= weights_.network(file)
        network = lpips.from_weights(weights)
        distances[f"lpips_{trunk_of(network)}"] = network
    images = made_images.Reconstructed(loaded, source, count=count, distances=distances)
    if settings.precision:  # what was begun without a word of it goes on
        images.identity["precision"] = settings.precision
    return images


def trunk_of(network: lpips.LPIPS) -> str:
    """ "vgg" or "alex", by the trunk of an LPIPS."""
    return "alex" if "alex" in type(network.trunk).__name__.lower() else "vgg"


def count_of(settings: score_settings.Settings, images: given_images.Images) -> int:
    """How many images are scored: what --samples says, the protocol's number, or all."""
    protocol = protocols.named(settings.protocol)
    wanted = settings.samples or protocol.samples or len(images)
    reconstructed_ = isinstance(images, made_images.Reconstructed)
    if not protocol.samples and reconstructed_ and images.unreadable:
        wanted = min(wanted, len(images))  # the others are told, and left out
    if protocol.samples and wanted != protocol.samples:
        raise UserError(
            f"{settings.protocol} is defined for {protocol.samples} samples; --samples asks for "
            f"{wanted}: leave it out, or score under the protocol local or cmmd"
        )
    if wanted > len(images) and isinstance(images, sample_parts.Growing):
        raise UserError(
            f"{settings.protocol} needs {wanted} images; {images.told()}: wait for tokgen sample, "
            "which fills it, or score what is there under the protocol local or cmmd"
        )
    if wanted > len(images):
        raise UserError(
            f"{settings.protocol} needs {wanted} images; found {len(images)}: give more"
            + ("" if protocol.samples else f", or say --samples {len(images)}")
        )
    return wanted


# ---------------------------------------------------------------- what measures them


def extractor_of(
    settings: score_settings.Settings, reference: references.Reference | None
) -> feature_extractors.Extractor:
    """The protocol's feature network: of the file that --weights names, or of the reference."""
    protocol = protocols.named(settings.protocol)
    if protocol.extractor == "local":
        if settings.weights:
            raise UserError(
                "the local protocol's network lies in its reference; leave --weights out"
            )
        if not reference.network:
            raise UserError(
                f"{settings.reference} holds no local network: it is of the protocol "
                f"{reference.record['protocol']}, not {settings.protocol}"
            )
        return feature_extractors.from_arrays(reference.network, reference.record["extractor"])
    found = feature_extractors.from_file(protocol.extractor, settings.weights)
    report.say(feature_extractors.described(found))
    return found


def with_features(
    reference: references.Reference, extractor: feature_extractors.Extractor
) -> references.Reference:
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
