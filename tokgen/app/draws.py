"""Pictures of a class, and how they came to be: what the page asks a generator for."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tokgen import image_generator, image_grid, traces
from tokgen.app import bounds, offers
from tokgen.errors import UserError

ALL = -1  # the label of "every class"
FRAMED = 4  # pictures of which it is shown how they came to be


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is asked for: a label or ALL, pictures of each, seed, preset, settings by name."""

    label: int
    number: int
    seed: int
    preset: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures, their names, and how they were drawn."""

    image_NHW3: np.ndarray
    tokens_NLG: np.ndarray
    names: list[str]
    told: dict[str, Any]


class Programs:
    """Which compiled programs there are: each setting is one, and too many would fill memory."""

    def __init__(self, most: int = bounds.PROGRAMS):
        self._most, self._known = most, set()

    def note(self, *key: object) -> None:
        """A program is about to run; those before it are dropped once they are too many."""
        if key not in self._known and len(self._known) >= self._most:
            jax.clear_caches()
            self._known.clear()
        self._known.add(key)


def checked(offer: offers.Offer, ask: Ask) -> dict[str, Any]:
    """The arguments of `model.sample`, or UserError."""
    seed = bounds.whole(ask.seed, "the seed", 0, bounds.SEEDS - 1)
    number = bounds.one_of(ask.number, "pictures of a class", bounds.NUMBERS)
    last = max(len(offer.classes), 1) - 1
    label = bounds.whole(ask.label, "the class", ALL, last)
    count = number * (len(offer.classes) if label == ALL else 1)
    if count > bounds.PICTURES or not count:
        raise UserError(
            f"at most {bounds.PICTURES} pictures are drawn at a time; found {count}: choose one "
            "class, or fewer of each"
        )
    return dict(
        classes="all" if label == ALL and offer.classes else max(label, 0),
        number=number,
        seed=seed,
        preset=ask.preset,
        **offer.departures(ask.preset, ask.settings),
    )


def draw(
    model: image_generator.ImageGenerator, offer: offers.Offer, ask: Ask, programs: Programs
) -> Drawn:
    """Pictures: to the bit those of `tokgen sample` with the same seed and settings."""
    asked = checked(offer, ask)
    programs.note("draw", model.fingerprint, _static(offer, asked))
    drawn = model.sample(**asked, progress=False)
    kinds = [offer.classes[kind] if offer.classes else "" for kind in drawn.kind_N]
    each = asked["number"]
    names = [f"{kind} {n % each}".strip() for n, kind in enumerate(kinds)]
    told = {"model": offer.title, "seed": asked["seed"], "preset": asked["preset"]}
    told |= {"class": drawn.classes, "settings": drawn.settings}
    return Drawn(drawn.image_NHW3, drawn.tokens_NLG, names, told)


def trace(
    model: image_generator.ImageGenerator, offer: offers.Offer, ask: Ask, programs: Programs
) -> traces.Trace:
    """How the first of these pictures came to be."""
    asked = checked(offer, ask)
    asked["number"] = min(asked["number"], FRAMED)
    if asked["classes"] == "all":
        asked |= dict(number=1)
    programs.note("trace", model.fingerprint, _static(offer, asked))
    return model.trace(**asked)


def said(offer: offers.Offer, preset: str, settings: Mapping[str, object]) -> str:
    """In words: what departs from the preset."""
    own = offer.presets[preset]
    changed = offer.departures(preset, settings)
    if not changed:
        return f"As the preset **{preset}** has it."
    parts = [
        f"{name.replace('_', '-')} {value:g} (preset {own[name]:g})"
        for name, value in changed.items()
    ]
    return f"**Departs from preset {preset}:** {', '.join(parts)}."


def bundle(drawn: Drawn) -> bytes:
    """A .zip of the pictures as PNG, of their tokens, and of how they were drawn."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped:
        for number, image in enumerate(image_grid.to_pil(drawn.image_NHW3)):
            zipped.writestr(f"{number:03}.png", png(image))
        tokens = io.BytesIO()
        np.save(tokens, drawn.tokens_NLG)
        zipped.writestr("tokens.npy", tokens.getvalue())
        zipped.writestr("drawn.json", json.dumps(drawn.told, indent=2, default=str))
    return file.getvalue()


def png(image: Any) -> bytes:
    """A PIL image as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _static(offer: offers.Offer, asked: Mapping[str, Any]) -> tuple:
    """What a program is compiled for: all but the seed and which classes they are."""
    kinds = len(offer.classes) if asked["classes"] == "all" else 1
    rest = {name: value for name, value in asked.items() if name not in ("seed", "classes")}
    return kinds, *sorted(rest.items())
