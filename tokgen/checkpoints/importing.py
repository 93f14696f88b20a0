"""A published weight file, or an export of ours, into a checkpoint of step 0."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import yaml

from tokgen import choices, output, records, runtime
from tokgen.checkpoints import exporting, imported as imports, loading
from tokgen.errors import UserError
from tokgen.pretrained import system as systems, transfer
from tokgen.pretrained.formats import paths
from tokgen.zoo import model as zoo

LARGEST_YAML = 2**20  # characters; it is slow to read

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Import:
    """What was imported, and where it lies.

    Attributes:
        out, step: the folder of the run, and the step in it.
        fitting: what the file holds of the model: its sizes, and what it has beside it.
        parameters: how many numbers an optimizer would move.
        source: what the checkpoint's record says: system, file, sha256, home, licence; of an export
            what it says itself.
        tokenizer: whether a generator's tokenizer was named.
        notes: what is to be told of how the file was read.
    """

    out: pathlib.Path
    step: pathlib.Path
    fitting: transfer.Fitting
    parameters: int
    source: dict
    tokenizer: bool
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def model(self) -> transfer.Imported:
        """The model, read from the step when it is first asked for."""
        return imports.load_imported(self.step)[1]


def import_file(
    file: Path,
    out: Path,
    system: str = "",
    *,
    config: Path | Mapping = "",
    entry: str = "",
    overrides: Sequence[str] = (),
    unknown: str = "refuse",
    tokenizer: Path = "",
    classes: Sequence[str] = (),
    row: zoo.Model | None = None,
) -> Import:
    """Write a checkpoint of step 0 to the new folder `out`, with licence and hash of its source.

    Args:
        file: a weight file, the index of one in parts, a folder with one; or an export of ours.
        out: the folder of the run.
        system: the published system that it is of, of `pretrained.system.importable()`; "" where
            the file is an export of ours, which says all of itself.
        config: the published configuration, or its file (JSON or YAML), where sizes are not the
            published ones.
        entry: which entry of the file holds the weights, dotted; "" finds it.
        overrides: fields of our config that change no weight, as "view.size=384,384".
        unknown: "refuse" or "opaque": objects of unknown classes are an error, or are left out.
        tokenizer: of a generator, the checkpoint of its tokenizer.
        classes: names of a generator's classes in the order of their numbers, which stay without
            names where there are not as many.
        row: the published model that the file is of, from `tokgen.models()`; None looks for it by
            the file's name. It says what `config` and `overrides` do not.

    Raises:
        UserError: the file does not fit the system, or `out` is not new.

    Examples:
        >>> export = tokgen.export_checkpoint("runs/tokenizer", "to_import")
        >>> found = tokgen.import_file(export.out, "runs/imported")
        >>> found.parameters, tokgen.load("runs/imported").fingerprint[:4] == "dead"
        (14051, False)
    """
    file = pathlib.Path(file)
    exported = not system and exporting.is_export(file)
    if exported:
        given = dict(config=config, entry=entry, set=overrides, opaque=unknown != "refuse")
        _refuse_given(file, [name for name, value in given.items() if value])
    else:
        check(file, system, tokenizer)
    inputs = [file if file.is_file() else "", tokenizer]
    if not isinstance(config, Mapping):
        inputs.append(config)
    with output.folder(out, records={}, inputs=inputs) as place:
        runtime.devices()
        notes, names = (), tuple(classes)
        if exported:
            model, record = exporting.read(file)
            if tokenizer and model.kind != "generator":
                raise UserError(f"--tokenizer is for generators; {file} is a tokenizer itself")
            names, source = tuple(record["classes"]), record.get("source")
            source = source if isinstance(source, dict) else {}
            named = loading.load_reference(tokenizer) if tokenizer else None
        else:
            # first: of a large file the reading takes minutes
            named = loading.load_reference(tokenizer) if tokenizer else None
            rows = {"": row} if row else _rows(file, system)
            published, overrides, notes = _settings(file, config, overrides, rows)
            model = transfer.held(
                file, system, published, overrides=overrides, entry=entry, unknown=unknown
            )
            source = _source(file, system, rows)
            names = names if len(names) == model.classes else ()
        step = imports.save_fitting(place.path, model, source, named, names)
    return Import(
        out=place.target,
        step=place.target / step.relative_to(place.path),
        fitting=model,
        parameters=transfer.parameters(model.network),
        source=source,
        tokenizer=bool(tokenizer),
        notes=(*notes, *model.notes),
    )


def check(file: pathlib.Path, system: str, tokenizer: Path) -> None:
    """Refuse what cannot be imported as a published file, before anything is read."""
    found = choices.named(systems.importable(), system, "--system")
    if not file.exists():
        rows = {name: f"{name} ({row.file})" for name, row in zoo.of(system).items()}
        raise UserError(
            f"no file {file}; tokgen pull NAME fetches one that is published, and imports it: "
            f"{', '.join(rows.values())}"
            if rows
            else f"no file {file}; of {system} no weights are published that have a name here"
        )
    if tokenizer and found.tokens is None:
        raise UserError(f"--tokenizer is for generators; {system} is a tokenizer itself")
    if exporting.is_export(file):
        raise UserError(
            f"{file} is an export of tokgen: leave out --system, or name the published file in it"
        )


def _refuse_given(file: pathlib.Path, given: Sequence[str]) -> None:
    if given:
        raise UserError(
            f"{file} is an export of tokgen, which says all of itself: leave out "
            f"--{given[0]}, or name the published file in it with --system"
        )


def _name(file: pathlib.Path) -> str:
    """Of the weight file that a path means."""
    return pathlib.Path(paths.located(file)).name.removesuffix(paths.INDEX)


def _rows(file: pathlib.Path, system: str) -> dict[str, zoo.Model]:
    """The published models that a file may be of, by their names: those whose file is called so."""
    name = _name(file)
    rows = zoo.of(system)
    return {key: row for key, row in rows.items() if pathlib.PurePosixPath(row.file).name == name}


def _source(file: pathlib.Path, system: str, rows: Mapping[str, zoo.Model]) -> dict:
    """What the record says of a published file; where it lies, as far as its rows tell."""
    found = systems.named(system)
    homes = [row.home for row in (rows or zoo.of(system)).values()]
    licences = [row.licence for row in rows.values()]
    return {
        "system": system,
        "file": _name(file),
        "sha256": transfer.digest(file),
        "home": ", ".join(dict.fromkeys(homes)) or found.home,
        "licence": " or ".join(dict.fromkeys(licences)) or found.licence,
    }


def _settings(
    file: pathlib.Path,
    config: Path | Mapping,
    overrides: Sequence[str],
    rows: Mapping[str, zoo.Model],
) -> tuple[dict, tuple[str, ...], tuple[str, ...]]:
    """(the published configuration, fields of ours, what is to be told).

    The weights do not tell all of it, as how many tokens an image has. What is not given either is
    that of the file's rows, where they agree.
    """
    published, notes = _configuration(file, config)
    special = {name: row for name, row in rows.items() if row.configuration or row.overrides}
    if not special:
        return published, tuple(overrides), notes
    if len({_options(row.configuration, row.overrides) for row in rows.values()}) > 1:
        plain = next((name for name in rows if name not in special), "one of usual sizes")
        others = [
            f"for {name} add {_options(row.configuration, row.overrides)}"
            for name, row in special.items()
        ]
        if not published and not overrides:
            told = f"{_name(file)} is the file of {' and '.join(rows)}: it is read as {plain}"
            notes += ("; ".join([told, *others]),)
        return published, tuple(overrides), notes
    row, names = next(iter(special.values())), " or ".join(filter(None, special))
    given = {override.partition("=")[0] for override in overrides}
    fields = tuple(field for field in row.overrides if field.partition("=")[0] not in given)
    missing = {name: v for name, v in row.configuration.items() if name not in published}
    if names and (missing or fields):
        told = f"{_name(file)} is the file of {names}: it is read with {_options(missing, fields)}"
        notes += (f"{told}, which a --config or --set of yours replaces",)
    return {**missing, **published}, (*fields, *overrides), notes


def _options(configuration: Mapping, fields: Sequence[str]) -> str:
    """What a row says, as options of `tokgen import`."""
    said = [f"--config of {json.dumps(dict(configuration))}"] if configuration else []
    return " ".join([*said, *(f"--set {field}" for field in fields)])


def _configuration(file: pathlib.Path, given: Path | Mapping) -> tuple[dict, tuple[str, ...]]:
    """(the published configuration, what is to be told): one that is given, or lies beside."""
    if isinstance(given, Mapping):
        return dict(given), ()
    if given:
        return _read(given), ()
    beside = (file if file.is_dir() else file.parent) / "config.json"
    if (file.is_dir() or file.name.endswith(paths.INDEX)) and beside.is_file():
        return _read(beside), (f"the configuration is {beside}",)
    return {}, ()


def _read(path: Path) -> dict:
    try:
        try:
            published = records.load(pathlib.Path(path))
        except ValueError:  # JSON first: YAML takes its 1e-06 for a word
            with open(path, encoding="utf-8") as file:
                published = yaml.safe_load(file.read(LARGEST_YAML))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(published, dict):
        raise UserError(f"--config {path} must hold a table of names and values")
    return published
