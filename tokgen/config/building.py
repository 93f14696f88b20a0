"""Build what a config names: every leaf section is the arguments of one constructor.

The `name` of a section is the name of a file: `quantizer = dict(name="fsq", levels=(8, 6, 5))`
builds `tokgen.quantizers.fsq.Quantizer`. No registry.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pathlib
import pkgutil
import types
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from flax import nnx

from tokgen import choices, ranges
from tokgen.config import migration
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn import dropout

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
    "discriminator.network": ("discriminators", "Discriminator", ("channels", "size", "rngs")),
    "generator": (
        "generators",
        "Generator",
        ("layout", "classes", "rates", "precision", "rngs"),
    ),
}


def at(config: Any, name: str) -> Any:
    """The value of a dotted name; None where there is none."""
    for part in filter(None, name.split(".")):
        if not hasattr(config, "items") or part not in config:
            return None
        config = config[part]
    return config


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
    raise UserError(choices.refusal(fitting, name, f"{kind}.name"))


def _defines(folder: types.ModuleType, file: str, attribute: str) -> bool:
    sources = (pathlib.Path(place) / f"{file}.py" for place in folder.__path__)
    return any(f"class {attribute}" in source.read_text() for source in sources if source.is_file())


def check(
    settings: Any, fields: Callable | None = None, **functions: tuple[Callable, tuple[str, ...]]
) -> None:
    """Hold every field against the signature that it is for; all problems in one error.

    `fields` is what takes the whole config. `functions` names what else is called with a section,
    by its path with `__` for a dot, and the arguments that come from elsewhere. Nothing is called.
    """
    problems = [] if fields is None else _mismatches(fields, settings, (), "config")
    for kind in CLASSES:
        section = at(settings, kind)
        # data may be a folder of token shards, an empty network that of no discriminator
        free = kind in ("data", "discriminator.network")
        if free and hasattr(section, "items") and "name" not in section:
            continue
        if section is not None:
            problems += _section_problems(section, kind)
    for path, (function, context) in functions.items():
        path = path.replace("__", ".")
        section = at(settings, path)
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
    arguments = {key: plain(value) for key, value in section.items() if key != "name"}
    context = {name: value for name, value in context.items() if name not in arguments}
    ranges.refuse(_mismatches(target, arguments, context, kind))
    for key, value in arguments.items():
        if _is_named(value):
            own = {name: item for name, item in context.items() if name not in value}
            arguments[key] = build(value, kind, **own)
    wanted = arguments_of(target)
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


def arguments_of(target: Callable) -> dict[str, inspect.Parameter]:
    # of __init__: the metaclass of nnx modules hides it behind (*args, **kwargs)
    function = target.__init__ if inspect.isclass(target) else target
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def _mismatches(target: Callable, arguments: Any, context: Any, kind: str) -> list[str]:
    """Unknown and missing arguments of one section, and values out of their type or range."""
    if not hasattr(arguments, "items"):
        return [f"{kind} must be a section; found {arguments!r}"]
    parameters = arguments_of(target)
    free = [name for name in parameters if name not in context]
    problems = []
    for name in arguments:
        if name not in free:
            path = name if kind == "config" else f"{kind}.{name}"
            near = difflib.get_close_matches(str(name), free, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(free)}"
            if (now := migration.field(str(path))) != path:
                hint = f"; it is called {now} now"
            problems.append(f"{kind} has no argument {name!r}{hint}")
    for name in free:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            problems.append(f"{kind} needs {name!r}")
    stated = ranges.hints(target)
    given = {
        name: plain(value)
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
    arguments = {key: plain(value) for key, value in section.items()}
    ranges.refuse(_mismatches(function, arguments, context, name))
    return _constructed(function, name, arguments, context)


def plain(value: Any) -> Any:
    """Sections as dictionaries, lists as tuples (configs read back from JSON have lists)."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()  # JSON knows Python's numbers only
    return value


def tokenizer(config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """The Tokenizer that a config describes."""
    from tokgen.nn import precision
    from tokgen.tokenizers import tokenizer as tokenizers

    _need(config, "precision", "view", "encoder", "quantizer", "decoder")
    at = call(precision.Precision, config["precision"], "precision")
    size, channels = _constructed(_pixels, "view", plain(config["view"]), {})
    encoder = named(config["encoder"], "encoder")
    arguments = {key: plain(value) for key, value in config["encoder"].items() if key != "name"}
    ranges.refuse(_mismatches(encoder, arguments, CLASSES["encoder"][2], "encoder"))
    grid = _constructed(encoder.grid, "encoder", dict(arguments, size=size), {})
    quantizer = build(config["quantizer"], "quantizer", grid=grid, rngs=rngs)
    context = dict(channels=channels, size=size, precision=at, rngs=rngs)
    return tokenizers.Tokenizer(
        build(config["encoder"], "encoder", latent=quantizer.inputs, **context),
        quantizer,
        build(config["decoder"], "decoder", latent=quantizer.channels, grid=grid, **context),
        pixels=plain(config.get("pixels", (-1.0, 1.0))),
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


def generator(config: Any, layout: TokenLayout, classes: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """The Generator that a config describes, for tokens of a layout."""
    from tokgen.nn import precision

    _need(config, "precision", "generator")
    at = call(precision.Precision, config["precision"], "precision")
    section = dict(config["generator"].items())
    rates = call(dropout.Rates, section.pop("rates", {}), "generator.rates")
    context = dict(layout=layout, classes=classes, rates=rates, precision=at, rngs=rngs)
    return build(section, "generator", **context)
