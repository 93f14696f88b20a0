"""Inception Score: exp of the mean KL of p(class | image) from their mean (arXiv:1606.03498).

The score grows with the size of the parts that it is taken over, and falls where a part lacks
classes: parts are of its definition, and an argument. In float64 from logits, where no
probability can vanish into a NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokgen.interfaces import UserError
from tokgen.metrics import bootstrap, metric

ROWS = 4096  # taken at a time


@dataclasses.dataclass(frozen=True)
class Score:
    """Mean and (population) standard deviation over parts."""

    mean: float
    std: float
    values: tuple[float, ...]


def consecutive(count: int, size: int = 5000) -> list[np.ndarray]:
    """Rows of parts of `size`, in the order given, the last may be shorter: ADM's.

    Only for samples in random order: sorted by class they score far too low.
    """
    return [np.arange(n, min(n + size, count)) for n in range(0, count, size)]


def shuffled(count: int, parts: int = 10, seed: int = 2020) -> list[np.ndarray]:
    """Rows of equally many images, in an order drawn from a seed: torch-fidelity's."""
    # the older generator of numpy: the same order as theirs
    order_N = np.random.RandomState(seed).permutation(count)
    return [order_N[n * count // parts : (n + 1) * count // parts] for n in range(parts)]


def score(logits_NK: np.ndarray, parts: Sequence[np.ndarray]) -> Score:
    """The score of every part (an array of rows): from 1, all alike, to K, all classes surely."""
    logits_NK = _checked(logits_NK)
    if not len(parts) or not all(len(rows) for rows in parts):
        raise UserError(
            f"every part needs at least one image; found {len(logits_NK)} images in "
            f"{len(parts)} parts: fewer parts, or more images"
        )
    values = [_score(logits_NK, rows) for rows in parts]
    return Score(float(np.mean(values)), float(np.std(values)), tuple(values))


def infinity(
    logits_NK: np.ndarray,
    *,
    seed: int,
    smallest: int = 5000,
    largest: int = 50_000,
    points: int = 15,
) -> bootstrap.Line:
    """IS-infinity: scores of random subsets, each in one part, against 1 / size, continued to 0.

    As in arXiv:1911.07023.
    """
    logits_NK = _checked(logits_NK)
    sizes = bootstrap.subset_sizes(len(logits_NK), smallest, largest, points)
    return bootstrap.infinity(len(logits_NK), lambda rows: _score(logits_NK, rows), sizes, seed)


def shares(logits_NK: np.ndarray) -> np.ndarray:
    """[N, K] the probabilities that logits mean, in float64."""
    return np.exp(_log_shares(_checked(logits_NK)))


def _log_shares(logits_NK: np.ndarray) -> np.ndarray:
    log_NK = logits_NK.astype(np.float64)
    log_NK -= log_NK.max(1, keepdims=True)
    log_NK -= np.log(np.exp(log_NK).sum(1, keepdims=True))
    return log_NK


def _checked(logits_NK: np.ndarray) -> np.ndarray:
    logits_NK = np.asarray(logits_NK)
    if logits_NK.ndim != 2:
        raise UserError(f"logits must be [images, classes]; found shape {logits_NK.shape}")
    fine_N = np.isfinite(logits_NK).all(1)
    if not fine_N.all():
        raise UserError(
            f"logits must be finite; row {int(np.argmin(fine_N))} is not: look at that image, or "
            "at the network's weights"
        )
    return logits_NK


def _score(logits_NK: np.ndarray, rows: np.ndarray) -> float:
    """exp(entropy of the mean - mean of the entropies), 0 log 0 = 0."""
    mean_K, negative = np.zeros(logits_NK.shape[1]), 0.0
    for n in range(0, len(rows), ROWS):
        log_nK = _log_shares(logits_NK[rows[n : n + ROWS]])
        share_nK = np.exp(log_nK)
        mean_K += share_nK.sum(0) / len(rows)
        negative += float(np.sum(share_nK * log_nK)) / len(rows)
    seen = mean_K[mean_K > 0]
    return float(np.exp(negative - seen @ np.log(seen)))


# ---------------------------------------------------------------- as metrics of a score


def shuffled_score(compared: metric.Compared) -> dict:
    """The score over parts of shuffled samples: sorted ones would score far too low."""
    logits_NK = compared.features[compared.logits]
    size, seed = compared.splits
    count = len(logits_NK)
    order_N = np.random.default_rng(compared.seed if seed is None else seed).permutation(count)
    parts = [order_N[rows] for rows in consecutive(count, size or count)]
    found = score(logits_NK, parts)
    spread = {"std": found.std} if len(parts) > 1 else {}
    return {"value": found.mean, **spread, "parts": len(parts), "part": size or count}


def is_infinity(compared: metric.Compared) -> dict:
    """The score continued to infinitely many samples."""
    logits_NK = compared.features[compared.logits]
    smallest = bootstrap.smallest(len(logits_NK))
    line = infinity(logits_NK, seed=compared.seed, smallest=smallest)
    return {"value": line.value, "error": line.error, "slope": line.slope}


METRICS = (
    metric.Metric(
        "is",
        title="Inception Score",
        better="higher",
        measure=shuffled_score,
        needs=(metric.logits,),
        protocols=("adm-50k", "val-centercrop-rfid", "local"),
        beside={"std": "std {}", "parts": "number of parts {}"},
        row=30,
    ),
    metric.Metric(
        "is_infinity",
        title="Inception Score, infinite",
        better="higher",
        measure=is_infinity,
        needs=(metric.logits, metric.many),
        protocols=("adm-50k", "local"),
        row=130,
    ),
)
