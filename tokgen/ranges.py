"""What an argument may be: a type and a range, said once, in the signature of what takes it.

    @ranges.checked
    def __init__(self, *, width: ranges.Width, rate: ranges.Rate = 0.1): ...

`problems` holds values against a signature and calls nothing: the check of a config asks it about
every leaf of a section. `checked` makes a constructor ask it too, for whoever calls it from Python.
Upper bounds are no opinions about networks: they are where a number is a slip of the keyboard that
would be worked on for hours, or written out in memory, before anything complains.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from tokgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` leaves the first out, `below` the last."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"from {_short(self.low)} to {_short(self.high)}"
        low = f"{'above' if self.above else 'from'} {_short(self.low)}"
        return f"{low} and {'below' if self.below else 'at most'} {_short(self.high)}"


@dataclasses.dataclass(frozen=True)
class Length:
    """Rows of `low` to `high` entries."""

    low: int
    high: int

    def __contains__(self, value: tuple) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"with {self.low} to {self.high} entries"


INT32 = 2**31 - 1  # steps and tokens are int32 on every device
LARGE = 1e9  # weights and factors beyond it leave no digits of what they are added to

# Sizes
Width = Annotated[int, Range(1, 2**17)]
Hidden = Annotated[int, Range(1, 2**20)]
Depth = Annotated[int, Range(1, 512)]
Heads = Annotated[int, Range(1, 2**12)]
Blocks = Annotated[int, Range(1, 256)]
Codes = Annotated[int, Range(2, 2**24)]
Side = Annotated[int, Range(1, 2**16)]
Positions = Annotated[int, Range(1, 2**20)]
Kernel = Annotated[int, Range(1, 255)]
Batch = Annotated[int, Range(1, 2**20)]

# Counts
Count = Annotated[int, Range(1, INT32)]
Whole = Annotated[int, Range(0, INT32)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 2**16)]  # of decoding
Axis = Annotated[int, Range(-1, 2**20)]

# Sizes where 0 means none, or that of something else
Optional = Annotated[int, Range(0, 2**17)]
Widths = Annotated[tuple[Width, ...], Length(1, 16)]

# Shares and rates
Share = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, 1, below=True)]
Fraction = Annotated[float, Range(0, 1, above=True)]

# Other numbers
Weight = Annotated[float, Range(-LARGE, LARGE)]
Amount = Annotated[float, Range(0, LARGE)]
Positive = Annotated[float, Range(0, LARGE, above=True)]


def checked(function: Callable) -> Callable:
    """The function, which raises a UserError for arguments out of the ranges of its signature."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def asked(*args, **options):
        given = signature.bind(*args, **options).arguments
        limited = {name: hint for name, hint in hints(function).items() if _has_range(hint)}
        refuse(
            wrong
            for name, value in given.items()
            if name in limited and (wrong := problem(name, value, limited[name]))
        )
        return function(*args, **options)

    return asked


def check(record: Any) -> None:
    """A UserError for fields of a dataclass out of their ranges, for its `__post_init__`."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    refuse(problems(type(record), fields))


def refuse(found) -> None:
    """One UserError of all problems; nothing where there are none."""
    found = list(found)
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        raise UserError("\n".join([f"{len(found)} problems:", *(f"  {each}" for each in found)]))


def hints(target: Callable) -> Mapping[str, Any]:
    """The types of the arguments of a function or a class, as far as they are stated."""
    return _hints(target)


@functools.cache
def _hints(target: Callable) -> Mapping[str, Any]:
    plain_class = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    return typing.get_type_hints(target.__init__ if plain_class else target, include_extras=True)


def problems(target: Callable, given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with values that the signature of `target` gives a type or a range."""
    stated = hints(target)
    found = [
        problem(prefix + name, value, stated[name])
        for name, value in given.items()
        if name in stated
    ]
    return [each for each in found if each]


def problem(name: str, value: Any, hint: Any) -> str:
    """Need and found of a value that its type or range forbids; empty where it fits."""
    if fits(value, hint):
        return ""
    found = repr(value)
    found = found if len(found) <= 80 else f"{found[:77]}..."
    return f"{name} must be {described(hint)}; found {found}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; what is no number, text or row of these is not looked into."""
    if hint is Any:  # which is a class, of a kind, from Python 3.11 on
        return True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *ranges = inner
        return fits(value, base) and all(value in each for each in ranges)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin in (tuple, collections.abc.Sequence):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(each, inner[0]) for each in value)
    if origin in (dict, collections.abc.Mapping):
        key, item = inner
        return hasattr(value, "items") and all(
            fits(k, key) and fits(v, item) for k, v in value.items()
        )
    if hint is int or hint is float:
        kind = numbers.Integral if hint is int else numbers.Real
        # a comparison and not isfinite, which overflows on whole numbers of many digits
        number = isinstance(value, kind) and not isinstance(value, bool)
        return number and bool(-math.inf < value < math.inf)
    if hint is type(None):
        return value is None
    if hint is dict:
        return hasattr(value, "items")
    return not inspect.isclass(hint) or isinstance(value, hint)


def described(hint: Any) -> str:
    """A type in words: "a whole number from 1 to 512"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([described(inner[0]), *map(str, inner[1:])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(each) for each in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        if len(set(inner)) == 1:
            return f"({', '.join(['.'] * len(inner))}), each {described(inner[0])}"
        return f"({', '.join(map(described, inner))})"
    if origin in (tuple, collections.abc.Sequence):
        return f"a tuple, each {described(inner[0])}"
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return "a section"
    words = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False"}
    return words.get(hint) or {type(None): "None"}.get(hint) or getattr(hint, "__name__", str(hint))


def typed(value: Any, hint: Any) -> Any:
    """A literal as a type wants it: lists as tuples, whole numbers as floats where only these fit.

    It may still not fit.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return typed(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        for each in inner:
            if fits(found := typed(value, each), each):
                return found
        return value
    if origin in (tuple, collections.abc.Sequence) and isinstance(value, list | tuple):
        fixed = origin is tuple and inner[-1] is not Ellipsis
        if fixed and len(inner) != len(value):
            return tuple(value)
        kinds = inner if fixed else (inner[0],) * len(value)
        return tuple(map(typed, value, kinds))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else value
    return value


def text(hint: Any) -> bool:
    """Whether a type takes text, which is then never read as a number."""
    row = typing.get_origin(hint) in (tuple, collections.abc.Sequence)
    return hint is str or (not row and str in typing.get_args(hint))


def _has_range(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is Annotated or any(_has_range(each) for each in inner)


def _short(number: float) -> str:
    """A bound as it is read: 1,024 and 2^20, 1e-08, 0.5."""
    if isinstance(number, float) and not number.is_integer() or abs(number) < 2**20:
        return f"{number:,}" if isinstance(number, int) else f"{number:g}"
    power = round(math.log2(abs(number) + 1))
    for value, text in ((2**power, f"2^{power}"), (2**power - 1, f"2^{power} - 1")):
        if abs(number) == value:
            return text if number > 0 else f"-({text})"
    return f"{number:g}"
