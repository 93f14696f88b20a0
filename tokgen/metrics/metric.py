"""What a metric says of itself: how and of what it is measured, by whom, and how it is shown.

A file of this room that has metrics lists them in METRICS, and that is all there is to adding one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from tokgen.interfaces import UserError
from tokgen.metrics import moments as moments_

T = TypeVar("T")
FEW = 200  # samples that `many` needs


@dataclasses.dataclass(frozen=True)
class Compared:
    """What metrics are measured of.

    Attributes:
        layer: the features that distances are taken in; `logits` the layer of class opinions, or
            "" where the network has none.
        features: layer -> float32 [N, D] of the samples.
        reference: layer -> float32 [n, D] of some real images, in a mixed order; may lack layers.
        moments: layer -> Moments of all real images.
        label_N, label_n: classes of samples and of those real images; empty where not known.
        classes: how many there are.
        least: images that a Frechet distance needs; None is one more than features.
        seed: of what is drawn: orders, chunks, subsets.
        neighbours: k of precision and recall.
        most: real images that neighbours are looked for among, at most.
        against: samples of precision and recall; 0 is as many as real images.
        splits: (images of a split, seed of the shuffle or None) of the Inception Score; 0 is all.
    """

    layer: str
    logits: str
    features: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    moments: dict[str, moments_.Moments]
    label_N: np.ndarray
    label_n: np.ndarray
    classes: int
    least: int | None
    seed: int
    neighbours: int = 3
    most: int = 10_000
    against: int = 0
    splits: tuple[int, int | None] = (5000, None)
    _kept: dict = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def samples_ND(self) -> np.ndarray:
        """Features of the samples, in the layer that distances are taken in."""
        return self.features[self.layer]

    @property
    def real_nD(self) -> np.ndarray:
        """Features of the real images, in the layer that distances are taken in."""
        return self.reference[self.layer]

    def pair(self, most: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(samples, real images) as features, in a mixed order: as many, or `most` samples."""
        if self.layer not in self.reference:
            raise UserError(f"the reference holds no features of {self.layer}")
        order_N = np.random.default_rng(self.seed).permutation(len(self.samples_ND))
        real_nD = self.real_nD[: self.most]
        if most:
            return self.samples_ND[order_N[:most]], real_nD
        count = min(len(order_N), len(real_nD))
        return self.samples_ND[order_N[:count]], real_nD[:count]

    def once(self, measure: Callable[[Compared], T]) -> T:
        """What `measure` finds here, measured once: for what several metrics are made of."""
        if measure not in self._kept:
            self._kept[measure] = measure(self)
        return self._kept[measure]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric, as its file declares it.

    Attributes:
        name: its key in results.
        title: its name for people.
        better: "lower", "higher", or "" where neither is.
        measure: from what is compared to {"value": number}, and where they are defined `low` and
            `high` (a 95 % interval over images), `error` (a standard error), and what the value
            must be read beside. None of what is measured of pairs of images, as they are seen.
        needs: each says why it cannot be measured of something, or "".
        least: images of either set; of fewer it is an error. More may be needed of a distance.
        protocols: the names of the protocols (evaluation/protocols.py) that report it.
        percent: whether it is a share, shown in percent.
        beside: key of what `measure` returns -> how it is shown beside the value, as "k = {}".
        row: where it stands in tables, from above; equal ones by name.
    """

    name: str
    title: str
    better: str
    measure: Callable[[Compared], dict] | None = None
    needs: tuple[Callable[[Compared], str], ...] = ()
    least: int = 1
    protocols: tuple[str, ...] = ()
    percent: bool = False
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    row: int = 1000

    def lacking(self, compared: Compared) -> str:
        """Why it cannot be measured, or nothing."""
        if self.measure is None:
            return "it is of pairs of images, and measured as they are seen"
        return next((why for need in self.needs if (why := need(compared))), "")


# ---------------------------------------------------------------- what metrics may need


def features(compared: Compared) -> str:
    """Features of single real images."""
    if compared.layer not in compared.reference:
        return "the reference holds no features of single images"
    return ""


def logits(compared: Compared) -> str:
    """A feature network with classes."""
    if compared.logits not in compared.features:
        return "the feature network has no classes"
    return ""


def labels(compared: Compared) -> str:
    """Labels of the samples, of the classes that network and reference have."""
    if not (compared.classes and len(compared.label_N)):
        return "the samples have no labels, or those of other classes than the reference"
    return ""


def classes(compared: Compared) -> str:
    """Two samples and two real images of every class, or more."""
    if not len(compared.label_n):
        return "the reference has no classes"
    labels = {"samples": compared.label_N, "kept reference images": compared.label_n}
    for name, label_N in labels.items():
        poor = int(np.sum(np.bincount(label_N, minlength=compared.classes) < 2))
        if poor:
            return f"{poor} of {compared.classes} classes have no two {name}"
    return ""


def many(compared: Compared) -> str:
    """Samples enough to be continued to infinitely many."""
    return "" if len(compared.samples_ND) >= FEW else f"it needs {FEW} samples"
