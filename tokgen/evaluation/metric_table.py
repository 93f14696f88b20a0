"""The table of figures: what each is called, what it needs, and a score of all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from tokgen import report
from tokgen.evaluation import measures

NOT_FINITE = "it is not finite"  # why a figure is absent that was measured


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a figure is measured and shown; `better` is "lower", "higher" or "near"."""

    title: str
    better: str
    measure: Callable[[measures.Compared], dict]
    needs: tuple[str, ...] = ()
    percent: bool = False


def score(
    compared: measures.Compared, *, what: str = "score"
) -> tuple[dict[str, dict], dict[str, str]]:
    """({metric: figure}, {metric: why there is none}) of a protocol's metrics."""
    figures, absent = {}, {}
    names = compared.protocol.metrics
    with report.bar(len(names), unit="metric", what=what, shown=bool(what)) as bar:
        for name in names:
            why = lacking(name, compared)
            if why:
                absent[name] = why
            else:
                figures[name] = METRICS[name].measure(compared)
            bar.update()
    return settled(figures, absent)


def settled(
    figures: Mapping[str, Mapping], absent: Mapping[str, str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """The same without what is not finite: such a figure is none, such an error is left out."""
    kept, without = {}, dict(absent)
    for name, figure in figures.items():
        value = figure.get("value")
        if not _finite(value):
            without[name] = f"{NOT_FINITE}: found {value}"
            continue
        kept[name] = {
            key: part
            for key, part in figure.items()
            if key not in ("low", "high", "error", "std", "bias") or _finite(part)
        }
        if not {"low", "high"} <= kept[name].keys():  # half of an interval is none
            kept[name] = {k: v for k, v in kept[name].items() if k not in ("low", "high")}
    return kept, without


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def lacking(name: str, compared: measures.Compared) -> str:
    """Why a metric cannot be measured, or nothing."""
    for need in METRICS[name].needs:
        if need == "spatial" and (why := _lacking_spatial(compared)):
            return why
        if need == "reference" and compared.layer not in compared.reference:
            return "the reference holds no features of single images"
        if need == "logits" and compared.logits not in compared.features:
            return "the feature network has no classes"
        if need == "labels" and not (compared.classes and len(compared.label_N)):
            return "the samples have no labels, or those of other classes than the reference"
        if need == "classes" and (why := _lacking_classes(compared)):
            return why
        if need == "many" and len(compared.features[compared.layer]) < 200:
            return "it needs 200 samples"
    return ""


def _lacking_spatial(compared: measures.Compared) -> str:
    if "spatial" not in compared.moments:
        return "the reference has no moments of the layer spatial"
    real = compared.moments["spatial"]
    fewest = min(len(compared.features["spatial"]), real.count)
    if compared.least is None and fewest <= real.width:
        return f"its {real.width} features need more images than that; found {fewest:g}"
    return ""


def _lacking_classes(compared: measures.Compared) -> str:
    if not len(compared.label_n):
        return "the reference has no classes"
    labels = {"samples": compared.label_N, "kept reference images": compared.label_n}
    for name, label_N in labels.items():
        poor = int(np.sum(np.bincount(label_N, minlength=compared.classes) < 2))
        if poor:
            return f"{poor} of {compared.classes} classes have no two {name}"
    return ""


METRICS = {
    "fid": Metric("Frechet distance", "lower", measures.fid),
    "sfid": Metric("spatial Frechet distance", "lower", measures.sfid, ("spatial",)),
    "fid_infinity": Metric("Frechet distance, infinite", "lower", measures.fid_infinity, ("many",)),
    "is": Metric("Inception Score", "higher", measures.is_, ("logits",)),
    "is_infinity": Metric(
        "Inception Score, infinite", "higher", measures.is_infinity, ("logits", "many")
    ),
    "kid": Metric("KID x 1000", "lower", measures.kid, ("reference",)),
    "cmmd": Metric("CMMD kernel", "lower", measures.cmmd, ("reference",)),
    "precision": Metric("precision", "higher", measures.precision, ("reference",), True),
    "recall": Metric("recall", "higher", measures.recall, ("reference",), True),
    "density": Metric("density", "higher", measures.density, ("reference",)),
    "coverage": Metric("coverage", "higher", measures.coverage, ("reference",), True),
    "vendi": Metric("Vendi score", "higher", measures.vendi_, ("reference",)),
    "authenticity": Metric("authentic", "higher", measures.authenticity, ("reference",), True),
    "mifid": Metric("MiFID", "lower", measures.mifid, ("reference",)),
    "classwise": Metric(
        "Frechet distance by class", "lower", measures.classwise, ("reference", "labels", "classes")
    ),
    "class_accuracy": Metric(
        "class accuracy", "higher", measures.class_accuracy, ("logits", "labels"), True
    ),
}
