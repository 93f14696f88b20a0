"""A decode as a picture: how images came to be, as an animation and as a strip."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import pathlib

import numpy as np

from tokgen import image_grid, samples
from tokgen.errors import UserError
from tokgen.sampling import tracing

IMAGES, PIXELS = 8, 2**18  # of a frame, at most, the images of kinds in turn; of large ones one
STRIP = 12  # frames of a strip, at most
SECONDS, LAST = 0.12, 1.5  # that a frame stands, and the last one


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """How images came to be; a notebook plays it.

    Attributes:
        frame_SNHW3: uint8 images, S frames of each: the first before anything was drawn, the last
            the finished ones.
        after_S: how many decoding steps each frame is after.

    Examples:
        >>> trace = tokgen.load("runs/generator").trace("ring", number=2)
        >>> trace
        25 frames of 2 images, 32 x 32 pixels, over 64 steps
        >>> trace.save_gif("trace.gif")
    """

    frame_SNHW3: np.ndarray
    after_S: np.ndarray

    @property
    def image_NHW3(self) -> np.ndarray:
        """The finished images."""
        return self.frame_SNHW3[-1]

    def __repr__(self) -> str:
        S, N, H, W, _ = self.frame_SNHW3.shape
        images = "1 image" if N == 1 else f"{N} images"
        return f"{S} frames of {images}, {H} x {W} pixels, over {self.after_S[-1]} steps"

    def strip(self) -> np.ndarray:
        """uint8 [rows, columns, 3]: a row for each image, from the first frame to the last."""
        S, N, H = self.frame_SNHW3.shape[:3]
        count = min(S, STRIP)
        chosen = np.unique(np.rint(np.linspace(0, S - 1, count)).astype(int))
        shown = self.frame_SNHW3[chosen].swapaxes(0, 1)
        return image_grid.grid(
            shown.reshape(-1, *shown.shape[2:]), len(chosen), scale=max(1, 64 // H)
        )

    def gif(self) -> bytes:
        """An animation that begins anew, the images of a frame in a row."""
        S, N, H = self.frame_SNHW3.shape[:3]
        sheets = [
            image_grid.grid(frame_NHW3, N, scale=max(1, 128 // H))
            for frame_NHW3 in self.frame_SNHW3
        ]
        first, *rest = image_grid.to_pil(np.stack(sheets))
        file, times = io.BytesIO(), [int(1000 * SECONDS)] * (S - 1) + [int(1000 * LAST)]
        first.save(file, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
        return file.getvalue()

    def save_gif(self, path: str | os.PathLike) -> None:
        """The animation as a file, which appears whole or not at all."""
        path = pathlib.Path(path)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(self.gif())
        part.replace(path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows."""
        del include, exclude
        return {"image/gif": base64.b64encode(self.gif()).decode(), "text/plain": repr(self)}


def check(settings: samples.Settings) -> None:
    """UserError where images that are drawn so have no one decode to show."""
    if settings.total:
        raise UserError(
            "a trace shows a few images; found --total, as many as are asked for: draw them with "
            "--number"
        )
    if settings.ranking.candidates > 1:
        raise UserError(
            "a trace shows one decode of an image; found candidates="
            f"{settings.ranking.candidates}, of which the best is kept: leave one out"
        )


def traced(ready: samples.Prepared, settings: samples.Settings) -> Trace:
    """How the first images of some settings came to be."""
    check(settings)
    kinds, (rows, columns) = ready.kinds, ready.tokenizer.config.view.size
    count = min(IMAGES, max(1, PIXELS // (rows * columns)))
    index_N = some(len(kinds.kind_N), settings.number)[:count]
    asked = (ready.generator, ready.tokenizer.module, kinds.cond(index_N), ready.sampler)
    how = dict(seed=settings.seed, index_N=index_N, batch=settings.batch)
    return Trace(*tracing.trace(*asked, **how))


def some(count: int, number: int) -> np.ndarray:
    """Numbers of images to show, of `number` of each kind: the first of each, then the second."""
    return np.arange(count).reshape(-1, number).T.reshape(-1)
