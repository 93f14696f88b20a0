"""Several scored runs side by side: a table, plots, and samples of the same seeds; or a refusal.

Metrics are only put beside each other where protocol, reference, feature network, number of images
and their size agree.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tokgen import output, report
from tokgen.data import npz
from tokgen.evaluation import collect, metric_table, page, score_page
from tokgen.interfaces import UserError

COMPARED = "compare.json"
RECORDS = {COMPARED: ("runs", "marks")}
DEVIATES = 1.96  # half of a 95 % interval, in standard errors
# What must agree, and where a result says it
SAME = {
    "protocol": lambda line: line["protocol"],
    "reference": lambda line: _reference(line),
    "feature network": lambda line: (
        f"{line['extractor']['name']} {line['extractor']['fingerprint'][:16]}"
    ),
    "number of images": lambda line: str(line["samples"]),
    "image size": lambda line: "x".join(map(str, line["size"])),
}


def compare(
    paths: Sequence[str], out: str, *, every: bool = False, overwrite: bool = False
) -> dict[str, dict]:
    """Several scores in one table, with plots and samples side by side, as a page.

    Args:
        paths: folders of scores.
        out: the folder of the page.
        every: all results of each folder, and not the last.
        overwrite: replace an earlier comparison.

    Returns:
        {name: result}, as `score` gives it.

    Raises:
        UserError: there are fewer than two results, or they are of different protocols.

    Examples:
        >>> few = dict(reference="reference.npz", samples=16, accept=("few",))
        >>> for seed, out in enumerate(("first", "second")):
        ...     settings = tokgen.ScoreSettings("runs/generator", "local", out, seed=seed, **few)
        ...     _ = tokgen.score(settings)
        >>> list(tokgen.compare(["first", "second"], "compared"))
        ['first', 'second']
    """
    lines, folders = read(paths, every=every)
    if len(lines) < 2:
        raise UserError(f"a comparison needs two results or more; found {len(lines)}")
    check(lines)
    with output.folder(out, records=RECORDS, overwrite=overwrite, inputs=paths) as place:
        write(lines, folders, place.path)
    where, same = (pathlib.Path(out) / name for name in (page.NAME, COMPARED))
    report.say(f"{where}: a page to look at; {same}: the same as JSON")
    return lines


def write(
    lines: Mapping[str, Mapping], folders: Mapping[str, pathlib.Path], out: pathlib.Path
) -> None:
    """The page, and all of it as JSON."""
    first = next(iter(lines.values()))
    record = {
        **{name: of(first) for name, of in SAME.items()},
        "runs": {name: {"folder": str(folders[name]), **line} for name, line in lines.items()},
        "marks": {metric: marks(lines, metric) for metric in metrics(lines)},
    }
    page.save(out / COMPARED, json.dumps(record, indent=2) + "\n")
    about = "; ".join(f"{name} {of(first)}" for name, of in SAME.items())
    parts = [
        page.text(about, "faint"),
        page.section("Metrics", page.text(LEGEND, "faint"), table(lines)),
        page.section("Plots", *plots(lines)),
        sheets(lines, folders),
        page.section("The runs", runs_table(lines)),
    ]
    title = f"{len(lines)} runs under {first['protocol']}"
    page.save(out / page.NAME, page.document(title, parts))


LEGEND = (
    "The best of each metric is marked best; tie marks those whose difference from it lies within "
    "the joint 95 % interval of both. Values without an interval cannot be told apart so. Below a "
    "value stands its 95 % interval."
)


def read(
    paths: Sequence[str], *, every: bool = False
) -> tuple[dict[str, dict], dict[str, pathlib.Path]]:
    """({name: result}, {name: its folder}) of folders; the last result of each, or every one."""
    shown = [pathlib.Path(path).resolve() for path in paths]
    if len(set(shown)) < len(shown):
        raise UserError("a folder is named twice; name every run once")
    # the shortest ends of the paths that tell them apart
    depth = 1
    while len({path.parts[-depth:] for path in shown}) < len(shown):
        depth += 1
    lines, folders = {}, {}
    for path, whole in zip(paths, shown, strict=True):
        found = collect.results(pathlib.Path(path))
        name = os.path.join(*whole.parts[-depth:])
        for number, line in enumerate(found if every else found[-1:], 1):
            key = f"{name} #{number}" if every and len(found) > 1 else name
            lines[key] = line
            folders[key] = whole if whole.is_dir() else whole.parent
    return lines, folders


def check(lines: Mapping[str, Mapping]) -> None:
    """One error that names every difference that forbids a comparison."""
    wrong = []
    for what, of in SAME.items():
        found = {}
        for name, line in lines.items():
            found.setdefault(of(line), []).append(name)
        if len(found) > 1:
            listed = ", ".join(f"{value} ({', '.join(names)})" for value, names in found.items())
            wrong.append(f"{what}: {listed}")
    if wrong:
        raise UserError(
            f"these results cannot be compared; {'; '.join(wrong)}: evaluate them again under one "
            "protocol, with one reference and one number of images"
        )


def _reference(line: Mapping) -> str:
    """The reference by its hash; where the originals are it, by theirs."""
    record = line["reference"]
    digest = record.get("digest") or line["images"].get("images", "")
    return f"{record['dataset']} {str(digest)[:16]}"


def metrics(lines: Mapping[str, Mapping]) -> list[str]:
    """Every metric that a run has, in the order of their results."""
    return list(dict.fromkeys(name for line in lines.values() for name in line["metrics"]))


def half(parts: Mapping) -> float:
    """Half of a value's 95 % interval; 0 where it has none."""
    if "low" in parts:
        return (parts["high"] - parts["low"]) / 2
    return DEVIATES * parts.get("error", 0.0)


