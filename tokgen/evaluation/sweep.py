"""Guidance, temperature and steps of a generator, scored on shared seeds; the best, with errors.

Every setting is drawn with the same seeds, so that differences are less noisy. Each setting and
seed is a score of its own in OUT/SETTING-SEED; killed at any point, the same sweep goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from tokgen import distributed, options, report, runtime
from tokgen.checkpoints import checkpoint, loading
from tokgen.evaluation import (
    collect,
    comparison,
    feature_extractors,
    inputs,
    metric_table,
    page,
    protocols,
    references,
    score,
    score_page,
    score_settings,
)
from tokgen.interfaces import UserError
from tokgen.sampling import presets

# Fields that are swept -> their letter in a folder's name
AXES = {"guidance": "g", "temperature": "t", "steps": "s"}
RECORDS = {collect.RUN: ("sweep of",)}
SUMMARY = "sweep.json"
RULE = (
    "The best setting was chosen on these seeds, which flatters it: report other seeds "
    "(tokgen evaluate with another --seed), with the spread over three or more."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is swept; every combination is scored.

    Attributes:
        score: what all scores share; its seed is the first of them, its `out` the folder of all.
        guidance, temperature, steps: values of each, in the place of `score.sampling`'s; none
            leaves it as it is there.
        seeds: of every combination.
        by: the metric that chooses the best.

    Examples:
        >>> shared = tokgen.ScoreSettings("runs/generator", "local", "swept", reference="ref.npz")
        >>> tokgen.SweepSettings(shared, guidance=(1.0, 1.5, 2.0), temperature=(0.9, 1.0)).seeds
        3
    """

    score: score_settings.Settings
    guidance: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    seeds: int = 3
    by: str = "fid"


def sweep(settings: Settings) -> dict:
    """Score every combination of sampling settings with every seed: `tokgen sweep`.

    Args:
        settings: what all scores share, and what is swept.

    Returns:
        The summary: every setting with mean and deviation, the best, its ties. It is also written
        to the folder, with a page that shows it.

    Raises:
        UserError: as of `score`; a setting that the generator has not.

    Examples:
        >>> few = dict(reference="reference.npz", samples=16, accept=("few",))
        >>> shared = tokgen.ScoreSettings("runs/generator", "local", "swept", **few)
        >>> summary = tokgen.sweep(tokgen.SweepSettings(shared, temperature=(0.5, 1.0), seeds=1))
        >>> summary["by"], sorted(summary["settings"])
        ('fid', ['t0.5', 't1'])
    """
    grid = grid_of(settings)
    check(settings)
    shared = settings.score
    read = (shared.scored, shared.reference, shared.weights, shared.tokenizer, shared.text)
    given = dict(overwrite=shared.overwrite, inputs=read)
    about = dict(records=RECORDS, what="another sweep")
    with collect.opened(shared.out, **about, **given) as place:
        runtime.devices()
        out = place.path
        try_out(settings, grid)
        reference = references.read(shared.reference, shared.assume)
        extractor = inputs.extractor_of(shared, reference)
        asked = identity(settings, reference, extractor)
        distributed.check_alike(asked)
        distributed.first(place.claim, asked)
        reference = distributed.first(inputs.with_features, reference, extractor) or reference
        jobs, lines = [], {}
        for name, setting in grid.items():
            lines[name] = []
            jobs += [(name, setting, shared.seed + number) for number in range(settings.seeds)]
        for number, (name, setting, seed) in enumerate(jobs, 1):
            folder = out / "-".join(filter(None, (name, f"seed{seed}")))
            line = scored(one(settings, setting, seed, folder), extractor, reference)
            lines[name].append(line)
            told = metric_table.number(settings.by, value(line, settings.by))
            what = metric_table.title_of(settings.by)
            report.say(f"{number} of {len(jobs)}: {folder.name}, {what} {told}")
        all_ = {f"{n} {line['seed']}": line for n, found in lines.items() for line in found}
        comparison.check(all_)
        summary = distributed.decided(_summed_up, settings, grid, lines, out)
    where, same = place.target / page.NAME, place.target / SUMMARY
    report.say(f"{where}: a page to look at; {same}: the same as JSON. {RULE}")
    return summary


def grid_of(settings: Settings) -> dict[str, dict]:
    """{name: {axis: its value}} of every combination; nothing swept is one without a name."""
    given = {name: list(dict.fromkeys(getattr(settings, name))) for name in AXES}
    axes = {name: values for name, values in given.items() if values}
    grid = {}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        grid["-".join(f"{AXES[axis]}{value:g}" for axis, value in setting.items())] = setting
    wanted = int(np.prod([len(values) for values in axes.values()]))
    if len(grid) < wanted:
        raise UserError("two swept values are equal in their first six digits; name one of them")
    return grid


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    shared = settings.score
    score_settings.check(one(settings, {}, shared.seed, pathlib.Path(shared.out)))
    protocol = protocols.named(shared.protocol)
    if settings.seeds < 1 or shared.seed + settings.seeds > 2**32:
        raise UserError(
            f"--seeds must be at least 1; found {settings.seeds} from seed {shared.seed}"
        )
    if protocol.paired:
        raise UserError(
            f"--protocol {shared.protocol} scores a tokenizer; there is nothing to sweep"
        )
    known = metric_table.of_protocol(shared.protocol)
    if settings.by not in known or not metric_table.better(settings.by):
        listed_ = ", ".join(filter(metric_table.better, known))
        raise UserError(f"--by is a metric of {shared.protocol}: {listed_}; found {settings.by!r}")


