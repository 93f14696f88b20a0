"""What an edit is asked for, in Python and on the command line, and what it gives."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np
from PIL import Image

from tokgen import image_grid, ranges, report, tokens as coding
from tokgen.editing import growing, redrawing, regions, varying
from tokgen.errors import UserError
from tokgen.evaluation import ranking as ranking_
from tokgen.interfaces import PyTree

DRAWS = 2**12  # of an image, at most: a candidate's number lies so much above the last one's
Feather = Annotated[float, ranges.Range(0, 2**10, below=True)]  # pixels
Overlap = Annotated[float, ranges.Range(0, 1, above=True, below=True)]  # of a side
MODES = ("mask", "grow", "strength", "scales")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn anew, one of MODES, and how.

    Attributes:
        mask: a region (`regions.region`), or one for each image.
        grow: pixels added at each side, as `right=128,bottom=64`.
        ranking: how many candidates of each draw, and what ranks them; not of `grow`.
        overlap: share of a side of each window that lies over what is there, for `grow`.
        strength: share of the tokens that are drawn anew, the least certain; of the scales.
        scales: so many of the coarsest are kept, all finer ones drawn.
        number: draws of each image.
        seed: of the draws.
        particles: draws that are held against what comes later in an order, for one that is kept.
        feather: pixels inside of a mask over which what was drawn meets what was kept; None: by
            the image's size.
        batch: images drawn and decoded together.
    """

    mask: Any = None
    grow: str | None = None
    strength: float | None = None
    scales: int | None = None
    number: int = 1
    seed: int = 0
    particles: int = redrawing.PARTICLES
    feather: float | None = None
    batch: int = 32
    overlap: float = 0.5
    ranking: ranking_.Ranking = ranking_.Ranking()

    @property
    def mode(self) -> str:
        """The one of MODES that is asked for."""
        (mode,) = self._modes()
        return mode

    def plain(self) -> list[str]:
        """The names of all but the ranking: numbers and words."""
        return [field.name for field in dataclasses.fields(self) if field.name != "ranking"]

    def check(self) -> None:
        """UserError where not one of MODES is asked for, or a number is none."""
        modes = self._modes()
        if len(modes) != 1:
            found = " and ".join(f"--{mode}" for mode in modes) or "none"
            raise UserError(
                "an edit is one of --mask (pixels drawn anew), --grow (a larger canvas), "
                f"--strength (a variation), --scales (finer scales drawn); found {found}"
            )
        numbers = (
            ("number", self.number, ranges.Count),
            ("seed", self.seed, ranges.Seed),
            ("particles", self.particles, ranges.Count),
            ("batch", self.batch, ranges.Batch),
            ("feather", self.feather, Feather | None),
            ("overlap", self.overlap, Overlap),
            ("strength", self.strength, float | None),
            ("scales", self.scales, ranges.Whole | None),
        )
        ranges.refuse(filter(None, (ranges.problem(*number) for number in numbers)))
        if self.number > DRAWS:
            raise UserError(f"number must be at most {DRAWS:,}, of each image; found {self.number}")
        if self.ranking.candidates > 1 and self.grow is not None:
            raise UserError(
                "--candidates ranks what has the model's size; found --grow: leave it out"
            )
        for mask in self.mask if isinstance(self.mask, list | tuple) else [self.mask]:
            regions.check(mask)
        if self.grow is not None:
            growing.margins(self.grow)
        if self.strength is not None:
            varying.check_strength(self.strength)

    def _modes(self) -> list[str]:
        return [mode for mode in MODES if getattr(self, mode) is not None]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Edits:
    """What was drawn, `number` of each image in turn; a notebook shows it beside the images.

    Attributes:
        image_NHW3: uint8 images.
        tokens_NLG: int32 tokens; None of a grown image, which has those of several windows.
        source_N: which image each is an edit of.
        original_KHW3: the images, as the model saw them.
        mask_KHW: true where pixels were drawn anew; of a grown image on its canvas.

    Examples:
        >>> model = tokgen.load("runs/generator")
        >>> edits = model.edit(model.fit("photo.png"), classes="ring", mask="left", number=3)
        >>> edits
        3 edits of 1 image, 32 x 32 pixels
        >>> edits.images[0].save("edited.png")
    """

    image_NHW3: np.ndarray
    tokens_NLG: np.ndarray | None
    source_N: np.ndarray
    original_KHW3: np.ndarray
    mask_KHW: np.ndarray

    @property
    def images(self) -> list[Image.Image]:
        """The edits for PIL."""
        return image_grid.to_pil(self.image_NHW3)

    def __len__(self) -> int:
        return len(self.image_NHW3)

    def __repr__(self) -> str:
        rows, columns = self.image_NHW3.shape[1:3]
        count = len(self.original_KHW3)
        what = "image" if count == 1 else "images"
        edits = "edit" if len(self) == 1 else "edits"
        return f"{len(self)} {edits} of {count} {what}, {rows} x {columns} pixels"

    def first(self, count: int) -> Edits:
        """The edits of the first images alone."""
        number = len(self) // len(self.original_KHW3)
        own = dict(
            original_KHW3=self.original_KHW3[:count],
            mask_KHW=self.mask_KHW[:count],
            image_NHW3=self.image_NHW3[: count * number],
            source_N=self.source_N[: count * number],
        )
        if self.tokens_NLG is not None:
            own["tokens_NLG"] = self.tokens_NLG[: count * number]
        return dataclasses.replace(self, **own)

    def veiled(self) -> np.ndarray:
        """uint8 [K, H, W, 3] of the images as they were, on the canvas of what was drawn.

        What is drawn anew lies under a gray veil, unless that is all of it.
        """
        K, rows, columns = self.mask_KHW.shape
        shown = np.full((K, rows, columns, self.image_NHW3.shape[-1]), 255, np.uint8)
        at = self._at()
        shown[:, at[0], at[1]] = self.original_KHW3
        # half way to gray: what is under the mask is seen, and that it goes
        veiled = (shown.astype(np.uint16) + 3 * 160) // 4
        if not self.mask_KHW.all():
            shown = np.where(self.mask_KHW[..., None], veiled, shown).astype(np.uint8)
        return shown

    def sheet(self) -> np.ndarray:
        """A row for each image: as it was, veiled, and its edits."""
        K, rows, _ = self.mask_KHW.shape
        shown = self.veiled()
        edits = self.image_NHW3.reshape(K, -1, *self.image_NHW3.shape[1:])
        both = np.concatenate([shown[:, None], edits], axis=1)
        scale = max(1, 64 // rows)
        return image_grid.grid(both.reshape(-1, *both.shape[2:]), both.shape[1], scale=scale)

    def _at(self) -> tuple[slice, slice]:
        """Where the image lies on what was drawn: where the mask begins to have pixels to keep."""
        H, W = self.original_KHW3.shape[1:3]
        if self.mask_KHW.shape[1:] == (H, W):
            return slice(None), slice(None)
        kept_HW = ~self.mask_KHW[0]
        top, left = (int(kept_HW.any(1 - axis).argmax()) for axis in (0, 1))
        return slice(top, top + H), slice(left, left + W)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        sheet = self.sheet()
        image_grid.to_pil(sheet[None])[0].save(file, "PNG")
        return file.getvalue()


def edit(
    model: redrawing.Model,
    image_KHW3: np.ndarray,
    settings: Settings,
    cond: PyTree,
    *,
    classes: Sequence[str] = (),
    what: str = "",
) -> Edits:
    """Draws of images; `cond` leads with the images, `what` names a progress bar."""
    ranking, K, number = settings.ranking, len(image_KHW3), settings.number
    X, score = ranking.candidates, None
    if X > 1:
        report.say(ranking.told(K * number))
        score = ranking.score(
            model.generator, model.decoder.module.quantizer, classes, settings.batch
        )
    draw_X = np.arange(X) * DRAWS  # the first candidate of a draw has its own number
    index_N = np.tile((np.arange(number)[:, None] + draw_X).reshape(-1), K)
    source_N = np.repeat(np.arange(K), number * X)
    own = jax.tree.map(lambda leaf: np.asarray(leaf)[source_N], cond)
    tokens_NLG, image_NHW3, mask_KHW = _drawn(
        model, image_KHW3, settings, cond, (source_N, index_N, own), what
    )
    if score is not None:
        score_NX = score(tokens_NLG, image_NHW3, own).reshape(-1, X)
        kept_N = ranking_.best(score_NX) + X * np.arange(len(score_NX))
        tokens_NLG, image_NHW3, source_N = (
            array[kept_N] for array in (tokens_NLG, image_NHW3, source_N)
        )
    return Edits(image_NHW3, tokens_NLG, source_N, image_KHW3, mask_KHW)


def _drawn(
    model: redrawing.Model,
    image_KHW3: np.ndarray,
    settings: Settings,
    cond: PyTree,
    rows: tuple[np.ndarray, np.ndarray, PyTree],
    what: str,
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """(tokens_NLG, image_NHW3, mask_KHW) of rows: (image of each, its number, its condition)."""
    source_N, index_N, own = rows
    size, feather = image_KHW3.shape[1:3], settings.feather
    feather = max(1.0, min(size) / 32) if feather is None else feather
    how = redrawing.How(settings.seed, settings.particles, settings.batch, what)
    mask_KHW = np.ones(image_KHW3.shape[:3], bool)
    if settings.mode == "mask":
        mask_KHW = masks(settings.mask, image_KHW3)
        asked = (image_KHW3, mask_KHW, source_N, own, index_N, how)
        return *redrawing.redraw(model, *asked, feather=feather), mask_KHW
    if settings.mode == "grow":
        added = growing.margins(settings.grow)
        around = (added[:2], added[2:])
        mask_KHW = np.pad(~mask_KHW, ((0, 0), *around), constant_values=True)
        asked = (image_KHW3[source_N], added, own, index_N, how)
        over = dict(overlap=settings.overlap, feather=feather)
        return None, growing.grow(model, *asked, **over), mask_KHW
    tokens_KLG = coding.encode(model.encoder, image_KHW3, batch=settings.batch)
    if settings.mode == "scales":
        varying.check_scales(model.generator, settings.scales)
        kept_L = varying.prefix(model.generator.layout, settings.scales)
        free_KL = np.repeat(~kept_L[None], len(tokens_KLG), axis=0)
    else:
        strength, batch = settings.strength, settings.batch
        free_KL = varying.freed(model, tokens_KLG, cond, strength, batch=batch)
    asked = (tokens_KLG[source_N], free_KL[source_N], own, index_N, how)
    return *redrawing.draw(model, *asked), mask_KHW


def masks(mask: Any, image_KHW3: np.ndarray) -> np.ndarray:
    """[K, H, W] of a region for all images, or of a list or array with one for each."""
    K, size = len(image_KHW3), image_KHW3.shape[1:3]
    mask = regions.plain(mask)
    several = isinstance(mask, list | tuple) or (isinstance(mask, np.ndarray) and mask.ndim == 3)
    if not several:
        return np.repeat(regions.region(mask, size)[None], K, axis=0)
    if len(mask) != K:
        raise UserError(
            f"a mask for all images is needed, or one for each of {K}; found {len(mask)}"
        )
    return np.stack([regions.region(one, size) for one in mask])
