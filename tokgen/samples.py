"""Images of a trained generator: drawn in Python, or written into a folder that a kill spares.

`sample` gives arrays; `write` is what `tokgen sample` calls. Image i depends on (seed, i, its
condition) and on nothing beside it, so both give the same images.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tokgen import image_grid, options, output, report, runtime
from tokgen.checkpoints import checkpoint
from tokgen.data import captioned, classes as names_
from tokgen.errors import UserError
from tokgen.evaluation import given_images, made_images
from tokgen.interfaces import Generator, PyTree
from tokgen.sampling import drawing, presets, sampler as samplers

RECORDS = {"samples.json": ("checkpoint", "settings")}
COLUMNS = 16  # images of a row of grid.png
PIXELS, SIDE = 2**26, 2**14  # of grid.png, at most; SIDE is its height


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn, of which generator.

    Attributes:
        checkpoint: of a generator: a work directory, or one step of it.
        classes: names, ids or ranges (`0-9,cat`), or `all`; "": all of few, some of many.
        text: .npz of features [N, T, E] and mask [N, T], for a generator that reads text.
        number: images per class or text.
        seed: of the draws, from 0 to 2**32 - 1.
        batch: images drawn and decoded together.
        precision: of the networks, float32 or bfloat16; "" is the preset's.
        tokenizer: where the generator's tokenizer lies now; "": where it lay when it was trained.
        sampling: the preset, and what is in the place of its settings.
    """

    checkpoint: str
    classes: str = ""
    text: str = ""
    number: int = 8
    seed: int = 0
    batch: int = 32
    precision: str = ""
    tokenizer: str = ""
    sampling: presets.Choice = presets.Choice()


