"""A training program without its numbers: what it is told is checked, then traced, before any work.

First every field is held against the signature that it is for, and against the others (`*_fields`,
which touches no device). Then the networks, a step of every kind that the run will take and the
default preset's decode are traced with shapes in the place of arrays: what cannot run is told in
one message, before the work directory holds anything and before a device has computed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen import parameters, ranges, rng, sharding
from tokgen.backbones import perceptual
from tokgen.config import building
from tokgen.data import datasets, views
from tokgen.interfaces import PyTree, Text, TokenLayout, UserError
from tokgen.nn import precision, transformer
from tokgen.sampling import decode, presets, sampler as filters
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

ENTROPIES = ("sample_entropy", "batch_entropy")  # what training may raise as well as lower


# ---------------------------------------------------------------- the fields of a config


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
    views: str = "center,flip"
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What the configs of both programs have at their top."""

    seed: ranges.Seed
    steps: ranges.Count
    batch_size: ranges.Batch
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


def names(fields: type[Fields]) -> tuple[str, ...]:
    """What the config of a program may have at its top."""
    return tuple(field.name for field in dataclasses.fields(fields))


SHARED = dict(
    precision=(precision.Precision, ()),
    report=(Report, ()),
    keep=(Keep, ()),
    mesh=(sharding.make_mesh, ()),
)


def tokenizer_fields(settings) -> None:
    """Every field of a tokenizer's config, alone and together; no device is touched."""
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
    tokenizer_step.check_frozen(settings, plan)


def generator_fields(settings) -> None:
    """Every field of a generator's config, alone and together; no device is touched."""
    building.check(
        settings,
        GeneratorFields,
        data=(Tokens, ()),
        held_out=(HeldOutAndDrawn, ()),
        generator__rates=(transformer.Rates, ()),
        optimizer=(optimizers.optimizer, ("steps", "begin")),
        **SHARED,
    )
    found = _shared(settings)
    if settings.generator.get("label_drop") == 1:
        found.append(
            "generator.label_drop must be below 1 in training: at 1 the classes are never seen; "
            "found 1"
        )
    ranges.refuse(found)
    building.call(transformer.Rates, settings.generator.get("rates", {}), "generator.rates")
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


def _optimizer(section, name: str, steps: int) -> None:
    building.call(optimizers.optimizer, section, name, steps=steps)


# What has a default, and is read by those who are handed a config or a checkpoint
STATED = ("precision.params", "precision.compute", "view.size", "view.channels")


def _shared(settings) -> list[str]:
    """What is wrong between fields that both programs have."""
    found = []
    for section, name in (field.split(".") for field in STATED):
        if section in settings and name not in settings[section]:
            found.append(f"{section} needs {name!r}")
    if settings.strategy not in sharding.STRATEGIES:
        names = ", ".join(sharding.STRATEGIES)
        near = difflib.get_close_matches(settings.strategy, sharding.STRATEGIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        found.append(f"strategy must be one of {names}; found {settings.strategy!r}{hint}")
    sizes = [settings.mesh.get(axis, 1) for axis in sharding.AXES]
    if 0 in sizes or sizes.count(-1) > 1:
        found.append(
            f"the sizes of the mesh are at least 1, but for one that may be -1, all that are "
            f"left; found {sizes}"
        )
    building.call(precision.Precision, settings.precision, "precision")
    train_state.average_of(settings.get("average", "muse"))
    return found


def _weights(settings) -> list[str]:
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


# ---------------------------------------------------------------- what runs, traced


def tokenizer(
    settings,
    mesh: jax.sharding.Mesh,
    frozen: PyTree,
    *,
    text: tuple[int, int] | None = None,
    memory: int | None = None,
) -> nnx.Module:
    """The Tokenizer as shapes, after every kind of step was traced; UserError for what cannot run.

    `frozen` is what `tokenizer_step.load_frozen` gives, as arrays or as shapes; `text` the shape of
    the features of one image, where the data has any; `memory` the bytes of all devices together.
    """
    tokenizer_fields(settings)
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    limits = building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    sharding.check_batch(settings.batch_size, mesh)
    shapes = nnx.eval_shape(lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)))
    stages.check(plan, shapes)
    begin, _ = gan.steps(settings.steps)
    batch = _pictures(settings, text)
    for stage in plan:
        networks, graphs, optimizer = networks_of(settings, stage, gan, mesh)
        check_memory(networks, batch, memory or bytes_of(mesh))
        steps = tokenizer_step.Steps(settings, gan, limits, graphs, optimizer, 0)
        # a stage may see the discriminator begin
        for playing in sorted({stage.begin >= begin, stage.end - 1 >= begin}):
            jax.eval_shape(steps(stage, playing), networks, batch, frozen)
    return shapes


