"""Read a config, check it whole, build what it names.

A config is a Python file with `get_config(variant="")` that returns a ConfigDict. Every leaf
section is the keyword arguments of one constructor, and its `name` is the name of the file:
`quantizer = dict(name="fsq", levels=(8, 6, 5))` builds `tokgen.quantizers.fsq.Quantizer`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import pkgutil
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np
from flax import nnx
from ml_collections import config_dict

from tokgen import ranges
from tokgen.interfaces import TokenLayout, UserError

# Sections that name a class: the package, the class, and the arguments that come from elsewhere.
CLASSES = {
    "data": ("data", "Source", ("split", "order", "doubtful")),
    "encoder": ("tokenizers", "Encoder", ("channels", "latent", "size", "precision", "rngs")),
    "quantizer": ("quantizers", "Quantizer", ("grid", "rngs")),
    "decoder": (
        "tokenizers",
        "Decoder",
        ("channels", "latent", "grid", "size", "precision", "rngs"),
    ),
    "critic.network": ("discriminators", "Discriminator", ("channels", "size", "rngs")),
    "generator": (
        "generators",
        "Generator",
        ("layout", "classes", "rates", "precision", "rngs"),
    ),
}


def programs() -> pathlib.Path:
    """The folder with the training programs and configs: a checkout, or inside the wheel."""
    package = pathlib.Path(__file__).parent
    inside = package / "programs"
    return inside if inside.is_dir() else package.parent


def load(reference: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of `PATH[:variant]` with overrides `a.b=value`; all problems in one error."""
    path, _, variant = reference.partition(":")
    file = next((f for f in (pathlib.Path(path), programs() / path) if f.is_file()), None)
    if file is None:
        known = sorted((programs() / "configs").glob("*/*.py"))
        names = [str(f.relative_to(programs())) for f in known]
        near = difflib.get_close_matches(path, names, 3, 0.5) or names
        raise UserError(f"no config file {path!r}; did you mean {', '.join(near)}?")
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


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Set `a.b=value` in place, each checked against the field that exists.

    Another `name` of a section comes first, wherever it stands: it brings the arguments of that
    constructor, with their defaults, in the place of the old one's. What both take and the new one
    has no default for stays.
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
    for name, value in values:
        if (name, value) in chosen:
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
    missing = [name for name in needed if _at(config, name) is None]
    if missing:
        options = " ".join(f"--config.{name}=VALUE" for name in missing)
        sections = ", ".join(dict.fromkeys(f"{n.rpartition('.')[0]}.name" for n in missing))
        problems.append(f"another {sections} needs {', '.join(missing)}: {options}")
    ranges.refuse(problems)


def _at(config: Any, name: str) -> Any:
    """The value of a dotted name; None where there is none."""
    for part in filter(None, name.split(".")):
        if not hasattr(config, "items") or part not in config:
            return None
        config = config[part]
    return config


def _kind(path: str, config: Any) -> str:
    """The key of CLASSES that a section, or one inside it, is built by; empty for others."""
    kind = next((k for k in CLASSES if path == k or path.startswith(f"{k}.")), "")
    if kind == "data" and path == kind and "name" not in (_at(config, path) or {}):
        return ""  # of a generator: a folder of token shards
    return kind


def _constructor(config: Any, path: str) -> tuple[Callable | None, str]:
    """(what the section at `path` is built by, its kind); None where no file has its name."""
    kind = _kind(path, config)
    try:
        return (named(_at(config, path), kind) if kind else None), kind
    except UserError:
        return None, kind


def _taken(config: Any, name: str) -> bool:
    """Whether a section's constructor has an argument that the section leaves to its default."""
    path, _, last = name.rpartition(".")
    target, kind = _constructor(config, path)
    return bool(target) and last in _parameters(target) and last not in CLASSES[kind][2]


def _hint(config: Any, name: str) -> Any:
    """The stated type of an argument of a section with a name."""
    path, _, last = name.rpartition(".")
    target, _ = _constructor(config, path)
    return ranges.hints(target).get(last) if target else None


