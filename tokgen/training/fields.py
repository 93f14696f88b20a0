"""The fields of a training program's config: each held against its signature, then with others.

`dry_run.py` traces what such a config describes.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any

import ml_collections

from tokgen import choices, ranges, sharding
from tokgen.backbones import perceptual
from tokgen.config import building, evaluators
from tokgen.data import views
from tokgen.interfaces import UserError
from tokgen.nn import dropout, precision
from tokgen.sampling import presets
from tokgen.training import (
    gan as gans,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

# What a tokenizer's step may compute beside perceptual distances: weights are looked up by name
TERMS = (
    *("l1", "l2", "codes", "codebook", "commitment", "index", "sample_entropy", "batch_entropy"),
    "kl",
)

# the first and the last step of a trace; () for none
Profiled = Annotated[tuple[ranges.Count, ...], ranges.Length(0, 2)]

ENTROPIES = ("sample_entropy", "batch_entropy")  # what training may raise as well as lower


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The section `held_out` of a tokenizer's config: images that are measured at a save."""

    images: ranges.Count


@dataclasses.dataclass(frozen=True)
class HeldOutAndDrawn:
    """That of a generator's: also pictures of each class in the grid that is drawn."""

    images: ranges.Count
    samples: Annotated[int, ranges.Range(0, 256)]


@dataclasses.dataclass(frozen=True)
class Report:
    """The section `report`: after so many steps figures are written, and a checkpoint is saved."""

    scalars: ranges.Count
    save: ranges.Count


@dataclasses.dataclass(frozen=True)
class Keep:
    """The section `keep`: how many of the latest and of the best steps stay."""

    latest: ranges.Whole
    best: ranges.Whole


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The section `data` of a generator's config."""

    tokens: str
    tokenizer: str
    images: str = ""
    labels: str = ""
    views: str = "center,flip"
    text: str = ""


@dataclasses.dataclass(frozen=True)
class MadeFor:
    """The section `made_for` of a generator's config: what a plan knows of tokens that are not yet.

    Training reads the tokens themselves.

    Args:
        tokenizer: the recipe of what makes them, PATH[:variant].
        pixels: along an edge of the images.
        classes: how many; 0 where texts are the condition.
    """

    tokenizer: str
    pixels: ranges.Count
    classes: ranges.Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What the configs of both programs have at their top."""

    seed: ranges.Seed
    steps: ranges.Count
    batch_size: ranges.Batch
    accumulate: ranges.Batch = 1
    precision: dict
    data: dict
    optimizer: dict
    ema: ranges.Rate
    average: str = "muse"
    mesh: dict
    strategy: str
    held_out: dict
    report: dict
    keep: dict
    profile: Profiled = ()
    evaluators: dict = dataclasses.field(default_factory=dict)
    init_from: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFields(Fields):
    """Those of a tokenizer's config."""

    view: dict
    pixels: tuple[ranges.Weight, ranges.Weight]
    encoder: dict
    quantizer: dict
    decoder: dict
    loss: Mapping[str, ranges.Weight]
    anneal: Mapping[str, tuple[ranges.Amount, ranges.Fraction]] = dataclasses.field(
        default_factory=dict
    )
    perceptual: Mapping[str, str] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    stages: tuple[dict, ...] = ()
    discriminator: dict
    safeguards: dict = dataclasses.field(default_factory=dict)
    max_bad: ranges.Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorFields(Fields):
    """Those of a generator's config."""

    generator: dict
    presets: Mapping[str, dict]
    max_bad: ranges.Share = 1e-3
    made_for: dict = dataclasses.field(default_factory=dict)


def names(fields: type[Fields]) -> tuple[str, ...]:
    """What the config of a program may have at its top."""
    return tuple(field.name for field in dataclasses.fields(fields))


SHARED = dict(
    precision=(precision.Precision, ()),
    report=(Report, ()),
    keep=(Keep, ()),
    mesh=(sharding.make_mesh, ()),
)


def check_tokenizer(settings: ml_collections.ConfigDict) -> None:
    """Hold every field of a tokenizer's config, and the files that its losses need."""
    check_recipe(settings)
    tokenizer_step.check_frozen(settings, stages.plan(settings))


def check_recipe(settings: ml_collections.ConfigDict) -> None:
    """Hold every field of a tokenizer's config, alone and together; no device is touched."""
    discriminator = settings.get("discriminator")
    # also of a discriminator that is off: it may be turned on
    stated = hasattr(discriminator, "items") and (
        discriminator.get("weight") or discriminator.get("optimizer")
    )
    its = {"discriminator__optimizer": (optimizers.optimizer, ("steps", "begin"))} if stated else {}
    building.check(
        settings,
        TokenizerFields,
        view=(views.View, ()),
        optimizer=(optimizers.optimizer, ("steps", "begin")),
        discriminator=(gans.GAN, ()),
        **its,
        safeguards=(safeguards.Limits, ()),
        held_out=(HeldOut, ()),
        **evaluators.checks(settings),
        **SHARED,
    )
    ranges.refuse([*_shared(settings), *_weights(settings)])
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    building.call(views.View, settings.view, "view")
    if stated:
        _optimizer(gan.optimizer, "discriminator.optimizer", settings.steps)
    if gan.weight and "name" not in gan.network:
        raise UserError(
            f"discriminator.weight={gan.weight:g} needs a discriminator: give "
            "discriminator.network a name, such as patchgan, or set discriminator.weight=0"
        )
    for number, stage in enumerate(plan):
        _check_aim(stage, {**settings.loss, **stage.loss}, f"stages[{number}]")


