"""Mean and covariance of features, from parts: streamed, merged and saved; in float64, on the host.

Kept are the mean and the sum of outer products around it, never a sum of raw squares, which loses
what is small beside the mean: parts are joined as in Chan, Golub and LeVeque, 1983.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tokgen.interfaces import UserError

ROWS = 2048  # taken at a time: the blocks are always the same ones, whatever the batches were
GROUP_ROWS = 512  # of one group of many: what waits for a group's next block is held in memory
FIELDS = ("count", "squares", "mean", "scatter")


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a set of features.

    Attributes:
        count: number of rows, or the sum of their weights.
        squares: sum of the squared weights; the number of rows where there are none.
        mean_D: their mean.
        scatter_DD: sum of (x - mean)(x - mean)^T.
    """

    count: float
    squares: float
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray, weight_N: np.ndarray | None = None) -> Moments:
        """Of all rows of an array, which may carry weights (not negative)."""
        if weight_N is None:
            return stream([features_ND])
        features_ND = _checked(features_ND, 0)
        weight_N = np.asarray(weight_N, np.float64)
        if weight_N.shape != features_ND.shape[:1] or not np.all(weight_N >= 0):
            raise UserError(
                f"moments of {len(features_ND)} rows need as many weights of 0 or more; found "
                f"shape {weight_N.shape}, least {weight_N.min(initial=0.0)}"
            )
        parts = [
            _block(features_ND[n : n + ROWS], weight_N[n : n + ROWS])
            for n in range(0, len(features_ND), ROWS)
        ]
        return merged(parts) if parts else empty(features_ND.shape[1])

    @classmethod
    def from_covariance(
        cls, mean_D: np.ndarray, covariance_DD: np.ndarray, count: float
    ) -> Moments:
        """Of statistics that others made of `count` images: the covariance divides by count - 1."""
        covariance_DD = np.asarray(covariance_DD, np.float64)
        scatter_DD = (covariance_DD + covariance_DD.T) / 2 * (count - 1)
        return cls(float(count), float(count), np.asarray(mean_D, np.float64), scatter_DD)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Moments:
        """What `arrays` wrote."""
        missing = [name for name in FIELDS if name not in arrays]
        if missing:
            raise UserError(f"saved moments need {', '.join(FIELDS)}; {', '.join(missing)} lack")
        found = {name: np.asarray(arrays[name], np.float64) for name in FIELDS}
        shapes = {name: array.shape for name, array in found.items()}
        width = shapes["mean"][:1]
        if shapes != dict(zip(FIELDS, ((), (), width, width * 2), strict=True)):
            raise UserError(f"saved moments need (), (), (D,) and (D, D); found {shapes}")
        if not all(np.isfinite(array).all() for array in found.values()):
            raise UserError("saved moments must be finite; these are not: make them anew")
        count, squares = float(found["count"]), float(found["squares"])
        return cls(count, squares, found["mean"], found["scatter"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays, for an npz file; `from_arrays` is the inverse, bit for bit."""
        values = (np.float64(self.count), np.float64(self.squares), self.mean_D, self.scatter_DD)
        return {name: np.asarray(value) for name, value in zip(FIELDS, values, strict=True)}

    def add(self, features_ND: np.ndarray) -> Moments:
        """With further rows; of many small batches, an `Accumulator` is quicker."""
        return self.merge(Moments.of(features_ND))

    def merge(self, other: Moments) -> Moments:
        """With the rows of another set."""
        return merged((self, other))

    def project(self, basis_Dd: np.ndarray) -> Moments:
        """Of the rows times a matrix."""
        scatter_dd = basis_Dd.T @ self.scatter_DD @ basis_Dd
        return Moments(
            self.count, self.squares, self.mean_D @ basis_Dd, (scatter_dd + scatter_dd.T) / 2
        )

    @property
    def width(self) -> int:
        """D, the number of features."""
        return len(self.mean_D)

    @property
    def covariance_DD(self) -> np.ndarray:
        """Without bias: over count - 1, or what that becomes for weights, sum w - sum w^2 / sum w.

        Rows that occur twice count as two rows; weights say how surely a row belongs.
        """
        freedom = self.count - self.squares / self.count if self.count else 0.0
        if freedom <= 1e-9 * self.count:
            raise UserError(f"a covariance needs at least 2 images; found {self.count:g}")
        return self.scatter_DD / freedom


class Accumulator:
    """Moments of rows that arrive in batches; the sizes of the batches change no bit of them."""

    def __init__(self, rows: int = ROWS):
        self._rows, self._filled, self._seen = rows, 0, 0
        self._buffer_ND: np.ndarray | None = None
        self._moments: Moments | None = None

    def add(self, features_ND: np.ndarray) -> None:
        """Further rows; they are copied, in float64."""
        features_ND = _checked(features_ND, self._seen)
        if self._buffer_ND is None:
            self._buffer_ND = np.empty((self._rows, features_ND.shape[1]))
        if features_ND.shape[1] != self._buffer_ND.shape[1]:
            raise UserError(
                f"features must all have one width; found {self._buffer_ND.shape[1]} and "
                f"{features_ND.shape[1]}"
            )
        self._seen += len(features_ND)
        while len(features_ND):
            part_ND = features_ND[: self._rows - self._filled]
            self._buffer_ND[self._filled : self._filled + len(part_ND)] = part_ND
            self._filled += len(part_ND)
            features_ND = features_ND[len(part_ND) :]
            if self._filled == self._rows:
                self._moments, self._filled = self.moments(), 0

    def moments(self) -> Moments:
        """Of all rows so far."""
        if self._buffer_ND is None:
            raise UserError("moments need at least one batch of features; found none")
        if self._moments is not None and not self._filled:
            return self._moments
        block = _block(self._buffer_ND[: self._filled], np.ones(self._filled))
        return block if self._moments is None else self._moments.merge(block)


def empty(width: int) -> Moments:
    """Of no row."""
    return Moments(0.0, 0.0, np.zeros(width), np.zeros((width, width)))


def merged(parts: Sequence[Moments], times_K: np.ndarray | None = None) -> Moments:
    """Of several sets together, each of them `times_K` times (once)."""
    widths = {part.mean_D.shape for part in parts}
    if len(widths) != 1:
        raise UserError(f"sets of features need one width to be merged; found {sorted(widths)}")
    times_K = np.ones(len(parts)) if times_K is None else np.asarray(times_K, np.float64)
    count_K = np.array([part.count for part in parts]) * times_K
    count = float(count_K.sum())
    if count == 0:
        return empty(*parts[0].mean_D.shape)
    mean_KD = np.stack([part.mean_D for part in parts])
    mean_D = count_K / count @ mean_KD
    apart_KD = np.sqrt(count_K)[:, None] * (mean_KD - mean_D[None])
    scatter_DD = apart_KD.T @ apart_KD
    for part, times in zip(parts, times_K, strict=True):
        if times:
            scatter_DD += part.scatter_DD if times == 1 else times * part.scatter_DD
    squares = float(np.array([part.squares for part in parts]) @ times_K)
    return Moments(count, squares, mean_D, scatter_DD)


def stream(batches: Iterable[np.ndarray]) -> Moments:
    """Of all rows of batches [n, D]: equal to `Moments.of` their concatenation in every bit."""
    accumulator = Accumulator()
    for features_ND in batches:
        accumulator.add(features_ND)
    return accumulator.moments()


def grouped(batches: Iterable[tuple[np.ndarray, np.ndarray]], groups: int) -> list[Moments]:
    """Of every group, of batches (features [n, D], number of each row's group [n])."""
    accumulators: dict[int, Accumulator] = {}
    for features_ND, group_N in batches:
        features_ND, group_N = np.asarray(features_ND), np.asarray(group_N)
        if group_N.shape != features_ND.shape[:1]:
            raise UserError(f"{features_ND.shape} features need as many groups: {group_N.shape}")
        if len(group_N) and not 0 <= group_N.min() <= group_N.max() < groups:
            raise UserError(
                f"groups must be from 0 to {groups - 1}; found {group_N.min()} to {group_N.max()}"
            )
        for group in np.unique(group_N):
            accumulators.setdefault(int(group), Accumulator(GROUP_ROWS)).add(
                features_ND[group_N == group]
            )
    if not accumulators:
        raise UserError("moments need at least one batch of features; found none")
    found = {group: accumulator.moments() for group, accumulator in accumulators.items()}
    nothing = empty(next(iter(found.values())).width)
    return [found.get(group, nothing) for group in range(groups)]


def chunk_of(first: int, count: int, chunks: int, seed: int) -> np.ndarray:
    """[count] chunk of the images numbered from `first`: at random, and evenly.

    Every run of `chunks` images is dealt out, one to each chunk: images sorted by class fall into
    all chunks alike, and the chunk of an image depends on its number and the seed alone.
    """
    runs = range(first // chunks, (first + count - 1) // chunks + 1)
    dealt = [np.random.default_rng((seed, run)).permutation(chunks) for run in runs]
    offset = first - runs.start * chunks
    return np.concatenate(dealt or [np.zeros(0, np.int64)])[offset : offset + count]


def _checked(features_ND: np.ndarray, first: int) -> np.ndarray:
    features_ND = np.asarray(features_ND)
    if features_ND.ndim != 2 or features_ND.dtype.kind not in "fiu":
        raise UserError(
            "features must be numbers [images, width]; found "
            f"{features_ND.dtype} {features_ND.shape}"
        )
    fine_N = np.isfinite(features_ND).all(1)
    if not fine_N.all():
        row = int(np.argmin(fine_N))
        bad = features_ND[row][~np.isfinite(features_ND[row])]
        raise UserError(
            f"features must be finite; found {bad[0]} in row {first + row} and "
            f"{np.sum(~fine_N)} such rows: look at that image, or at the network's weights"
        )
    return features_ND


def _block(features_ND: np.ndarray, weight_N: np.ndarray) -> Moments:
    """Of few rows, in one piece; two passes over them."""
    count, squares = float(weight_N.sum()), float(weight_N @ weight_N)
    if count == 0:
        return empty(features_ND.shape[1])
    mean_D = weight_N / count @ features_ND.astype(np.float64, copy=False)
    apart_ND = features_ND - mean_D[None]
    if not np.all(weight_N == 1):
        apart_ND *= np.sqrt(weight_N)[:, None]
    return Moments(count, squares, mean_D, apart_ND.T @ apart_ND)
