"""Guidance, temperature and steps of a generator, scored on shared seeds; the best, with errors.

Every setting is drawn with the same seeds, so that differences are less noisy. Each setting and
seed is an evaluation of its own in DIR/SETTING-SEED; killed at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.commands import compare, evaluate, sample
from tokgen.errors import UserError
from tokgen.evaluation import protocols

if TYPE_CHECKING:
    from tokgen.evaluation import references

# Options that are swept -> their letter in a folder's name
AXES = {"guidance": "g", "temperature": "t", "steps": "s"}
RULE = (
    "The best setting was chosen on these seeds, which flatters it: report a figure of other seeds "
    "(tokgen evaluate with another --seed), with the spread over three or more."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="of a generator: a work directory, or one step of it")
    parser.add_argument("--protocol", required=True, help=", ".join(protocols.PROTOCOLS))
    parser.add_argument("--reference", required=True, help="what tokgen reference wrote")
    parser.add_argument("--out", required=True, help="folder of the evaluations and the page")
    output.arguments(parser)
    swept = parser.add_argument_group("what is swept: every combination is scored")
    swept.add_argument("--guidance", type=float, nargs="+", default=[], help="weights; 1 is off")
    swept.add_argument("--temperature", type=float, nargs="+", default=[])
    swept.add_argument("--steps", type=int, nargs="+", default=[], help="of a masked generator")
    swept.add_argument("--seeds", type=int, default=3, help="of every setting (default 3)")
    swept.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    swept.add_argument("--by", default="fid", help="the figure that chooses the best (fid)")
    score = parser.add_argument_group("the rest, as of tokgen evaluate")
    score.add_argument("--samples", type=int, default=0, help="default: the protocol's, or 1000")
    score.add_argument("--assume", default="", help="the protocol of a reference without a record")
    score.add_argument("--weights", default="", help="weight file of a published feature network")
    score.add_argument(
        "--accept",
        action="extend",
        nargs="+",
        default=[],
        choices=("duplicates", "constant", "few", "lossy"),
    )
    score.add_argument("--preset", default="default", help="what is not swept is as in it")
    score.add_argument("--top-k", type=int, help="in the place of the preset's; 0 keeps all")
    score.add_argument("--top-p", type=float, help="in the place of the preset's")
    score.add_argument("--noise", type=float, help="of a masked generator's choice of tokens")
    score.add_argument("--batch", type=int, default=32, help="images decoded together")
    score.add_argument("--precision", choices=("float32", "bfloat16"), help="of the networks")
    score.add_argument("--text", default="", help="captions of a generator that reads text")
    score.add_argument("--tokenizer", default="", help="where the tokenizer lies now, if moved")


def run(args: argparse.Namespace) -> None:
    """Score every setting with every seed, and say which is the best, and how surely."""
    from tokgen.evaluation import collect, page, references, score as scores

    grid = settings_of(args)
    check(args)
    protocol = protocols.named(args.protocol)
    inputs = (args.checkpoint, args.reference, args.weights, args.tokenizer, args.text)
    given = dict(overwrite=args.overwrite, inputs=inputs)
    about = dict(records={collect.RUN: ("sweep of",)}, record=collect.RUN, what="another sweep")
    with output.growing(args.out, **about, **given) as place:
        runtime.devices()
        out = place.path
        try_out(args, grid)
        reference = references.read(args.reference, args.assume)
        extractor = scores.extractor_of(args, protocol, reference)
        place.claim(identity(args, reference, extractor))
        reference = scores.with_features(reference, extractor)
        jobs, lines = [], {}
        for name, setting in grid.items():
            lines[name] = []
            jobs += [(name, setting, args.seed + number) for number in range(args.seeds)]
        for number, (name, setting, seed) in enumerate(jobs, 1):
            folder = out / "-".join(filter(None, (name, f"seed{seed}")))
            line = evaluated(one(args, setting, seed, folder), extractor, reference)
            lines[name].append(line)
            told = page.number(args.by, value(line, args.by))
            report.say(f"{number} of {len(jobs)}: {folder.name}, {page.title_of(args.by)} {told}")
        compare.check({f"{n} {line['seed']}": line for n, found in lines.items() for line in found})
        summary = summarised(args, grid, lines)
        page.save(out / "sweep.json", json.dumps(summary, indent=2) + "\n")
        page.save(out / page.NAME, shown(summary, lines))
    print(listed(summary))
    where, same = place.target / page.NAME, place.target / "sweep.json"
    report.say(f"{where}: a page to look at; {same}: the same as JSON. {RULE}")


def settings_of(args: argparse.Namespace) -> dict[str, dict]:
    """{name: {option: its value}} of every combination; nothing swept is one without a name."""
    import numpy as np

    axes = {name: list(dict.fromkeys(getattr(args, name))) for name in AXES if getattr(args, name)}
    grid = {}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        grid["-".join(f"{AXES[axis]}{value:g}" for axis, value in setting.items())] = setting
    wanted = int(np.prod([len(values) for values in axes.values()]))
    if len(grid) < wanted:
        raise UserError("two swept values are equal in their first six digits; name one of them")
    return grid


def check(args: argparse.Namespace) -> None:
    """Errors of the command line, before anything is loaded."""
    from tokgen.evaluation import page, score as scores

    scores.check(one(args, {}, args.seed, pathlib.Path(args.out)))
    protocol = protocols.named(args.protocol)
    if args.seeds < 1 or args.seed + args.seeds > 2**32:
        raise UserError(f"--seeds must be at least 1; found {args.seeds} from seed {args.seed}")
    if protocol.paired:
        raise UserError(f"--protocol {args.protocol} scores a tokenizer; there is nothing to sweep")
    if args.by not in protocol.metrics or not page.better(args.by):
        known = ", ".join(filter(page.better, protocol.metrics))
        raise UserError(f"--by is a figure of {args.protocol}: {known}; found {args.by!r}")


def one(
    args: argparse.Namespace, setting: Mapping, seed: int, folder: pathlib.Path
) -> argparse.Namespace:
    """The command line of tokgen evaluate that scores a setting with a seed."""
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    made = vars(parser.parse_args([args.checkpoint]))
    given = {name: value for name, value in vars(args).items() if name in made}
    swept = dict.fromkeys(AXES) | dict(setting)
    own = {"seed": seed, "out": str(folder), "overwrite": False}
    return argparse.Namespace(**made | given | swept | own)


def try_out(args: argparse.Namespace, grid: Mapping[str, Mapping]) -> None:
    """An error where any setting is none of the generator's, before hours go into the others."""
    from tokgen.checkpoints import checkpoint

    step = checkpoint.find(args.checkpoint)
    kind = checkpoint.read_meta(step)["kind"]
    if kind != "generator":
        raise UserError(f"a sweep needs a generator; {step} holds a {kind}")
    loaded = checkpoint.load_generator(step)
    lines = [one(args, setting, args.seed, pathlib.Path(args.out)) for setting in grid.values()]
    idle = [sample.idle(sample.prepared(line, loaded)[-1]) for line in lines]
    # what has an effect in one setting is asked for
    idle_in_all = set.intersection(*map(set, idle))
    options.check(args, {name: idle[0][name] for name in sorted(idle_in_all)})


