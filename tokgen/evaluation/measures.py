"""What is measured of samples against real images: a function per figure.

Every figure is a dictionary with a `value`, and where they are defined `low` and `high` (a 95 %
interval over images), `error` (a standard error), and what the value must be read beside.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from tokgen.evaluation import protocols
from tokgen.interfaces import UserError
from tokgen.metrics import (
    accuracy,
    bootstrap,
    frechet,
    inception_score,
    kernels,
    memorisation,
    moments as moments_,
    neighbours,
    vendi,
)

CHUNKS = 32  # random parts of the images, that intervals are made of
KID_SEED = 2020  # torch-fidelity's
WIDE = 512  # features beyond which a Frechet distance takes seconds
NEAREST = 20  # samples shown beside their nearest training image


@dataclasses.dataclass(frozen=True)
class Compared:
    """What the figures are made of.

    Attributes:
        layer: the features that distances are taken in; `logits` the layer of class opinions.
        features: layer -> float32 [N, D] of the samples.
        reference: layer -> float32 [n, D] of some real images; may lack layers.
        moments: layer -> Moments of all real images.
        label_N, label_n: classes of samples and of those real images; empty where not known.
        classes: how many there are.
        least: images that a Frechet distance needs.
    """

    protocol: protocols.Protocol
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

    def pair(self, most: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(samples, real images) as features, in a mixed order: as many, or `most` samples."""
        if self.layer not in self.reference:
            raise UserError(f"the reference holds no features of {self.layer}")
        order_N = np.random.default_rng(self.seed).permutation(len(self.features[self.layer]))
        real_nD = self.reference[self.layer][: self.protocol.compared]
        if most:
            return self.features[self.layer][order_N[:most]], real_nD
        count = min(len(order_N), len(real_nD))
        return self.features[self.layer][order_N[:count]], real_nD[:count]

    @functools.cached_property
    def distance(self) -> dict:
        """Frechet distance, with its interval and the bias of so many images."""
        return _frechet(self, self.layer)

    @functools.cached_property
    def precision_recall(self) -> tuple[dict, dict]:
        """Share of samples inside a ball of the real images, and the other way round."""
        rows_ND, real_nD = self.pair(self.protocol.against)
        k = min(self.protocol.neighbours, len(rows_ND) - 1, len(real_nD) - 1)
        precise, recalled = neighbours.precision_recall(real_nD, rows_ND, k)
        precision = share(precise, {"k": k, "images": len(rows_ND)})
        return precision, share(recalled, {"k": k, "images": len(real_nD)})

    @functools.cached_property
    def density_coverage(self) -> tuple[dict, dict]:
        """Real balls around a sample, per k; share of the real balls that are not empty."""
        rows_ND, real_nD = self.pair()
        k = min(5, len(rows_ND) - 1)
        about = {"k": k, "images": len(rows_ND)}
        dense, covered = neighbours.density_coverage(real_nD, rows_ND, k)
        return {"value": dense, **about}, share(covered, about | {"expected": 1 - 0.5**k})


def share(value: float, about: dict) -> dict:
    """A share of images, with its standard error: the other set's balls are taken as they are."""
    if about["images"] < 2:
        return {"value": value, **about}
    return {"value": value, "error": math.sqrt(value * (1 - value) / about["images"]), **about}


# ---------------------------------------------------------------- distances of distributions