def one(
    settings: Settings, setting: Mapping[str, float], seed: int, folder: pathlib.Path
) -> score_settings.Settings:
    """The score of a combination with a seed."""
    choice = dataclasses.replace(settings.score.sampling, **setting)
    own = {"seed": seed, "out": str(folder), "overwrite": False}
    return dataclasses.replace(settings.score, sampling=choice, **own)


def try_out(settings: Settings, grid: Mapping[str, Mapping[str, float]]) -> None:
    """An error where any setting is none of the generator's, before hours go into the others."""
    step = checkpoint.find(settings.score.scored)
    kind = checkpoint.read_meta(step)["kind"]
    if kind != "generator":
        raise UserError(f"a sweep needs a generator; {step} holds a {kind}")
    loaded = loading.load_generator(step)
    idle = []
    for setting in grid.values():
        choice = dataclasses.replace(settings.score.sampling, **setting)
        known = loaded.config.presets.to_dict()
        *_, sampler = presets.choose(loaded.module, known, choice, loaded.classes)
        idle.append(presets.without_effect(choice, sampler))
    # what has an effect in one setting is asked for
    in_all = set.intersection(*map(set, idle))
    options.refuse({name: idle[0][name] for name in sorted(in_all)})


def identity(
    settings: Settings,
    reference: references.Reference,
    extractor: feature_extractors.Extractor,
) -> dict:
    """What all scores of a sweep share; its grid and its seeds may grow."""
    shared, choice = settings.score, settings.score.sampling
    return {
        "sweep of": str(checkpoint.find(shared.scored)),
        "reference": reference.digest,
        "extractor": extractor.record["fingerprint"],
        **{name: getattr(shared, name) for name in ("protocol", "samples", "text")},
        **{name: getattr(choice, name) for name in ("preset", "top_k", "top_p", "noise")},
        "precision": shared.precision or None,
    }


def scored(
    settings: score_settings.Settings,
    extractor: feature_extractors.Extractor,
    reference: references.Reference,
) -> dict:
    """The result of one score: made now, or found finished."""
    if finished := distributed.decided(_finished, pathlib.Path(settings.out)):
        return finished
    with score.opened(settings) as place:
        images, classes = inputs.images_of(settings, place.path)
        count = inputs.count_of(settings, images)
        return score.measured(settings, images, classes, count, extractor, reference, place)


def _finished(out: pathlib.Path) -> dict | None:
    """The last result of a folder, if it has one."""
    return collect.results(out)[-1] if (out / collect.RESULTS).exists() else None


def value(line: Mapping, metric: str) -> float:
    """A metric of a result, or an error where it has none."""
    if metric not in line["metrics"]:
        why = line["absent"].get(metric, "it was not measured")
        if why.startswith(metric_table.NOT_FINITE):
            return math.nan
        raise UserError(f"--by {metric}: there is no such metric here: {why}; choose another")
    return line["metrics"][metric]["value"]