def generator(
    settings,
    layout: TokenLayout,
    classes: int,
    mesh: jax.sharding.Mesh,
    codec: nnx.Module,
    train_step: Callable,
    *,
    text: tuple[int, int] | None = None,
    memory: int | None = None,
) -> tuple[nnx.Module, filters.Sampler]:
    """(the Generator as shapes, the default preset's Sampler) after all that will run was traced.

    That is a step of training, and the decode by the default preset; UserError for what cannot run.

    `train_step` gives (settings, structure, optimizer) -> step; `codec` is the tokenizer's
    quantizer, as arrays or as shapes.
    """
    generator_fields(settings)
    sharding.check_batch(settings.batch_size, mesh)
    optimizer = building.call(
        optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
    )

    def make():
        rngs = nnx.Rngs(rng.key(settings.seed, "init"))
        return building.generator(settings, layout, classes, rngs=rngs)

    shapes = nnx.eval_shape(make)
    datasets.check_text(shapes, settings.data.get("text", ""), "config.data.text")
    samplers = {name: _prepared(settings, shapes, name) for name in settings.presets}
    batch = _tokens(settings, layout, shapes, text)
    graph, network = _created(
        lambda: train_state.create(
            make, optimizer, mesh=mesh, strategy=settings.strategy, ema=settings.ema
        )
    )
    check_memory(network, batch, memory or bytes_of(mesh))
    jax.eval_shape(train_step(settings, graph, optimizer), network, batch, codec)
    if settings.held_out.samples:
        rows = settings.held_out.samples * min(max(classes, 1), 10)
        cond = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype),
            _cond(shapes, batch),
        )
        jax.eval_shape(
            functools.partial(_decoded, samplers["default"][1]), samplers["default"][0], codec, cond
        )
    return shapes, samplers["default"][1]


def _decoded(sampler, generator, codec, cond):
    keys_B = rng.per_image(0, "sample", jnp.arange(len(jax.tree.leaves(cond)[0])))
    return decode.generate(generator, codec, cond, sampler, keys_B=keys_B).tokens_BLG


def _prepared(settings, shapes: nnx.Module, name: str):
    """(generator, sampler) of a preset; one without "no class" cannot be guided by default."""
    try:
        made, sampler = presets.prepare(shapes, presets.named(settings.presets.to_dict(), name))
        labels = shapes.cond == "label"
        if name == "default" and sampler.guidance and labels:
            shapes.null(np.zeros(1, np.int32))
    except UserError as error:
        raise UserError(f"config.presets.{name}: {error}") from error
    return made, sampler


def _cond(shapes: nnx.Module, batch: Mapping[str, Any]) -> PyTree:
    """What of a batch is the condition."""
    if shapes.cond == "label":
        return batch["label"]
    return Text(batch["text"], batch["mask"])


def _tokens(settings, layout: TokenLayout, shapes, text) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the stream, as shapes."""
    B = settings.batch_size
    batch = {
        "tokens": jax.ShapeDtypeStruct((B, layout.length, layout.groups), jnp.int32),
        "label": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    if shapes.cond == "text":
        shape = text or shapes.text
        batch["text"] = jax.ShapeDtypeStruct((B, *shape), jnp.float32)
        batch["mask"] = jax.ShapeDtypeStruct((B, shape[0]), bool)
    return batch


def _pictures(settings, text: tuple[int, int] | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of images, and of their texts where `text` is their shape, as shapes."""
    B, (rows, columns) = settings.batch_size, settings.view.size
    shape = (B, rows, columns, settings.view.get("channels", 3))
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    if text is not None:
        batch["text"] = jax.ShapeDtypeStruct((B, *text), jnp.float32)
    return batch


def networks_of(
    settings: ml_collections.ConfigDict,
    stage: stages.Stage,
    gan: gans.GAN,
    mesh: jax.sharding.Mesh,
) -> tuple[PyTree, tokenizer_step.Graphs, optimizers.Optimizer | None]:
    """What `tokenizer_step.create` gives, its arrays as shapes."""
    (graphs, optimizer), networks = _created(
        lambda: _turned(*tokenizer_step.create(settings, stage, gan, mesh))
    )
    return networks, graphs, optimizer


def _turned(networks, graphs, optimizer):
    return (graphs, optimizer), networks


def _created(create: Callable[[], tuple[Any, PyTree]]) -> tuple[Any, PyTree]:
    """(structure, arrays as shapes) of what gives a structure and arrays."""
    kept = []

    def arrays():
        structure, made = create()
        kept.append(structure)
        return made

    made = jax.eval_shape(arrays)
    return kept[-1], made


# ---------------------------------------------------------------- sizes


def check_memory(networks: PyTree, batch: PyTree, memory: int) -> None:
    """Refuse what cannot fit, by the least that must be there at once.

    That is the state, the gradients of its parameters, and a batch in float32; activations and
    copies come on top.
    """
    trained = [n for n in jax.tree.leaves(networks, is_leaf=_is_state) if _is_state(n)]
    parts = {
        "parameters, moments and averages": _bytes(networks),
        "gradients": sum(4 * parameters.count(network.params) for network in trained),
        "a batch": sum(4 * leaf.size for leaf in jax.tree.leaves(batch)),
    }
    need = sum(parts.values())
    if need > memory:
        told = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in parts.items())
        raise UserError(
            f"this config needs at least {need / 2**30:,.1f} GiB ({told}); found "
            f"{memory / 2**30:,.1f} GiB on all devices together: a smaller batch_size, smaller "
            "networks, or more devices"
        )


def bytes_of(mesh: jax.sharding.Mesh) -> int:
    """Memory of all devices of a mesh; of devices that share the host's, that of the hosts."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    if all(limits):
        return sum(limits) * jax.process_count()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()


def _is_state(tree: Any) -> bool:
    return isinstance(tree, train_state.TrainState)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
