"""Mutants of the shipped configs: one field each, dropped, renamed, of another type or size."""

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any

import ml_collections

from tests import recipes
from tokgen.config import reading as configs

KINDS = (
    *("drop", "rename", "retype", "zero", "negative", "huge", "infinite", "nan", "more", "less"),
    *("empty", "longer", "section"),
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A field of a config and what becomes of it."""

    reference: str
    field: str
    kind: str
    value: Any = None  # of the kinds that give one

    def __str__(self) -> str:
        shown = repr(self.value)[:40] if self.kind not in ("drop", "rename") else ""
        return f"{self.reference} {self.field} {self.kind} {shown}".strip()

    def touches(self, field: str) -> bool:
        """Whether another field is the mutated one, holds it, or lies in it."""
        own = (self.field, f"{self.field}x")  # a renamed one has this name
        pairs = [(name, field) for name in own] + [(field, name) for name in own]
        return any(f"{inner}.".startswith(f"{outer}.") for inner, outer in pairs)

    def config(self, *overrides: str) -> ml_collections.ConfigDict:
        """The config with its one change; overrides first."""
        settings = recipes.load(self.reference, overrides)
        *parents, last = self.field.split(".")
        section = settings
        for parent in parents:
            section = section[parent]
        with settings.unlocked(), section.ignore_type():
            if self.kind == "drop":
                del section[last]
            elif self.kind == "rename":
                value = section[last]
                del section[last]
                section[f"{last}x"] = value
            else:
                section[last] = self.value
        return settings


def number(value: float, kind: str) -> Any:
    """A number in the place of a number."""
    changed = {
        "retype": f"{value}",
        "zero": type(value)(0),
        "negative": -abs(value) - 1,
        "huge": 10**10 if isinstance(value, int) else 1e30,
        "infinite": math.inf,
        "nan": math.nan,
        "more": value + 1,  # what divided divides no longer
        "less": value / 2 if isinstance(value, float) else value - 1,
    }
    return changed.get(kind)


def changed(value: Any, kind: str) -> Any:
    """The value of a kind of change; None where the kind says nothing of such a value."""
    if kind == "section":
        return {"name": "conv", "of": 1}
    if isinstance(value, bool):
        return {"retype": "yes", "more": 2, "huge": 10**10}.get(kind)
    if isinstance(value, int | float):
        return number(value, kind)
    if isinstance(value, str):
        return {"retype": 5, "empty": "", "more": f"{value}x", "huge": "x" * 2000}.get(kind)
    if isinstance(value, tuple):
        entry = value[0] if value and isinstance(value[0], int | float) else None
        if kind == "empty":
            return ()
        if kind == "longer" and value:
            return (*value, value[-1])
        if kind == "retype":
            return entry if entry is not None else "tuple"
        if entry is not None:
            found = number(entry, kind)
            return None if found is None else (found, *value[1:])
    return None


def of(reference: str, count: int, kinds: tuple[str, ...] = KINDS) -> Iterator[Mutant]:
    """As many mutants of a config, drawn evenly over kinds, then over fields."""
    settings = recipes.load(reference)
    fields = configs.flat(settings)
    draw = random.Random(reference)
    found = {kind: [] for kind in dict.fromkeys((*kinds, "drop", "retype"))}
    for field, value in fields.items():
        for kind in kinds:
            new = changed(value, kind)
            if kind in ("drop", "rename") or new is not None:
                found[kind].append(Mutant(reference, field, kind, new))
    for section in sorted({field.split(".")[0] for field in fields if "." in field}):
        found["drop"].append(Mutant(reference, section, "drop"))
        found["retype"].append(Mutant(reference, section, "retype", 5))
    for each in found.values():
        draw.shuffle(each)
    turns = list(kinds)
    draw.shuffle(turns)
    for turn in range(count):
        kind = turns[turn % len(turns)]
        if found[kind]:
            yield found[kind].pop()
