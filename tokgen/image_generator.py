"""A generator as a library user holds it, with its tokenizer: loaded once, asked often."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from tokgen import (
    boundary,
    image_tokenizer,
    options,
    ranges,
    samples,
    tokens as arrays,
    traces,
)
from tokgen.checkpoints import loading
from tokgen.data import captioned, classes as names, pictures
from tokgen.editing import edits, redrawing, regions
from tokgen.errors import UserError
from tokgen.evaluation import ranking, validation
from tokgen.interfaces import PyTree, TokenLayout
from tokgen.sampling import decode, drawing, presets


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageGenerator:
    """A generator with its tokenizer: it draws images, and says how likely images are.

    `tokgen.load` makes it. Networks are loaded once, and compiled at the first call of a kind.

    Attributes:
        loaded: the generator, with what its checkpoint says of it.
        tokenizer: the tokenizer of its tokens.
        name: of a published model; "" of any other.
        precision: that was asked for; "" where presets decide.

    Examples:
        >>> model = tokgen.load("runs/generator")
        >>> model
        ImageGenerator of autoregressive: 12,000 parameters, float32, step 0 in runs/generator
        8 x 8 tokens of 240; 10 classes (disc, ring, square ... (7 more)); images of 32 x 32 pixels
        >>> samples = model.sample(classes=["ring", 3], number=2, seed=1)
        >>> tokens_NLG = model.encode(samples.images)
        >>> model.log_likelihood(samples.images, classes=samples.kind_N).shape
        (4,)
    """

    loaded: loading.Loaded
    tokenizer: image_tokenizer.ImageTokenizer
    name: str = ""
    precision: str = ""
    _drawing: dict[str, loading.Loaded] = dataclasses.field(default_factory=dict, init=False)

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of its images."""
        return self.tokenizer.size

    @property
    def layout(self) -> TokenLayout:
        """Alphabets and grids of its tokens."""
        return self.loaded.layout

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label; () of one that is unconditional, or reads text."""
        return self.loaded.classes

    @property
    def presets(self) -> tuple[str, ...]:
        """Names of the sampling settings that its checkpoint carries."""
        return tuple(dict.fromkeys((*self.config.presets, "no_guidance")))

    @property
    def exact(self) -> bool:
        """Whether it has a `log_likelihood`; else a `log_likelihood_bound` only."""
        return self.loaded.module.exact

    @property
    def config(self) -> ml_collections.ConfigDict:
        """The whole config that it was trained or imported with."""
        return self.loaded.config

    @property
    def step(self) -> os.PathLike:
        """Where its checkpoint lies."""
        return self.loaded.step

    @property
    def fingerprint(self) -> str:
        """A hash of weights and form: equal where it computes the same."""
        return self.loaded.fingerprint

    def sample(
        self,
        classes: samples.Classes = "",
        *,
        number: int = 8,
        seed: int = 0,
        preset: str = "default",
        text: str = "",
        batch: int = 32,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        noise: float | None = None,
        candidates: int = 1,
        rank: str = ranking.LIKELIHOOD,
        progress: bool = True,
    ) -> samples.Samples:
        """Draw images, `number` of each class or text: what `tokgen sample` draws, to the bit.

        Args:
            classes: names, ids or ranges in a text (`0-9,cat`), or `all`; a label, the place of
                its name in `classes`; or a list of names and labels. "": all of few, some of many.
            number: images per class or text.
            seed: from 0 to 2**32 - 1; image i depends on (seed, i, its class) and nothing else.
            preset: sampling settings by name, of `presets`.
            text: .npz of features [N, T, E] and mask [N, T], for a generator that reads text.
            batch: images drawn and decoded together.
            temperature, top_k, top_p, guidance, steps, noise: in the place of the preset's
                settings; None leaves them.
            candidates: that are drawn of each image, of which the best is kept.
            rank: what is best: "likelihood", under the generator; or the file of a reference with
                a classifier (`tokgen.make_reference`), which must see the class.
            progress: whether a draw of more than two seconds shows how far it is.

        Returns:
            Samples: `.images` for PIL, `.image_NHW3`, `.tokens_NLG`, `.kind_N`.

        Raises:
            UserError: it has no such class, preset or setting.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> model.sample("ring", number=2, guidance=2.0, seed=3).images[0].size
            (32, 32)
            >>> model.sample("teapot")
            Traceback (most recent call last):
            tokgen.errors.UserError: unknown class 'teapot'...
        """
        choice = presets.Choice(preset, temperature, top_k, top_p, guidance, steps, noise)
        settings = samples.Settings(
            checkpoint=os.fspath(self.step),
            classes=classes,
            text=text,
            number=number,
            seed=seed,
            batch=batch,
            precision=self.precision,
            sampling=choice,
            ranking=ranking.Ranking(candidates, rank),
        )
        samples.check(settings)
        loaded = self._computing(self.precision or presets.precision(self.loaded.meta, choice))
        return samples.drawn(settings, loaded, self.tokenizer.decoder, progress=progress)

    def trace(
        self,
        classes: samples.Classes = "",
        *,
        number: int = 1,
        seed: int = 0,
        preset: str = "default",
        text: str = "",
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        noise: float | None = None,
    ) -> traces.Trace:
        """How images come to be, step by step: those that `sample` draws of the same settings.

        Args:
            classes, number, seed, preset, text: as of `sample`; of many images the first 8, of
                large ones fewer, classes in turn.
            temperature, top_k, top_p, guidance, steps, noise: as of `sample`.

        Returns:
            Trace: a notebook plays it; `.save_gif(path)`, `.strip()`, `.frame_SNHW3`.

        Raises:
            UserError: it has no such class, preset or setting.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> model.trace(["ring", "disc"], seed=3)
            25 frames of 2 images, 32 x 32 pixels, over 64 steps
        """
        choice = presets.Choice(preset, temperature, top_k, top_p, guidance, steps, noise)
        settings = samples.Settings(
            checkpoint=os.fspath(self.step),
            classes=classes,
            text=text,
            number=number,
            seed=seed,
            precision=self.precision,
            sampling=choice,
        )
        samples.check(settings)
        loaded = self._computing(self.precision or presets.precision(self.loaded.meta, choice))
        ready = samples.prepared(settings, loaded, self.tokenizer.decoder)
        return traces.traced(ready, settings)

    def edit(
        self,
        images: pictures.Pictures,
        classes: samples.Classes | None = None,
        *,
        mask: regions.Region | Sequence[regions.Region] | None = None,
        grow: str | None = None,
        strength: float | None = None,
        scales: int | None = None,
        number: int = 1,
        seed: int = 0,
        preset: str = "default",
        text: str = "",
        batch: int = 32,
        particles: int = redrawing.PARTICLES,
        feather: float | None = None,
        overlap: float = 0.5,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        noise: float | None = None,
        candidates: int = 1,
        rank: str = ranking.LIKELIHOOD,
        progress: bool = True,
    ) -> edits.Edits:
        """Draw parts of images anew: what `tokgen edit` draws. One of four is asked for.

        Args:
            images: as of `encode`.
            classes: of all images, or one for each, as of `log_likelihood`; another class than an
                image's makes what is drawn one of it.
            mask: which pixels are drawn anew: left, right, top, bottom, center, all,
                "box=ROW,COLUMN,HEIGHT,WIDTH", the file of an image or a PIL image (white is drawn),
                or a bool array [H, W]; or a list with one for each image. All other pixels keep
                every byte.
            grow: pixels that are added at each side, as "right=128,bottom=64".
            strength: a variation: the share of tokens that are drawn anew, those that the generator
                was least certain of; of several grids the share of these, the finest.
            scales: so many of the coarsest grids are kept, and the finer ones drawn: more detail.
            number: draws of each image.
            seed: a draw depends on (seed, its number, image, mask, class) and nothing else.
            preset, text, batch: as of `sample`.
            particles: draws that are held against what is kept later in the generator's order.
            feather: pixels inside of the mask over which both meet; None: a 32nd of the side.
            overlap: of `grow`: the share of a window's side that lies over what is there.
            temperature, top_k, top_p, guidance, steps, noise, progress: as of `sample`.
            candidates, rank: as of `sample`; not with `grow`.

        Returns:
            Edits: `.images` for PIL, `.image_NHW3`, `.source_N`.

        Raises:
            UserError: images of another size; none or two of the four; a mask, class or setting
                that there is not; a generator whose tokens have no place in the image.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> ring = model.sample("ring", number=1).images[0]
            >>> model.edit(ring, "ring", mask="left", number=2, progress=False)
            2 edits of 1 image, 32 x 32 pixels
            >>> model.edit(ring, "ring", grow="right=32", progress=False).images[0].size
            (64, 32)
        """
        asked = edits.Settings(
            mask=mask,
            grow=grow,
            strength=strength,
            scales=scales,
            number=number,
            seed=seed,
            particles=particles,
            feather=feather,
            batch=batch,
            overlap=overlap,
            ranking=ranking.Ranking(candidates, rank),
        )
        asked.check()
        pixels_KHW3 = self.tokenizer._exact(images)
        choice = presets.Choice(preset, temperature, top_k, top_p, guidance, steps, noise)
        cond = self._cond(classes, text, len(pixels_KHW3))
        self.loaded.module.check(cond)
        what = "edit" if progress else ""
        model = self._editing(choice)
        return edits.edit(model, pixels_KHW3, asked, cond, classes=self.classes, what=what)

    def _editing(self, choice: presets.Choice) -> redrawing.Model:
        loaded = self._computing(self.precision or presets.precision(self.loaded.meta, choice))
        _, generator, sampler = presets.choose(
            loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes
        )
        options.refuse(presets.without_effect(choice, sampler))
        return redrawing.Model(generator, sampler, self.tokenizer.encoder, self.tokenizer.decoder)

    def log_likelihood(
        self,
        images: pictures.Pictures | None = None,
        *,
        tokens: np.ndarray | None = None,
        classes: samples.Classes | None = None,
        text: str = "",
        batch: int = 32,
    ) -> np.ndarray:
        """ln p(tokens | class) of images, in nats: exact, of generators that have it.

        Of autoregressive and next-scale generators, under the generator's own order. A masked one
        has a bound only, and is refused: `log_likelihood_bound` is its way. Divide by
        `-math.log(2)` for bits.

        Args:
            images: as of `encode`; their tokens are what is likely.
            tokens: integers [N, L, G] in their place.
            classes: of all images, or one for each: a name, a label, or a list of these. None of a
                generator without classes.
            text: .npz of the features that each image was drawn from, or of one text for all.
            batch: images at a time.

        Returns:
            float64 [N], at most 0.

        Raises:
            UserError: a masked generator; images, tokens or classes that are none of its.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> samples = model.sample("ring", number=2)
            >>> nats_N = -model.log_likelihood(tokens=samples.tokens_NLG, classes="ring")
            >>> nats_N.shape, nats_N.dtype
            ((2,), dtype('float64'))
        """
        if not self.exact:
            raise UserError(
                "log_likelihood needs a generator with an exact likelihood; found a masked one: "
                "log_likelihood_bound estimates a lower bound of it"
            )
        return -self._nats(images, tokens, classes, text, batch, draws=1, seed=0)[:, 0]

    def log_likelihood_bound(
        self,
        images: pictures.Pictures | None = None,
        *,
        tokens: np.ndarray | None = None,
        classes: samples.Classes | None = None,
        text: str = "",
        batch: int = 32,
        draws: int = 8,
        seed: int = 0,
    ) -> np.ndarray:
        """An estimate of a lower bound of ln p(tokens | class), in nats, of masked generators.

        The mean over `draws` of -(N / n) nats of n masked slots among N, n uniform: in expectation
        the log-likelihood of drawing slot by slot in a random order, at most that of the mixture of
        all orders (arXiv:2110.02037, equation 2). An estimate of one image may lie above it.

        Args:
            images, tokens, classes, text, batch: as of `log_likelihood`.
            draws: random maskings of each image; the error falls with its square root.
            seed: of them: a draw depends on (seed, place of the image) alone.

        Returns:
            float64 [N].

        Raises:
            UserError: a generator whose likelihood is exact; images, tokens or classes that are
                none of its.

        Examples:
            >>> masked = tokgen.load("runs/masked")
            >>> samples = masked.sample("ring", number=2)
            >>> bound_N = masked.log_likelihood_bound(samples.images, classes="ring", draws=2)
            >>> bound_N.shape
            (2,)
        """
        if self.exact:
            raise UserError(
                "log_likelihood_bound is for generators without an exact likelihood; this one has "
                "it: log_likelihood(images)"
            )
        return -self._nats(images, tokens, classes, text, batch, draws=draws, seed=seed).mean(1)

    def fit(self, images: pictures.Pictures) -> np.ndarray:
        """Images of any size, or their files, as the model sees them: `ImageTokenizer.fit`.

        Examples:
            >>> tokgen.load("runs/generator").fit("photo.png").shape
            (1, 32, 32, 3)
        """
        return self.tokenizer.fit(images)

    def encode(self, images: pictures.Pictures, *, batch: int = 32) -> np.ndarray:
        """Tokens of images, int32 [N, L, G]: `ImageTokenizer.encode`.

        Examples:
            >>> tokgen.load("runs/generator").encode(PIL.Image.new("RGB", (32, 32))).shape
            (1, 64, 1)
        """
        return self.tokenizer.encode(images, batch=batch)

    def decode(self, tokens: np.ndarray, *, batch: int = 32) -> np.ndarray:
        """uint8 images [N, rows, columns, 3] of tokens [N, L, G]: `ImageTokenizer.decode`.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> samples = model.sample(0, number=2)
            >>> bool((model.decode(samples.tokens_NLG) == samples.image_NHW3).all())
            True
        """
        return self.tokenizer.decode(tokens, batch=batch)

    def reconstruct(self, images: pictures.Pictures, *, batch: int = 32) -> np.ndarray:
        """Images through its tokenizer and back, uint8: `ImageTokenizer.reconstruct`.

        Examples:
            >>> model = tokgen.load("runs/generator")
            >>> model.reconstruct(model.fit("photo.png")).shape
            (1, 32, 32, 3)
        """
        return self.tokenizer.reconstruct(images, batch=batch)

    def _computing(self, precision: str) -> loading.Loaded:
        """The generator in a precision, laid out for drawing: once, whatever is drawn then.

        Loaded anew where a preset asks for another precision.
        """
        if precision not in self._drawing:
            loaded = self.loaded
            if precision == loaded.config.precision.compute:
                laid = dataclasses.replace(loaded, module=decode.laid_out(loaded.module))
            else:
                laid = loading.load_to_draw(self.step, compute=precision)
            self._drawing[precision] = laid
        return self._drawing[precision]

    def _nats(
        self,
        images: pictures.Pictures | None,
        tokens: np.ndarray | None,
        classes: samples.Classes | None,
        text: str,
        batch: int,
        *,
        draws: int,
        seed: int,
    ) -> np.ndarray:
        """[N, draws] nats of images, or of their tokens."""
        if (images is None) == (tokens is None):
            found = "neither" if images is None else "both"
            raise UserError(f"images or tokens= must be given, one of them; found {found}")
        numbers = (
            ("batch", batch, ranges.Batch),
            ("draws", draws, ranges.Count),
            ("seed", seed, ranges.Seed),
        )
        ranges.refuse(filter(None, (ranges.problem(*number) for number in numbers)))
        if images is not None:
            pixels_NHW3 = self.tokenizer._exact(images)  # wrong ones are told before wrong classes
            count = len(pixels_NHW3)
        else:
            tokens = np.asarray(boundary.tokens(arrays.array(tokens), self.layout))
            count = len(tokens)
        if not count:
            raise UserError("at least one image is needed, or the tokens of one; found none")
        cond = self._cond(classes, text, count)
        self.loaded.module.check(cond)
        if images is not None:
            tokens = arrays.encode(self.tokenizer.encoder, pixels_NHW3, batch=batch)
        return validation.nats(
            self.loaded.module,
            self.tokenizer.decoder.module.quantizer,
            tokens,
            cond,
            batch=drawing.even(count, batch),
            draws=draws,
            seed=seed,
        )

    def _cond(self, classes: samples.Classes | None, text: str, count: int) -> PyTree:
        """The condition of each of so many images: one for all of them, or one for each."""
        if self.loaded.module.cond == "text":
            if classes is not None or not text:
                raise UserError(
                    "the generator reads text: it needs text= of an .npz with arrays features "
                    f"[N, T, E] and mask [N, T]; found {'classes' if text else 'none'}"
                )
            cond = captioned.conditions(text)
            rows = len(cond.mask_BT)
        elif text:
            raise UserError(
                "text= needs a generator that reads text; found one of "
                f"{len(self.classes)} classes: use classes="
            )
        elif self.classes and (classes is None or (isinstance(classes, str) and not classes)):
            raise UserError(
                f"the class of each image is needed: classes= one of {names.listed(self.classes)} "
                "for all, or a list with one for each; found none"
            )
        else:
            cond = np.asarray(
                names.chosen(0 if classes is None else classes, self.classes), np.int32
            )
            rows = len(cond)
        if rows not in (1, count):
            raise UserError(
                f"classes or texts must be one for all images, or one for each of {count}; found "
                f"{rows}"
            )
        return jax.tree.map(lambda leaf: np.repeat(leaf, count // rows, axis=0), cond)

    def __repr__(self) -> str:
        rows, columns = self.size
        kinds = f"{len(self.classes)} classes ({names.listed(self.classes, 3)})"
        if not self.classes:
            kinds = "texts" if self.loaded.module.cond == "text" else "no classes"
        told = (
            f"{image_tokenizer.told_of(self.layout)}; {kinds}; images of {rows} x {columns} pixels"
        )
        return f"{image_tokenizer.headline(self, self.name, self.loaded)}\n{told}"
