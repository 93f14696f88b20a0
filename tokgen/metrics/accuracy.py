"""Whether a classifier finds the class that an image was asked to be of."""

from __future__ import annotations

import dataclasses

import numpy as np

from tokgen import interfaces
from tokgen.metrics import metric


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Share of the images whose label is among the k likeliest; its standard error, none of one."""

    value: float
    error: float | None


def top(logits_NV: np.ndarray, label_N: np.ndarray, k: int = 1) -> Accuracy:
    """Of equal logits the class with the smaller number is the likelier one."""
    logits_NV, label_N = np.asarray(logits_NV), np.asarray(label_N)
    if logits_NV.ndim != 2 or label_N.shape != logits_NV.shape[:1] or not len(label_N):
        raise interfaces.UserError(
            "accuracy needs logits [images, classes] and a label per image; found "
            f"{logits_NV.shape} and {label_N.shape}"
        )
    classes = logits_NV.shape[1]
    if not 1 <= k <= classes:
        raise interfaces.UserError(f"top-{k} needs at least {k} classes, and k 1; found {classes}")
    fine_N = np.isfinite(logits_NV).all(axis=1) & (label_N >= 0) & (label_N < classes)
    if not fine_N.all():
        row = int(np.argmin(fine_N))
        raise interfaces.UserError(
            f"accuracy needs labels of 0 to {classes - 1} and finite logits; row {row} has the "
            f"label {label_N[row]}, logits from {logits_NV[row].min()} to {logits_NV[row].max()}"
        )
    own_N1 = np.take_along_axis(logits_NV, label_N[:, None], axis=1)
    earlier_NV = np.arange(classes)[None] < label_N[:, None]
    before_N = np.sum((logits_NV > own_N1) | ((logits_NV == own_N1) & earlier_NV), axis=1)
    share = float(np.mean(before_N < k))
    error = float(np.sqrt(share * (1 - share) / len(label_N))) if len(label_N) > 1 else None
    return Accuracy(share, error)


# ---------------------------------------------------------------- as metrics of a score


def class_accuracy(compared: metric.Compared) -> dict:
    """Share of the samples in which the network sees the class that was asked for."""
    found = top(compared.features[compared.logits], compared.label_N)
    return {"value": found.value} | ({} if found.error is None else {"error": found.error})


METRICS = (
    metric.Metric(
        "class_accuracy",
        title="class accuracy",
        better="higher",
        measure=class_accuracy,
        needs=(metric.logits, metric.labels),
        protocols=("local",),
        percent=True,
        row=160,
    ),
)
