"""Edit: a part of a picture painted over, a larger canvas, a variation, finer scales."""

from __future__ import annotations

from typing import Any

import gradio
import numpy as np

from tokgen.app import bounds, changes, desks, draw_panel, offers, painter, setting_panel, uploads
from tokgen.errors import UserError

PAINT = "rgb(230, 60, 160)"


def panel(desk: desks.Desk, number: int, key: str, drawn: gradio.Gallery) -> None:
    """The panel of a model; `drawn` are pictures that it drew."""
    model, offer = desk.models[number], desk.offers[number]
    times = offer.enlarged
    if offer.why:
        gradio.Markdown(offer.why)
    with gradio.Row():
        with gradio.Column(scale=1, min_width=300):
            upload = gradio.UploadButton(
                "Upload a picture", file_types=["image"], type="filepath", elem_id=f"{key}-upload"
            )
            take = gradio.Button("Take the picture chosen under Draw", elem_id=f"{key}-take")
            gradio.Markdown("To draw a part anew, paint over it:")
            editor = painter.painter(
                show_label=False,
                image_mode="RGBA",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gradio.Brush(
                    default_size=max(24, 2 * times), colors=[PAINT], color_mode="fixed"
                ),
                canvas_size=(offer.size[1] * times, offer.size[0] * times),
                buttons=[],
                elem_id=f"{key}-editor",
                elem_classes=[draw_panel.look(offer.size)],
            )
        with gradio.Column(scale=1, min_width=300):
            way = gradio.Radio(
                [(offers.WAYS[name], name) for name in offer.ways],
                value=offer.ways[0],
                label="What is drawn anew",
                elem_id=f"{key}-way",
            )
            first = offer.ways[0]
            sides = gradio.CheckboxGroup(
                list(changes.SIDES),
                value=["right"],
                label="Sides that grow",
                visible=first == "canvas",
                elem_id=f"{key}-sides",
            )
            share = gradio.Slider(
                0.25, 1, 0.5, step=0.25, label="by this share of a side", visible=first == "canvas"
            )
            strength = gradio.Slider(
                0.05, 1, 0.3, step=0.05, label="share of the tokens", visible=first == "variation"
            )
            most = max(1, len(offer.layout.grids) - 1)
            scales = gradio.Slider(
                1, max(most, 2), 1, step=1, label="coarsest scales that are kept", visible=False
            )
            label = setting_panel.classes(offer.classes, every=False, key=key)
            count = gradio.Radio(
                list(bounds.DRAWS), value=2, label="Edits", elem_id=f"{key}-number"
            )
            seed = setting_panel.seeds(key)
            settings = setting_panel.settings(offer, key)
            particles = gradio.Slider(
                *bounds.PARTICLES,
                64,
                step=8,
                label="particles: more hold together better, and take longer",
                visible=offer.particles and first in ("region", "canvas"),
                elem_id=f"{key}-particles",
            )
            button = gradio.Button("Draw the edit", variant="primary", elem_id=f"{key}-draw")
    gallery = draw_panel.gallery(
        "Before, and edits", f"{key}-gallery", columns=5, look=draw_panel.look(offer.size)
    )
    on = gradio.Button("Edit the chosen one on", size="sm", elem_id=f"{key}-on")
    source = gradio.State(None, time_to_live=bounds.KEPT)
    chosen, picked = gradio.State(0), gradio.State(0)

    def shown(image_HW3: np.ndarray) -> tuple:
        large = uploads.enlarged(image_HW3, times)
        return {"background": large, "layers": [], "composite": large}, image_HW3

    def uploaded(path: str | None) -> tuple:
        return shown(uploads.fitted(model, path))

    def of_class(caption: str | None) -> Any:
        """The class of a picture that was drawn, by its name: what is drawn anew is of it."""
        name = (caption or "").rpartition(" ")[0]
        known = offer.classes.index(name) if name in offer.classes else None
        return gradio.skip() if known is None else known

    def taken(pictures: list | None, place: int) -> tuple:
        if not pictures:
            raise UserError("there is no picture yet: draw some, or upload one")
        place = place if isinstance(place, int) and 0 <= place < len(pictures) else 0
        path, caption = pictures[place]
        return *shown(uploads.fitted(model, path)), of_class(caption)

    def edited(image_HW3: np.ndarray | None, painted: list, *values: Any) -> list:
        if image_HW3 is None:
            raise UserError("a picture is needed first: upload one, or take a drawn one")
        way, sides, share, strength, scales, label, count, seed, particles, *rest = values
        preset, own = settings.read(tuple(rest))
        mask_HW = uploads.painted(painted, offer.size) if way == "region" else None
        ask = changes.Ask(
            *(way, label, count, seed, preset, own),
            **dict(mask_HW=mask_HW, sides=sides or (), share=share, strength=strength),
            **dict(scales=scales, particles=particles),
        )
        return changes.named(changes.draw(model, offer, image_HW3, ask, desk.programs))

    def way_chosen(way: str) -> list:
        visible = [way == "canvas", way == "canvas", way == "variation", way == "scales"]
        visible.append(offer.particles and way in ("region", "canvas"))
        return [gradio.update(visible=each) for each in visible]

    def place_of(event: gradio.SelectData) -> int:
        return event.index if isinstance(event.index, int) else 0

    parts = [way, sides, share, strength, scales, label, count, seed, particles]
    desks.at_once(way.change, way_chosen, [way], [sides, share, strength, scales, particles])
    drawn.select(place_of, None, picked, queue=False, api_visibility="private")
    gallery.select(place_of, None, chosen, queue=False, api_visibility="private")
    desk.at_work(upload.upload, uploaded, [upload], [editor, source])
    desk.at_work(take.click, taken, [drawn, picked], [editor, source, label])
    desk.at_work(on.click, taken, [gallery, chosen], [editor, source, label])
    asked = [source, editor, *parts, *settings.components]
    desk.at_work(button.click, edited, asked, [gallery])
