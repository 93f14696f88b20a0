"""Images to be scored that are made while they are scored: drawn by a generator, or reconstructed.

What was made is kept part by part, so that a run that is killed
goes on to the very images that it would have made.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np

from tokgen import archives, distributed, storage
from tokgen.checkpoints import loading
from tokgen.data import datasets, loader, npz, scan, sources
from tokgen.evaluation import feature_extractors, validation
from tokgen.interfaces import PyTree, UserError
from tokgen.metrics import codebook
from tokgen.sampling import drawing

LABELS, CLASSES = 5, 6  # streams of numpy's, for the order of the classes, and for drawing them


def balanced(count: int, classes: int, seed: int) -> np.ndarray:
    """[count] labels, every class as often as the others, in a mixed order."""
    order = np.random.default_rng([seed, LABELS]).permutation(count)
    return (np.arange(count) % max(classes, 1))[order].astype(np.int32)


def drawn_classes(count: int, classes: int, seed: int) -> np.ndarray:
    """[count] labels, each drawn uniformly from all classes."""
    drawn_N = np.random.default_rng([seed, CLASSES]).integers(0, max(classes, 1), count)
    return drawn_N.astype(np.int32)


def conditions(cond: PyTree) -> str:
    """A hash of what images are asked to be: of labels, or of every number of their texts."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(cond):
        digest.update(
            f"{leaf.dtype} {leaf.shape}\n".encode() + np.ascontiguousarray(leaf).tobytes()
        )
    return digest.hexdigest()[:16]


