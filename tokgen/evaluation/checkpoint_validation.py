"""A checkpoint on held-out images: a tokenizer's reconstructions, a generator's likelihood."""

from __future__ import annotations

import dataclasses
import pathlib
import time

from tokgen import distributed, options, report, runtime
from tokgen.checkpoints import checkpoint, loading
from tokgen.data import (
    captioned,
    classes,
    datasets,
    sources,
    token_header,
    token_shards,
    unreadable,
)
from tokgen.evaluation import validation
from tokgen.interfaces import UserError

ORDERS = 8  # draws per image, where orders are drawn


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and of which images.

    Attributes:
        checkpoint: a work directory, or one step of it.
        data: an image folder, or token shards; "" is what the config says.
        split: held_out, train or all.
        labels: what class folders mean, in the place of the config.
        images: at most so many.
        text: a folder of text features; "" is what the config says.
        tokenizer: where the generator's tokenizer lies now.
        order: of a generator: its nats under raster, columns or random order.
        orders: draws per image, where orders are drawn; None is ORDERS.
        seed: of those draws; None is 0.
        batch: images at a time, at most.
        precision: of the networks; "" is the config's.

    Examples:
        >>> tokgen.ValidationSettings("runs/tokenizer", data="photographs", split="all").images
        1000
    """

    checkpoint: str
    data: str = ""
    split: str = "held_out"
    labels: str = ""
    images: int = 1000
    text: str = ""
    tokenizer: str = ""
    order: str = ""
    orders: int | None = None
    seed: int | None = None
    batch: int = 32
    precision: str = ""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Metrics by name, with what they are of.

    Attributes:
        metrics: numbers by name.
        title: what `nats_per_token` is to people, with what it is: of which orders, or a bound.
        source: the images that they are of.
        precision: of the networks.
    """

    metrics: dict
    title: str
    source: object
    precision: str


def validate(settings: Settings) -> tuple[dict, dict]:
    """Held-out metrics of a tokenizer, or the likelihood of a generator: `tokgen evaluate`.

    Args:
        settings: what is measured, and of which images.

    Returns:
        (a record of what was measured, of what and how; the metrics by names for people). Nats are
        per token; `l2` is on the scale of [-1, 1], `psnr_db` of [0, 1].

    Raises:
        UserError: the images cannot be read, or are none of the checkpoint's.

    Examples:
        >>> settings = tokgen.ValidationSettings("runs/tokenizer", data="photographs", split="all")
        >>> record, metrics = tokgen.validate(settings)
        >>> record["images"], "psnr_db" in metrics
        (16, True)
    """
    runtime.devices()
    step = checkpoint.find(settings.checkpoint)
    kind = checkpoint.read_meta(step)["kind"]
    found = (tokenizer if kind == "tokenizer" else generator)(step, settings)
    record = {
        "checkpoint": str(step),
        "split": settings.split,
        "data": settings.data,
        "order": settings.order,
        "seed": settings.seed or 0,
        "precision": found.precision,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **found.metrics,
    }
    if "unreadable" in found.metrics:
        record["unreadable_files"] = found.source.unreadable.record()["files"]
    shown = {found.title if n == "nats_per_token" else n: v for n, v in found.metrics.items()}
    return record, shown


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    orders = ORDERS if settings.orders is None else settings.orders
    if settings.images < 1 or orders < 1:
        raise UserError(
            f"--images and --orders must be at least 1; found {settings.images}, {orders}"
        )
    seed = settings.seed or 0
    if settings.batch < 1 or not 0 <= seed < 2**32:
        raise UserError(
            f"--batch must be at least 1, --seed in [0, 2**32); found {settings.batch}, {seed}"
        )


