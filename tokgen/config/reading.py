"""Read a config file, and what a command line overrides in it.

A config is a Python file with `get_config(variant="")` that returns a ConfigDict.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from tokgen import ranges
from tokgen.config import building, evaluators, migration
from tokgen.interfaces import UserError


def programs() -> pathlib.Path:
    """The folder with the training programs and configs: a checkout, or inside the wheel."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "programs"
    return inside if inside.is_dir() else package.parent


def shipped(reference: str) -> ml_collections.ConfigDict:
    """The config of `PATH[:variant]` as it comes with tokgen, for configs that build on it.

    Whatever lies in the present folder, and wherever a copy of the other config lies.
    """
    return load(str(programs() / reference))


def load(reference: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `PATH[:variant]` with overrides `a.b=value`; all problems in one error."""
    path, _, variant = reference.partition(":")
    file = next((f for f in (pathlib.Path(path), programs() / path) if f.is_file()), None)
    if file is None:
        known = sorted((programs() / "configs").glob("*/*.py"))
        names = [str(f.relative_to(programs())) for f in known]
        near = difflib.get_close_matches(path, names, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise UserError(f"no config file {path!r}; {hint}")
    config = _called(file, path, variant)
    override(config, overrides)
    return config


def _called(file: pathlib.Path, path: str, variant: str) -> ml_collections.ConfigDict:
    """What `get_config` of a file returns; a mistake in the file ends in one message."""
    name = f"tokgen_config_{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file))  # whatever the file's ending
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    try:
        loader.exec_module(module)
    except UserError:
        raise
    except _MISTAKES as error:
        raise UserError(f"config file {path!r} cannot be run: {_told(error, file)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"config file {path!r} needs a function get_config(variant=''), which returns a "
            "ml_collections.ConfigDict; found none"
        )
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(f"config {path!r} has no variants; found {variant!r}")
    try:
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except _MISTAKES as error:
        if variant and isinstance(error, KeyError | ValueError):
            raise UserError(f"config {path!r} has no variant {variant!r}: {error}") from error
        raise UserError(f"get_config of {path!r} failed: {_told(error, file)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config of {path!r} must return a ml_collections.ConfigDict; found "
            f"{type(config).__name__}"
        )
    empty = _placeholders(config)
    if empty:
        raise UserError(f"config {path!r} leaves {', '.join(empty)} without a value")
    return config.copy_and_resolve_references()


# What the code of a config file raises; it is the user's, whatever it is.
_MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)


def _told(error: BaseException, file: pathlib.Path) -> str:
    """The kind of an error, its words, and the last line of the file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    at = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{at}"


def _placeholders(section: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Names of required fields that hold no value yet."""
    found = []
    for name, value in section.items(preserve_field_references=True):
        if isinstance(value, ml_collections.FieldReference):
            try:
                value = value.get()
            except config_dict.RequiredValueError:
                found.append(prefix + name)
                continue
        if isinstance(value, ml_collections.ConfigDict):
            found += _placeholders(value, f"{prefix}{name}.")
    return found


# How a run goes and not what it trains: fields that a config may leave to their defaults
LEFT_OUT = {"accumulate": int, "profile": tuple[int, ...], "view.resize": str}
BEGUN = r"evaluators\.[^.]+\.kind"


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Set `a.b=value` in place, each checked against the field that exists.

    Another `name` of a section comes first, wherever it stands: it brings the arguments of that
    constructor, with their defaults, in the place of the old one's. What both take and the new one
    has no default for stays. The `kind` of an evaluator comes first, too, and begins one that is
    not there yet.
    """
    problems, values = [], []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r}: an override needs a value, as --config.{name}=VALUE")
        else:
            values.append((name, value))
    chosen = [(name, value) for name, value in values if _kind(name.rpartition(".")[0], config)]
    chosen = [(name, value) for name, value in chosen if name.endswith(".name")]
    needed = {}  # arguments without a default of sections with another name
    for name, value in sorted(chosen, key=lambda pair: pair[0].count(".")):
        try:
            needed |= _rename(config, name.removesuffix(".name"), value)
        except UserError as error:
            problems.append(str(error))
    begun = [(name, value) for name, value in values if re.fullmatch(BEGUN, name)]
    for name, kind in begun:
        try:
            _begin(config, name.split(".")[1], kind)
        except UserError as error:
            problems.append(str(error))
    for name, value in values:
        if (name, value) in [*chosen, *begun]:
            continue
        if (now := migration.field(name)) != name and building.at(config, name) is None:
            problems.append(f"unknown config key {name!r}; it is called {now} now")
            continue
        *parents, last = name.split(".")
        section = config
        for depth, parent in enumerate(parents):
            if isinstance(section, ml_collections.ConfigDict) and parent in section:
                section = section[parent]
                continue
            problems.append(_unknown(".".join(parents[: depth + 1]), config))
            section = None
            break
        if section is None:
            continue
        here = isinstance(section, ml_collections.ConfigDict)
        if not here or not (last in section or name in needed or _taken(config, name)):
            problems.append(_unknown(name, config))
            continue
        if isinstance(section.get(last), ml_collections.ConfigDict):
            fields = ", ".join(f"{name}.{field}" for field in section[last])
            problems.append(f"{name} is a section; set one of its fields: {fields}")
            continue
        try:
            new = _typed(value, section.get(last), _hint(config, name))
        except ValueError as error:
            problems.append(f"{name}={value}: {error}")
        else:
            # a field that was None, or a row of rows, takes values of another type
            with config.unlocked(), section.ignore_type():
                section[last] = new
        needed.pop(name, None)
    missing = [name for name in needed if building.at(config, name) is None]
    if missing:
        options = " ".join(f"--config.{name}=VALUE" for name in missing)
        sections = ", ".join(dict.fromkeys(f"{n.rpartition('.')[0]}.name" for n in missing))
        problems.append(f"another {sections} needs {', '.join(missing)}: {options}")
    ranges.refuse(problems)


def _kind(path: str, config: Any) -> str:
    """The key of CLASSES that a section, or one inside it, is built by; empty for others."""
    kind = next((k for k in building.CLASSES if path == k or path.startswith(f"{k}.")), "")
    if kind == "data" and path == kind and "name" not in (building.at(config, path) or {}):
        return ""  # of a generator: a folder of token shards
    return kind


def _constructor(config: Any, path: str) -> tuple[Callable | None, str]:
    """(what the section at `path` is built by, its kind); None where no file has its name."""
    kind = _kind(path, config)
    try:
        return (building.named(building.at(config, path), kind) if kind else None), kind
    except UserError:
        return None, kind


def _taken(config: Any, name: str) -> bool:
    """Whether a section's constructor has an argument that the section leaves to its default."""
    path, _, last = name.rpartition(".")
    if name in LEFT_OUT:
        return not path or path in config
    if evaluator := evaluators.takes(config, path):
        return last in building.arguments_of(evaluator)
    target, kind = _constructor(config, path)
    return (
        bool(target)
        and last in building.arguments_of(target)
        and last not in building.CLASSES[kind][2]
    )


def _hint(config: Any, name: str) -> Any:
    """The stated type of an argument of a section with a name."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    path, _, last = name.rpartition(".")
    target = evaluators.takes(config, path) or _constructor(config, path)[0]
    return ranges.hints(target).get(last) if target else None


def _rename(config: ml_collections.ConfigDict, path: str, name: str) -> dict[str, str]:
    """Make the section at `path` one of another constructor; its arguments without a default."""
    kind = _kind(path, config)
    parent_path, _, last = path.rpartition(".")
    parent, old = building.at(config, parent_path), building.at(config, path)
    if not isinstance(old, ml_collections.ConfigDict | None) or parent is None:
        raise UserError(_unknown(path, config))
    if old is None:
        # a section inside another begins where the constructor of that one takes it
        outer = _kind(parent_path, config)
        if path != kind and (
            not outer or last not in building.arguments_of(building.named(parent, outer))
        ):
            raise UserError(_unknown(path, config))
    old = {} if old is None else dict(old.items())
    if old.get("name") == name:
        return {}
    taken = building.arguments_of(building.named({"name": name}, kind))
    context = building.CLASSES[kind][2]
    section, needed = {"name": name}, {}
    for argument, parameter in taken.items():
        has_default = parameter.default is not inspect.Parameter.empty
        if argument in context or argument == "rates":
            if argument in old:
                section[argument] = old[argument]
        elif has_default:
            section[argument] = parameter.default
        elif argument in old and ranges.fits(
            building.plain(old[argument]), _hint_of(kind, name, argument)
        ):
            section[argument] = old[argument]
        else:
            needed[f"{path}.{argument}"] = name
    with config.unlocked(), parent.ignore_type():
        parent[last] = ml_collections.ConfigDict(section)
    return needed


def _begin(config: ml_collections.ConfigDict, name: str, kind: str) -> None:
    """Make the evaluator of that name one of a kind; where there is none, a new one."""
    section = evaluators.begun(config, name, kind)
    with config.unlocked(), config.ignore_type():
        if "evaluators" not in config:
            config.evaluators = ml_collections.ConfigDict()
        with config.evaluators.ignore_type():
            config.evaluators[name] = ml_collections.ConfigDict(section)


def _hint_of(kind: str, name: str, argument: str) -> Any:
    return ranges.hints(building.named({"name": name}, kind)).get(argument, Any)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | dict):
            fields.update(flat(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = value
    return fields


def _unknown(name: str, config) -> str:
    top, _, inner = name.partition(".")
    if top == "evaluators" and (inner := inner.partition(".")[0]) not in config.get(top, {}):
        kind = f"--config.evaluators.{inner or 'NAME'}.kind"
        return f"unknown config key {name!r}; an evaluator begins with its kind: {kind}=score"
    names = list(flat(config))
    sections = {n.rsplit(".", 1)[0] for n in names if "." in n}
    near = difflib.get_close_matches(name, [*names, *sections], 3, 0.6)
    last = name.rsplit(".", 1)[-1]
    near = near or [n for n in names if n.rsplit(".", 1)[-1] == last]
    hint = f"; did you mean {', '.join(near)}?" if near else f"; it has {', '.join(config)}"
    return f"unknown config key {name!r}{hint}"


def _typed(text: str, old: Any, hint: Any = None) -> Any:
    """The value of `text` in the type of the field that it replaces, or of its argument."""
    if isinstance(old, str) or (old is None and ranges.text(hint)):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if hint is not None and ranges.fits(found := ranges.typed(value, hint), hint):
        # such as None, or a number per level, for an argument that takes either
        return found
    if old is None:
        if hint is None:
            return value
        raise ValueError(f"needs {ranges.described(hint)}; found {type(value).__name__} {value!r}")
    if isinstance(old, float):
        value = ranges.typed(value, float)
    if isinstance(old, tuple) and isinstance(value, list | tuple):
        floats = old and all(isinstance(v, float) for v in old)
        value = ranges.typed(value, tuple[float if floats else Any, ...])
    if type(value) is not type(old):
        raise ValueError(
            f"needs {type(old).__name__} (as {old!r}); found {type(value).__name__} {value!r}"
        )
    return value