def identity(args: argparse.Namespace, reference: references.Reference, extractor) -> dict:
    """What all evaluations of a sweep share; its grid and its seeds may grow."""
    from tokgen.checkpoints import checkpoint

    names = ("protocol", "samples", "preset", "top_k", "top_p", "noise", "precision", "text")
    return {
        "sweep of": str(checkpoint.find(args.checkpoint)),
        "reference": reference.digest,
        "extractor": extractor.record["fingerprint"],
        **{name: getattr(args, name) for name in names},
    }


def evaluated(args: argparse.Namespace, extractor, reference: references.Reference) -> dict:
    """The result of one evaluation: made now, or found finished."""
    from tokgen.evaluation import collect, references, score as scores

    protocol = protocols.named(args.protocol)
    if (pathlib.Path(args.out) / collect.RESULTS).exists():
        return collect.results(pathlib.Path(args.out))[-1]
    with scores.opened(args) as place:
        supply, classes = scores.supply_of(args, protocol, place.path)
        count = scores.count_of(args, protocol, supply)
        references.check(reference, args.protocol, extractor, size=supply.size, count=count)
        line, found = scores.scored(args, supply, extractor, reference, count, classes, place)
        scores.finish(place, line, found, supply, extractor, reference, count)
    return line


def value(line: Mapping, metric: str) -> float:
    """A figure of a result, or an error where it has none."""
    from tokgen.evaluation import metric_table

    if metric not in line["figures"]:
        why = line["absent"].get(metric, "it was not measured")
        if why.startswith(metric_table.NOT_FINITE):
            return math.nan
        raise UserError(f"--by {metric}: there is no such figure here: {why}; choose another")
    return line["figures"][metric]["value"]


def summarised(args, grid: Mapping[str, Mapping], lines: Mapping[str, Sequence[Mapping]]) -> dict:
    """Mean and standard deviation over seeds of every setting; the best one, and its ties."""
    import numpy as np

    from tokgen.evaluation import page

    rows = {}
    for name, found in lines.items():
        shared = [m for m in found[0]["figures"] if all(m in line["figures"] for line in found)]
        figures = {}
        for metric in shared:
            values = [line["figures"][metric]["value"] for line in found]
            figures[metric] = {"mean": float(np.mean(values)), "values": values}
            if len(values) > 1:
                figures[metric]["std"] = float(np.std(values, ddof=1))
        rows[name] = {**grid[name], "figures": figures}
    sign = 1 if page.better(args.by) == "lower" else -1
    # one whose figure is not finite for some seed is not among them
    chosen = [name for name in rows if args.by in rows[name]["figures"]]
    if not chosen:
        raise UserError(f"--by {args.by}: it is finite for no setting; choose another")
    best = min(chosen, key=lambda name: sign * rows[name]["figures"][args.by]["mean"])
    ties = [name for name in chosen if name != best and tied(lines[name], lines[best], args.by)]
    first = next(iter(lines.values()))[0]
    return {
        "checkpoint": first["supply"].get("checkpoint", args.checkpoint),
        **{name: of(first) for name, of in compare.SAME.items()},
        "seeds": [line["seed"] for line in next(iter(lines.values()))],
        "by": args.by,
        "best": best,
        "ties": ties,
        "warning": RULE,
        "settings": rows,
    }