class Drawn:
    """Images of a generator; number i depends on (seed, i, its condition) only.

    `cond` leads with the images: labels [N], or a Text. Parts, of `each` images but for the last,
    are kept in `folder`.
    """

    def __init__(
        self,
        loaded: loading.Loaded,
        tokenizer: loading.Loaded,
        prepared: tuple,
        cond: PyTree,
        *,
        settings: Mapping,
        preset: str,
        seed: int,
        batch: int,
        each: int,
        folder: pathlib.Path,
    ):
        self.generator, self.sampler = prepared
        self.tokenizer, self.cond = tokenizer.module, cond
        self.seed, self.folder = seed, folder
        # one program serves all parts, the last too, which is filled up to a multiple of it
        self.batch = distributed.rows(drawing.even(min(each, len(self)), batch))
        self.size = tuple(tokenizer.config.view.size)
        self.classes = loaded.classes
        self.identity = {
            "checkpoint": str(storage.resolved(loaded.step)),
            "fingerprint": loaded.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "step": loaded.meta["step"],
            "preset": preset,
            "settings": dict(settings),
            "precision": loaded.config.precision.compute,
            "conditions": conditions(cond),
            "seed": seed,
            # programs of other sizes round otherwise, now and then by a grey level
            "batch": batch,
        }

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.cond)[0])

    @functools.cached_property
    def archive(self) -> npz.Archive | None:
        """All images, where they are kept: looked for once the folder is this score's own."""
        whole = self.folder.parent / "samples.npz"
        return npz.Archive(whole) if whole.exists() else None

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images and labels `start` to `stop`: drawn now, or as they were kept."""
        if self.archive is not None:
            return self.archive.part(start, stop)
        file = self.folder / f"{start:07d}-{stop:07d}.npz"
        if (kept := loaded_part(file)) is not None:
            return kept
        cond = jax.tree.map(lambda leaf: leaf[start:stop], self.cond)
        rows = -(-(stop - start) // self.batch) * self.batch
        index_B = np.minimum(np.arange(rows), stop - start - 1)
        cond = jax.tree.map(lambda leaf: leaf[index_B], cond)
        _, image_NHWC = drawing.draw(
            *(self.generator, self.tokenizer, cond, self.sampler),
            seed=self.seed,
            batch=self.batch,
            index_N=start + index_B,
            what="",
        )
        part = {"image": coloured(image_NHWC[: stop - start])}
        if isinstance(self.cond, np.ndarray) and self.classes:
            part["label"] = self.cond[start:stop]
        save_part(file, part)
        return part

    def keep(self, path: pathlib.Path) -> None:
        """Take the images from the archive at `path` from now on: parts would keep them twice."""
        self.archive = npz.Archive(path)
        shutil.rmtree(self.folder, ignore_errors=True)


class Reconstructed:
    """Reconstructions of a source's images, beside the originals and what was measured of each."""

    def __init__(
        self,
        loaded: loading.Loaded,
        source: sources.RandomAccess,
        *,
        count: int,
        distances: Mapping,
    ):
        self.tokenizer, self.source = loaded.module, source
        self.view = datasets.view_of(loaded.config)
        self.size = tuple(loaded.config.view.size)
        # seen to before anything is measured: a part has as many images as its bounds say
        wanted = validation.spread(len(source), count)
        seen = distributed.decided(_readable, source, wanted, loaded.config.view.channels)
        self.index_N = np.asarray(seen, np.int64)
        self.count, self.unreadable = len(self.index_N), len(wanted) - len(self.index_N)
        self.distances = distances  # name -> LPIPS over images in [-1, 1]
        self.layout, self.classes = loaded.layout, tuple(source.classes)
        self.identity = {
            "checkpoint": str(storage.resolved(loaded.step)),
            "fingerprint": loaded.fingerprint,
            "step": loaded.meta["step"],
            "images": source.fingerprint,
            "distances": {
                n: feature_extractors.fingerprint(n, distances[n])[:16] for n in sorted(distances)
            },
        }

    def __len__(self) -> int:
        return self.count

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Images, their originals, and a value per image of each measure."""
        passing = loader.once(
            self.source,
            self.view,
            batch_size=stop - start,
            indices=self.index_N[start:stop],
        )
        given = next(passing)
        if len(given["label"]) != stop - start:
            raise UserError(
                f"{stop - start - len(given['label'])} images became unreadable while they were "
                f"measured; put them back, and run the same command again:\n"
                f"{passing.unreadable.listed()}"
            )
        tokens_BLG, decoded, values = self._reconstructed(given)
        part = {
            "image": coloured(decoded),
            "original": coloured(given["image"]),
            **{f"values/{name}": value_B for name, value_B in values.items()},
        }
        if self.source.classes:
            part["label"] = given["label"]
        if tokens_BLG is not None:
            counts = codebook.counts(tokens_BLG, self.layout)
            part |= {f"counts/{g}": count_V for g, count_V in enumerate(counts)}
        return part

    def _reconstructed(self, given: Mapping[str, np.ndarray]) -> tuple:
        """What validation.reconstruct gives of a part, in pieces as large as devices are few."""
        rows = len(given["label"])
        each, found = distributed.rows(rows), []
        for first in range(0, rows, each):
            piece = {name: array[first : first + each] for name, array in given.items()}
            naming = datasets.named(self.source, piece["index"])
            found.append(
                validation.reconstruct(
                    *(self.tokenizer, piece, self.distances), batch=each, named=naming
                )
            )
        return jax.tree.map(lambda *pieces: np.concatenate(pieces), *found)


def _readable(source: sources.RandomAccess, index_N: np.ndarray, channels: int) -> list[int]:
    return scan.readable(source, index_N, channels).tolist()


def coloured(image_NHWC: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] of images with one channel or three."""
    image_NHWC = np.asarray(image_NHWC)
    return np.repeat(image_NHWC, 3, axis=3) if image_NHWC.shape[3] == 1 else image_NHWC


def save_part(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under a name that appears whole or not at all, also when the machine dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    write_part(part, arrays)
    part.replace(file)


def write_part(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as .npz, on the disk when this returns. Equal arrays make equal files."""
    with open(file, "wb") as out:
        np.savez(out, **arrays)
        out.flush()
        os.fsync(out.fileno())


def loaded_part(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a part; none where there is none. The archive's checksums are compared."""
    if not file.exists():
        return None
    try:
        return archives.arrays(file)
    except (UserError, FileNotFoundError) as error:
        if not file.exists():  # removed meanwhile
            return None
        raise UserError(f"{file} is damaged: {error}; remove it, and it is made again") from error


def awaited_part(file: pathlib.Path) -> dict[str, np.ndarray]:
    """A part that was written: a network's file system may show another process's later."""
    return distributed.awaited(lambda: loaded_part(file), file)