def _rename(config: ml_collections.ConfigDict, path: str, name: str) -> dict[str, str]:
    """Make the section at `path` one of another constructor; its arguments without a default."""
    kind = _kind(path, config)
    parent_path, _, last = path.rpartition(".")
    parent, old = _at(config, parent_path), _at(config, path)
    if not isinstance(old, ml_collections.ConfigDict | None) or parent is None:
        raise UserError(_unknown(path, config))
    if old is None:
        # a section inside another begins where the constructor of that one takes it
        outer = _kind(parent_path, config)
        if path != kind and (not outer or last not in _parameters(named(parent, outer))):
            raise UserError(_unknown(path, config))
    old = {} if old is None else dict(old.items())
    if old.get("name") == name:
        return {}
    taken = _parameters(named({"name": name}, kind))
    context = CLASSES[kind][2]
    section, needed = {"name": name}, {}
    for argument, parameter in taken.items():
        has_default = parameter.default is not inspect.Parameter.empty
        if argument in context or argument == "rates":
            if argument in old:
                section[argument] = old[argument]
        elif has_default:
            section[argument] = parameter.default
        elif argument in old and ranges.fits(_plain(old[argument]), _hint_of(kind, name, argument)):
            section[argument] = old[argument]
        else:
            needed[f"{path}.{argument}"] = name
    with config.unlocked(), parent.ignore_type():
        parent[last] = ml_collections.ConfigDict(section)
    return needed


def _hint_of(kind: str, name: str, argument: str) -> Any:
    return ranges.hints(named({"name": name}, kind)).get(argument, Any)


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


