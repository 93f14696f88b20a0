"""List the published models that have a name here, or say everything of one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

from tokgen import choices, options, runtime
from tokgen.errors import UserError
from tokgen.zoo import model as zoo

HERE = "*"
_MEASURES = {"generator": "FID", "tokenizer": "rFID"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", help="say everything of this one")
    parser.add_argument(
        "--system",
        default="",
        help="only those of a system of tokgen import, or of a family, as titok",
    )
    parser.add_argument(
        "--tokenizers", action="store_true", help="tokenizers in the place of generators"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the table, or what is known of one model."""
    if args.name:
        options.check(args, dict.fromkeys(("system", "tokenizers"), "the whole table"))
        models = {args.name: zoo.named(args.name)}
    else:
        models = _chosen(args.system, "tokenizer" if args.tokenizers else "")
    if args.json:
        print(json.dumps({name: record(name, model) for name, model in models.items()}, indent=2))
    elif args.name:
        print(described(args.name, models[args.name]))
    else:
        kind = "tokenizer" if args.tokenizers else "generator"
        print(listed(models, "" if args.system else kind))


def _chosen(system: str, kind: str) -> dict[str, zoo.Model]:
    """Those of a system, or of a family by its name, and of a kind; "" is any."""
    known = zoo.known()
    names = {name: {m.system, m.otherwise, m.family.lower()} - {""} for name, m in known.items()}
    system = system.lower()
    if system:
        choices.named(dict.fromkeys(sorted(set().union(*names.values()))), system, "--system")
    found = {
        name: model
        for name, model in known.items()
        if (not system or system in names[name]) and kind in ("", model.kind)
    }
    if not found:
        raise UserError(f"of {system} no {kind} has a name: leave out --tokenizers")
    return found


def folder(name: str) -> pathlib.Path:
    """Where a model lies that was pulled; as `checkpoint.pulled`, which would load jax."""
    return runtime.cache_folder() / "models" / name


def record(name: str, model: zoo.Model) -> dict:
    """Everything of a row, for programs; `here` is where it lies, null where it was not pulled."""
    place = folder(name)
    return dataclasses.asdict(model) | {
        "kind": model.kind,
        "here": str(place) if place.exists() else None,
    }


def listed(models: Mapping[str, zoo.Model], kind: str) -> str:
    """A table, by family; of one kind, if `kind` says which."""
    shown = {name: m for name, m in models.items() if kind in ("", m.kind)}
    kinds = {model.kind for model in shown.values()}
    measure = _MEASURES[kinds.pop()] if len(kinds) == 1 else "(r)FID"
    tokenizer = "tokenizer" if measure != "rFID" else ""
    rows = [["", "parameters", "size", measure, "pixels", "licence", tokenizer]]
    heads = {}
    for family, group in itertools.groupby(shown, lambda name: shown[name].family):
        names = list(group)
        papers = dict.fromkeys(shown[name].paper for name in names)
        heads[len(rows)] = f"{family} ({', '.join(papers)})"
        rows += [_row(name, shown[name]) for name in names]
    lines = []
    for number, line in enumerate(_aligned(rows)):
        lines += ["", heads[number]] if number in heads else []
        lines.append(line)
    lines.append("")
    if any(row[0].startswith(HERE) for row in rows):
        lines.append(f"{HERE} is here, in {folder('x').parent}")
    if any("(code)" in model.licence for model in shown.values()):
        lines.append("(code): the licence of the code; that of the weights is not stated")
    if kind == "generator":
        rest = len(zoo.known()) - len(shown)
        lines.append(f"tokgen models --tokenizers lists the {rest} tokenizers")
    lines.append("tokgen models NAME says more of one, tokgen pull NAME brings it here")
    return "\n".join(lines)


def _row(name: str, model: zoo.Model) -> list[str]:
    return [
        f"{HERE if folder(name).exists() else ' '} {name}",
        counted(model.parameters),
        sized(model.size),
        "-" if model.fid is None else f"{model.fid:.2f}",
        str(model.pixels),
        model.licence,
        model.tokenizer,
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, whose second to fifth columns are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:>{width}}" if 1 <= number <= 4 else f"{cell:<{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def described(name: str, model: zoo.Model) -> str:
    """Everything of a model, and the commands that bring and use it."""
    what = "a tokenizer"
    if model.kind == "generator":
        what = f"a generator told {'a class of ImageNet' if model.classes else 'a text'}"
    place = folder(name)
    said = {
        "described in": model.paper,
        "parameters": f"{model.parameters:,}",
        _MEASURES[model.kind]: "not published" if model.fid is None else f"{model.fid:.2f}",
        "file": f"{model.file}, about {sized(model.size)}",
        "lies at": model.home.removesuffix(f"/{model.file}"),
        "licence": model.licence,
        "read by": " or ".join(f"--system {one}" for one in (model.system, model.otherwise) if one),
        "configuration": json.dumps(model.configuration) if model.configuration else "",
        "settings": " ".join(f"--set {override}" for override in model.overrides),
        "texts": model.text and f"as features of {model.text}",
    }
    if model.kind == "generator":
        said["tokenizer"] = f"{model.tokenizer}, about {sized(zoo.named(model.tokenizer).size)}"
    said["here"] = str(place) if place.exists() else "no"
    width = max(map(len, said)) + 2
    return "\n".join(
        [
            f"{name}: {model.family}, {what}; {model.pixels} x {model.pixels} pixels",
            "",
            *(f"  {label:<{width}}{text}" for label, text in said.items() if text),
            "",
            *(f"  {line}" for line in commands(name, model)),
        ]
    )


def commands(name: str, model: zoo.Model) -> list[str]:
    """What to type: to bring a model here, if it is not, and to use it."""
    lines = []
    for one in (model.tokenizer, name):
        row = one and not folder(one).exists() and zoo.named(one)
        if row and row.address:
            lines.append(f"# fetch {row.address}")
            lines.append(f"tokgen pull {one} --file {row.file}")
        elif row and one == name:  # and its tokenizer
            lines.append(f"tokgen pull {name}")
    if model.classes:
        use = f'sample {name} --classes "golden retriever"'
    elif model.kind == "generator":
        use = f"sample {name} --text FEATURES.npz"
    else:
        use = f"reconstruct {name} IMAGES{' --text FEATURES' if model.text else ''}"
    return [*lines, f"tokgen {use} --out look"]


def counted(number: int) -> str:
    """`955M`, `1.50B`: three digits."""
    return _short(number, ("", "k", "M", "B"))


def sized(number: int) -> str:
    """`436 MB`, `1.24 GB`: three digits."""
    return _short(number, (" bytes", " kB", " MB", " GB"))


def _short(number: float, units: Sequence[str]) -> str:
    power = 0
    while number >= 999.5 and power < len(units) - 1:  # 999.6 would be shown as 1000
        number, power = number / 1000, power + 1
    digits = 0 if not power or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{units[power]}"