def tied(lines: Sequence[Mapping], best: Sequence[Mapping], metric: str) -> bool:
    """Whether the mean difference of two settings over their common seeds may be 0, at 95 %.

    With one seed, whether the difference lies within the joint interval of both.
    """
    import numpy as np
    import scipy.stats

    pairs = [[line["figures"][metric] for line in found] for found in (lines, best)]
    apart_S = np.array([a["value"] - b["value"] for a, b in zip(*pairs, strict=True)])
    if len(apart_S) == 1:
        return abs(apart_S[0]) <= np.hypot(*(compare.half(found[0]) for found in pairs))
    error = apart_S.std(ddof=1) / len(apart_S) ** 0.5
    return bool(abs(apart_S.mean()) <= scipy.stats.t.ppf(0.975, len(apart_S) - 1) * error)


def marks(summary: Mapping) -> dict[str, str]:
    """{setting: "best" or "tie"}."""
    return dict.fromkeys(summary["ties"], "tie") | {summary["best"]: "best"}


def cell(metric: str, figure: Mapping) -> str:
    """`12.3 ± 0.4` of a figure over seeds."""
    from tokgen.evaluation import page

    spread = f" ± {page.number(metric, figure['std'], digits=2)}" if "std" in figure else ""
    return page.number(metric, figure["mean"]) + spread


def listed(summary: Mapping) -> str:
    """The settings for the terminal, by the figure that chose."""
    from tokgen.evaluation import metric_table, page

    by, rows = summary["by"], []
    for name, row in summary["settings"].items():
        mark = marks(summary).get(name, "")
        told = cell(by, row["figures"][by]) if by in row["figures"] else metric_table.NOT_FINITE
        rows.append(f"{name or 'preset':<20} {told:<24} {mark}".rstrip())
    seeds = len(summary["seeds"])
    return "\n".join([f"{page.title_of(by)}, mean ± standard deviation of {seeds} seeds", *rows])


def shown(summary: Mapping, lines: Mapping[str, Sequence[Mapping]]) -> str:
    """The page of a sweep."""
    from tokgen.evaluation import page

    by, marked = summary["by"], marks(summary)
    figures = [by]
    for row in summary["settings"].values():
        figures += [metric for metric in row["figures"] if metric not in figures]
    rows = []
    for name, row in summary["settings"].items():
        cells = [cell(m, row["figures"][m]) if m in row["figures"] else "none" for m in figures]
        mark = marked.get(name, "")
        rows.append((name or "preset", (f"{cells[0]} {mark}".rstrip(), mark), *cells[1:]))
    told = (
        f"Mean ± standard deviation over the seeds {page.plain(summary['seeds'])}, the same for "
        f"every setting. Best is the best mean of {page.title_of(by)}; a tie differs "
        "from it by no more than the seeds explain (95 %, differences taken seed by seed)."
    )
    first = next(iter(lines.values()))[0]
    head = ("setting", *map(page.title_of, figures))
    parts = [
        page.text(RULE, "alarm"),
        page.section("Figures", page.text(told, "faint"), page.table(head, rows)),
        page.section("Plots", *plots(summary)),
        page.section("What was measured, by its first evaluation", page.made(first)),
    ]
    title = f"Sweep of {summary['checkpoint']}: {summary['protocol']}"
    return page.document(title, parts)


def plots(summary: Mapping) -> list[str]:
    """The figure that chose against every axis; precision against recall. Bars: one deviation."""
    from tokgen.evaluation import page

    found, rows, by = [], summary["settings"], summary["by"]
    for axis in AXES:
        series = {}
        for row in rows.values():
            if axis in row and by in row["figures"]:
                rest = [
                    f"{other} {row[other]:g}" for other in AXES if other in row and other != axis
                ]
                figure = row["figures"][by]
                point = (row[axis], figure["mean"], figure.get("std", 0.0))
                series.setdefault(", ".join(rest) or page.title_of(by), []).append(point)
        if any(len(points) > 1 for points in series.values()):
            address = page.lines(series, axis, page.title_of(by))
            found.append(
                page.picture(
                    address, f"{page.title_of(by)} against {axis}; bars: a standard deviation"
                )
            )
    if all({"precision", "recall"} <= set(row["figures"]) for row in rows.values()):
        pairs = {}
        for name, row in rows.items():
            both = [row["figures"][metric] for metric in ("recall", "precision")]
            pairs[name or "preset"] = (
                *(figure["mean"] for figure in both),
                *(figure.get("std", 0.0) for figure in both),
            )
        address = page.points(pairs, "recall", "precision")
        found.append(page.picture(address, "precision against recall"))
    return found