@dataclasses.dataclass(frozen=True)
class Samples:
    """What was drawn.

    Attributes:
        tokens_NLG: int32 tokens.
        image_NHW3: uint8 images.
        kind_N: the label of each image; of a generator that reads text, the row of its text.
        classes: names of the classes that were drawn, in their order; () for texts.
        settings: how they were drawn, every setting of the sampler by name.
    """

    tokens_NLG: np.ndarray
    image_NHW3: np.ndarray
    kind_N: np.ndarray
    classes: tuple[str, ...]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Everything that a draw needs, loaded and held against each other."""

    loaded: checkpoint.Loaded
    tokenizer: checkpoint.Loaded
    cond: PyTree  # leads with the images, N
    kind_N: np.ndarray
    classes: list[str]
    settings: dict[str, Any]
    generator: Generator
    sampler: samplers.Sampler
    precision: str


def sample(
    generator: str | os.PathLike,
    *,
    classes: str = "",
    text: str = "",
    number: int = 8,
    seed: int = 0,
    batch: int = 32,
    preset: str = "default",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    noise: float | None = None,
    precision: str = "",
    tokenizer: str = "",
) -> Samples:
    """Images of a trained generator, `number` of each class or text: of a work directory or a step.

    `temperature` to `noise` are in the place of the preset's settings; None leaves them. The rest
    is as in Settings. UserError where the generator has no such class, setting or text.
    """
    choice = presets.Choice(preset, temperature, top_k, top_p, guidance, steps, noise)
    settings = Settings(
        os.fspath(generator), classes, text, number, seed, batch, precision, tokenizer, choice
    )
    check(settings)
    ready = _prepared(settings)
    drawn = (ready.generator, ready.tokenizer.module, ready.cond, ready.sampler)
    tokens_NLG, image_NHW3 = drawing.draw(*drawn, seed=seed, batch=batch, what="")
    return Samples(tokens_NLG, image_NHW3, ready.kind_N, tuple(ready.classes), ready.settings)


def write(
    settings: Settings, out: str | os.PathLike, *, png: bool = True, overwrite: bool = False
) -> str:
    """Draw into a new folder; what is to be said.

    It holds samples.npz (the layout of ADM's evaluator), tokens.npy, grid.png, samples.json and,
    with `png`, a file per image. Stopped at any point, the same call goes on with it.
    """
    check(settings)
    inputs = (settings.checkpoint, settings.tokenizer, settings.text)
    with output.folder(out, records=RECORDS, overwrite=overwrite, inputs=inputs) as place:
        runtime.devices()
        count, shown = _filled(settings, place, png)
    return (
        f"{count} images in {out}: grid.png ({shown}), samples.npz (arr_0 images, "
        "arr_1 labels), samples.json (settings)"
    )


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    if settings.number < 1 or settings.batch < 1:
        raise UserError(
            f"--number and --batch must be at least 1; found {settings.number}, {settings.batch}"
        )
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2**32); found {settings.seed}")


def conditions(
    settings: Settings, loaded: checkpoint.Loaded
) -> tuple[PyTree, np.ndarray, list[str]]:
    """(the condition of every image, the number of its class or text [N], names of the classes)."""
    if loaded.module.cond == "label" and settings.text:
        raise UserError(
            "--text needs a generator that reads text; found one of "
            f"{len(loaded.classes)} classes: use --classes"
        )
    if loaded.module.cond == "label":
        labels = names_.labels_of(settings.classes, loaded.classes)
        if not settings.classes and len(labels) < len(loaded.classes):
            report.say(
                f"{len(labels)} of {len(loaded.classes)} classes are drawn, evenly over them: "
                f"{names_.listed([loaded.classes[i] for i in labels])}; --classes chooses others, "
                f"--classes all draws {len(loaded.classes) * settings.number:,} images"
            )
        label_N = np.repeat(np.asarray(labels, np.int32), settings.number)
        return label_N, label_N, [loaded.classes[i] if loaded.classes else "" for i in labels]
    if settings.classes or not settings.text:
        raise UserError(
            "the generator reads text: it needs --text FILE.npz with arrays features [N, T, E] "
            f"and mask [N, T]; found {'--classes' if settings.classes else 'none'}"
        )
    text = captioned.conditions(settings.text)
    row_N = np.repeat(np.arange(len(text.mask_BT), dtype=np.int32), settings.number)
    return jax.tree.map(lambda leaf: leaf[row_N], text), row_N, []


def _prepared(settings: Settings) -> _Prepared:
    """Load the networks; the conditions and the sampler that they are drawn with."""
    choice, precision = settings.sampling, settings.precision
    if not precision:
        meta = checkpoint.read_meta(checkpoint.find(settings.checkpoint))
        precision = presets.precision(meta, choice)
    loaded = checkpoint.load_to_draw(settings.checkpoint, compute=precision)
    tokenizer = checkpoint.load_to_decode(loaded, settings.tokenizer)
    cond, kind_N, classes = conditions(settings, loaded)
    found, generator, sampler = presets.choose(
        loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes
    )
    options.refuse(presets.without_effect(choice, sampler))
    return _Prepared(loaded, tokenizer, cond, kind_N, classes, found, generator, sampler, precision)


def _filled(settings: Settings, place: output.Folder, png: bool) -> tuple[int, str]:
    """Draw what an unfinished result does not have yet, and write all.

    (how many images there are, what the grid shows)
    """
    ready = _prepared(settings)
    record = {
        "checkpoint": str(ready.loaded.step),
        "fingerprint": ready.loaded.fingerprint,
        "tokenizer": ready.tokenizer.fingerprint,
        "seed": settings.seed,
        "preset": settings.sampling.preset,
        "settings": ready.settings,
        "classes": ready.classes,
        "names": list(ready.loaded.classes),  # what the numbers of samples.npz are called
        "text": settings.text,
        "number": settings.number,
        "precision": ready.precision,
        "versions": checkpoint.versions(),
    }
    parts = place.path / "parts"
    place.claim(record | {"conditions": made_images.conditions(ready.cond), "png": png})
    done = sum(len(image_BHW3) for _, image_BHW3 in _kept(parts))
    for tokens_BLG, image_BHW3 in drawing.drawn(
        *(ready.generator, ready.tokenizer.module, ready.cond, ready.sampler),
        **dict(seed=settings.seed, batch=settings.batch, done=done),
    ):
        for i, image_HW3 in enumerate(image_BHW3, done):
            if png:
                kind = f"text{ready.kind_N[i]}"
                if not settings.text:
                    kind = names_.file_name(int(ready.kind_N[i]), ready.loaded.classes)
                name = f"seed{settings.seed}-{i:05d}-{kind}.png"
                image_grid.save_png(place.path / name, image_HW3)
        # last: what is in a part has its pictures
        part = {"tokens": tokens_BLG, "image": image_BHW3}
        made_images.save_part(parts / f"{done:07d}.npz", part)
        done += len(image_BHW3)
    shown = _written(place.path, parts, ready.kind_N, settings.number)
    shutil.rmtree(parts)
    (place.path / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    return len(ready.kind_N), shown


def _kept(parts: pathlib.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens and images of the parts that were made, from the first on without a gap."""
    start = 0
    while (found := made_images.loaded_part(parts / f"{start:07d}.npz")) is not None:
        yield found["tokens"], found["image"]
        start += len(found["image"])


def _written(out: pathlib.Path, parts: pathlib.Path, kind_N: np.ndarray, number: int) -> str:
    """samples.npz, tokens.npy and grid.png of the parts, read one by one; what the grid shows."""
    first_BHW3 = next(_kept(parts))[1]
    rows, columns, colours = first_BHW3.shape[1:]
    scale = max(1, 64 // rows)
    layout_RX, told = sheet(len(kind_N), number, (scale * rows, scale * columns))
    wanted = dict.fromkeys(layout_RX[layout_RX >= 0].tolist())
    shape = (len(kind_N), *first_BHW3.shape[1:])
    with given_images.writing(out / "samples.npz", shape, kind_N) as add:
        tokens, start = [], 0
        for tokens_BLG, image_BHW3 in _kept(parts):
            add(image_BHW3)
            tokens.append(tokens_BLG)
            stop = start + len(image_BHW3)
            wanted |= {i: image_BHW3[i - start] for i in wanted if start <= i < stop}
            start = stop
    np.save(out / "tokens.npy", np.concatenate(tokens))
    blank = np.full((rows, columns, colours), 255, np.uint8)
    shown = np.stack([wanted[i] if i >= 0 else blank for i in layout_RX.reshape(-1).tolist()])
    image_grid.save_png(out / "grid.png", image_grid.grid(shown, layout_RX.shape[1], scale=scale))
    return told


def sheet(count: int, number: int, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """(which image stands where [rows, columns], -1 for none; in words) of `grid.png`.

    A class, of which there are `number` images of `size` pixels, begins a row. A picture of more
    than PIXELS pixels no program opens: then only some of the images stand in it.
    """
    columns = min(number, COLUMNS)
    room = max(1, PIXELS // (columns * size[0] * size[1]))
    room = min(room, max(1, SIDE // size[0]))
    kinds = count // number
    chosen = np.arange(min(kinds, room)) * kinds // min(kinds, room)
    each = max(1, min(-(-number // columns), room // len(chosen)))
    index_KX = np.arange(each * columns)
    index_KX = np.where(index_KX < number, chosen[:, None] * number + index_KX, -1)
    told = "a row per class or text" if each == 1 else f"{each} rows per class or text"
    left = count - int((index_KX >= 0).sum())
    told += f", {count - left} of {count} images" if left else ""
    return index_KX.reshape(-1, columns), told
