"""Images of a trained generator, drawn in Python: arrays, and the same for people.

`sample_folder` writes the same images: image i depends on (seed, i, its condition) and on nothing
beside it.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from tokgen import image_grid, options, ranges, report
from tokgen.checkpoints import checkpoint, loading
from tokgen.data import captioned, classes as names_
from tokgen.errors import UserError
from tokgen.evaluation import made_images, ranking as ranking_, sample_parts
from tokgen.interfaces import Generator, PyTree
from tokgen.sampling import drawing, presets, sampler as samplers

# How often each class is drawn, of so many images in all -> how labels are made of a seed
CLASS_COUNTS = {"equal": made_images.balanced, "drawn": made_images.drawn_classes}
COLUMNS = 16  # images of a row of grid.png
PIXELS, SIDE = 2**26, 2**14  # of grid.png, at most; SIDE is its height
DELAY = 2  # seconds of a draw from Python before it says how far it is
NOTEBOOK = 2**22  # pixels of what a notebook shows, which keeps it in its file

Classes = str | int | Sequence[str | int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn, of which generator.

    Attributes:
        checkpoint: of a generator: a work directory, or one step of it.
        classes: names, ids or ranges (`0-9,cat`), or `all`; "": all of few, some of many. Or a
            label, or a list of names and labels.
        text: .npz of features [N, T, E] and mask [N, T], for a generator that reads text.
        number: images per class or text.
        total: images in all, in the place of `number`; 0: as many as `number` says.
        class_counts: of `total`: equal, every class as often as the others; or drawn, uniformly.
        seed: of the draws, from 0 to 2**32 - 1.
        batch: images drawn and decoded together.
        precision: of the networks, float32 or bfloat16; "" is the preset's.
        tokenizer: where the generator's tokenizer lies now; "": where it lay when it was trained.
        sampling: the preset, and what is in the place of its settings.
        ranking: how many candidates are drawn of each image, and what ranks them.
    """

    checkpoint: str
    classes: Classes = ""
    text: str = ""
    number: int = 8
    seed: int = 0
    batch: int = 32
    precision: str = ""
    tokenizer: str = ""
    sampling: presets.Choice = presets.Choice()
    total: int = 0
    class_counts: str = "equal"
    ranking: ranking_.Ranking = ranking_.Ranking()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """What was drawn: arrays, and the same images for people; a notebook shows them.

    Attributes:
        tokens_NLG: int32 tokens.
        image_NHW3: uint8 images.
        kind_N: the label of each image; of a generator that reads text, the row of its text.
        classes: names of the classes that were drawn, in their order; () for texts.
        settings: how they were drawn, every setting of the sampler by name.

    Examples:
        >>> samples = tokgen.sample("runs/generator", classes="ring,0", number=3)
        >>> samples
        6 samples of 32 x 32 pixels: ring, disc
        >>> samples.image_NHW3.shape, samples.image_NHW3.dtype, samples.tokens_NLG.shape
        ((6, 32, 32, 3), dtype('uint8'), (6, 64, 1))
        >>> samples.images[0].save("first.png")
    """

    tokens_NLG: np.ndarray
    image_NHW3: np.ndarray
    kind_N: np.ndarray
    classes: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def images(self) -> list[Image.Image]:
        """The images for PIL."""
        return image_grid.to_pil(self.image_NHW3)

    def __len__(self) -> int:
        return len(self.image_NHW3)

    def __repr__(self) -> str:
        rows, columns = self.image_NHW3.shape[1:3]
        texts = f"{len(np.unique(self.kind_N))} texts"
        what = names_.listed(self.classes) if any(self.classes) else ""
        what = what if self.classes else texts
        said = f"{len(self)} samples of {rows} x {columns} pixels"
        return f"{said}: {what}" if what else said

    def _repr_png_(self) -> bytes:
        """A row per class, as notebooks ask for it; of many images some."""
        number = int(np.argmax(np.append(self.kind_N, -1) != self.kind_N[0]))
        index_KX = np.arange(len(self)).reshape(-1, number)
        image_of = dict(enumerate(self.image_NHW3))
        picture, _ = sheet_of(image_of, index_KX, len(self), pixels=NOTEBOOK)
        file = io.BytesIO()
        image_grid.to_pil(picture[None])[0].save(file, "PNG")
        return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What each image is asked to be.

    Attributes:
        kind_N: its label; or the row of its text.
        texts: what the rows are of, a Text; None of a generator without.
        classes: names of the classes that are drawn, in their order; () for texts.
    """

    kind_N: np.ndarray
    texts: PyTree
    classes: list[str]

    def cond(self, index_N: np.ndarray) -> PyTree:
        """What a generator is told of images, by their numbers."""
        kind_N = self.kind_N[index_N]
        if self.texts is None:
            return kind_N
        return jax.tree.map(lambda leaf: leaf[kind_N], self.texts)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that a draw needs, loaded and held against each other."""

    loaded: loading.Loaded
    tokenizer: loading.Loaded
    kinds: Kinds
    settings: dict[str, Any]
    generator: Generator
    sampler: samplers.Sampler


