"""Tokens: a picture through the tokenizer and back, and the tokens in between."""

from __future__ import annotations

import io

import gradio
import numpy as np

from tokgen import image_grid
from tokgen.app import codes, desks, draw_panel, uploads


def panel(desk: desks.Desk, number: int, key: str) -> None:
    """The panel of a model, generator or tokenizer."""
    model, offer = desk.models[number], desk.offers[number]
    look = draw_panel.look(offer.size)
    with gradio.Row():
        with gradio.Column(scale=1, min_width=300):
            upload = gradio.UploadButton(
                "Upload a picture",
                file_types=["image"],
                type="filepath",
                variant="primary",
                elem_id=f"{key}-upload",
            )
            note = gradio.Markdown(
                f"It is cut in the middle and resized to {offer.size[0]} x {offer.size[1]} pixels.",
                elem_id=f"{key}-told",
            )
            pair = draw_panel.gallery(
                "As the model sees it, and back from its tokens",
                f"{key}-pair",
                columns=2,
                look=look,
            )
        with gradio.Column(scale=1, min_width=300):
            maps = draw_panel.gallery(
                "Tokens: the same colour is the same token", f"{key}-maps", columns=2, look="large"
            )
            numbers = gradio.Textbox(
                label="The tokens as numbers",
                lines=4,
                max_lines=12,
                interactive=False,
                elem_id=f"{key}-numbers",
                elem_classes="numbers",
            )
            file = gradio.DownloadButton(
                "Download tokens (.npy)", interactive=False, size="sm", elem_id=f"{key}-file"
            )

    def looked(path: str | None) -> tuple:
        found = codes.look(model, uploads.fitted(model, path))
        both = image_grid.to_pil(np.stack([found.image_HW3, found.back_HW3]))
        pair = list(zip(both, ("as the model sees it", "back"), strict=True))
        if found.tokens_LG is None:
            return found.told, pair, [], "", gradio.update(interactive=False)
        data = io.BytesIO()
        np.save(data, found.tokens_LG)
        path = str(desk.files.keep(data.getvalue(), "npy"))
        told = codes.written(found.tokens_LG, offer.layout)
        return found.told, pair, found.maps, told, gradio.update(value=path, interactive=True)

    desk.at_work(upload.upload, looked, [upload], [note, pair, maps, numbers, file])
