"""The best of several candidates: rejection sampling.

Each image is drawn several times, and the candidate with the highest score is kept: ln of the
likelihood of its tokens under the generator itself, or of its class under a classifier, as for the
published FID of 1.73 of VAR (arXiv:2404.02905, "rejection sampling"). What is kept is no sample of
the generator any more: likelier, and less varied.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import numpy as np
from flax import nnx

from tokgen import ranges
from tokgen.evaluation import feature_extractors, references, validation
from tokgen.interfaces import Generator, PyTree, Quantizer, Sampler, UserError
from tokgen.sampling import drawing

LIKELIHOOD = "likelihood"
MOST = 255  # candidates of an image
APART = 2**24  # numbers of the candidates of one image; images lie below

# (tokens_NLG, uint8 image_NHW3, conditions) -> [N] float64: the higher the better
Score = Callable[[np.ndarray, np.ndarray, PyTree], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """So many candidates of each image, and what ranks them.

    Args:
        candidates: of each image; 1 is no ranking.
        by: LIKELIHOOD, or the file of a reference with a network of its own (`tokgen reference`).
    """

    candidates: int = 1
    by: str = LIKELIHOOD

    def __post_init__(self):
        if not ranges.fits(self.candidates, Annotated[int, ranges.Range(1, MOST)]):
            raise UserError(
                f"--candidates must be a whole number from 1 to {MOST}, of each image; found "
                f"{self.candidates!r}"
            )
        named = isinstance(self.by, str | os.PathLike)
        if not named or self.by != LIKELIHOOD and not pathlib.Path(self.by).is_file():
            raise UserError(
                f"--rank is {LIKELIHOOD}, or the file that `tokgen reference` wrote; found no file "
                f"{self.by!r}"
            )

    def told(self, images: int) -> str:
        """What it costs, in words."""
        by = LIKELIHOOD if self.by == LIKELIHOOD else f"the classifier of {self.by}"
        return (
            f"{self.candidates} candidates of each of {images:,} images: "
            f"{self.candidates * images:,} are drawn, ranked by {by}, and {images:,} kept"
        )

    def numbers(self, index_N: np.ndarray, candidate: int) -> np.ndarray:
        """What a candidate of each image is drawn with; the first with the image's own number."""
        return index_N + candidate * APART

    def score(
        self, generator: Generator, codec: Quantizer | None, classes: Sequence[str], batch: int
    ) -> Score:
        """The function that ranks; UserError where it cannot, before anything is drawn."""
        if self.by == LIKELIHOOD:
            return _likelihood(generator, codec, batch)
        return _classifier(self.by, generator, classes)


def _likelihood(generator: Generator, codec: Quantizer | None, batch: int) -> Score:
    if not generator.exact:
        raise UserError(
            "--rank likelihood needs a generator with an exact likelihood; found a masked one: "
            "--rank FILE ranks by a classifier, of a reference of `tokgen reference DATA`"
        )

    def score(tokens_NLG: np.ndarray, image_NHW3: np.ndarray, cond: PyTree) -> np.ndarray:
        del image_NHW3
        return -validation.nats(generator, codec, tokens_NLG, cond, batch=batch)[:, 0]

    return score


def _classifier(path: str, generator: Generator, classes: Sequence[str]) -> Score:
    found = references.read(path)
    if not found.network:
        raise UserError(
            f"--rank needs a reference with a classifier of its own, of the protocol local; found "
            f"{path}, measured by {found.record['extractor']['name']}"
        )
    about = found.record["extractor"]
    known = list(about.get("classes", ()))
    if generator.cond != "label" or not classes or sorted(known) != sorted(classes):
        raise UserError(
            f"the classifier of {path} must know the generator's classes, "
            f"{len(classes)}; found {len(known)}{' others' if known else ''}: make the reference "
            "of the data that the generator was trained on"
        )
    extractor = feature_extractors.from_arrays(found.network, about)
    place_K = np.array([known.index(name) for name in classes])

    def score(tokens_NLG: np.ndarray, image_NHW3: np.ndarray, cond: PyTree) -> np.ndarray:
        del tokens_NLG
        image_NHW3 = np.broadcast_to(image_NHW3, (*image_NHW3.shape[:3], 3))  # of gray ones, too
        logits_NK = feature_extractors.features(extractor, image_NHW3, ("logits",))["logits"]
        logs_NK = np.asarray(jax.nn.log_softmax(logits_NK.astype(np.float64), axis=-1))
        return np.take_along_axis(logs_NK, place_K[np.asarray(cond)][:, None], axis=1)[:, 0]

    return score


def best(score_NX: np.ndarray) -> np.ndarray:
    """[N] the candidate of each image with the highest score; of equals the first."""
    return np.asarray(score_NX).argmax(axis=1)


def drawn(
    asked: Ranking,
    score: Score,
    generator: Generator,
    tokenizer: nnx.Module,
    cond: PyTree,
    sampler: Sampler,
    *,
    seed: int,
    batch: int,
    index_N: np.ndarray,
    what: str = "",
    delay: float = 0,
) -> Iterator[drawing.Part]:
    """What `drawing.drawn` gives, `batch` images a part, of the best candidate of each image."""
    X = asked.candidates
    numbers_M = np.stack([asked.numbers(index_N, c) for c in range(X)], axis=1).reshape(-1)
    cond = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), X, axis=0), cond)
    parts = drawing.drawn(
        *(generator, tokenizer, cond, sampler),
        **dict(seed=seed, batch=batch, index_N=numbers_M, what=what, delay=delay),
    )
    rows, done, last = None, 0, len(numbers_M)
    for part in parts:
        at = slice(done, done + len(part.near_B))
        own, done = jax.tree.map(lambda leaf, at=at: leaf[at], cond), at.stop
        part = (*part, score(part.tokens_BLG, part.image_BHW3, own))
        if rows is not None:
            part = tuple(map(np.concatenate, zip(rows, part, strict=True)))
        rows = part
        while len(rows[-1]) >= batch * X or (done == last and len(rows[-1])):
            several, rows = ([a[: batch * X] for a in rows], [a[batch * X :] for a in rows])
            score_NX = several[-1].reshape(-1, X)
            kept_N = best(score_NX) + X * np.arange(len(score_NX))
            tokens, image, near = (array[kept_N] for array in several[:-1])
            # of any of them: which one is kept was decided among all
            near |= several[2].reshape(-1, X).any(1)
            yield drawing.Part(tokens, image, near)