def _frechet(compared: Compared, layer: str) -> dict:
    rows_ND, real = compared.features[layer], compared.moments[layer]
    count, width = rows_ND.shape
    if width != len(real.mean_D):
        raise UserError(
            f"the layer {layer} of the samples has {width} features, that of the reference "
            f"{len(real.mean_D)}: they are of other networks, or of images of another size"
        )
    chunks = min(CHUNKS, count // 2)
    chunk_N = moments_.chunk_of(0, count, max(chunks, 1), compared.seed)
    parts = moments_.grouped([(rows_ND, chunk_N)], max(chunks, 1))
    distance = frechet.between(moments_.merged(parts), real, compared.least)
    figure = {"value": distance.value, "features": width}
    if chunks < 8:
        return figure | {"bias": distance.bias}
    interval = bootstrap.of_moments(
        parts,
        frechet.against(real),
        seed=compared.seed,
        replicates=100 if width <= WIDE else 20,
    )
    bounds = {"low": interval.low, "high": interval.high, "error": interval.error}
    # as measured: features have heavier tails than the normals of the closed form
    return figure | bounds | {"bias": interval.bias}


def fid(compared: Compared) -> dict:
    """Frechet distance, with its interval and the bias of so many images."""
    return compared.distance


def sfid(compared: Compared) -> dict:
    """The same of spatial features."""
    return _frechet(compared, "spatial")


def fid_infinity(compared: Compared) -> dict:
    """The distance continued to infinitely many samples."""
    rows_ND = compared.features[compared.layer]
    line = frechet.infinity(
        rows_ND,
        compared.moments[compared.layer],
        seed=compared.seed,
        smallest=_smallest(len(rows_ND)),
    )
    return {"value": line.value, "error": line.error, "slope": line.slope}


def _smallest(count: int) -> int:
    return 5000 if count >= 10_000 else count // 2


def kid(compared: Compared) -> dict:
    """1000 times the kernel distance."""
    rows_ND, real_nD = compared.features[compared.layer], compared.reference[compared.layer]
    found = kernels.kid(rows_ND, real_nD, seed=KID_SEED)
    return {
        "value": 1000 * found.value,
        "error": 1000 * found.error,
        "std": 1000 * found.std,
        "subset": found.size,
    }


def cmmd(compared: Compared) -> dict:
    """CMMD's kernel on the directions of features, as many of either set."""
    rows_ND, real_nD = compared.pair()
    value = kernels.cmmd(kernels.unit(rows_ND), kernels.unit(real_nD))
    return {"value": value, "images": len(rows_ND)}


# ---------------------------------------------------------------- opinions of a classifier


def is_(compared: Compared) -> dict:
    """Inception Score over parts of shuffled samples: sorted ones would score far too low."""
    logits_NK = compared.features[compared.logits]
    size, seed = compared.protocol.splits
    count = len(logits_NK)
    order_N = np.random.default_rng(compared.seed if seed is None else seed).permutation(count)
    parts = [order_N[rows] for rows in inception_score.consecutive(count, size or count)]
    found = inception_score.score(logits_NK, parts)
    spread = {"std": found.std} if len(parts) > 1 else {}
    return {"value": found.mean, **spread, "parts": len(parts), "part": size or count}


def is_infinity(compared: Compared) -> dict:
    """The score continued to infinitely many samples."""
    logits_NK = compared.features[compared.logits]
    smallest = _smallest(len(logits_NK))
    line = inception_score.infinity(logits_NK, seed=compared.seed, smallest=smallest)
    return {"value": line.value, "error": line.error, "slope": line.slope}


def class_accuracy(compared: Compared) -> dict:
    """Share of the samples in which the network sees the class that was asked for."""
    found = accuracy.top(compared.features[compared.logits], compared.label_N)
    return {"value": found.value} | ({} if found.error is None else {"error": found.error})


def classwise(compared: Compared) -> dict:
    """Frechet distance within classes, their mean; and how the classes are shared out."""
    rows_ND, real_nD = compared.features[compared.layer], compared.reference[compared.layer]
    fewest = int(np.bincount(compared.label_n, minlength=compared.classes).min())
    fewest = min(fewest, int(np.bincount(compared.label_N, minlength=compared.classes).min()))
    width = frechet.class_width(max(fewest, 4), rows_ND.shape[1])
    axes_Dw = frechet.principal(compared.moments[compared.layer], width)
    sets = [
        moments_.grouped([(rows @ axes_Dw, label)], compared.classes)
        for rows, label in ((rows_ND, compared.label_N), (real_nD, compared.label_n))
    ]
    found = frechet.classwise(*sets)
    return {
        "value": found.value,
        "divergence": found.divergence,
        "by_class": [round(float(value), 4) for value in found.value_K],
        "axes": width,
    }


# ---------------------------------------------------------------- neighbours


def precision(compared: Compared) -> dict:
    """Share of samples inside a ball of the real images."""
    return compared.precision_recall[0]


def recall(compared: Compared) -> dict:
    """Share of real images inside a ball of the samples."""
    return compared.precision_recall[1]


def density(compared: Compared) -> dict:
    """Real balls around a sample, per k: 1 for two samples of one distribution."""
    return compared.density_coverage[0]


def coverage(compared: Compared) -> dict:
    """Share of the real balls that are not empty: 1 - 2^-k for one distribution."""
    return compared.density_coverage[1]


def vendi_(compared: Compared) -> dict:
    """How many different images there are, beside as many real ones."""
    rows_ND, real_nD = compared.pair()
    return {
        "value": vendi.score(rows_ND),
        "real": vendi.score(real_nD),
        "images": len(rows_ND),
    }


def authenticity(compared: Compared) -> dict:
    """Share of samples farther from their nearest real image than that one's neighbour is."""
    rows_ND, real_nD = compared.features[compared.layer], compared.reference[compared.layer]
    authentic_N = memorisation.authentic(rows_ND, real_nD)
    interval = bootstrap.of_mean(authentic_N, seed=compared.seed)
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def mifid(compared: Compared) -> dict:
    """The Frechet distance, larger where samples lie on real images."""
    rows_ND, real_nD = compared.features[compared.layer], compared.reference[compared.layer]
    found = memorisation.mifid(compared.distance["value"], rows_ND, real_nD)
    return {"value": found.value, "distance": found.distance, "images": len(real_nD)}


def nearest(compared: Compared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, their nearest kept real images, similarity), those most alike first."""
    rows_ND, real_nD = compared.features[compared.layer], compared.reference[compared.layer]
    found = memorisation.report(rows_ND, real_nD[:2], real_nD, NEAREST)
    return found.sample_N, found.training_N, found.similarity_N