def parts(
    ready: Prepared, settings: Settings, index_N: np.ndarray, **how
) -> Iterator[drawing.Part]:
    """Images by their numbers, batch by batch: the best candidates, where there are several."""
    module = ready.tokenizer.module
    asked = (ready.generator, module, ready.kinds.cond(index_N), ready.sampler)
    how |= dict(seed=settings.seed, index_N=index_N)
    ranking = settings.ranking
    if ranking.candidates == 1:
        return drawing.drawn(*asked, **how)
    report.say(ranking.told(len(index_N)))
    score = ranking.score(ready.generator, module.quantizer, ready.loaded.classes, how["batch"])
    return ranking_.drawn(ranking, score, *asked, **how)


def sample(
    generator: str | os.PathLike,
    *,
    classes: Classes = "",
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
    candidates: int = 1,
    rank: str = ranking_.LIKELIHOOD,
    progress: bool = True,
) -> Samples:
    """Images of a trained generator, `number` of each class or text, loaded for this call alone.

    What `tokgen.load(generator).sample` gives, to the bit, which loads once for many calls.

    Args:
        generator: its checkpoint: a work directory, one step of it, or a published model's name.
        classes: names, ids or ranges in a text (`0-9,cat`), or `all`; a label; or a list of names
            and labels. "": all of few, some of many.
        text: .npz of features [N, T, E] and mask [N, T], for a generator that reads text.
        number: images per class or text.
        seed: of the draws, from 0 to 2**32 - 1: image i depends on (seed, i, its class) alone.
        batch: images drawn and decoded together.
        preset: the checkpoint's sampling settings by name.
        temperature, top_k, top_p, guidance, steps, noise: in the place of the preset's settings;
            None leaves them. `guidance` is w of `uncond + w (cond - uncond)` (arXiv:2207.12598).
        precision: of the networks, float32 or bfloat16; "" is the preset's.
        tokenizer: where the generator's tokenizer lies now; "": where it lay when it was trained.
        candidates: that are drawn of each image, of which the best is kept (rejection sampling).
        rank: what is best: "likelihood", under the generator; or the file of a reference with a
            classifier (`make_reference`), which must see the class.
        progress: whether a long draw shows how far it is.

    Returns:
        Samples: tokens, uint8 images, labels, settings.

    Raises:
        UserError: the generator has no such class, setting or text.

    Examples:
        >>> samples = tokgen.sample("runs/generator", classes=[3, 7], number=2, temperature=0.8)
        >>> samples.kind_N
        array([3, 3, 7, 7], dtype=int32)
        >>> samples.settings["temperature"]
        0.8
    """
    choice = presets.Choice(preset, temperature, top_k, top_p, guidance, steps, noise)
    settings = Settings(
        os.fspath(generator),
        classes,
        text,
        number,
        seed,
        batch,
        precision,
        tokenizer,
        choice,
        ranking=ranking_.Ranking(candidates, rank),
    )
    check(settings)
    return drawn(settings, *networks(settings), progress=progress)


def drawn(
    settings: Settings,
    loaded: loading.Loaded,
    tokenizer: loading.Loaded,
    *,
    progress: bool = True,
) -> Samples:
    """What settings ask for, of networks that are loaded already."""
    ready = prepared(settings, loaded, tokenizer)
    kinds = ready.kinds
    how = dict(batch=settings.batch, what="sample" if progress else "", delay=DELAY)
    found = parts(ready, settings, np.arange(len(kinds.kind_N)), **how)
    tokens_NLG, image_NHW3, _ = map(np.concatenate, zip(*found, strict=True))
    return Samples(tokens_NLG, image_NHW3, kinds.kind_N, tuple(kinds.classes), ready.settings)


def networks(settings: Settings) -> tuple[loading.Loaded, loading.Loaded]:
    """The generator of the settings in the precision that they ask for, and its tokenizer.

    Both for nothing but drawing: no encoder, and no parameter twice.
    """
    compute = settings.precision
    if not compute:
        meta = checkpoint.read_meta(checkpoint.find(settings.checkpoint))
        compute = presets.precision(meta, settings.sampling)
    loaded = loading.load_to_draw(settings.checkpoint, compute=compute)
    return loaded, loading.load_to_decode(loaded, settings.tokenizer)


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    for name in ("number", "batch", "seed", "total"):
        value = getattr(settings, name)
        if not ranges.fits(value, int):
            raise UserError(f"--{name} must be a whole number; found {value!r}")
    if settings.number < 1 or settings.batch < 1:
        raise UserError(
            f"--number and --batch must be at least 1; found {settings.number}, {settings.batch}"
        )
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2**32); found {settings.seed}")
    if not 0 <= settings.total <= sample_parts.MOST:
        raise UserError(
            f"--total must lie in [1, {sample_parts.MOST:,}], images in all; found {settings.total}"
        )
    if settings.class_counts not in CLASS_COUNTS:
        raise UserError(
            f"--class-counts must be {' or '.join(CLASS_COUNTS)}; found {settings.class_counts!r}"
        )


