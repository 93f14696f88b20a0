"""A choice by name: what a table has under it, or an error that says which there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tokgen.errors import UserError

T = TypeVar("T")


def named(table: Mapping[str, T], name: object, what: str) -> T:
    """`table[name]`; `what` is the name of the choice in messages, as `quantizer.update`."""
    if not isinstance(name, str) or name not in table:
        raise UserError(refusal(table, name, what))
    return table[name]


def refusal(known: Iterable[str], name: object, what: str) -> str:
    """Why `name` is none of those that are known, and the nearest of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what} must be one of {', '.join(known)}; found {name!r}{hint}"
