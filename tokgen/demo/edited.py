"""Edits on the demo's page: held-out shapes, and parts of them drawn anew."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tokgen import image_models
from tokgen.config import building
from tokgen.data import shapes
from tokgen.evaluation import local_classifier

IMAGES = 8  # of every kind, and drawn at once: so one program draws all kinds
PARTICLES = 32  # half of an edit's own number, in half the time

# What fits into the outline that a centre leaves standing
OTHER = {"disc": "ring", "ring": "disc", "square": "frame", "frame": "square"}


class Kind(NamedTuple):
    """A kind of edit: how it is told, what `ImageGenerator.edit` is asked for, and, of the class of
    an image, the class that is drawn; without any it is the image's own."""

    title: str
    words: str
    asked: Mapping[str, Any]
    classes: Mapping[str, str] = types.MappingProxyType({})


KINDS = {
    "left": Kind("In-painting, a half", "the left half drawn anew", dict(mask="left")),
    "center": Kind("In-painting, a box", "the centre drawn anew", dict(mask="center")),
    "classes": Kind(
        "Another class",
        "the centre of a disc drawn as of a ring, of a square as of a frame, and back",
        dict(mask="center"),
        OTHER,
    ),
    "grow": Kind(
        "Out-painting",
        "twice the width; each window lies over what is there by a quarter of its side or more",
        dict(grow="right=32", overlap=0.25),
    ),
    "variation": Kind(
        "A variation",
        "the 30 % of the tokens of which the generator was least certain drawn anew",
        dict(strength=0.3),
    ),
    "scales": Kind(
        "Finer scales", "the two coarsest of four grids kept, the others drawn", dict(scales=2)
    ),
}
SHOWN = ("left", "center", "classes", "variation", "grow")  # of the demo's own generator


def measure(
    generator: str | os.PathLike,
    tokenizer: str | os.PathLike,
    classifier: nnx.Module,
    kinds: Sequence[str],
    seed: int,
    *,
    rows: int = IMAGES,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({kind: share}, {kind: uint8 sheet of so many rows}) of held-out shapes, edited.

    The share is that of edits in which the classifier sees the class that was asked for. A larger
    canvas has none: the classifier knows no such images.
    """
    model = image_models.load(generator, tokenizer=str(tokenizer))
    held_out = building.build(model.tokenizer.config.data, "data", split="held_out")
    shares, sheets = {}, {}
    for kind in kinds:
        index_N, label_N = chosen(KINDS[kind].classes)
        found = model.edit(
            held_out.batch(index_N),
            label_N,
            **KINDS[kind].asked,
            seed=seed,
            particles=PARTICLES,
            batch=IMAGES * PARTICLES,
            progress=False,
        )
        sheets[kind] = found.first(rows).sheet()
        if found.image_NHW3.shape == found.original_KHW3.shape:
            hits_N = local_classifier.predictions(classifier, found.image_NHW3) == label_N
            shares[kind] = round(float(hits_N.mean()), 4)
    return shares, sheets


def chosen(classes: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """(numbers of images, labels of what is drawn): the first images of the classes named."""
    count, becomes = len(shapes.CLASSES), classes or {name: name for name in shapes.CLASSES}
    index_N = [i for i in range(count * IMAGES) if shapes.CLASSES[i % count] in becomes][:IMAGES]
    return index_N, [shapes.CLASSES.index(becomes[shapes.CLASSES[i % count]]) for i in index_N]


def section(shares: Mapping[str, float], samples: float, picture: Callable[[str, str], str]) -> str:
    """The part of the demo's page; `samples` is the share of whole samples."""
    figures = []
    for kind in SHOWN:
        title, words, *_ = KINDS[kind]
        told = "; ".join(filter(None, [words, recognised(shares, kind)]))
        figures.append(
            f"<figure>{picture(f'edit_{kind}', title)}"
            f"<figcaption><b>{title}</b>: {told}.</figcaption></figure>"
        )
    figures = "\n".join(figures)
    return f"""<h2>Editing</h2>
<p>Held-out images, gray over what is drawn anew, and to the right of each its edit: the first
images, the first draw, none picked. What is not under gray keeps its bytes; a variation is decoded
as a whole. Recognised is the share, of {IMAGES} edits, in which the classifier sees the class that
was asked for; of whole samples it is {100 * samples:.1f} %.</p>
<div class="side edits">
{figures}
</div>"""


def recognised(shares: Mapping[str, float], kind: str) -> str:
    """A share in words; empty where there is none."""
    return f"{100 * shares[kind]:.0f} % recognised" if kind in shares else ""
