"""Class, preset, settings and seed: what is asked for wherever pictures are drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio

from tokgen.app import bounds, desks, draws, offers
from tokgen.data import classes as names

RANDOM = "() => Math.floor(Math.random() * 4294967296)"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The preset and its sliders."""

    offer: offers.Offer
    preset: gradio.Dropdown
    sliders: list[gradio.Slider]

    @property
    def components(self) -> list:
        """What a handler takes, in this order."""
        return [self.preset, *self.sliders]

    def read(self, values: tuple) -> tuple[str, dict[str, Any]]:
        """(preset, settings by name) of their values."""
        preset, *rest = values
        known = bounds.one_of(preset, "the preset", tuple(self.offer.presets))
        return known, {s.name: v for s, v in zip(self.offer.settings, rest, strict=True)}


def classes(known: tuple[str, ...], *, every: bool, key: str) -> gradio.Dropdown:
    """A class by its name or number; typing searches."""
    return gradio.Dropdown(
        value=0, label="Class", filterable=True, elem_id=f"{key}-class", **listed(known, every)
    )


def listed(known: tuple[str, ...], every: bool) -> dict[str, Any]:
    """Classes as the choices of a list."""
    shown = [
        (f"{names.shown(name)}" if names.counted(known) else f"{names.shown(name)} · {n}", n)
        for n, name in enumerate(known)
    ]
    some = bool(every and 1 < len(shown) <= bounds.PICTURES)
    choices = [*shown, *([("every class", draws.ALL)] if some else [])]
    return dict(
        choices=choices or [("no classes", 0)],
        interactive=bool(shown),
        info="type to search" if len(shown) > 8 else None,
    )


def seeds(key: str) -> gradio.Number:
    """A seed, and a button for another."""
    with gradio.Row(elem_classes="seeds"):
        seed = gradio.Number(
            0,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=bounds.SEEDS - 1,
            elem_id=f"{key}-seed",
            min_width=120,
            scale=3,
        )
        other = gradio.Button("Another", size="sm", min_width=70, scale=1, elem_id=f"{key}-another")
    other.click(None, None, seed, js=RANDOM, queue=False, api_visibility="private")
    return seed


def settings(offer: offers.Offer, key: str) -> Settings:
    """A preset and its settings, which say where they depart from it."""
    first = next(iter(offer.presets))
    with gradio.Accordion("Settings", open=False, elem_id=f"{key}-settings"):
        preset = gradio.Dropdown(
            list(offer.presets), value=first, label="Preset", elem_id=f"{key}-preset"
        )
        sliders = [
            gradio.Slider(
                setting.low,
                setting.high,
                value=_value(offer, first, setting),
                step=setting.step,
                elem_id=f"{key}-{setting.name}",
                **_look(offer, first, setting, _value(offer, first, setting)),
            )
            for setting in offer.settings
        ]
        back = gradio.Button("Back to the preset", size="sm", elem_id=f"{key}-back")
    note = gradio.Markdown(draws.said(offer, first, {}), elem_id=f"{key}-note")
    found = Settings(offer, preset, sliders)

    def chosen(preset: str) -> list:
        bounds.one_of(preset, "the preset", tuple(offer.presets))
        values = [_value(offer, preset, setting) for setting in offer.settings]
        updates = [
            gradio.update(value=value, **_look(offer, preset, setting, value))
            for setting, value in zip(offer.settings, values, strict=True)
        ]
        return [*updates, draws.said(offer, preset, {})]

    def moved(*values: Any) -> list:
        preset, asked = found.read(values)
        updates = [
            gradio.update(**_look(offer, preset, setting, asked[setting.name]))
            for setting in offer.settings
        ]
        return [*updates, draws.said(offer, preset, asked)]

    for event in (preset.input, back.click):
        desks.at_once(event, chosen, [preset], [*sliders, note])
    for slider in sliders:
        for event in (slider.release, slider.input):
            how = dict(trigger_mode="always_last")
            desks.at_once(event, moved, found.components, [*sliders, note], **how)
    return found


def _value(offer: offers.Offer, preset: str, setting: offers.Setting) -> float:
    own = offer.presets[preset][setting.name]
    return setting.low if own is None else own


def _look(offer: offers.Offer, preset: str, setting: offers.Setting, value: Any) -> dict[str, Any]:
    """The label of a slider: a dot where it departs, and what the preset has."""
    own = offer.presets[preset][setting.name]
    if own is None:
        return {"label": f"{setting.told}: differs by step in this preset", "interactive": False}
    changed = value is not None and value != own
    label = f"● {setting.told} (preset: {own:g})" if changed else setting.told
    return {"label": label, "interactive": True}
