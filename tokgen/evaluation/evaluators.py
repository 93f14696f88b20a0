"""Evaluators at work: what a run measures at periods of its own, as its config names them.

They are made before the first step, where what cannot run is told, and measure the averaged
weights. What they draw depends on their own seed alone and so is the same at every step: a curve
shows what was learned. All processes compute; process 0 logs. `tokgen.config.evaluators` says what
each takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx

from tokgen import distributed, image_grid, metrics_log, report, runtime, sharding
from tokgen.checkpoints import loading
from tokgen.config import evaluators as sections
from tokgen.data import datasets, loader, sources
from tokgen.evaluation import (
    collect,
    feature_extractors,
    given_images,
    inputs,
    made_images,
    metric_table,
    protocols,
    references,
    score as scores,
    score_settings,
    validation,
)
from tokgen.interfaces import Generator, PyTree, Text, UserError
from tokgen.metrics import metric
from tokgen.sampling import drawing, memory, presets


class Measured(NamedTuple):
    """What an evaluator found: numbers, and a picture uint8 [H, W, 3 or 1] where it makes one."""

    figures: Mapping[str, float | None]
    picture: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """An evaluator that can run.

    Attributes:
        name: under which its figures are logged.
        every: so many steps, and at the last.
        measure: of a network with its averaged weights.
        fewer: the argument by which it takes fewer images at a time, or "".
    """

    name: str
    every: int
    measure: Callable[[nnx.Module], Measured]
    fewer: str = ""


@dataclasses.dataclass(frozen=True)
class Material:
    """What a run has that evaluators measure with: its config, its splits, its frozen tokenizer."""

    settings: ml_collections.ConfigDict
    sources: Mapping[str, sources.RandomAccess]
    tokenizer: loading.Loaded | None = None  # of a generator
    cond: str = ""  # of a generator: "label" or "text"


# ---------------------------------------------------------------- made, and when they are due


def made(material: Material) -> tuple[Evaluator, ...]:
    """The evaluators of a run; UserError for what cannot run, of all together."""
    generator = material.tokenizer is not None
    known, found, problems = OF_GENERATOR if generator else OF_TOKENIZER, [], []
    for name, section in sections.of(material.settings).items():
        try:
            measure = known[section.kind](material, section)
            found.append(Evaluator(name, section.every, measure, _fewer(section)))
        except UserError as error:
            problems.append(f"config.evaluators.{name}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return tuple(found)


def check_room(material: Material, generator: Generator) -> None:
    """UserError where what one draws at a time cannot fit beside what the devices hold by now."""
    mesh, cond = sharding.current(), np.zeros(1, np.int32)
    if material.cond == "text":
        shape = (1, *generator.text)
        like = jax.ShapeDtypeStruct
        cond = Text(like(shape, np.float32), like(shape[:2], bool))
    for name, section in sections.of(material.settings).items():
        here = f"config.evaluators.{name}"
        if isinstance(section, sections.Score):
            count, images, option = section.samples, section.batch, f"{here}.batch"
        elif isinstance(section, sections.Grid):
            rows = _rows(material)
            count = images = rows * section.columns
            option = f"{here}.columns times {rows}"
        else:
            continue
        preset = presets.named(material.settings.presets.to_dict(), section.preset)
        made, sampler = presets.prepare(generator, preset)
        batch = drawing.even(count, images, sharding.ways(mesh))
        codec = material.tokenizer.module.quantizer
        try:
            memory.check(made, codec, cond, sampler, batch, mesh, option=option)
        except UserError as error:
            raise UserError(f"{here}: {error}") from error


def _rows(material: Material) -> int:
    """How many rows a grid has."""
    held_out = material.sources["held_out"]
    count = len(held_out) if material.cond == "text" else max(len(held_out.classes), 1)
    return min(count, 10)


def _fewer(section: sections.Evaluator) -> str:
    """What of a section says how many images are at work at a time; "": nothing does."""
    return next((name for name in ("batch", "columns") if hasattr(section, name)), "")


def due(evaluators: Sequence[Evaluator], step: int, steps: int) -> list[Evaluator]:
    """Those that measure after a step: every so many, and all of them after the last."""
    return [each for each in evaluators if step and (step % each.every == 0 or step == steps)]


def left(
    evaluators: Sequence[Evaluator], step: int, steps: int, log: metrics_log.AnyLog
) -> list[Evaluator]:
    """Those that were due after a step and logged nothing: the run was ended before."""
    asked = due(evaluators, step, steps)
    there = distributed.decided(_logged, log, step) if asked else []
    return [each for each in asked if each.name not in there]


def _logged(log: metrics_log.AnyLog, step: int) -> list[str]:
    """What a step has lines of. Calls are told by name, and the logs of others are of another."""
    return log.splits(step)


def run(
    evaluators: Sequence[Evaluator], network: nnx.Module, step: int, log: metrics_log.AnyLog
) -> None:
    """Let each measure a step; the line of its figures comes last, and says that it has."""
    for each in evaluators:
        begun = time.monotonic()
        with _told(each):
            found = each.measure(network)
        values = {n: v for n, v in found.figures.items() if not n.endswith(BESIDE)}
        said = report.metrics(values, tuple(values))
        report.say(f"step {step}: {each.name}: {said} ({time.monotonic() - begun:.1f} s)")
        if found.picture is not None:
            log.image(step, each.name, found.picture)
        log.scalars(step, found.figures, split=each.name)
        log.keep()


@contextlib.contextmanager
def _told(one: Evaluator) -> Iterator[None]:
    """Errors of an evaluator, by its name: what no memory was left for is told what to make less.

    One that all processes of a job have stays one of all.
    """
    here = f"config.evaluators.{one.name}"
    try:
        yield
    except UserError as error:
        raise type(error)(f"{here}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not runtime.is_exhausted(error):
            raise
        said = (str(error).strip() or "memory cannot be allocated").splitlines()[0][:300]
        less = f"fewer images at a time with a smaller {here}.{one.fewer}, or " if one.fewer else ""
        raise UserError(
            f"{here} needs more memory than there is ({said}); remedy: {less}without it with "
            f"--{here}.every=0"
        ) from error


BESIDE = ("_low", "_high", "_error")  # endings of what stands beside a figure


# ---------------------------------------------------------------- the local score


@dataclasses.dataclass(frozen=True)
class _Judge:
    """The network of a reference, and what images of some classes are compared by."""

    section: Any
    reference: references.Reference
    extractor: feature_extractors.Extractor
    metrics: tuple[str, ...]
    label_C: np.ndarray  # a class -> how the reference counts it
    classes: int  # 0: those of the reference are others

    def figures(self, parts: Sequence[Mapping[str, np.ndarray]], label_N: np.ndarray) -> dict:
        """Metrics of what was seen of all images, as process 0 finds them."""
        found = collect.joined(parts)
        label_N = self.label_C[label_N] if len(self.label_C) else np.zeros(0, np.int32)
        return distributed.decided(self._measured, dataclasses.replace(found, label_N=label_N))

    def compared(self, found: collect.Found) -> metric.Compared:
        """What was seen, beside the reference."""
        return collect.compared(
            found,
            self.extractor,
            protocols.named("local"),
            self.reference,
            classes=self.classes,
            accepted=self.section.accept,
            seed=self.section.seed,
        )

    def _measured(self, found: collect.Found) -> dict[str, float]:
        metrics, absent = metric_table.score(self.compared(found), self.metrics, what="")
        for name in sorted({*absent} & {*self.section.metrics}):
            report.say(f"no {name}: {absent[name]}")
        figures = {
            name if part == "value" else f"{name}_{part}": float(value)
            for name, parts in metrics.items()
            for part, value in parts.items()
            if part in ("value", "low", "high", "error")
        }
        # early samples may all be one: a number here, and no error as of a finished score
        counts = given_images.suspicious(found.digest_N, found.constant_N)
        return figures | counts | {"images": len(found.digest_N)}


def _judge(
    section: Any, size: Sequence[int], count: int, names: Sequence[str], *, labelled: bool = True
) -> _Judge:
    """What `count` images of a size and of classes with these names are judged by."""
    asked = score_settings.Settings(*("", "local", ""), reference=section.reference, samples=count)
    reference = references.read(section.reference)
    extractor = inputs.extractor_of(asked, reference)
    references.check(reference, "local", extractor, size=tuple(size), count=count)
    metrics = section.metrics or metric_table.of_protocol("local")
    for name in metrics:
        metric_table.named(name)
    enough = dict(layer=extractor.layers[0], count=count, remedy="accept=('few',)")
    scores.check_enough(metrics, section.accept, reference, **enough)
    every_C = np.arange(len(names), dtype=np.int32)
    label_C, classes = scores.labels_of(every_C, names, len(names), extractor, reference)
    label_C = label_C if classes else np.zeros(0, np.int32)
    distributed.check_alike({"references": {section.reference: reference.digest}})
    judge = _Judge(section, reference, extractor, metrics, label_C, classes)
    _check_measurable(judge, count, labelled)
    return judge


def _check_measurable(judge: _Judge, count: int, labelled: bool) -> None:
    """UserError for metrics of a section that so many images would lack, as many of each class."""
    label_N = np.resize(judge.label_C, count) if labelled and judge.classes else judge.label_C[:0]
    blank = np.broadcast_to(np.float32(0), (count, 1))
    seen = collect.Found(
        dict.fromkeys(judge.extractor.layers, blank),
        *({}, {}, {}),
        label_N=label_N,
        digest_N=np.zeros(count),
        constant_N=np.zeros(count, bool),
    )
    compared = judge.compared(seen)
    found = {name: metric_table.named(name).lacking(compared) for name in judge.section.metrics}
    if said := "; ".join(f"{name}: {why}" for name, why in found.items() if why):
        raise UserError(f"metrics that can't be measured here, {said}: leave them out")


def _sample_score(material: Material, section: sections.Score) -> Callable:
    """Of samples, drawn as `tokgen evaluate --protocol local` draws them of the same step."""
    size = material.tokenizer.config.view.size
    names = material.sources["held_out"].classes
    judge = _judge(section, size, section.samples, names, labelled=material.cond == "label")
    preset = presets.named(material.settings.presets.to_dict(), section.preset)
    text, label_N = material.cond == "text", np.zeros(0, np.int32)
    if text:
        _filled(material, "held_out")
    else:
        label_N = made_images.balanced(section.samples, len(names), section.seed)

    def measure(network: Generator) -> Measured:
        generator, sampler = presets.prepare(network, preset)
        # a gigabyte, of a thousand texts of a large encoder: not held while the run trains
        cond = _texts(material, section.samples) if text else label_N
        parts, start = [], 0
        for part in drawing.drawn(
            *(generator, material.tokenizer.module, cond, sampler),
            **dict(seed=section.seed, batch=section.batch, what=""),
        ):
            image_BHW3 = made_images.coloured(part.image_BHW3)
            parts.append(collect.seen({"image": image_BHW3}, judge.extractor, start))
            start += len(image_BHW3)
        return Measured(judge.figures(parts, label_N))

    return measure


def _reconstruction_score(material: Material, section: sections.ReconstructionScore) -> Callable:
    """Of reconstructions of held-out images."""
    source, view = _filled(material, "held_out"), datasets.view_of(material.settings)
    chosen = validation.spread(len(source), section.images)
    judge = _judge(section, view.size, len(chosen), source.classes)

    def measure(tokenizer: nnx.Module) -> Measured:
        parts, labels, start = [], [], 0
        for part, made in validation.reconstructed(tokenizer, source, view, chosen=chosen):
            image_BHW3 = made_images.coloured(made[1])
            parts.append(collect.seen({"image": image_BHW3}, judge.extractor, start))
            labels.append(part["label"])
            start += len(image_BHW3)
        return Measured(judge.figures(parts, np.concatenate(labels)))

    return measure


# ---------------------------------------------------------------- likelihood, figures, pictures


def _likelihood(material: Material, section: sections.Likelihood) -> Callable:
    source, codec = _filled(material, section.split), material.tokenizer.module.quantizer

    def measure(generator: Generator) -> Measured:
        return Measured(validation.likelihood(generator, codec, source, count=section.images))

    return measure


def _reconstruction(material: Material, section: sections.Reconstruction) -> Callable:
    source, view = _filled(material, section.split), datasets.view_of(material.settings)

    def measure(tokenizer: nnx.Module) -> Measured:
        figures, pairs = validation.reconstruction(
            tokenizer, source, view, count=section.images, shown=section.shown
        )
        return Measured(figures, image_grid.beside(*pairs))

    return measure


def _grid(material: Material, section: sections.Grid) -> Callable:
    preset = presets.named(material.settings.presets.to_dict(), section.preset)
    held_out = material.sources["held_out"]
    if material.cond == "text":
        _filled(material, "held_out")

    def measure(generator: Generator) -> Measured:
        rows, image_HW3 = grid(
            *(generator, preset, held_out.classes, held_out, material.tokenizer.module),
            columns=section.columns,
            seed=section.seed,
        )
        return Measured({"images": rows * section.columns}, image_HW3)

    return measure


def grid(
    generator: Generator,
    preset: Mapping[str, Any],
    classes: Sequence[str],
    held_out: sources.RandomAccess,
    tokenizer: nnx.Module,
    *,
    columns: int,
    seed: int,
) -> tuple[int, np.ndarray]:
    """(rows, samples uint8 [H, W, 3]) of the first ten classes, or held-out texts, a row each."""
    if generator.cond == "text":
        ten = np.arange(min(10, len(held_out)))
        shown = datasets.condition(next(loader.once(held_out, batch_size=len(ten), indices=ten)))
    else:
        shown = np.arange(min(max(len(classes), 1), 10), dtype=np.int32)
    cond = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), columns, axis=0), shown)
    count = len(jax.tree.leaves(cond)[0])
    generator, sampler = presets.prepare(generator, preset)
    _, image_NHW3 = drawing.draw(
        *(generator, tokenizer, cond, sampler), seed=seed, batch=count, what=""
    )
    return count // columns, image_grid.grid(image_NHW3, columns, scale=2)


def _filled(material: Material, split: str) -> sources.RandomAccess:
    """The images of a split, of which there are some."""
    source = material.sources[split]
    datasets.check_filled(source, split)
    return source


def _texts(material: Material, count: int) -> PyTree:
    """Conditions of as many images: held-out texts, from the first again where they are fewer."""
    source = _filled(material, "held_out")
    chosen = validation.spread(len(source), count)
    parts = [datasets.condition(p) for p in loader.once(source, batch_size=500, indices=chosen)]
    text = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    rows_N = np.arange(count) % len(jax.tree.leaves(text)[0])
    return jax.tree.map(lambda leaf: leaf[rows_N], text)


# kind -> what makes of the material and its section what measures
OF_GENERATOR = {"score": _sample_score, "likelihood": _likelihood, "grid": _grid}
OF_TOKENIZER = {"score": _reconstruction_score, "reconstruction": _reconstruction}
