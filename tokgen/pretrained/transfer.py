"""A published weight file into a model of ours, and back."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
import ml_collections
import ml_dtypes
import numpy as np
from flax import nnx

from tokgen import archives, parameters as parameters_, rng
from tokgen.config import building, reading as configs
from tokgen.interfaces import TokenLayout, UserError
from tokgen.pretrained import entries, keymap, system as systems
from tokgen.pretrained.formats import paths, reader

# Of arrays of another system
_MISFITS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
PLAIN = entries.Form()  # float32, without entries
DTYPES = {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype("i1"), "uint8": np.dtype("u1")}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A published model as ours."""

    config: ml_collections.ConfigDict
    module: nnx.Module  # the live weights
    average: nnx.Module | None  # their moving average, where the file has one
    aside: dict[str, np.ndarray]  # arrays of the file that have no place in our model
    form: entries.Form = PLAIN
    layout: TokenLayout | None = None  # None: a continuous bottleneck
    classes: int = 0  # of a generator
    notes: tuple[str, ...] = ()  # what is to be told of how the file was read

    @property
    def kind(self) -> str:
        """What the config describes: a tokenizer or a generator."""
        return "generator" if "generator" in self.config else "tokenizer"

    @property
    def used(self) -> nnx.Module:
        """What the published numbers were measured with: the average where there is one."""
        return self.module if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A published file held against a model of ours; its numbers may lie in it still.

    Attributes:
        network: of our model, the shapes.
        rows: the key table between both.
        weights, average: what it accounts for, by published names; of the moving average those
            that are its own, none where there is none.
        source: what the file is called in errors.
        Others are those of `Imported`.
    """

    config: ml_collections.ConfigDict
    network: nnx.Module
    rows: tuple[keymap.Row, ...]
    weights: systems.Weights
    average: systems.Weights
    source: str
    aside: systems.Weights
    form: entries.Form
    layout: TokenLayout | None
    classes: int
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What the config describes: a tokenizer or a generator."""
        return "generator" if "generator" in self.config else "tokenizer"

    def imported(self) -> Imported:
        """The model, every array read."""
        module = keymap.fill(self.network, self.rows, self.weights, source=self.source)
        average = None
        if self.average:
            # what has no average (usage counts) stays as it is
            weights, source = self.weights | self.average, _averages(self.source)
            average = keymap.fill(self.network, self.rows, weights, source=source)
        return Imported(
            self.config,
            module,
            average,
            {key: keymap.numbers(array) for key, array in self.aside.items()},
            self.form,
            self.layout,
            self.classes,
            self.notes,
        )

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What a checkpoint holds of it, by path: params/..., stats/... and, of an average, ema/...

        Shapes and dtypes.
        """
        _, params, stats = parameters_.split(self.network)
        trees = {"params": params, "stats": stats} | ({"ema": params} if self.average else {})
        return {
            f"{name}/{path}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, tree in trees.items()
            for path, leaf in parameters_.paths(tree).items()
        }

    def pieces(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(path of a leaf, layer of a stacked one or None, numbers): all of `leaves`, in pieces.

        Each array of the file is read once, and nobody keeps it. UserError at the end where
        numbers are not finite.
        """
        _, params, stats = parameters_.split(self.network)
        trained, counted = parameters_.paths(params), parameters_.paths(stats)
        leaves, wrong = trained | counted, {self.source: [], _averages(self.source): []}

        def read(weights, row, source):
            array = keymap.numbers(weights[row.key])
            found = archives.not_finite(row.key, array, source)
            wrong[source] += [found] if found else []
            return [] if found else keymap.parts(row, array, leaves)

        for row in self.rows:
            parts = read(self.weights, row, self.source)
            for path, layer, part in parts:
                yield f"{'params' if path in trained else 'stats'}/{path}", layer, part
            # an export of ours has one array for both
            if self.average.get(row.key, self.weights[row.key]) is not self.weights[row.key]:
                parts = read(self.average, row, _averages(self.source))
            for path, layer, part in parts:
                if self.average and path in trained:
                    yield f"ema/{path}", layer, part
        for source, found in wrong.items():
            archives.refuse_numbers(found, source)
        filled = {path for row in self.rows for path in row.paths}
        for path in set(counted) - filled:  # as in a new module
            yield f"stats/{path}", None, np.zeros(counted[path].shape, counted[path].dtype)


def _averages(source: str) -> str:
    return f"{source} (moving averages)"


