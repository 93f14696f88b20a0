"""Edits of images, written into a folder: what `tokgen edit` calls."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import numpy as np
from PIL import Image

from tokgen import image_generator, image_grid, image_models, output, records, report, runtime
from tokgen.checkpoints import checkpoint, pulling
from tokgen.data import datasets, pictures, pixels, views
from tokgen.editing import edits, regions
from tokgen.errors import UserError
from tokgen.sampling import presets

RECORD, GRID = "edit.json", "grid.png"
RECORDS = {RECORD: ("checkpoint", "images")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is edited, by which generator, and how.

    Attributes:
        images: files.
        generator: its checkpoint: a work directory, or one step of it.
        edit: what is drawn anew.
        label: the class of what is drawn, one for all or one for each, with commas between.
        text: .npz of features, for a generator that reads text.
        fit: whether images and a mask's file are cut and resized to the model's size.
        precision: of the networks; "" is the preset's.
        tokenizer: where the generator's tokenizer lies now; "": where it was.
        sampling: the preset, and what is in the place of its settings.
    """

    images: tuple[str, ...]
    generator: str
    edit: edits.Settings
    label: str = ""
    text: str = ""
    fit: bool = False
    precision: str = ""
    tokenizer: str = ""
    sampling: presets.Choice = presets.Choice()


def check_write(settings: Settings, out: str | os.PathLike, *, overwrite: bool = False) -> None:
    """What `write` would refuse, sooner: before a published model is fetched."""
    settings.edit.check()
    pulling.check_kind(settings.generator, "generator")
    output.check_folder(out, records=RECORDS, overwrite=overwrite)
    _read(settings)


def write(settings: Settings, out: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Draw into a folder; what is to be said.

    It holds a file for each edit, grid.png (a row for each image: what is drawn anew in gray, then
    its edits), and edit.json, which says how.
    """
    check_write(settings, out, overwrite=overwrite)
    inputs = (settings.generator, settings.tokenizer, settings.text, *settings.images)
    files = (settings.edit.mask, settings.edit.ranking.by)  # or words
    inputs += tuple(file for file in files if file and os.path.isfile(file))
    with output.folder(out, records=RECORDS, overwrite=overwrite, inputs=inputs) as place:
        runtime.devices()
        how = dict(tokenizer=settings.tokenizer, precision=settings.precision)
        model = image_models.load(settings.generator, **how)
        if not isinstance(model, image_generator.ImageGenerator):
            raise UserError(f"{model.step} holds a tokenizer; need the checkpoint of a generator")
        asked, choice = settings.edit, settings.sampling
        images, mask = _fitted(settings, views_of(model))
        found = model.edit(
            images,
            _labels(settings, len(images)),
            text=settings.text,
            **{name: getattr(asked, name) for name in asked.plain()} | {"mask": mask},
            candidates=asked.ranking.candidates,
            rank=asked.ranking.by,
            **dataclasses.asdict(choice),
        )
        number, files, stems = asked.number, [], _stems(settings.images)
        for i, (source, image_HW3) in enumerate(zip(found.source_N, found.image_NHW3, strict=True)):
            files.append(f"{stems[source]}-seed{asked.seed}-{i % number:03d}.png")
            image_grid.save_png(place.path / files[-1], image_HW3)
        image_grid.save_png(place.path / GRID, found.sheet())
        record = {
            "checkpoint": str(model.step),
            "fingerprint": model.fingerprint,
            "tokenizer": model.tokenizer.fingerprint,
            "images": [str(image) for image in settings.images],
            "edits": files,
            **{name: _plain(getattr(asked, name)) for name in asked.plain()},
            "candidates": asked.ranking.candidates,
            "rank": asked.ranking.by,
            "label": settings.label,
            "text": settings.text,
            "fit": settings.fit,
            "sampling": dataclasses.asdict(choice),
            "precision": settings.precision or model.config.precision.compute,
            "versions": checkpoint.versions(),
        }
        records.save(place.path / RECORD, json.dumps(record, indent=2) + "\n")
    return (
        f"{found} in {out}: {GRID} (a row per image, what is drawn anew in gray), a file for each, "
        f"{RECORD} (settings)"
    )


def _stems(images: tuple[str, ...]) -> list[str]:
    """A name for each image: its file's, and its number where two are called alike."""
    stems = [pathlib.Path(image).stem for image in images]
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{stem}-{number}" for number, stem in enumerate(stems)]


def views_of(model: image_generator.ImageGenerator) -> views.View:
    """How its tokenizer sees images."""
    return datasets.view_of(model.tokenizer.config)


def _read(settings: Settings) -> list[tuple[int, int]]:
    """(rows, columns) of the images, upright; UserError where one is none."""
    found = []
    for path in map(pathlib.Path, settings.images):
        if not path.is_file():
            raise UserError(f"an image is needed at {path}; found {_what(path)}")
        try:
            with Image.open(path) as image:
                found.append(pixels.size(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error
    return found


def _what(path: pathlib.Path) -> str:
    return "a folder: name its files" if path.is_dir() else "nothing"


def _fitted(settings: Settings, view: views.View) -> tuple[np.ndarray, np.ndarray | None]:
    """(uint8 images of the model's size, the mask [H, W]) as they are, or cut and resized alike."""
    sizes = _read(settings)
    wrong = [i for i, size in enumerate(sizes) if size != tuple(view.size)]
    mask = settings.edit.mask
    if wrong and not settings.fit and settings.edit.scales is None:
        rows, columns = view.size
        found = sizes[wrong[0]]
        raise UserError(
            f"images must have the model's size, {rows} x {columns} pixels (rows x columns); found "
            f"{found[0]} x {found[1]} in {settings.images[wrong[0]]}: --fit cuts it in the middle "
            "and resizes it"
        )
    images = pictures.fitted(list(settings.images), view)
    if wrong:
        report.say(
            f"{len(wrong)} of {len(sizes)} images cut in the middle and resized to "
            f"{view.size[0]} x {view.size[1]} pixels: what is kept is kept of these"
        )
    if mask is None:
        return images, mask
    if settings.fit and pathlib.Path(mask).is_file():
        mask_HW = regions.read(mask)
        if mask_HW.shape != tuple(view.size):
            mask_HW = _cut(mask_HW, sizes, view, mask)
        mask = mask_HW
    mask_HW = regions.region(mask, view.size)
    if not mask_HW.any():
        raise UserError(
            f"a mask is white where pixels are drawn anew; found none in {settings.edit.mask}"
            + (" once it is cut and resized" if settings.fit else "")
        )
    return images, mask_HW


def _cut(
    mask_HW: np.ndarray, sizes: list[tuple[int, int]], view: views.View, path: str
) -> np.ndarray:
    """A mask of the size of its images, cut and resized as they are."""
    if any(mask_HW.shape != size for size in sizes):
        raise UserError(
            f"a mask must have the size of its image, or of the model's; found {mask_HW.shape[0]} "
            f"x {mask_HW.shape[1]} in {path} for an image of {sizes[0][0]} x {sizes[0][1]}"
        )
    white_HW1 = np.where(mask_HW, 255, 0).astype(np.uint8)[..., None]
    return pictures.fitted(white_HW1, dataclasses.replace(view, channels=1))[0, ..., 0] > 127


def _labels(settings: Settings, count: int) -> list[str] | str | None:
    """One for all images, or a list with one for each; None where none is named."""
    names = [name.strip() for name in settings.label.split(",")]
    if len(names) == 1 or len(names) != count:  # a name may have a comma of its own
        return settings.label or None
    return names


def _plain(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
