"""A published weight file into a model of ours, and back."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import ml_dtypes
import numpy as np
from flax import nnx

from tokgen import config as configs
from tokgen.interfaces import TokenLayout, UserError
from tokgen.pretrained import reader, table
from tokgen.pretrained import system as systems

_MISFITS = (ValueError, LookupError, TypeError, AttributeError)  # of arrays of another system

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A published model as ours."""

    config: ml_collections.ConfigDict
    module: nnx.Module  # the live weights
    average: nnx.Module | None  # their moving average, where the file has one
    aside: dict[str, np.ndarray]  # arrays of the file that have no place in our model
    dtype: str = "float32"  # of the file's weights; ours are float32, which holds them exactly
    layout: TokenLayout | None = None  # None: a continuous bottleneck
    classes: int = 0  # of a generator

    @property
    def kind(self) -> str:
        """What the config describes: a tokenizer or a generator."""
        return "generator" if "generator" in self.config else "tokenizer"

    @property
    def used(self) -> nnx.Module:
        """What the published numbers were measured with: the average where there is one."""
        return self.module if self.average is None else self.average


def weights_of(path: pathlib.Path, system: systems.System, **options) -> dict[str, np.ndarray]:
    """The arrays of a published file, unwrapped as the system publishes them."""
    problem = None
    for entry in [tuple(name.split(".")) for name in system.unwrap] + [()]:
        try:
            return reader.read(path, *entry, flatten=not entry and not system.unwrap, **options)
        except UserError as error:
            problem = problem or error
    raise problem


def read(
    path: str | pathlib.Path,
    name: str,
    published: dict | None = None,
    *,
    overrides: Sequence[str] = (),
    **options,
) -> Imported:
    """Import a published file; `published` is its configuration, None where sizes are standard.

    `overrides` are fields of our config, `view.size=384,384`; `options` are the reader's.
    """
    system = systems.named(name)
    if system.settings is None:
        raise UserError(f"{name} is no tokenizer or generator: it can be compared, not imported")
    weights = weights_of(pathlib.Path(path), system, **options)
    return fit(weights, name, published or {}, source=str(path), overrides=overrides)


def fit(
    weights: dict[str, np.ndarray],
    name: str,
    published: dict,
    *,
    source: str,
    overrides: Sequence[str] = (),
) -> Imported:
    """The model of published arrays; `source` names them in errors."""
    system = systems.named(name)
    layout, classes = None, 0
    try:
        config = system.settings(published, weights)
        configs.override(config, overrides)
        if system.tokens is not None:
            layout, classes = system.tokens(published, weights)
    except UserError:
        raise
    except _MISFITS as error:
        raise UserError(
            f"{source} and its configuration do not look like {name} ({error!r}): is --system "
            f"right? It holds {', '.join(list(weights)[:5])} ..."
        ) from error
    if layout is None:
        make = nnx.eval_shape(lambda: configs.tokenizer(config, rngs=nnx.Rngs(0)))
        layout = make.layout
    else:
        make = nnx.eval_shape(lambda: configs.generator(config, layout, classes, rngs=nnx.Rngs(0)))
    rows = list(system.rows(make))
    weights, aside = table.split(weights, system.aside)
    kinds = collections.Counter(array.dtype.name for array in weights.values())
    dtype = kinds.most_common(1)[0][0] if kinds else "float32"
    averages = {}
    if system.average is not None:
        names = {entry.key: system.average(entry.key) for entry in rows}
        averages = {live: weights[ema] for live, ema in names.items() if ema in weights}
        weights = {k: a for k, a in weights.items() if k not in set(names.values())}
    module = table.fill(make, rows, weights, source=source)
    average = None
    if averages:
        # what has no average (usage counts) stays as it is
        average = table.fill(make, rows, weights | averages, source=f"{source} (moving averages)")
    return Imported(config, module, average, aside, dtype, layout, classes)


def publish(imported: Imported, name: str) -> dict[str, np.ndarray]:
    """The arrays of a model under their published names: the inverse of `read`."""
    system = systems.named(name)
    if system.rows is None:
        raise UserError(f"{name} is no tokenizer or generator: there is nothing to publish")
    try:
        rows = list(system.rows(imported.module))
        weights = table.publish(imported.module, rows)
    except _MISFITS as error:
        raise UserError(
            f"this model has not the form of {name} ({error!r}): need one that its recipe or an "
            "import made"
        ) from error
    if imported.average is not None and system.average is not None:
        averages = table.publish(imported.average, rows)
        weights |= {system.average(key): array for key, array in averages.items()}
    if imported.dtype in HALVES:
        weights = {key: array.astype(HALVES[imported.dtype]) for key, array in weights.items()}
    derived = system.derived(imported.module) if system.derived else {}
    return weights | derived | imported.aside


def digest(path: str | pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameters(module: nnx.Module) -> int:
    """Numbers that an optimizer would move."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
