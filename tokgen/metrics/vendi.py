"""Vendi score: how many different images a set is worth (Friedman and Dieng, arXiv:2210.02410)."""

from __future__ import annotations

import math

import numpy as np

from tokgen import interfaces
from tokgen.metrics import metric

BLOCK = 4096  # rows turned to float64 at a time


def score(features_ND: np.ndarray, order: float = 1.0) -> float:
    """exp of the Renyi entropy of that order of the spectrum: 1 for copies, at most N.

    Order 1 is Shannon's, infinity is 1 / the largest share; arXiv:2310.12952.
    It depends on N and on the features: stands beside the score of as many real images.
    """
    if not order >= 0:
        raise interfaces.UserError(f"the order needs to be 0 or more; found {order}: 1 is usual")
    share_K = spectrum(features_ND)
    if order == 1:
        return float(np.exp(-np.sum(share_K * np.log(share_K))))
    if math.isinf(order):
        return float(1 / share_K.max())
    return float(np.sum(share_K**order) ** (1 / (1 - order)))


def by_class(
    features_ND: np.ndarray, label_N: np.ndarray, order: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The labels that occur [C], and the score within each [C]; their mean is what is reported."""
    label_C = np.unique(label_N)
    return label_C, np.array([score(features_ND[label_N == label], order) for label in label_C])


def spectrum(features_ND: np.ndarray) -> np.ndarray:
    """Positive eigenvalues of K / N, K the cosines between all rows; they sum to 1.

    K = X X^T and X^T X share them, so that the smaller of the two is decomposed.
    """
    if features_ND.ndim != 2 or not len(features_ND):
        raise interfaces.UserError(
            f"the Vendi score needs features [points, features]; found {features_ND.shape}"
        )
    count, width = features_ND.shape
    if count <= width:
        unit_ND = _unit(features_ND, 0)
        gram = unit_ND @ unit_ND.T
    else:
        gram = np.zeros((width, width))
        for start in range(0, count, BLOCK):
            unit_BD = _unit(features_ND[start : start + BLOCK], start)
            gram += unit_BD.T @ unit_BD
    share_K = np.linalg.eigvalsh(gram / count)
    # what rounding leaves of a zero would count whole at order 0
    return share_K[share_K > max(count, width) * np.finfo(np.float64).eps * share_K[-1]]


def _unit(features_BD: np.ndarray, start: int) -> np.ndarray:
    x_BD = features_BD.astype(np.float64)
    norm_B = np.sqrt(np.sum(x_BD * x_BD, axis=1))
    fine_B = (norm_B > 0) & np.isfinite(norm_B)
    if not fine_B.all():
        raise interfaces.UserError(
            "the Vendi score needs finite features with a direction; row "
            f"{start + int(np.argmin(fine_B))} has none: leave its image out, and say so"
        )
    return x_BD / norm_B[:, None]


# ---------------------------------------------------------------- as metrics of a score


def both(compared: metric.Compared) -> dict:
    """How many different images there are, beside as many real ones."""
    rows_ND, real_nD = compared.pair()
    return {"value": score(rows_ND), "real": score(real_nD), "images": len(rows_ND)}


METRICS = (
    metric.Metric(
        "vendi",
        title="Vendi score",
        better="higher",
        measure=both,
        needs=(metric.features,),
        protocols=("adm-50k", "fd-dinov2", "cmmd", "local"),
        beside={"real": "real images {}"},
        row=100,
    ),
)