def named(section: Any, kind: str) -> Callable:
    """The class that a section names; `kind` is a key of CLASSES."""
    package, attribute, _ = CLASSES[kind]
    name = section.get("name", "")
    folder = importlib.import_module(f"tokgen.{package}")
    files = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    valid = [f for f in files if f == name]
    if valid:
        module = importlib.import_module(f"tokgen.{package}.{name}")
        if hasattr(module, attribute):
            return getattr(module, attribute)
    fitting = [f for f in files if _defines(folder, f, attribute)]
    near = difflib.get_close_matches(str(name), fitting, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{kind}.name must be one of {fitting}; found {name!r}{hint}")


def _defines(folder, file: str, attribute: str) -> bool:
    source = pathlib.Path(folder.__path__[0]) / f"{file}.py"
    return source.is_file() and f"class {attribute}" in source.read_text()


def check(
    settings: Any, fields: Callable | None = None, **functions: tuple[Callable, tuple[str, ...]]
) -> None:
    """Hold every field against the signature that it is for; all problems in one error.

    `fields` is what takes the whole config. `functions` names what else is called with a section,
    by its path with `__` for a dot, and the arguments that come from elsewhere. Nothing is called.
    """
    problems = [] if fields is None else _mismatches(fields, settings, (), "config")
    for kind in CLASSES:
        section = _at(settings, kind)
        # data may be a folder of token shards, an empty network that of no critic
        free = kind in ("data", "critic.network")
        if free and hasattr(section, "items") and "name" not in section:
            continue
        if section is not None:
            problems += _section_problems(section, kind)
    for path, (function, context) in functions.items():
        path = path.replace("__", ".")
        section = _at(settings, path)
        problems += _mismatches(function, {} if section is None else section, context, path)
    # a section that is none is told once, by what takes the whole
    ranges.refuse(list(dict.fromkeys(problems)))


def _section_problems(section: Any, kind: str) -> list[str]:
    """Of a section that names a class, and of the sections with names in it."""
    context = CLASSES[kind][2]
    if not hasattr(section, "items"):
        return [f"{kind} must be a section; found {section!r}"]
    try:
        target = named(section, kind)
    except UserError as error:
        return [str(error)]
    arguments = {key: value for key, value in section.items() if key not in ("name", "rates")}
    inner = {key: value for key, value in arguments.items() if _is_named(value)}
    free = [name for name in context if name not in arguments]
    problems = _mismatches(target, arguments, free, kind)
    for value in inner.values():
        problems += _section_problems(value, kind)
    return problems


def build(section: Any, kind: str, **context: Any) -> Any:
    """An instance of what the section names; `context` holds what the config need not say.

    A section may hold sections with names of their own (a decoder made of two): they are built
    first, and may state for themselves what the context says of the whole.
    """
    target = named(section, kind)
    arguments = {key: _plain(value) for key, value in section.items() if key != "name"}
    context = {name: value for name, value in context.items() if name not in arguments}
    ranges.refuse(_mismatches(target, arguments, context, kind))
    for key, value in arguments.items():
        if _is_named(value):
            own = {name: item for name, item in context.items() if name not in value}
            arguments[key] = build(value, kind, **own)
    wanted = _parameters(target)
    context = {name: value for name, value in context.items() if name in wanted}
    return _constructed(target, kind, arguments, context)


def _constructed(target: Callable, name: str, arguments: dict, context: dict) -> Any:
    """`target` called; only what it raises on purpose is told as a mistake in the section."""
    try:
        return target(**arguments, **context)
    except UserError as error:
        # commands build sources of folders that no config names
        if name == "data" or str(error).startswith("config section"):
            raise
        raise UserError(f"config section {name!r}: {error}") from error


def _is_named(value: Any) -> bool:
    return isinstance(value, dict | ml_collections.ConfigDict) and "name" in value


def _parameters(target: Callable) -> dict[str, inspect.Parameter]:
    # of __init__: the metaclass of nnx modules hides it behind (*args, **kwargs)
    function = target.__init__ if inspect.isclass(target) else target
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def _mismatches(target: Callable, arguments: Any, context: Any, kind: str) -> list[str]:
    """Unknown and missing arguments of one section, and values out of their type or range."""
    if not hasattr(arguments, "items"):
        return [f"{kind} must be a section; found {arguments!r}"]
    parameters = _parameters(target)
    free = [name for name in parameters if name not in context]
    problems = []
    for name in arguments:
        if name not in free:
            near = difflib.get_close_matches(str(name), free, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(free)}"
            problems.append(f"{kind} has no argument {name!r}{hint}")
    for name in free:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            problems.append(f"{kind} needs {name!r}")
    stated = ranges.hints(target)
    given = {
        name: _plain(value)
        for name, value in arguments.items()
        # a section of its own becomes the module that is asked for
        if name in free and not (_is_named(value) and _is_module(stated.get(name)))
    }
    prefix = "" if kind == "config" else f"{kind}."
    return problems + ranges.problems(target, given, prefix)


def _is_module(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, nnx.Module)


def call(function: Callable, section: Any, name: str, **context: Any) -> Any:
    """`function` with a section as its keyword arguments, problems told as of `build`."""
    arguments = {key: _plain(value) for key, value in section.items()}
    ranges.refuse(_mismatches(function, arguments, context, name))
    return _constructed(function, name, arguments, context)


def _plain(value: Any) -> Any:
    """Sections as dictionaries, lists as tuples (configs read back from JSON have lists)."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()  # JSON knows Python's numbers only
    return value


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as dictionaries, tuples and numbers; compared and saved as JSON."""
    return _plain(config)


def tokenizer(config: Any, *, rngs):
    """The Tokenizer that a config describes."""
    from tokgen.nn import precision
    from tokgen.tokenizers import tokenizer as tokenizers

    _need(config, "precision", "view", "encoder", "quantizer", "decoder")
    at = call(precision.Precision, config["precision"], "precision")
    size, channels = _constructed(_pixels, "view", _plain(config["view"]), {})
    encoder = named(config["encoder"], "encoder")
    arguments = {key: _plain(value) for key, value in config["encoder"].items() if key != "name"}
    ranges.refuse(_mismatches(encoder, arguments, CLASSES["encoder"][2], "encoder"))
    grid = _constructed(encoder.grid, "encoder", dict(arguments, size=size), {})
    quantizer = build(config["quantizer"], "quantizer", grid=grid, rngs=rngs)
    context = dict(channels=channels, size=size, precision=at, rngs=rngs)
    return tokenizers.Tokenizer(
        build(config["encoder"], "encoder", latent=quantizer.inputs, **context),
        quantizer,
        build(config["decoder"], "decoder", latent=quantizer.channels, grid=grid, **context),
        pixels=_plain(config.get("pixels", (-1.0, 1.0))),
        size=(*size, channels),
    )


def _need(config: Any, *sections: str) -> None:
    """An error that lists the sections that a config lacks."""
    lacking = [name for name in sections if not hasattr(config.get(name), "items")]
    if lacking:
        raise UserError(f"the config needs {', '.join(lacking)}, each a section; it has none such")


@ranges.checked
def _pixels(size: tuple[ranges.Side, ranges.Side], channels: ranges.Width = 3, **_):
    """(size, channels): all that a network needs of a view."""
    return tuple(size), channels


def generator(config: Any, layout: TokenLayout, classes: int, *, rngs):
    """The Generator that a config describes, for tokens of a layout."""
    from tokgen.nn import precision, transformer

    _need(config, "precision", "generator")
    at = call(precision.Precision, config["precision"], "precision")
    section = dict(config["generator"].items())
    rates = call(transformer.Rates, section.pop("rates", {}), "generator.rates")
    context = dict(layout=layout, classes=classes, rates=rates, precision=at, rngs=rngs)
    return build(section, "generator", **context)