def marks(lines: Mapping[str, Mapping], metric: str) -> dict[str, str]:
    """{run: "best" or "tie"} of a metric, where one of two values is the better one."""
    values = {n: line["metrics"][metric] for n, line in lines.items() if metric in line["metrics"]}
    better = metric_table.better(metric)
    if not better or len(values) < 2:
        return {}
    if len({parts.get("axes") for parts in values.values()}) > 1:
        return {}  # of other features
    sign = 1 if better == "lower" else -1
    best = min(values, key=lambda name: sign * values[name]["value"])
    top, found = values[best], {best: "best"}
    for name, parts in values.items():
        apart = abs(parts["value"] - top["value"])
        if name != best and apart <= math.hypot(half(parts), half(top)):
            found[name] = "tie"
    return found


def shown(lines: Mapping[str, Mapping], metric: str, name: str) -> tuple[str, str, str]:
    """(value, interval, mark) of a run's metric."""
    parts = lines[name]["metrics"].get(metric)
    if parts is None:
        return "none", "", ""
    value, interval, _ = metric_table.cells(metric, parts)
    return value, interval, marks(lines, metric).get(name, "")


def table(lines: Mapping[str, Mapping]) -> str:
    """Metrics x runs, the best of each marked: a metric per row, to be read on a narrow screen."""
    rows = []
    for metric in metrics(lines):
        cells = []
        for name in lines:
            value, interval, mark = shown(lines, metric, name)
            words = f"{value} {mark}".rstrip()
            cells.append((f"{words}\n{interval}".rstrip(), mark))
        better = metric_table.better(metric)
        title = metric_table.title_of(metric) + (f", {better} is better" if better else "")
        rows.append((title, *cells))
    return page.table(("metric", *lines), rows, "cells")


