"""The networks that images are drawn with, as shapes: a checkpoint's, or those of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from flax import nnx

from tokgen import parameters, rng
from tokgen.checkpoints import checkpoint, loading
from tokgen.config import building, reading
from tokgen.interfaces import Generator, TokenLayout, UserError
from tokgen.planning import recipes
from tokgen.sampling import presets, sampler as samplers


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """What draws, and how.

    Args:
        generator: as shapes, narrow, as it is laid out where it draws.
        tokenizer: the same, without its encoder.
        settings: of the sampler, by name.
        precision: in which the generator computes.
        pixels: in which the tokenizer does.
        parameters: of the generator by path, as they are stored.
    """

    generator: Generator
    tokenizer: nnx.Module
    sampler: samplers.Sampler
    settings: Mapping[str, Any]
    precision: str
    pixels: str
    parameters: Mapping[str, jax.ShapeDtypeStruct]


def read(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    choice: presets.Choice,
    precision: str = "",
    tokenizer: str = "",
    classes: int | None = None,
    on_cpu: bool,
) -> Networks:
    """The networks of a CKPT or of `PATH[:variant]`; no array is read, and none is made.

    Args:
        overrides, classes: of a recipe.
        precision: of the generator; "": as the preset says.
        tokenizer: where that of a checkpoint lies now, or the recipe of a recipe's.
        on_cpu: whether they lie whole on CPUs, and are laid out for that.
    """
    if reference.partition(":")[0].endswith(".py"):
        found = _of_recipe(reference, overrides, tokenizer, classes)
    else:
        if overrides or classes is not None:
            raise UserError("--set and --classes are of a recipe; a checkpoint says what it is of")
        found = _of_checkpoint(reference, tokenizer)
    config, layout, names, own = found
    known = config.presets.to_dict()
    compute = precision or (presets.LOADING | presets.named(known, choice.preset))["precision"]
    config.precision.compute = compute
    generator = nnx.eval_shape(
        lambda: building.generator(config, layout, len(names), rngs=rng.rngs(0))
    )
    decoder = nnx.eval_shape(lambda: building.tokenizer(own, rngs=rng.rngs(0)))
    decoder.encoder = None
    settings, chosen, sampler = presets.choose(
        laid_out(generator, on_cpu=on_cpu), known, choice, names
    )
    return Networks(
        chosen,
        laid_out(decoder, on_cpu=on_cpu),
        sampler,
        settings,
        precision=compute,
        pixels=own.precision.compute,
        parameters=parameters.paths(parameters.split(generator)[1]),
    )


def laid_out(shapes: nnx.Module, *, on_cpu: bool) -> nnx.Module:
    """Shapes of a network as it is loaded for drawing: narrow; on a CPU its layers are apart.

    On a GPU they are, too: arrays of the same sizes, which a plan leaves stacked.
    """
    marks = parameters.narrowed(parameters.marked(shapes, on_cpu=on_cpu))
    graph, *trees = parameters.split(marks.unstacked() if on_cpu else marks)
    return parameters.merge(
        graph,
        *jax.tree.map(lambda mark: jax.ShapeDtypeStruct(mark.shape, mark.dtype), trees),
    )


Found = tuple[ml_collections.ConfigDict, TokenLayout, Sequence[str], ml_collections.ConfigDict]


def _of_checkpoint(reference: str, tokenizer: str) -> Found:
    """(config, layout, classes, the tokenizer's config) of a checkpoint."""
    loaded = loading.load_reference(checkpoint.find(reference), "generator")
    own = loading.load_reference_of(loaded, tokenizer)
    return loaded.config, loaded.layout, loaded.classes, own.config


def _of_recipe(
    reference: str, overrides: Sequence[str], tokenizer: str, classes: int | None
) -> Found:
    """(config, layout, classes, the tokenizer's config) of a recipe."""
    config = reading.load(reference, overrides)
    if "generator" not in config:
        raise UserError(f"{reference} is of a tokenizer: images are drawn with a generator")
    layout, _ = recipes.tokens(config, reference, tokenizer)
    count = recipes.classes_of(config, reference, classes)
    return config, layout, ("",) * count, recipes.tokenizer_of(config, reference, tokenizer)
