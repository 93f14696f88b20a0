"""Edits: a part painted over, a larger canvas, a variation, finer scales, another class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokgen import image_generator, image_grid
from tokgen.app import bounds, draws, offers
from tokgen.editing import edits
from tokgen.errors import UserError

SIDES = ("left", "right", "top", "bottom")


@dataclasses.dataclass(frozen=True)
class Ask:
    """What is asked for: how, and of which class, what is drawn anew.

    Attributes:
        way: of offers.WAYS.
        label: the class of what is drawn.
        number, seed, preset, settings: as of a draw.
        mask_HW: of a region: where it is painted.
        sides, share: of a canvas: which sides grow, by which share of the picture's.
        strength: of a variation: the share of the tokens.
        scales: so many of the coarsest are kept.
        particles: where a generator needs them.
    """

    way: str
    label: int
    number: int
    seed: int
    preset: str
    settings: Mapping[str, Any]
    mask_HW: np.ndarray | None = None
    sides: Sequence[str] = ()
    share: float = 0.5
    strength: float = 0.3
    scales: int = 1
    particles: int = 64


def checked(offer: offers.Offer, ask: Ask) -> dict[str, Any]:
    """The arguments of `model.edit`, or UserError."""
    if ask.way not in offer.ways:
        raise UserError(f"{offer.title} cannot draw {offers.WAYS.get(ask.way, 'that')} anew")
    asked = dict(
        number=bounds.one_of(ask.number, "edits", bounds.DRAWS),
        seed=bounds.whole(ask.seed, "the seed", 0, bounds.SEEDS - 1),
        preset=ask.preset,
        **offer.departures(ask.preset, ask.settings),
    )
    if offer.classes:
        asked["classes"] = bounds.whole(ask.label, "the class", 0, len(offer.classes) - 1)
    if offer.particles and ask.way in ("region", "canvas"):
        asked["particles"] = bounds.whole(ask.particles, "particles", *bounds.PARTICLES)
    return asked | _what(offer, ask)


def _what(offer: offers.Offer, ask: Ask) -> dict[str, Any]:
    """The one of mask, grow, strength and scales that is asked for."""
    if ask.way == "region":
        if ask.mask_HW is None or not ask.mask_HW.any():
            raise UserError("paint over what is to be drawn anew; found nothing painted")
        return {"mask": ask.mask_HW}
    if ask.way == "canvas":
        sides = [
            bounds.one_of(side, "a side", SIDES) for side in dict.fromkeys(list(ask.sides)[:9])
        ]
        if not sides:
            raise UserError("choose a side at which the canvas grows; found none")
        share = bounds.real(ask.share, "the share of a side", 0.125, 1)
        pixels = {"top": offer.size[0], "bottom": offer.size[0]}
        added = (f"{side}={round(share * pixels.get(side, offer.size[1]))}" for side in sides)
        return {"grow": ",".join(added)}
    if ask.way == "variation":
        return {"strength": bounds.real(ask.strength, "the share that is drawn anew", 0.01, 1)}
    most = len(offer.layout.grids) - 1
    return {"scales": bounds.whole(ask.scales, "scales that are kept", 1, most)}


def draw(
    model: image_generator.ImageGenerator,
    offer: offers.Offer,
    image_HW3: np.ndarray,
    ask: Ask,
    programs: draws.Programs,
) -> edits.Edits:
    """Edits of a picture of the model's size."""
    asked = checked(offer, ask)
    rest = {k: v for k, v in asked.items() if k not in ("mask", "seed", "classes", "strength")}
    programs.note("edit", model.fingerprint, ask.way, *sorted(rest.items()))
    return model.edit(image_HW3, progress=False, **asked)


def named(found: edits.Edits) -> list[tuple[Any, str]]:
    """(picture for PIL, its name) of what was there, what went under a veil, and of the edits."""
    (shown,) = image_grid.to_pil(found.veiled())
    return [(shown, "before"), *((one, f"edit {n}") for n, one in enumerate(found.images))]