def listed(lines: Mapping[str, Mapping]) -> str:
    """The table for the terminal: a run per row; * the best, = a tie with it."""
    names = metrics(lines)
    rows = [("", *(metric_table.title_of(name) for name in names))]
    signs = {"best": " *", "tie": " =", "": ""}
    for run_ in lines:
        cells = [shown(lines, metric, run_) for metric in names]
        rows.append((run_, *(value + signs[mark] for value, _, mark in cells)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    made = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([*made, "* best, = within the joint 95 % interval of the best"])


def plots(lines: Mapping[str, Mapping]) -> list[str]:
    """Distance against guidance where runs differ in it; precision against recall."""
    found = []
    series = guided(lines)
    if series:
        title = metric_table.title_of("fid")
        address = page.lines(series, "guidance weight", title)
        found.append(page.picture(address, f"{title} against guidance, with 95 % intervals"))
    pairs = {}
    for name, line in lines.items():
        if {"precision", "recall"} <= set(line["metrics"]):
            both = [line["metrics"][metric] for metric in ("recall", "precision")]
            pairs[name] = (*(f["value"] for f in both), *(half(f) for f in both))
    if pairs:
        address = page.points(pairs, "recall", "precision")
        found.append(page.picture(address, "precision against recall"))
    return found


def guided(lines: Mapping[str, Mapping]) -> dict[str, list[tuple]]:
    """{what runs share beside the guidance: [(weight, distance, half of its interval)]}."""
    runs_ = {}
    for name, line in lines.items():
        weight = line["images"].get("settings", {}).get("weight")
        if isinstance(weight, int | float) and "fid" in line["metrics"]:
            runs_[name] = (weight, dict(line["images"]["settings"]), line)
    groups = {}
    for weight, settings, line in runs_.values():
        rest = {k: v for k, v in settings.items() if k != "weight"}
        key = json.dumps([line["images"].get("fingerprint"), rest], sort_keys=True)
        groups.setdefault(key, []).append((weight, line))
    series = {}
    for members in groups.values():
        if len({weight for weight, _ in members}) > 1:
            rest = members[0][1]["images"]
            checkpoint = score_page.name_of(members[0][1])
            heat = metric_table.plain(rest["settings"].get("temperature"))
            about = f"{checkpoint}, temperature {heat}"
            while about in series:
                about += "'"
            series[about] = [
                (weight, line["metrics"]["fid"]["value"], half(line["metrics"]["fid"]))
                for weight, line in members
            ]
    return series


def runs_table(lines: Mapping[str, Mapping]) -> str:
    """How each run was made."""
    rows = []
    for name, line in lines.items():
        images = {k: v for k, v in line["images"].items() if k != "seed"}
        rows.append((name, metric_table.plain(images), f"seed {line['seed']}, {line['time']}"))
    return page.table(("run", "images of", "when"), rows, "long")


def sheets(lines: Mapping[str, Mapping], folders: Mapping[str, pathlib.Path]) -> str:
    """Samples of each class, a row per run; the same numbers of every run that has them."""
    opened, without = {}, []
    for name in lines:
        kept = _images_of(lines[name], folders[name])
        if kept is None:
            without.append(name)
        else:
            opened[name] = kept
    if not opened:
        return ""
    count = next(iter(lines.values()))["samples"]
    labels = {n: np.zeros(0) if a.label_N is None else a.label_N for n, a in opened.items()}
    first = next(iter(labels.values()))
    agree = all(np.array_equal(first, label_N) for label_N in labels.values())
    seeds = {lines[name]["seed"] for name in opened}
    told = "A row is a run, in the order of the table. "
    if agree and len(seeds) == 1:
        told += "A column is one number: the same seed and class in every run."
    else:
        told += "Seeds or classes differ between the runs: columns have nothing in common."
    if without:
        told += f" No samples are kept of {', '.join(without)}."
    rows = {n: score_page.rows_of(label_N, count) for n, label_N in labels.items()}
    images = {
        name: dict(
            zip(index_n.tolist(), score_page.gathered(opened[name], index_n, count), strict=True)
        )
        for name, index_n in ((n, np.concatenate(list(r.values()))) for n, r in rows.items())
    }
    names = score_page.names_of(next(iter(lines.values())), first)
    parts = [page.text(told, "faint")]
    for label in rows[next(iter(opened))]:
        made = []
        for name in opened:
            chosen = rows[name].get(label, np.zeros(0, int))[: score_page.SHOWN].tolist()
            made.append([images[name][index] for index in chosen])
        parts.append(page.picture(_sheet(made), score_page.class_name(label, names)))
    return page.section("Samples side by side", *parts)


def _images_of(line: Mapping, folder: pathlib.Path) -> npz.Archive | None:
    """The images of a result: kept beside it, or the archive that was scored, if unchanged."""
    if (folder / "samples.npz").is_file():
        return npz.Archive(folder / "samples.npz")
    scored = pathlib.Path(line["images"].get("samples", ""))
    if scored.suffix != ".npz" or not scored.is_file():
        return None
    found = npz.Archive(scored)
    return found if found.identity == line["images"] else None


def _sheet(rows: Sequence[Sequence[np.ndarray]]) -> str:
    """Rows of images of one size, short ones filled up with white."""
    blank = np.full_like(next(row[0] for row in rows if row), 255)
    columns = max(map(len, rows))
    filled = [image for row in rows for image in [*row, *[blank] * (columns - len(row))]]
    return page.sheet(np.stack(filled), columns)
