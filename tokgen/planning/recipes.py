"""The recipe that is planned: its step, by its config and that of the tokens it is made for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import ml_collections
from flax import nnx

from tokgen import flops, rng
from tokgen.config import building, reading
from tokgen.interfaces import TokenLayout, UserError
from tokgen.planning import estimate, steps
from tokgen.training import fields


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config trains, as shapes."""

    settings: ml_collections.ConfigDict
    step: steps.Step
    network: steps.Network

    @functools.cached_property
    def work(self) -> float:
        """Those of the model for all images, as the log's `mfu` counts them."""
        step = self.step
        return flops.of_training(step.compiled("data"), step.state, step.batch, step.frozen)

    @functools.cached_property
    def operations(self) -> float:
        """Operations of a step for all images, with those of remat and of the optimizer."""
        return estimate.count(self.step)


def read(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    tokenizer: str = "",
    classes: int | None = None,
) -> Recipe:
    """The recipe of `PATH[:variant]`; UserError where it cannot be built.

    Args:
        tokenizer: of a generator, the recipe of its tokens; "": as its `made_for` says.
        classes: of a generator; None: as its `made_for` says.
    """
    settings = reading.load(reference, overrides)
    if "generator" not in settings:
        raise UserError(f"{reference} trains a tokenizer: plans are of generators so far")
    layout, codec = tokens(settings, reference, tokenizer)
    count = classes_of(settings, reference, classes)
    return Recipe(settings, *steps.generator(settings, layout, count, codec))


def classes_of(settings: ml_collections.ConfigDict, reference: str, classes: int | None) -> int:
    """How many classes a generator has: as given, or as its `made_for` says."""
    count = settings.get("made_for", {}).get("classes") if classes is None else classes
    if count is None or count < 0:
        raise UserError(
            f"{reference} does not say how many classes it is made for: give --classes, 0 of a "
            f"generator without labels; found {count}"
        )
    return count


def tokens(
    settings: ml_collections.ConfigDict, reference: str, tokenizer: str = ""
) -> tuple[TokenLayout, nnx.Module]:
    """(layout of a generator's tokens, their quantizer as shapes)."""
    own = tokenizer_of(settings, reference, tokenizer)
    codec = nnx.eval_shape(lambda: building.tokenizer(own, rngs=rng.rngs(0))).quantizer
    return codec.layout, codec


def tokenizer_of(
    settings: ml_collections.ConfigDict, reference: str, tokenizer: str = ""
) -> ml_collections.ConfigDict:
    """The recipe of what makes a generator's tokens, for images of their size."""
    told = settings.get("made_for", {})
    if not tokenizer and not told:
        raise UserError(
            f"{reference} does not say what its tokens are: give --tokenizer "
            "configs/tokenizer/NAME.py, and --classes"
        )
    own = reading.load(tokenizer or told.tokenizer)
    if not tokenizer:
        own.view.size = (building.call(fields.MadeFor, told, "made_for").pixels,) * 2
    return own
