"""Side by side: two models, or two presets of one, on the same seeds."""

from __future__ import annotations

from typing import Any

import gradio

from tokgen import image_grid
from tokgen.app import bounds, desks, draw_panel, draws, offers, setting_panel as asked_of
from tokgen.data import classes as names
from tokgen.errors import UserError


def panel(desk: desks.Desk, drawing: list[int]) -> None:
    """The panel of those models that draw."""
    choices = [
        (f"{desk.offers[n].title} · {preset}", f"{n} {preset}")
        for n in drawing
        for preset in desk.offers[n].presets
    ]
    known = {value: int(value.partition(" ")[0]) for _, value in choices}
    first = desk.offers[drawing[0]]
    gradio.Markdown(
        "The same class and seeds in both. A picture depends on its seed, number and class alone: "
        "what differs is the model, or the preset."
    )
    with gradio.Row():
        with gradio.Column(min_width=280):
            label = asked_of.classes(first, every=False, key="side")
        with gradio.Column(min_width=280):
            count = gradio.Radio(
                list(bounds.NUMBERS), value=4, label="Pictures of each", elem_id="side-number"
            )
        with gradio.Column(min_width=280):
            seed = asked_of.seeds("side")
    button = gradio.Button("Draw both", variant="primary", elem_id="side-draw")
    chosen, galleries = [], []
    second = next((v for _, v in choices if known[v] != drawing[0]), choices[-1][1])
    with gradio.Row():
        for side, value in (("a", choices[0][1]), ("b", second)):
            with gradio.Column(min_width=300):
                chosen.append(
                    gradio.Dropdown(
                        choices, value=value, label="Model and preset", elem_id=f"side-model-{side}"
                    )
                )
                galleries.append(
                    gradio.Gallery(
                        label="Pictures",
                        columns=4,
                        height="auto",
                        show_label=False,
                        object_fit="contain",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id=f"side-gallery-{side}",
                        elem_classes=["pictures", draw_panel.look(first.size)],
                    )
                )

    def draw(label: Any, count: Any, seed: Any, *both: Any) -> list:
        shown = []
        for value in both:
            number = known[bounds.one_of(value, "the model", tuple(known))]
            offer, preset = desk.offers[number], value.partition(" ")[2]
            ask = draws.Ask(_label(first, offer, label), count, seed, preset, {})
            drawn = draws.draw(desk.models[number], offer, ask, desk.programs)
            images = image_grid.to_pil(drawn.image_NHW3)
            shown.append(list(zip(images, drawn.names, strict=True)))
        return shown

    desks.at_work(button.click, draw, [label, count, seed, *chosen], galleries)


def _label(first: offers.Offer, offer: offers.Offer, label: Any) -> int:
    """The label of the same class in another model, by its name; or UserError."""
    label = bounds.whole(label, "the class", 0, max(len(first.classes), 1) - 1)
    if not offer.classes or offer.classes == first.classes:
        return label if offer.classes else 0
    old, new = names.common(first.classes, offer.classes)
    if label not in old:
        name = names.shown(first.classes[label]) if first.classes else "no class"
        raise UserError(f"{offer.title} has no class {name}; it has {names.listed(offer.classes)}")
    return new[old.index(label)]
