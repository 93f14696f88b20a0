"""Images and tokens of a set as training, pretokenizing and measuring take them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import report
from tokgen.config import building
from tokgen.data import captioned, classes, online_tokens, pixels as images, token_shards
from tokgen.interfaces import PyTree, Text, UserError
from tokgen.metrics import reconstruction as quality


@jax.jit
def encode(tokenizer, image_BHW3):
    """Tokens of uint8 images; -1 where something was not finite."""
    return tokenizer.encode(quality.from_uint8(image_BHW3))


def condition(batch: dict) -> PyTree:
    """What a generator is told of a batch of the stream: its text where it has one, or labels."""
    if "text" not in batch:
        return batch["label"]
    mask_BT = batch.get("mask")
    mask_BT = jnp.ones(batch["text"].shape[:2], bool) if mask_BT is None else mask_BT
    return Text(batch["text"], mask_BT)


def view_of(settings) -> images.View:
    """The centre view of the pixels that a tokenizer's config names."""
    return images.fixed("center", tuple(settings.view.size), settings.view.channels)


def generator_source(
    data,
    split: str,
    tokenizer=None,
    order: Sequence[str] = (),
    labels: str = "",
):
    """What a config's `data` gives to a generator: token shards, or images to encode; with text.

    `tokenizer` is for images; it should compute in float32, as pretokenizing does. `order` is that
    of the classes, where one was recorded; `labels` says how those of images are read, in the place
    of the config, whose `data.labels` stands for that of the tokenizer.
    """
    text = data.get("text", "")
    if data.get("tokens", ""):
        shards = token_shards.Source(data["tokens"], split=split)
        return captioned.Tokens(shards, text) if text and len(shards) else shards
    if tokenizer.layout is None:
        raise UserError(
            f"{tokenizer.step} holds a continuous tokenizer, which writes no tokens; need one with "
            "a discrete quantizer (vq, fsq, lfq, bsq, multiscale)"
        )
    # whose condition is a text needs no classes
    labels = labels or data.get("labels", "")
    known = dict(order=order, labels=labels, doubtful="drop" if text else "refuse")
    pictures = image_source(tokenizer.config, data.get("images", ""), split, **known)
    if not len(pictures):
        return pictures  # nothing is held out
    if isinstance(pictures, captioned.Source):  # what the tokenizer's decoder reads
        pictures = pictures.images
    return online_tokens.Source(
        captioned.Source(pictures, text, split=split) if text else pictures,
        images.stored(data.get("views", "center,flip")),
        size=tuple(tokenizer.config.view.size),
        channels=tokenizer.config.view.channels,
        layout=tokenizer.layout.to_json(),
        tokenizer=tokenizer.fingerprint,
        encode=functools.partial(encode, tokenizer.module),
    )


def check_text(generator, text: str, option: str) -> None:
    """An error where a generator reads text and there is none, or the other way round."""
    cond = generator.cond
    if (cond == "text") != bool(text):
        raise UserError(
            "a generator whose condition is text needs features, and no other one reads them: "
            f"{option}={text!r}, and the generator's condition is a {cond}; it is the folder of "
            "train.npy, train_mask.npy, held_out.npy and held_out_mask.npy"
        )


def image_source(settings, path: str, split: str, *, labels: str = "", **context):
    """The images of a folder, or of the data set that the config names.

    `labels` says how they are read in the place of the config; `context` are arguments that a
    source may take: `order` and `doubtful` of classes.
    """
    if not path and "data" not in settings:
        raise UserError(
            "an imported tokenizer has no data set of its own; name a folder of images: --data DIR "
            "in commands, --config.data.images=DIR in training"
        )
    section = dict(settings.get("data", {}))
    if path:  # whose folders mean what those of the config do
        kept = {"labels": section["labels"]} if "labels" in section else {}
        section = {"name": "folder", "path": path} | (
            kept if section.get("name") == "folder" else {}
        )
    if labels:
        section["labels"] = labels
    return building.build(section, "data", split=split, **context)


def called(data, path: str = "") -> str:
    """What a data set is called in messages."""
    names = ("path", "tokens", "images", "dataset", "name")
    if path:
        return path
    found = next((data[name] for name in names if data.get(name)), "data")
    return found if isinstance(found, str) else called(found)


def tell(what: str, **sources) -> None:
    """Say the classes and counts of each split, before anything is done with them."""
    report.say(classes.told(what, sources))


def check_filled(source, split: str) -> None:
    """An error where there is nothing to measure."""
    if not len(source):
        raise UserError(
            f"there are no images in the part {split!r}: nothing was held out; measure those of "
            "another part, as by --split train, or give other images"
        )


def named(source, index_B: np.ndarray) -> Callable[[int], str]:
    """What the images of a batch are called in messages: by file where the source knows them."""
    name = getattr(source, "name", lambda index: f"number {index}")
    return lambda row: str(name(int(index_B[row])))