def read(
    path: str | pathlib.Path,
    name: str,
    published: dict | None = None,
    *,
    overrides: Sequence[str] = (),
    entry: str = "",
    unknown: str = "refuse",
) -> Imported:
    """Import a published file, all of its numbers; see `held`."""
    return held(path, name, published, overrides=overrides, entry=entry, unknown=unknown).imported()


def held(
    path: str | pathlib.Path,
    name: str,
    published: dict | None = None,
    *,
    overrides: Sequence[str] = (),
    entry: str = "",
    unknown: str = "refuse",
) -> Fitting:
    """A published file; `published` is its configuration, None where sizes are standard.

    `overrides` are fields of our config, `view.size=384,384`; `entry` says which entry of the file
    is meant; `unknown` is the reader's: what is to be done about objects of unknown classes.
    """
    system = systems.named(name)
    if system.settings is None:
        raise UserError(f"{name} is no tokenizer or generator: it can be compared, not imported")
    found = entries.contents(path, system, entry=entry, unknown=unknown)
    return fitting(
        found.weights,
        name,
        published or {},
        source=str(path),
        overrides=overrides,
        average=found.average,
        form=found.form,
        notes=found.notes,
    )


def fit(
    weights: systems.Weights,
    name: str,
    published: dict,
    *,
    source: str,
    overrides: Sequence[str] = (),
    average: systems.Weights | None = None,
    form: entries.Form = PLAIN,
    notes: Sequence[str] = (),
) -> Imported:
    """The model of published arrays; see `fitting`."""
    return fitting(
        weights,
        name,
        published,
        source=source,
        overrides=overrides,
        average=average,
        form=form,
        notes=notes,
    ).imported()


def fitting(
    weights: systems.Weights,
    name: str,
    published: dict,
    *,
    source: str,
    overrides: Sequence[str] = (),
    average: systems.Weights | None = None,
    form: entries.Form = PLAIN,
    notes: Sequence[str] = (),
) -> Fitting:
    """Published arrays held against the model that they are of; `source` names them in errors.

    Where they do not fit by their names, what all names begin with is left away.
    """
    system = systems.named(name)
    wrapped = list(notes)
    inside = [part for part in reader.WRAPPERS if any(part in key for key in weights)]
    if inside:
        wrapped.append(f"{', '.join(inside)} within its names is left away")
    weights, average = reader.unwrapped(weights), reader.unwrapped(average or {})
    errors = []
    for prefix in ("", *_prefixes(weights, system.aside)):
        try:
            found = _fit(
                _shorn(weights, prefix),
                system,
                name,
                published,
                source=source,
                overrides=overrides,
                average=_shorn(average, prefix),
                form=form,
            )
        except UserError as error:
            errors.append(error)
            continue
        if prefix:
            wrapped.append(f"{prefix!r}, with which its names begin, is left away")
        return dataclasses.replace(found, notes=tuple(wrapped))
    # the attempt that came the farthest says the most
    raise min(errors, key=lambda e: e.problems if isinstance(e, keymap.Misfit) else np.inf)


