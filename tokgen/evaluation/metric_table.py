"""The metrics of a score: found by name in tokgen/metrics/, measured, and shown as they declare.

Every file of that room that lists METRICS takes part; nothing else names them.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence

from tokgen import choices, metrics as room, report
from tokgen.evaluation import protocols
from tokgen.metrics import metric

NOT_FINITE = "it is not finite"  # why a metric is absent that was measured


def known() -> dict[str, metric.Metric]:
    """{name: metric} of all files of tokgen/metrics/, as they stand in tables."""
    return _known(tuple(room.__path__))


@functools.cache
def _known(paths: tuple[str, ...]) -> dict[str, metric.Metric]:
    found = {}
    for file in pkgutil.iter_modules(paths):
        module = importlib.import_module(f"{room.__name__}.{file.name}")
        for one in getattr(module, "METRICS", ()):
            if one.name in found:
                raise ValueError(f"two metrics are called {one.name}; one is of {module.__name__}")
            found[one.name] = one
    return {one.name: one for one in sorted(found.values(), key=lambda m: (m.row, m.name))}


def of_protocol(name: str) -> tuple[str, ...]:
    """The metrics of a protocol: those that it lists, or those that name it."""
    listed = protocols.named(name).metrics
    return listed or tuple(n for n, found in known().items() if name in found.protocols)


def named(name: str) -> metric.Metric:
    """The metric of that name."""
    return choices.named(known(), name, "the metric")


def score(
    compared: metric.Compared, names: Sequence[str], *, what: str = "score"
) -> tuple[dict[str, dict], dict[str, str]]:
    """({metric: what was measured}, {metric: why there is none}) of metrics by name."""
    found, absent = {}, {}
    with report.bar(len(names), unit="metric", what=what, shown=bool(what)) as bar:
        for name in names:
            one = named(name)
            why = one.lacking(compared)
            if why:
                absent[name] = why
            else:
                found[name] = one.measure(compared)
            bar.update()
    return settled(found, absent)


def settled(
    found: Mapping[str, Mapping], absent: Mapping[str, str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Metrics without what is not finite: such a value is none, such an error is left out."""
    kept, without = {}, dict(absent)
    for name, parts in found.items():
        value = parts.get("value")
        if not _finite(value):
            without[name] = f"{NOT_FINITE}: found {value}"
            continue
        kept[name] = {
            key: part
            for key, part in parts.items()
            if key not in ("low", "high", "error", "std", "bias") or _finite(part)
        }
        if not {"low", "high"} <= kept[name].keys():  # half of an interval is none
            kept[name] = {k: v for k, v in kept[name].items() if k not in ("low", "high")}
    return kept, without


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------- how a metric is shown


def title_of(name: str) -> str:
    """A metric's name as people read it."""
    return known()[name].title if name in known() else name.replace("_", " ")


def better(name: str) -> str:
    """ "lower", "higher" or "": which of two values of a metric is the better one."""
    return known()[name].better if name in known() else ""


def number(name: str, value: float, digits: int = 4) -> str:
    """Some digits of a value, in percent where it is a share."""
    percent = name in known() and known()[name].percent
    return f"{100 * value:.{digits}g}\u00a0%" if percent else f"{value:.{digits}g}"


def cells(name: str, found: Mapping) -> tuple[str, str, str]:
    """(value, 95 % interval or standard error, what it is read beside) of a metric."""
    interval = ""
    if "low" in found:
        interval = f"{number(name, found['low'])} to {number(name, found['high'])}"
    elif "error" in found:
        interval = f"standard error {number(name, found['error'])}"
    forms = known()[name].beside if name in known() else {}
    notes = [form.format(_beside(name, found[key])) for key, form in forms.items() if key in found]
    return number(name, found["value"]), interval, "; ".join(notes)


def _beside(name: str, value: object) -> str:
    """What a metric is read beside; beside a share a share, not a number of something."""
    return number(name, value) if isinstance(value, float) else plain(value)


def rows(line: Mapping) -> list[tuple[str, str, str, str, str]]:
    """(title, value, interval, which is better, what it is read beside) of a result's metrics.

    Those that there are none of have the value "none", and why.
    """
    found = []
    for name, parts in line["metrics"].items():
        value, interval, notes = cells(name, parts)
        found.append((title_of(name), value, interval, better(name), notes))
    return found + [(title_of(name), "none", "", "", why) for name, why in line["absent"].items()]


def plain(value: object) -> str:
    """A value of a record, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        some = ", ".join(map(plain, value[:10])) or "none"
        return some if len(value) <= 10 else f"{some}, ... ({len(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