def check_generator(settings: ml_collections.ConfigDict) -> None:
    """Hold every field of a generator's config, alone and together; no device is touched."""
    building.check(
        settings,
        GeneratorFields,
        data=(Tokens, ()),
        held_out=(HeldOutAndDrawn, ()),
        **({"made_for": (MadeFor, ())} if settings.get("made_for") else {}),
        generator__rates=(dropout.Rates, ()),
        optimizer=(optimizers.optimizer, ("steps", "begin")),
        **evaluators.checks(settings),
        **SHARED,
    )
    found = _shared(settings)
    if settings.generator.get("label_drop") == 1:
        found.append(
            "generator.label_drop must be below 1 in training: at 1 the classes are never seen; "
            "found 1"
        )
    ranges.refuse(found)
    building.call(dropout.Rates, settings.generator.get("rates", {}), "generator.rates")
    _optimizer(settings.optimizer, "optimizer", settings.steps)
    views.stored(settings.data.get("views", "center,flip"))
    presets.named(settings.presets.to_dict(), "default")


def _check_aim(stage: stages.Stage, weights: Mapping[str, float], name: str) -> None:
    """A stage descends something, and no distance upwards."""
    negative = [term for term, w in weights.items() if w < 0 and term not in ENTROPIES]
    if negative:
        told = ", ".join(f"loss.{term}={weights[term]:g}" for term in negative)
        raise UserError(
            f"a weight of config.loss is at least 0, but for {' and '.join(ENTROPIES)}; found "
            f"{told}"
        )
    aims = ("codes",) if stage.objective == "codes" else ("l1", "l2", *perceptual.known())
    if not any(weights.get(term) for term in aims):
        raise UserError(
            f"{name} compares nothing with the image: one of the weights {', '.join(aims)} of "
            "config.loss must be above 0"
        )


def _optimizer(section: Mapping[str, Any], name: str, steps: int) -> None:
    building.call(optimizers.optimizer, section, name, steps=steps)


# What has a default, and is read by those who are handed a config or a checkpoint
STATED = ("precision.params", "precision.compute", "view.size", "view.channels")


def _shared(settings: ml_collections.ConfigDict) -> list[str]:
    """What is wrong between fields that both programs have."""
    found, parts = evaluators.problems(settings), settings.get("accumulate", 1)
    if settings.batch_size % parts:
        fitting = [n for n in range(1, parts) if settings.batch_size % n == 0][-2:]
        found.append(
            f"accumulate takes a batch in equal parts: batch_size={settings.batch_size} has no "
            f"{parts}; give accumulate={' or '.join(map(str, fitting))}, or batch_size="
            f"{-(-settings.batch_size // parts) * parts}"
        )
    profile = tuple(settings.get("profile", ()))
    if profile and not (len(profile) == 2 and profile[0] <= profile[1] <= settings.steps):
        found.append(
            f"profile must be () or (first, last), steps from 1 to steps={settings.steps}; found "
            f"{profile}"
        )
    for section, name in (field.split(".") for field in STATED):
        if section in settings and name not in settings[section]:
            found.append(f"{section} needs {name!r}")
    if settings.strategy not in sharding.STRATEGIES:
        found.append(choices.refusal(sharding.STRATEGIES, settings.strategy, "strategy"))
    sizes = [settings.mesh.get(axis, 1) for axis in sharding.AXES]
    if 0 in sizes or sizes.count(-1) > 1:
        found.append(
            f"the sizes of the mesh are at least 1, but for one that may be -1, all that are "
            f"left; found {sizes}"
        )
    building.call(precision.Precision, settings.precision, "precision")
    train_state.average_of(settings.get("average", "muse"))
    return found


def _weights(settings: ml_collections.ConfigDict) -> list[str]:
    """Names of losses, distances and annealed terms that nothing computes."""
    found, distances = [], tuple(perceptual.known())
    for section, known in (("loss", (*TERMS, *distances)), ("perceptual", distances)):
        for name in settings.get(section, {}):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
                found.append(f"{section} has no term {name!r}{hint}")
    for name in settings.get("anneal", {}):
        if name not in settings.loss:
            found.append(f"anneal.{name} needs a weight of that name in config.loss")
    return found