def tokenizer(step: pathlib.Path, settings: Settings) -> Measured:
    """Reconstruction of images by a tokenizer."""
    loaded = loading.load_tokenizer(step, compute=settings.precision)
    source = datasets.image_source(
        loaded.config, settings.data, settings.split, labels=settings.labels, doubtful="drop"
    )
    if settings.text and not loaded.config.decoder.get("text"):
        raise UserError("--text is for a tokenizer whose decoder reads text; found another")
    if settings.text:
        pictures = source.images if isinstance(source, captioned.Source) else source
        source = captioned.Source(pictures, settings.text, split=settings.split)
    what = datasets.called(loaded.config.get("data", {}), settings.data)
    datasets.tell(what, **{settings.split: source})
    datasets.check_filled(source, settings.split)
    distributed.check_alike({"checkpoint": loaded.fingerprint, "data": source.fingerprint})
    _tell_count(settings, source, step)
    view = datasets.view_of(loaded.config)
    batch = min(settings.batch, validation.bounded(view, settings.images))
    found, _ = validation.reconstruction(
        *(loaded.module, source, view), count=settings.images, batch=batch, what="reconstruct"
    )
    return Measured(found, "", source, loaded.config.precision.compute)


def generator(step: pathlib.Path, settings: Settings) -> Measured:
    """Likelihood of images under a generator."""
    loaded = loading.load_generator(step, compute=settings.precision)
    if loaded.module.exact and settings.order != "random":
        when = "orders that are drawn: of a masked generator, or with --order random"
        drawn = {"orders": settings.orders, "seed": settings.seed}
        options.refuse({name: when for name, value in drawn.items() if value is not None})
    tokenizer_ = loading.load_tokenizer_of(loaded, settings.tokenizer)
    data = _data_of(loaded, settings.data)
    data["text"] = settings.text or data.get("text", "")
    datasets.check_text(loaded.module, data["text"], "--text")
    if data["tokens"]:
        if settings.labels:
            options.refuse({"labels": "images, not for token shards"})
        train = token_shards.Source(data["tokens"])  # whole, before anything is measured
        source = datasets.generator_source(data, settings.split)
        loading.check_tokens(tokenizer_, source.header, source.path)
    else:
        encoder = loading.load_tokenizer(tokenizer_.step, compute="float32")
        source = datasets.generator_source(data, settings.split, encoder, labels=settings.labels)
    datasets.tell(datasets.called(data, settings.data), **{settings.split: source})
    datasets.check_filled(source, settings.split)
    label_C = None
    if not data["text"]:
        where = settings.data or "the data"
        label_C, said = classes.matched(source.classes, loaded.classes, where, "the generator")
        if said:
            report.say(said)
    distributed.check_alike(
        {
            "checkpoint": loaded.fingerprint,
            "tokenizer": tokenizer_.fingerprint,
            "data": source.fingerprint,
        }
    )
    _tell_count(settings, source, step)
    metrics = validation.likelihood(
        *(loaded.module, tokenizer_.module.quantizer, source),
        count=settings.images,
        batch=settings.batch,
        what="likelihood",
        order=settings.order,
        draws=ORDERS if settings.orders is None else settings.orders,
        seed=settings.seed or 0,
        label_C=label_C,
    )
    how = [] if loaded.module.exact else ["upper bound"]
    how += [f"order {settings.order}"] if settings.order else []
    how += [f"{metrics['orders']} orders"] if "orders" in metrics else []
    title = f"nats_per_token ({', '.join(how)})" if how else "nats_per_token"
    if data["tokens"]:  # images would all have to be encoded for it
        unreadable.share(source, train)
        metrics |= validation.unigram(train, source, loaded.layout)
    return Measured(metrics, title, source, loaded.config.precision.compute)


def _tell_count(settings: Settings, source: sources.RandomAccess, step: pathlib.Path) -> None:
    count = min(settings.images, len(source))
    report.say(f"{count} of {len(source)} images, step {step.name}")


def _data_of(loaded: loading.Loaded, path: str) -> dict:
    """The config's `data`, with the shards or images that lie at `path`, if one is given."""
    data = {"tokens": "", **dict(loaded.config.get("data", {}))}
    record = loaded.meta["tokens"]
    data["tokens"] = str(checkpoint.referred(record, loaded.step)) if record else ""
    if path and token_header.is_there(path):
        data["tokens"] = path
    elif path:
        data |= {"tokens": "", "images": path}
    return data
