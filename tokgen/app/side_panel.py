"""Side by side: two models, or two presets of one, on the same seeds."""

from __future__ import annotations

from typing import Any

import gradio

from tokgen import image_grid
from tokgen.app import bounds, desks, draw_panel, draws, offers, setting_panel as asked_of


def panel(desk: desks.Desk, drawing: list[int]) -> None:
    """The panel of those models that draw."""
    choices = [
        (f"{desk.offers[n].title} · {preset}", f"{n} {preset}")
        for n in drawing
        for preset in desk.offers[n].presets
    ]
    known = {value: int(value.partition(" ")[0]) for _, value in choices}
    first = desk.offers[drawing[0]]
    second = next((v for _, v in choices if known[v] != drawing[0]), choices[-1][1])
    gradio.Markdown(
        "The same class and seeds in both. A picture depends on its seed, number and class alone: "
        "what differs is the model, or the preset."
    )
    with gradio.Row():
        with gradio.Column(min_width=280):
            both = offers.shared([first, desk.offers[known[second]]])
            label = asked_of.classes(both, every=False, key="side")
        with gradio.Column(min_width=280):
            count = gradio.Radio(
                list(bounds.NUMBERS), value=4, label="Pictures of each", elem_id="side-number"
            )
        with gradio.Column(min_width=280):
            seed = asked_of.seeds("side")
    button = gradio.Button("Draw both", variant="primary", elem_id="side-draw")
    chosen, galleries = [], []
    with gradio.Row():
        for side, value in (("a", choices[0][1]), ("b", second)):
            with gradio.Column(min_width=300):
                chosen.append(
                    gradio.Dropdown(
                        choices, value=value, label="Model and preset", elem_id=f"side-model-{side}"
                    )
                )
                galleries.append(
                    draw_panel.gallery(
                        "Pictures",
                        f"side-gallery-{side}",
                        columns=4,
                        look=draw_panel.look(first.size),
                    )
                )

    def numbers(both: tuple) -> list[int]:
        return [known[bounds.one_of(value, "the model", tuple(known))] for value in both]

    def draw(label: Any, count: Any, seed: Any, *both: Any) -> list:
        shown, places = [], numbers(both)
        classes = offers.shared([desk.offers[number] for number in places])
        for number, value in zip(places, both, strict=True):
            offer, preset = desk.offers[number], value.partition(" ")[2]
            ask = draws.Ask(offers.label_in(classes, offer, label), count, seed, preset, {})
            drawn = draws.draw(desk.models[number], offer, ask, desk.programs)
            images = image_grid.to_pil(drawn.image_NHW3)
            shown.append(list(zip(images, drawn.names, strict=True)))
        return shown

    def model_chosen(label: Any, *both: Any) -> Any:
        """The classes of both; the chosen one stays where it can."""
        classes = offers.shared([desk.offers[number] for number in numbers(both)])
        kept = label if isinstance(label, int) and 0 <= label < len(classes) else 0
        return gradio.update(value=kept, **asked_of.listed(classes, every=False))

    for each in chosen:
        desks.at_once(each.input, model_chosen, [label, *chosen], [label])
    desk.at_work(button.click, draw, [label, count, seed, *chosen], galleries)
