"""Published systems: what each file of this package says of the systems it knows.

A file of the folder `systems` (`maskgit_tokenizer.py`, `var_generator.py`) holds a dictionary
SYSTEMS of these by name. The name is what `--system` takes and what a fixture's folder is called.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
import numpy as np

from tokgen import choices
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap, systems as systems_
from tokgen.pretrained.formats import stored

Weights = dict[str, np.ndarray | stored.Stored]


@dataclasses.dataclass(frozen=True)
class System:
    """How to read one published system.

    Attributes:
        parity: fixture folder -> the arrays that our model computes, by the fixture's names.
        settings: (published configuration, weights) -> our config; None where there is nothing
            to train from (discriminators, frozen networks). A generator's has a `generator`
            section, and its published sampling settings as `presets`.
        rows: our module -> its key table; of a generator, parameters only.
        tokens: (published configuration, weights) -> (layout, classes) of a generator, 0 for one
            without classes; None for what is no generator.
        beside: the tokenizer's system, whose fixture folder lies beside a generator's.
        unwrap: entries of the file around the state dict, the first that is there is taken; one
            inside another is written with a dot.
        aside: patterns of keys that have no place in our model; kept beside an import, so that an
            export can give them back.
        derived: arrays of the published file that follow from our model (constant buffers).
        average: a live key -> the name of its moving average in the file, where one is published.
        averaged: the entry beside the live weights in which the moving average is published.
        form: how the published file is written, a form of `writer.py`.
        wrap: the entry around the state dict when exporting.
        home: where the weights of a system lie that has no row in `tokgen.zoo`, which says it of
            the others.
        licence: the terms of the code that made them.
    """

    parity: Callable[[Any], dict[str, np.ndarray]]
    settings: Callable[[dict, Weights], ml_collections.ConfigDict] | None = None
    rows: Callable[[Any], Iterable[keymap.Row]] | None = None
    unwrap: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    derived: Callable[[Any], Weights] | None = None
    average: Callable[[str], str] | None = None
    averaged: str = ""
    form: str = "torch"
    wrap: tuple[str, ...] = ()
    home: str = ""
    licence: str = "not stated by its authors"
    tokens: Callable[[dict, Mapping[str, np.ndarray]], tuple[TokenLayout, int]] | None = None
    beside: str = ""


def known() -> dict[str, System]:
    """Every system by name."""
    systems: dict[str, System] = {}
    for file in pkgutil.iter_modules(systems_.__path__):
        module = importlib.import_module(f"tokgen.pretrained.systems.{file.name}")
        systems.update(getattr(module, "SYSTEMS", {}))
    return systems


def importable() -> dict[str, System]:
    """Those that there is something to train or sample from, by name."""
    return {name: found for name, found in sorted(known().items()) if found.settings is not None}


def named(name: str) -> System:
    """The system that `--system` names."""
    return choices.named(dict(sorted(known().items())), name, "--system")
