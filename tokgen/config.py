"""Read a config, check it whole, build what it names.

A config is a Python file with `get_config(variant="")` that returns a ConfigDict. Every leaf
section is the keyword arguments of one constructor, and its `name` is the name of the file:
`quantizer = dict(name="fsq", levels=(8, 6, 5))` builds `tokgen.quantizers.fsq.Quantizer`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from tokgen.interfaces import TokenLayout, UserError

# Sections that name a class: the package, the class, and the arguments that come from elsewhere.
CLASSES = {
    "data": ("data", "Source", ("split",)),
    "encoder": ("tokenizers", "Encoder", ("channels", "latent", "size", "precision", "rngs")),
    "quantizer": ("quantizers", "Quantizer", ("grid", "rngs")),
    "decoder": (
        "tokenizers",
        "Decoder",
        ("channels", "latent", "grid", "size", "precision", "rngs"),
    ),
    "critic.network": ("critics", "Discriminator", ("channels", "size", "rngs")),
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
    spec = importlib.util.spec_from_file_location(f"tokgen_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if variant and not inspect.signature(module.get_config).parameters:
        raise UserError(f"config {path!r} has no variants; found {variant!r}")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except (KeyError, ValueError) as error:
        raise UserError(f"config {path!r} has no variant {variant!r}: {error}") from error
    override(config, overrides)
    return config


def override(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Set `a.b=value` in place, each checked against the field that exists."""
    problems = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{text!r}: an override needs a value, as --config.{name}=VALUE")
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
        if not isinstance(section, ml_collections.ConfigDict) or last not in section:
            problems.append(_unknown(name, config))
            continue
        if isinstance(section[last], ml_collections.ConfigDict):
            fields = ", ".join(f"{name}.{field}" for field in section[last])
            problems.append(f"{name} is a section; set one of its fields: {fields}")
            continue
        try:
            section[last] = _typed(value, section[last])
        except ValueError as error:
            problems.append(f"{name}={value}: {error}")
    _raise(problems)


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


def _typed(text: str, old: Any) -> Any:
    """The value of `text` in the type of the field that it replaces."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, tuple) and old and isinstance(value, tuple):
        floats = all(isinstance(v, float) for v in old)
        value = tuple(float(v) if floats and isinstance(v, int) else v for v in value)
    if old is not None and type(value) is not type(old):
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


def check(settings: Any, **functions: tuple[Callable, tuple[str, ...]]) -> None:
    """Bind every section to the constructor that it is for; all problems in one error.

    `functions` names what else is called with a section, by its path with `__` for a dot, and the
    arguments that come from elsewhere.
    """
    problems = []
    for kind in CLASSES:
        section = settings
        for name in kind.split("."):
            section = section.get(name) if section else None
        # data may be a folder of token shards, an empty network that of no critic
        if section and (kind not in ("data", "critic.network") or "name" in section):
            problems += _section_problems(section, kind)
    for path, (function, context) in functions.items():
        section, path = settings, path.replace("__", ".")
        for name in path.split("."):
            section = section.get(name, {}) if section is not None else {}
        problems += _mismatches(function, section, context, path)
    _raise(problems)


def _section_problems(section: Any, kind: str) -> list[str]:
    """Of a section that names a class, and of the sections with names in it."""
    context = CLASSES[kind][2]
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
    _raise(_mismatches(target, arguments, context, kind))
    for key, value in arguments.items():
        if _is_named(value):
            own = {name: item for name, item in context.items() if name not in value}
            arguments[key] = build(value, kind, **own)
    wanted = _parameters(target)
    context = {name: value for name, value in context.items() if name in wanted}
    try:
        return target(**arguments, **context)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"config section {kind!r}: {error}") from error


def _is_named(value: Any) -> bool:
    return isinstance(value, dict | ml_collections.ConfigDict) and "name" in value


def _parameters(target: Callable) -> dict[str, inspect.Parameter]:
    # of __init__: the metaclass of nnx modules hides it behind (*args, **kwargs)
    function = target.__init__ if inspect.isclass(target) else target
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def _mismatches(target: Callable, arguments: Any, context: Any, kind: str) -> list[str]:
    """Unknown and missing arguments of one section."""
    parameters = _parameters(target)
    free = [name for name in parameters if name not in context]
    problems = []
    for name in arguments:
        if name not in free:
            near = difflib.get_close_matches(name, free, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(free)}"
            problems.append(f"{kind} has no argument {name!r}{hint}")
    for name in free:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            problems.append(f"{kind} needs {name!r}")
    return problems


def call(function: Callable, section: Any, name: str, **context: Any) -> Any:
    """`function` with a section as its keyword arguments, problems told as of `build`."""
    arguments = {key: _plain(value) for key, value in section.items()}
    _raise(_mismatches(function, arguments, context, name))
    try:
        return function(**arguments, **context)
    except (ValueError, TypeError) as error:
        raise UserError(f"config section {name!r}: {error}") from error


def _plain(value: Any) -> Any:
    """Sections as dictionaries, lists as tuples (configs read back from JSON have lists)."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def plain(config: ml_collections.ConfigDict) -> dict:
    """The config as dictionaries, tuples and numbers; compared and saved as JSON."""
    return _plain(config)


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{len(problems)} problems:", *(f"  {p}" for p in problems)]))


def tokenizer(config: Any, *, rngs):
    """The Tokenizer that a config describes."""
    from tokgen.nn import precision
    from tokgen.tokenizers import tokenizer as tokenizers

    at = call(precision.Precision, config["precision"], "precision")
    size, channels = tuple(config["view"]["size"]), config["view"]["channels"]
    encoder = named(config["encoder"], "encoder")
    try:
        grid = encoder.grid(size, **_plain(config["encoder"]))
    except (ValueError, TypeError) as error:
        raise UserError(f"config section 'encoder': {error}") from error
    quantizer = build(config["quantizer"], "quantizer", grid=grid, rngs=rngs)
    context = dict(channels=channels, size=size, precision=at, rngs=rngs)
    return tokenizers.Tokenizer(
        build(config["encoder"], "encoder", latent=quantizer.inputs, **context),
        quantizer,
        build(config["decoder"], "decoder", latent=quantizer.channels, grid=grid, **context),
        pixels=tuple(config["pixels"]),
    )


def generator(config: Any, layout: TokenLayout, classes: int, *, rngs):
    """The Generator that a config describes, for tokens of a layout."""
    from tokgen.nn import precision, transformer

    at = call(precision.Precision, config["precision"], "precision")
    section = dict(config["generator"].items())
    rates = call(transformer.Rates, section.pop("rates", {}), "generator.rates")
    context = dict(layout=layout, classes=classes, rates=rates, precision=at, rngs=rngs)
    return build(section, "generator", **context)