def _summed_up(
    settings: Settings,
    grid: Mapping[str, Mapping],
    lines: Mapping[str, Sequence[Mapping]],
    out: pathlib.Path,
) -> dict:
    """The summary; it is written, with its page."""
    summary = summarised(settings, grid, lines)
    page.save(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    page.save(out / page.NAME, shown(summary, lines))
    return summary


def summarised(
    settings: Settings, grid: Mapping[str, Mapping], lines: Mapping[str, Sequence[Mapping]]
) -> dict:
    """Mean and standard deviation over seeds of every setting; the best one, and its ties."""
    rows = {}
    for name, found in lines.items():
        shared = [m for m in found[0]["metrics"] if all(m in line["metrics"] for line in found)]
        metrics = {}
        for metric in shared:
            values = [line["metrics"][metric]["value"] for line in found]
            metrics[metric] = {"mean": float(np.mean(values)), "values": values}
            if len(values) > 1:
                metrics[metric]["std"] = float(np.std(values, ddof=1))
        rows[name] = {**grid[name], "metrics": metrics}
    sign = 1 if metric_table.better(settings.by) == "lower" else -1
    # one whose value is not finite for some seed is not among them
    chosen = [name for name in rows if settings.by in rows[name]["metrics"]]
    if not chosen:
        raise UserError(f"--by {settings.by}: it is finite for no setting; choose another")
    best = min(chosen, key=lambda name: sign * rows[name]["metrics"][settings.by]["mean"])
    ties = [name for name in chosen if name != best and tied(lines[name], lines[best], settings.by)]
    first = next(iter(lines.values()))[0]
    return {
        "checkpoint": first["images"].get("checkpoint", settings.score.scored),
        **{name: of(first) for name, of in comparison.SAME.items()},
        "seeds": [line["seed"] for line in next(iter(lines.values()))],
        "by": settings.by,
        "best": best,
        "ties": ties,
        "warning": RULE,
        "settings": rows,
    }


def tied(lines: Sequence[Mapping], best: Sequence[Mapping], metric: str) -> bool:
    """Whether the mean difference of two settings over their common seeds may be 0, at 95 %.

    With one seed, whether the difference lies within the joint interval of both.
    """
    pairs = [[line["metrics"][metric] for line in found] for found in (lines, best)]
    apart_S = np.array([a["value"] - b["value"] for a, b in zip(*pairs, strict=True)])
    if len(apart_S) == 1:
        return abs(apart_S[0]) <= np.hypot(*(comparison.half(found[0]) for found in pairs))
    error = apart_S.std(ddof=1) / len(apart_S) ** 0.5
    return bool(abs(apart_S.mean()) <= scipy.stats.t.ppf(0.975, len(apart_S) - 1) * error)


def marks(summary: Mapping) -> dict[str, str]:
    """{setting: "best" or "tie"}."""
    return dict.fromkeys(summary["ties"], "tie") | {summary["best"]: "best"}


def cell(metric: str, parts: Mapping) -> str:
    """`12.3 ± 0.4` of a metric over seeds."""
    spread = f" ± {metric_table.number(metric, parts['std'], digits=2)}" if "std" in parts else ""
    return metric_table.number(metric, parts["mean"]) + spread


def listed(summary: Mapping) -> str:
    """The settings for the terminal, by the metric that chose."""
    by, rows = summary["by"], []
    for name, row in summary["settings"].items():
        mark = marks(summary).get(name, "")
        told = cell(by, row["metrics"][by]) if by in row["metrics"] else metric_table.NOT_FINITE
        rows.append(f"{name or 'preset':<20} {told:<24} {mark}".rstrip())
    seeds = len(summary["seeds"])
    return "\n".join(
        [f"{metric_table.title_of(by)}, mean ± standard deviation of {seeds} seeds", *rows]
    )


def shown(summary: Mapping, lines: Mapping[str, Sequence[Mapping]]) -> str:
    """The page of a sweep."""
    by, marked = summary["by"], marks(summary)
    metrics = [by]
    for row in summary["settings"].values():
        metrics += [metric for metric in row["metrics"] if metric not in metrics]
    rows = []
    for name, row in summary["settings"].items():
        cells = [cell(m, row["metrics"][m]) if m in row["metrics"] else "none" for m in metrics]
        mark = marked.get(name, "")
        rows.append((name or "preset", (f"{cells[0]} {mark}".rstrip(), mark), *cells[1:]))
    told = (
        "Mean ± standard deviation over the seeds "
        f"{metric_table.plain(summary['seeds'])}, the same for every "
        f"setting. Best is the best mean of {metric_table.title_of(by)}; a tie differs "
        "from it by no more than the seeds explain (95 %, differences taken seed by seed)."
    )
    first = next(iter(lines.values()))[0]
    head = ("setting", *map(metric_table.title_of, metrics))
    parts = [
        page.text(RULE, "alarm"),
        page.section("Metrics", page.text(told, "faint"), page.table(head, rows)),
        page.section("Plots", *plots(summary)),
        page.section("What was measured, by its first evaluation", score_page.made(first)),
    ]
    title = f"Sweep of {summary['checkpoint']}: {summary['protocol']}"
    return page.document(title, parts)


def plots(summary: Mapping) -> list[str]:
    """The metric that chose against every axis; precision against recall. Bars: one deviation."""
    found, rows, by = [], summary["settings"], summary["by"]
    for axis in AXES:
        series = {}
        for row in rows.values():
            if axis in row and by in row["metrics"]:
                rest = [
                    f"{other} {row[other]:g}" for other in AXES if other in row and other != axis
                ]
                parts = row["metrics"][by]
                point = (row[axis], parts["mean"], parts.get("std", 0.0))
                series.setdefault(", ".join(rest) or metric_table.title_of(by), []).append(point)
        if any(len(points) > 1 for points in series.values()):
            address = page.lines(series, axis, metric_table.title_of(by))
            found.append(
                page.picture(
                    address,
                    f"{metric_table.title_of(by)} against {axis}; bars: a standard deviation",
                )
            )
    if all({"precision", "recall"} <= set(row["metrics"]) for row in rows.values()):
        pairs = {}
        for name, row in rows.items():
            both = [row["metrics"][metric] for metric in ("recall", "precision")]
            pairs[name or "preset"] = (
                *(parts["mean"] for parts in both),
                *(parts.get("std", 0.0) for parts in both),
            )
        address = page.points(pairs, "recall", "precision")
        found.append(page.picture(address, "precision against recall"))
    return found
