"""The recipe that is planned: its step, by its config and that of the tokens it is made for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import ml_collections
from flax import nnx

from tokgen import flops, rng
from tokgen.config import building, reading
from tokgen.interfaces import TokenLayout, UserError
from tokgen.planning import steps
from tokgen.training import fields, gan as gans, stages, tokenizer_step


@dataclasses.dataclass(frozen=True)
class Kind:
    """Steps of a run that are alike: `count` of them; `name` where a run has several kinds."""

    count: int
    step: steps.Step
    network: steps.Network
    name: str = ""

    def on(self, platform: str) -> Kind:
        """The same, as it is traced for a platform."""
        return dataclasses.replace(self, step=dataclasses.replace(self.step, platform=platform))

    @functools.cached_property
    def work(self) -> float:
        """Those of the model for all images, as the log's `mfu` counts them."""
        return flops.products(self.step.traced, flops.BESIDE)

    @functools.cached_property
    def operations(self) -> float:
        """Operations of a step for all images, with those of remat and of the optimizer."""
        return flops.products(self.step.traced)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config trains, as shapes: its kinds of steps, the one with most to compute first.

    Args:
        anew: the same with more overrides, for a platform.
    """

    settings: ml_collections.ConfigDict
    kinds: tuple[Kind, ...]
    anew: Callable[[Sequence[str], str], Recipe]

    @property
    def dearest(self) -> Kind:
        """The kind with most to compute."""
        return self.kinds[0]

    @property
    def images(self) -> int:
        """How many a step takes."""
        return self.dearest.step.images

    @property
    def parts(self) -> int:
        """In which a step takes them."""
        return self.dearest.network.parts

    def again(self, overrides: Sequence[str]) -> Recipe:
        """The same with more overrides."""
        return self.anew(overrides, self.dearest.step.platform)

    def on(self, platform: str) -> Recipe:
        """The same, as it is traced for a platform."""
        if platform == self.dearest.step.platform:
            return self
        return dataclasses.replace(self, kinds=tuple(kind.on(platform) for kind in self.kinds))

    @property
    def effort(self) -> float:
        """Of libtpu to make the step quick, from -1 to 1, its usual being 0.

        It spends seconds on every convolution, of which a tokenizer's step has hundreds. What it
        leaves undone is to keep some arrays in a chip's fast memory: the large one holds them, too.
        """
        return 0.0 if "generator" in self.settings else -1.0

    @property
    def kept_whole(self) -> tuple[str, ...]:
        """Fields `remat` that may yet be "full": the backward pass would keep less."""
        sections = {"generator": self.settings.get("generator")}
        for name in ("encoder", "decoder"):
            section = self.settings.get(name, {})
            sections |= {name: section, f"{name}.codes": section.get("codes")}
            sections |= {f"{name}.pixels": section.get("pixels")}
        return tuple(
            f"{name}.remat"
            for name, section in sections.items()
            if section and section.get("name") != "two_stage" and section.get("remat") != "full"
        )


def read(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    tokenizer: str = "",
    classes: int | None = None,
    platform: str = "cpu",
) -> Recipe:
    """The recipe of `PATH[:variant]`; UserError where it cannot be built.

    Args:
        tokenizer: of a generator, the recipe of its tokens; "": as its `made_for` says. Of a
            tokenizer that learns another one's codes, the recipe of that.
        classes: of a generator; None: as its `made_for` says.
        platform: of the devices that are planned for.
    """

    def anew(more: Sequence[str], platform: str) -> Recipe:
        how = dict(tokenizer=tokenizer, classes=classes, platform=platform)
        return read(reference, (*overrides, *more), **how)

    settings = reading.load(reference, overrides)
    if "generator" not in settings:
        kinds = [kind.on(platform) for kind in of_tokenizer(settings, reference, tokenizer)]
        return Recipe(settings, tuple(sorted(kinds, key=lambda kind: -kind.operations)), anew)
    layout, codec = tokens(settings, reference, tokenizer)
    count = classes_of(settings, reference, classes)
    kind = Kind(settings.steps, *steps.generator(settings, layout, count, codec))
    return Recipe(settings, (kind.on(platform),), anew)


def classes_of(settings: ml_collections.ConfigDict, reference: str, classes: int | None) -> int:
    """How many classes a generator has: as given, or as its `made_for` says."""
    count = settings.get("made_for", {}).get("classes") if classes is None else classes
    if count is None or count < 0:
        raise UserError(
            f"{reference} does not say how many classes it is made for: give --classes, 0 of a "
            f"generator without labels; found {count}"
        )
    return count


def of_tokenizer(
    settings: ml_collections.ConfigDict, reference: str, teacher: str = ""
) -> tuple[Kind, ...]:
    """The kinds of steps of a tokenizer: stages, and from when on the discriminator learns.

    In their order.
    """
    fields.check_recipe(settings)
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    begin, _ = gan.steps(settings.steps)
    frozen = tokenizer_step.frozen_shapes(
        settings, plan, _teacher(settings, plan, reference, teacher)
    )
    found = []
    for number, stage in enumerate(plan):
        name = f"of stage {number}" if len(plan) > 1 else ""
        learns = begin if stage.objective == "pixels" else stage.end
        alone = min(max(learns, stage.begin), stage.end)
        for count, adversarial in ((alone - stage.begin, False), (stage.end - alone, True)):
            if count:
                made = steps.tokenizer(settings, stage, frozen, adversarial=adversarial)
                with_it = "with the discriminator" if adversarial else "without discriminator"
                found.append(Kind(count, *made, f"{name} {with_it}".strip()))
    return tuple(found)


def _teacher(
    settings: ml_collections.ConfigDict, plan: Sequence[stages.Stage], reference: str, name: str
) -> nnx.Module | None:
    """The tokenizer whose codes a stage learns, as shapes; None where none does."""
    if all(stage.objective != "codes" for stage in plan):
        return None
    if not name:
        raise UserError(
            f"{reference} learns another tokenizer's codes: give its recipe, as --tokenizer "
            "configs/tokenizer/maskgit_vqgan.py"
        )
    own = reading.load(name)
    own.view.size = settings.view.size
    return nnx.eval_shape(lambda: building.tokenizer(own, rngs=rng.rngs(0)))


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
