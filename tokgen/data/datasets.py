"""Sources of what a config or a command line says: of a path, a `data` section, a generator's data.

And what whoever reads a source asks of it: its name in messages, what is told of it, its view.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import report
from tokgen.config import building
from tokgen.data import captioned, classes, npz, online_tokens, sources, token_shards, views
from tokgen.interfaces import Generator, PyTree, Text, TokenBatch, UserError

TFDS = "tfds:"  # before the name of a tensorflow_datasets set, where a path may stand


def kind_of(path: str | os.PathLike) -> str:
    """What images a path names: "tfds" of `tfds:NAME`, "npz" of such a file, or else "folder"."""
    path = os.fspath(path)
    if path.startswith(TFDS):
        return "tfds"
    return "npz" if path.endswith(".npz") and pathlib.Path(path).is_file() else "folder"


def from_path(
    path: str | os.PathLike,
    split: str,
    *,
    labels: str = "",
    splits: Sequence[str] = ("train", "test"),
    data_dir: str = "",
    label: str = "",
    held_out: float | None = None,
) -> sources.RandomAccess:
    """The images that a path names: a folder, an .npz, or a TFDS set as `tfds:NAME`.

    Args:
      split: `train`, `held_out` or `all`; an .npz has no parts, and gives all of its images.
      labels: how classes are read, of a folder or a TFDS set; empty for their default.
      splits, data_dir, label: of a TFDS set, as tfds.Source takes them.
      held_out: the share that is kept aside of a folder without split folders; None for its
        default.
    """
    path, kind = os.fspath(path), kind_of(path)
    if kind == "npz":
        return npz.Source(path)
    section = {"name": kind}
    if kind == "tfds":
        section |= {"dataset": path.removeprefix(TFDS), "splits": tuple(splits)}
        section |= {"data_dir": data_dir, "label": label}
    else:
        section |= {"path": path} | ({} if held_out is None else {"held_out": held_out})
    if labels:
        section["labels"] = labels
    return building.build(section, "data", split=split)


def condition(batch: dict) -> PyTree:
    """What a generator is told of a batch of the stream: its text where it has one, or labels."""
    if "text" not in batch:
        return batch["label"]
    mask_BT = batch.get("mask")
    mask_BT = jnp.ones(batch["text"].shape[:2], bool) if mask_BT is None else mask_BT
    return Text(batch["text"], mask_BT)


def token_batch(batch: dict, order_BL: jax.Array | None = None) -> TokenBatch:
    """What a generator is trained on, of a batch of the stream; called on the devices.

    Tokens come there in as few bytes as their source has them in, and are int32 from here on: sums
    of them, and the marks of what is masked or could not be encoded, need room and a sign.
    """
    return TokenBatch(batch["tokens"].astype(jnp.int32), condition(batch), order_BL)


def view_of(settings) -> views.View:
    """The centre view of the pixels that a tokenizer's config names."""
    return views_of(settings, ("center",))[0]


def views_of(settings, names: Sequence[str]) -> list[views.View]:
    """Stored views, by their names, of the pixels that a tokenizer's config names."""
    size, channels = tuple(settings.view.size), settings.view.channels
    return [views.fixed(name, size, channels) for name in names]


def generator_source(
    data: Mapping[str, Any],
    split: str,
    tokenizer: online_tokens.Tokenizer | None = None,
    order: Sequence[str] = (),
    labels: str = "",
) -> sources.RandomAccess:
    """What a config's `data` gives to a generator: token shards, or images to encode; with text.

    `tokenizer` is for images; it should compute in float32, as pretokenizing does. `order` is that
    of the classes, where one was recorded; `labels` says how those of images are read, in the place
    of the config, whose `data.labels` stands for that of the tokenizer.
    """
    text = data.get("text", "")
    if data.get("tokens", ""):
        shards = token_shards.Source(data["tokens"], split=split)
        return captioned.Source(shards, text, split=split) if text else shards
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
        pictures = pictures.inner
    return online_tokens.Source(
        captioned.Source(pictures, text, split=split) if text else pictures,
        views.stored(data.get("views", "center,flip")),
        size=tuple(tokenizer.config.view.size),
        channels=tokenizer.config.view.channels,
        layout=tokenizer.layout.to_json(),
        tokenizer=tokenizer.fingerprint,
        encode=functools.partial(online_tokens.encode, tokenizer.module),
    )


def check_text(generator: Generator, text: str, option: str) -> None:
    """An error where a generator reads text and there is none, or the other way round."""
    cond = generator.cond
    if (cond == "text") != bool(text):
        raise UserError(
            "a generator whose condition is text needs features, and no other one reads them: "
            f"{option}={text!r}, and the generator's condition is a {cond}; it is the folder of "
            "train.npy, train_mask.npy, held_out.npy and held_out_mask.npy"
        )


def image_source(
    settings: Mapping[str, Any], path: str, split: str, *, labels: str = "", **context: Any
) -> sources.RandomAccess:
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
    return lambda row: str(source.name(int(index_B[row])))