def check_condition(settings: Settings, cond: str, classes: int) -> None:
    """An error where a generator with that condition is told the other, or none."""
    if cond == "label":
        if settings.text:
            raise UserError(
                f"--text needs a generator that reads text; found one of {classes} classes: use "
                "--classes"
            )
        return
    unchosen = isinstance(settings.classes, str) and not settings.classes
    if not unchosen or not settings.text:
        raise UserError(
            "the generator reads text: it needs --text FILE.npz with arrays features [N, T, E] "
            f"and mask [N, T]; found {'none' if unchosen else '--classes'}"
        )


def kinds(settings: Settings, loaded: loading.Loaded) -> Kinds:
    """What each image is asked to be, in the order of their numbers."""
    check_condition(settings, loaded.module.cond, len(loaded.classes))
    if loaded.module.cond == "label":
        unchosen = isinstance(settings.classes, str) and not settings.classes
        labels = names_.chosen(settings.classes, loaded.classes)
        if unchosen and settings.total:
            labels = list(range(max(len(loaded.classes), 1)))
        elif unchosen and len(labels) < len(loaded.classes):
            report.say(
                f"{len(labels)} of {len(loaded.classes)} classes are drawn, evenly over them: "
                f"{names_.listed([loaded.classes[i] for i in labels])}; --classes chooses others, "
                f"--classes all draws {len(loaded.classes) * settings.number:,} images"
            )
        names = [loaded.classes[i] if loaded.classes else "" for i in labels]
        return Kinds(_repeated(settings, np.asarray(labels, np.int32)), None, names)
    text = captioned.conditions(settings.text)
    rows = np.arange(len(text.mask_BT), dtype=np.int32)
    return Kinds(_repeated(settings, rows), text, [])


def _repeated(settings: Settings, kind_K: np.ndarray) -> np.ndarray:
    """[N] the kind of each image: `number` of each, or `total` in all in a mixed order."""
    if not settings.total:
        return np.repeat(kind_K, settings.number)
    each, more = divmod(settings.total, len(kind_K))
    if more and settings.class_counts == "equal":
        report.say(
            f"{settings.total:,} images are no multiple of {len(kind_K):,} classes or texts: "
            f"{each + 1:,} of each of the first {more:,}, {each:,} of the others"
        )
    which = CLASS_COUNTS[settings.class_counts]
    return kind_K[which(settings.total, len(kind_K), settings.seed)]


def prepared(settings: Settings, loaded: loading.Loaded, tokenizer: loading.Loaded) -> Prepared:
    """The conditions and the sampler that networks are asked with."""
    choice = settings.sampling
    asked = kinds(settings, loaded)
    found, generator, sampler = presets.choose(
        loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes
    )
    options.refuse(presets.without_effect(choice, sampler))
    return Prepared(loaded, tokenizer, asked, found, generator, sampler)


def sheet_of(
    image_of: Mapping[int, np.ndarray], index_KX: np.ndarray, count: int, pixels: int = PIXELS
) -> tuple[np.ndarray, str]:
    """(the sheet of images [H, W, 3], in words) of those that stand on it, by their numbers.

    A row of `index_KX` has the numbers of the images of a class or text, of `count` in all.
    """
    shape = next(iter(image_of.values())).shape
    layout_RX, scale, told = laid_out(shape, index_KX, count, pixels)
    blank = np.full(shape, 255, np.uint8)
    shown = np.stack([image_of[i] if i >= 0 else blank for i in layout_RX.reshape(-1).tolist()])
    return image_grid.grid(shown, layout_RX.shape[1], scale=scale), told


def laid_out(
    shape: Sequence[int], index_KX: np.ndarray, count: int, pixels: int = PIXELS
) -> tuple[np.ndarray, int, str]:
    """(which image stands where, the scale of each, in words): small ones are enlarged."""
    scale = max(1, 64 // shape[0])
    size = (scale * shape[0], scale * shape[1])
    layout_RX, told = sheet(count, index_KX.shape[1], size, pixels, len(index_KX))
    return np.where(layout_RX < 0, -1, index_KX.reshape(-1)[layout_RX]), scale, told


def sheet(
    count: int, number: int, size: tuple[int, int], pixels: int = PIXELS, kinds: int = 0
) -> tuple[np.ndarray, str]:
    """(which image stands where [rows, columns], -1 for none; in words) of `grid.png`.

    A class, of which there are `number` images of `size` pixels, begins a row; there are `kinds` of
    them, or as many as the `count` of all images affords. A picture of more
    than PIXELS pixels no program opens: then only some of the images stand in it.
    """
    columns = min(number, COLUMNS)
    room = max(1, pixels // (columns * size[0] * size[1]))
    room = min(room, max(1, SIDE // size[0]))
    kinds = kinds or count // number
    chosen = np.arange(min(kinds, room)) * kinds // min(kinds, room)
    each = max(1, min(-(-number // columns), room // len(chosen)))
    index_KX = np.arange(each * columns)
    index_KX = np.where(index_KX < number, chosen[:, None] * number + index_KX, -1)
    told = "a row per class or text" if each == 1 else f"{each} rows per class or text"
    left = count - int((index_KX >= 0).sum())
    told += f", {count - left} of {count} images" if left else ""
    return index_KX.reshape(-1, columns), told
