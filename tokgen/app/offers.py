"""What a model can do, and what its settings may be: what the page offers of it."""

from __future__ import annotations

import dataclasses
import numbers
import pathlib
from collections.abc import Mapping, Sequence

from tokgen import image_generator, image_tokenizer
from tokgen.app import bounds
from tokgen.data import classes as names
from tokgen.errors import UserError
from tokgen.interfaces import TokenLayout
from tokgen.sampling import decode, presets

Model = image_generator.ImageGenerator | image_tokenizer.ImageTokenizer

# Way of editing -> what it is called on the page
WAYS = {
    "region": "a part that you paint",
    "variation": "a variation of all of it",
    "canvas": "a larger canvas",
    "scales": "the finer scales",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of sampling as a slider: its name in `model.sample`, and from where to where."""

    name: str
    told: str
    low: float
    high: float
    step: float


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the page shows of a model.

    Attributes:
        title: its name on the page.
        told: two lines of what it is.
        draws: whether it draws pictures.
        why: why it does not; or why it edits no part of a picture.
        classes: names by label; () of one without.
        presets: {preset: {setting: its value}}, None of a value that differs from step to step.
        settings: the sliders.
        ways: of editing, of WAYS.
        particles: whether an edit of it weighs particles.
        size: (rows, columns) of its pictures.
        layout: of its tokens; None of one without.
    """

    title: str
    told: str
    draws: bool
    why: str
    classes: tuple[str, ...]
    presets: Mapping[str, Mapping[str, float | None]]
    settings: tuple[Setting, ...]
    ways: tuple[str, ...]
    particles: bool
    size: tuple[int, int]
    layout: TokenLayout | None

    @property
    def enlarged(self) -> int:
        """How often a pixel is repeated each way to be painted on: small pictures fill a hand."""
        return max(1, 512 // max(self.size))

    def departures(self, preset: str, settings: Mapping[str, object]) -> dict[str, float]:
        """{setting: value} of what is not as the preset has it, or UserError."""
        known = self.presets[bounds.one_of(preset, "the preset", tuple(self.presets))]
        found = {}
        for setting in self.settings:
            value, own = settings.get(setting.name), known[setting.name]
            if own is None or value is None:  # by step, or left alone
                continue
            if isinstance(value, numbers.Real) and value == own:
                continue
            check = bounds.whole if isinstance(setting.step, int) else bounds.real
            found[setting.name] = check(value, setting.told, setting.low, setting.high)
        return found


def offer(model: Model, title: str) -> Offer:
    """What the page offers of a model."""
    told = repr(model).replace("ImageGenerator of", "Generator,")
    told = told.replace("ImageTokenizer of", "Tokenizer,")
    own = dict(title=title, told=told, size=model.size, layout=model.layout)
    nothing = dict(classes=(), presets={}, settings=(), ways=(), particles=False)
    if isinstance(model, image_tokenizer.ImageTokenizer):
        why = "This is a tokenizer: it turns pictures into tokens and back, and draws none."
        return Offer(draws=False, why=why, **own, **nothing)
    if model.loaded.module.cond == "text":
        why = (
            "This generator reads text features from a file, which the page does not make: draw "
            "with `tokgen sample --text FILE.npz`. Its tokens can be looked at here."
        )
        return Offer(draws=False, why=why, **own, **nothing)
    ways, why = _ways(model)
    return Offer(
        draws=True,
        why=why,
        classes=model.classes,
        presets={name: _values(model, name) for name in model.presets},
        settings=tuple(_settings(model)),
        ways=ways,
        particles="region" in ways and not model.loaded.module.sees_given,
        **own,
    )


def shared(both: Sequence[Offer]) -> tuple[str, ...]:
    """The classes to choose from for several models: those that all with classes know.

    () where none has any; where they have none in common, those of the first.
    """
    first, *others = [each.classes for each in both if each.classes] or [()]
    kept = list(range(len(first)))
    for other in others:
        if other != first:
            known = names.common(first, other)[0]
            kept = [label for label in kept if label in known]
    return tuple(first[label] for label in kept) or first


def label_in(known: tuple[str, ...], offer: Offer, label: object) -> int:
    """The label in a model of a class of those known; 0 of one without classes; or UserError."""
    label = bounds.whole(label, "the class", 0, max(len(known), 1) - 1)
    if not offer.classes or offer.classes == known:
        return label if offer.classes else 0
    old, new = names.common(known, offer.classes)
    if label not in old:
        name = names.shown(known[label]) if known else "no class"
        raise UserError(f"{offer.title} has no class {name}; it has {names.listed(offer.classes)}")
    return new[list(old).index(label)]


def titles(paths: Sequence[str]) -> list[str]:
    """A name for each: of a published model its own, of a run its folder's; no two alike."""
    found = []
    for path in paths:
        parts = [part for part in pathlib.PurePath(path).parts if part != "checkpoints"]
        title = " ".join(parts[-2:]) if parts and parts[-1].isdigit() else (parts or [path])[-1]
        title = names.shown(title)
        same = [other for other in found if other == title or other.startswith(f"{title} (")]
        found.append(f"{title} ({len(same) + 1})" if same else title)
    return found


def _values(model: image_generator.ImageGenerator, preset: str) -> dict[str, float | None]:
    """The values of a preset; None where it has one for each step, or symbol."""
    settings = presets.PLAIN | presets.MASKED
    settings |= presets.named(model.config.presets.to_dict(), preset)
    found = {"guidance": settings["weight"]}
    found |= {name: settings[name] for name in ("temperature", "top_k", "top_p", "noise")}
    found["steps"] = settings["steps"] or decode.steps(model.loaded.module)
    return {k: v if isinstance(v, numbers.Real) else None for k, v in found.items()}


def _settings(model: image_generator.ImageGenerator) -> list[Setting]:
    """The sliders: as wide as is of use, and wider where a preset asks for more."""
    module, values = model.loaded.module, [_values(model, name) for name in model.presets]
    symbols = module.layout.absent
    found = [Setting("temperature", "temperature", 0.0, 2.0, 0.05)]
    if model.classes:
        found.append(Setting("guidance", "guidance", 0.0, 10.0, 0.25))
    found.append(Setting("top_k", "top-k, 0 keeps all", 0, symbols, 1))
    found.append(Setting("top_p", "top-p", 0.05, 1.0, 0.05))
    if "steps" in module.knobs:
        found.append(Setting("steps", "steps", 1, bounds.STEPS, 1))
    if module.knobs:
        found.append(Setting("noise", "noise of the choice", 0.0, 10.0, 0.25))
    wide = []
    for setting in found:
        own = [value[setting.name] or 0 for value in values]
        most = max([setting.high, *(2 * v for v in own if v > setting.high)])
        # as many steps as a preset asks for, else they would be refused as they are
        most = max(bounds.STEPS, *own) if setting.name == "steps" else most
        most = symbols if setting.name == "top_k" else most
        wide.append(dataclasses.replace(setting, high=most))
    return wide


def _ways(model: image_generator.ImageGenerator) -> tuple[tuple[str, ...], str]:
    """(ways of editing, what is to be said of those that there are not)."""
    encoder, layout = model.tokenizer.encoder.module.encoder, model.layout
    scales = ("scales",) if len(layout.grids) > 1 else ()
    if not encoder.places:
        return ("variation", *scales), (
            f"Each of its {layout.length} tokens is of the whole picture: no part of it can be "
            "drawn anew, but a variation can."
        )
    return ("region", "variation", "canvas", *scales), ""
