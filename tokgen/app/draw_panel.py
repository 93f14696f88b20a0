"""Draw: pictures of a class, and how they came to be."""

from __future__ import annotations

from typing import Any

import gradio

from tokgen import image_grid
from tokgen.app import bounds, desks, draws, films, setting_panel

SMALL = 128  # pixels of a side below which pictures are shown as squares, not smoothed


def look(size: tuple[int, int]) -> str:
    """The class of elements that show pictures of a size."""
    return "small" if max(size) < SMALL else "large"


def gallery(label: str, key: str, *, columns: int, look: str) -> gradio.Gallery:
    """Pictures that are shown and not taken, as PNG: to the bit those that were drawn."""
    return gradio.Gallery(
        label=label,
        columns=columns,
        height="auto",
        show_label=False,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=key,
        elem_classes=["pictures", look],
    )


def panel(desk: desks.Desk, number: int, key: str) -> gradio.Gallery:
    """The panel of a model; its gallery."""
    model, offer = desk.models[number], desk.offers[number]
    with gradio.Row():
        with gradio.Column(scale=1, min_width=300):
            label = setting_panel.classes(offer.classes, every=True, key=key)
            count = gradio.Radio(
                list(bounds.NUMBERS), value=4, label="Pictures of it", elem_id=f"{key}-number"
            )
            seed = setting_panel.seeds(key)
            settings = setting_panel.settings(offer, key)
            button = gradio.Button("Draw", variant="primary", elem_id=f"{key}-draw")
        with gradio.Column(scale=2, min_width=300):
            pictures = gallery("Pictures", f"{key}-gallery", columns=4, look=look(offer.size))
            with gradio.Row():
                bundle = gradio.DownloadButton(
                    "Download all (.zip)", interactive=False, size="sm", elem_id=f"{key}-bundle"
                )
                show = gradio.Button("How they came to be", size="sm", elem_id=f"{key}-trace")
            film = gradio.HTML(elem_id=f"{key}-film")
    asked = [label, count, seed, *settings.components]

    def ask(values: tuple) -> draws.Ask:
        label, count, seed, *rest = values
        preset, own = settings.read(tuple(rest))
        return draws.Ask(label, count, seed, preset, own)

    def draw(*values: Any) -> tuple:
        drawn = draws.draw(model, offer, ask(values), desk.programs)
        images = image_grid.to_pil(drawn.image_NHW3)
        path = str(desk.files.keep(draws.bundle(drawn), "zip"))
        shown = list(zip(images, drawn.names, strict=True))
        return shown, gradio.update(value=path, interactive=True), ""

    def trace(*values: Any) -> str:
        found = draws.trace(model, offer, ask(values), desk.programs)
        data, ending, size = films.sheet(found)
        address = f"gradio_api/file={desk.files.keep(data, ending)}"
        words = films.told(found, offer.layout)
        return films.document(address, size, words, small=look(offer.size) == "small")

    desk.at_work(button.click, draw, asked, [pictures, bundle, film])
    desk.at_work(show.click, trace, asked, [film])
    return pictures
