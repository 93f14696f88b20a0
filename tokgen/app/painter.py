"""What is painted over a picture: the framework's editor, whose layers alone are read, bounded.

The editor sends each layer on its own, before the request that it belongs to. Its own functions
would keep as many, make a list as long as a request says, and decode whatever size a layer has.
"""

from __future__ import annotations

from typing import Any

import gradio
import numpy as np

from tokgen.app import bounds, uploads
from tokgen.errors import UserError


class Layers(dict):
    """{id of a request: {number: a layer's file}} of requests to come, the latest."""

    def put(self, id_: str, number: int, data: bytes) -> None:
        """Keep a layer; the oldest request's go where there are many."""
        self[id_] = self.pop(id_, {}) | {number: data}
        while len(self) > bounds.BLOBS:
            del self[next(iter(self))]


def painter(**look: Any) -> gradio.ImageEditor:
    """An editor whose value, for a handler, is the opacity of its layers: arrays [h, w]."""
    editor, waiting = gradio.ImageEditor(**look), Layers()

    def accept_blobs(data: Any) -> None:
        said, files = data.data, data.files
        number = str(said.get("index", ""))
        if said.get("type") != "layer" or number not in map(str, range(bounds.LAYERS)):
            return  # the picture itself is known
        if files and len(str(said.get("id", ""))) <= 64:
            waiting.put(str(said.get("id", "")), int(number), files[0][1])

    def preprocess(payload: Any) -> list[np.ndarray]:
        if payload is None:
            return []
        if payload.id is not None:
            files = waiting.pop(payload.id, {}).values()
        else:
            files = [uploads.read(layer.path) for layer in payload.layers[: bounds.LAYERS]]
        try:
            return [uploads.opacity(data) for data in files]
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    accept_blobs._is_server_fn = True
    editor.accept_blobs, editor.preprocess = accept_blobs, preprocess
    return editor