def _prefixes(weights: systems.Weights, aside: Sequence[str]) -> list[str]:
    """What all names begin with, up to a dot each: "module.", "module.model."."""
    names = list(keymap.split(weights, aside)[0])
    if not names:
        return []
    parts = os.path.commonprefix([name.split(".")[:-1] for name in names])
    return [".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)]


def _shorn(weights: systems.Weights, prefix: str) -> systems.Weights:
    return {key.removeprefix(prefix): array for key, array in weights.items()}


def _fit(
    weights: systems.Weights,
    system: systems.System,
    name: str,
    published: dict,
    *,
    source: str,
    overrides: Sequence[str],
    average: systems.Weights,
    form: entries.Form,
) -> Fitting:
    empty = [key for key, array in keymap.split(weights, system.aside)[0].items() if not array.size]
    if empty:
        raise UserError(
            f"{source} has no numbers in {', '.join(empty[:5])}: it was not saved whole, or its "
            "weights were shared out among processes; fetch or gather it again"
        )
    config, layout, classes = sizes(weights, system, name, published, source=source)
    configs.override(config, overrides)
    if layout is None:
        make = nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
        layout = make.layout
    else:
        make = nnx.eval_shape(lambda: building.generator(config, layout, classes, rngs=rng.rngs(0)))
    rows = list(system.rows(make))
    weights, aside = keymap.split(weights, system.aside)
    dtype, dtypes = _dtypes(weights)
    form = dataclasses.replace(form, dtype=dtype, dtypes=dtypes)
    if average:
        average, _ = keymap.split(average, system.aside)
        dtype, dtypes = _dtypes(average)
        form = dataclasses.replace(form, average_dtype=dtype, average_dtypes=dtypes)
    elif system.average is not None:
        names = {entry.key: system.average(entry.key) for entry in rows}
        average = {live: weights[ema] for live, ema in names.items() if ema in weights}
        weights = {k: a for k, a in weights.items() if k not in set(names.values())}
    keymap.check(make, rows, weights, source=source)
    if average:
        keymap.check(make, rows, weights | average, source=_averages(source))
    return Fitting(
        config, make, tuple(rows), weights, average, source, aside, form, layout, classes
    )


def sizes(
    weights: systems.Weights, system: systems.System, name: str, published: dict, *, source: str
) -> tuple[ml_collections.ConfigDict, TokenLayout | None, int]:
    """(config, layout of the tokens of a generator, its classes), from shapes and what is said."""
    layout, classes = None, 0
    try:
        config = system.settings(published, weights)
        if system.tokens is not None:
            layout, classes = system.tokens(published, weights)
    except UserError:
        raise
    except _MISFITS as error:
        raise UserError(
            f"{source} and its configuration do not look like {name} ({error!r:.300}): is --system "
            f"right? It holds {', '.join(list(weights)[:5])} ..."
        ) from error
    if classes < 0:
        raise UserError(f"{source} has a table of classes without a row: is --system right?")
    return config, layout, classes


def _dtypes(weights: systems.Weights) -> tuple[str, dict[str, str]]:
    """(the dtype of most arrays, those of the others by name)."""
    names = {key: array.dtype.name for key, array in weights.items()}
    most = collections.Counter(names.values()).most_common(1)
    dtype = most[0][0] if most else "float32"
    return dtype, {key: name for key, name in names.items() if name != dtype}


def publish(imported: Imported, name: str) -> dict[str, np.ndarray]:
    """The arrays of a model under their published names: the inverse of `read`.

    Averages are among them where the system keeps them in one table; `publish_average` gives those
    that have an entry of their own, and where neither can be, the average is what is published.
    """
    system = _publishable(name)
    module = imported.used if _only_used(imported, system) else imported.module
    weights = _rows_of(module, system, name)
    if imported.average is not None and system.average is not None:
        averages = _rows_of(imported.average, system, name)
        weights |= {system.average(key): array for key, array in averages.items()}
    weights = _as_published(weights, imported.form.dtype, imported.form.dtypes)
    derived = system.derived(imported.module) if system.derived else {}
    return weights | derived | imported.aside


def publish_average(imported: Imported, name: str) -> dict[str, np.ndarray]:
    """The averages of a model, where they have an entry of their own; none where they have not."""
    system = _publishable(name)
    if imported.average is None or system.average is not None or _only_used(imported, system):
        return {}
    weights = _rows_of(imported.average, system, name)
    form = imported.form
    return _as_published(weights, form.average_dtype, form.average_dtypes)


def _only_used(imported: Imported, system: systems.System) -> bool:
    """Whether a published file has room for one set of weights only."""
    return system.average is None and not system.averaged and imported.form.average is None


def _publishable(name: str) -> systems.System:
    system = systems.named(name)
    if system.rows is None:
        raise UserError(f"{name} is no tokenizer or generator: there is nothing to publish")
    return system


def _rows_of(module: nnx.Module, system: systems.System, name: str) -> systems.Weights:
    try:
        return keymap.publish(module, list(system.rows(module)))
    except _MISFITS as error:
        raise UserError(
            f"this model has not the form of {name} ({error!r:.300}): need one that its recipe or "
            "an import made"
        ) from error


def _as_published(weights: systems.Weights, dtype: str, others: dict[str, str]) -> systems.Weights:
    """Every array in the dtype that it had."""
    return {
        key: array.astype(DTYPES.get(others.get(key, dtype), array.dtype), copy=False)
        for key, array in weights.items()
    }


def digest(path: str | pathlib.Path) -> str:
    """SHA-256 of a file; of one in parts, of the digests of them all."""
    sums = [archives.sha256(part) for part in paths.files(paths.located(path))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def parameters(module: nnx.Module) -> int:
    """Numbers that an optimizer would move."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
