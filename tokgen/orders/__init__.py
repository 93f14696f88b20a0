"""Who comes after whom: a file per order, each with a function `order(layout, key)`.

It gives [L], the position that is handled at every place of the sequence; `key` is for orders that
are drawn. To add one is to add a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import jax

from tokgen import choices
from tokgen.interfaces import TokenLayout

Order = Callable[[TokenLayout, jax.Array], jax.Array]


def known() -> tuple[str, ...]:
    """The names of all orders: those of the files beside this one."""
    return tuple(sorted(file.name for file in pkgutil.iter_modules(__path__)))


def named(name: str) -> Order:
    """The order that a config names; UserError where there is no such file."""
    names = {file: file for file in known()}
    return importlib.import_module(f"tokgen.orders.{choices.named(names, name, 'order')}").order
