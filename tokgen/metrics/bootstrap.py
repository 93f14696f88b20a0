"""How far to trust a number: intervals by drawing images again, and sizes continued to infinity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tokgen.interfaces import UserError
from tokgen.metrics import moments


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value, the interval around it, its standard error, and what few images add to it."""

    value: float
    low: float
    high: float
    error: float
    bias: float = 0.0  # of the value, whatever the distribution; of a mean there is none


@dataclasses.dataclass(frozen=True)
class Line:
    """A statistic against 1 / size: its value at infinitely many images, and how it gets there."""

    value: float  # the intercept
    error: float  # its standard error
    slope: float
    sizes: tuple[int, ...]
    values: tuple[float, ...]


def of_mean(
    values_N: np.ndarray, *, seed: int, replicates: int = 1000, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean of a value per image (PSNR, LPIPS, right or wrong).

    Images are drawn again with replacement, as many as there are: exactly, since a mean is cheap.
    """
    values_N = np.asarray(values_N, np.float64)
    if values_N.ndim != 1 or len(values_N) < 2 or not np.isfinite(values_N).all():
        raise UserError(
            f"an interval needs a finite value of 2 images or more; found shape {values_N.shape}"
        )
    random, count = np.random.default_rng(seed), len(values_N)
    means = np.array(
        [values_N[random.integers(count, size=count)].mean() for _ in range(replicates)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_N.mean()), float(low), float(high), float(means.std(ddof=1)))


def of_moments(
    chunks: Sequence[moments.Moments],
    statistic: Callable[[moments.Moments], float],
    *,
    seed: int,
    replicates: int = 100,
    level: float = 0.95,
) -> Interval:
    """Interval of a statistic of moments: whole chunks are drawn again, and merged.

    The chunks are random parts of the images (`moments.chunk_of`), some 32 of them. Weighing single
    images anew would need a pass over all features per replicate; chunks need none: a replicate
    costs K additions of D x D and the statistic. What is lost is precision of the error itself,
    1 / sqrt(2 K) of it: an eighth at 32.

    Drawing again adds the bias of a finite set once more, which for a Frechet distance can exceed
    its spread. So the replicates are used around their own mean: the interval is of the statistic
    at this number of images. How far their mean lies above the value is the estimate of `bias`. Of
    K chunks the variance is 1 - 1/K of what it should be, which is made good.
    """
    count = len(chunks)
    if count < 8:
        raise UserError(f"an interval needs at least 8 chunks of images, better 32; found {count}")
    random, values = np.random.default_rng(seed), []
    for _ in range(replicates):
        times_K = np.bincount(random.integers(count, size=count), minlength=count)
        values.append(statistic(moments.merged(chunks, times_K)))
    apart = (np.array(values) - np.mean(values)) * np.sqrt(count / (count - 1))
    low, high = np.quantile(apart, [(1 - level) / 2, (1 + level) / 2]).tolist()
    value = float(statistic(moments.merged(chunks)))
    bias = (float(np.mean(values)) - value) * count / (count - 1)
    return Interval(value, value + low, value + high, float(apart.std(ddof=1)), bias)


def subset_sizes(count: int, smallest: int, largest: int, points: int) -> tuple[int, ...]:
    """Equally spaced sizes of subsets, from `smallest` to all images (but no more than largest)."""
    if points < 3 or not 2 <= smallest < min(count, largest):
        raise UserError(
            "continuing to infinity needs 3 sizes or more, from `smallest` to more images than "
            f"that; found {points} sizes, smallest {smallest}, and {min(count, largest)} images: "
            "choose a smaller `smallest`"
        )
    return tuple(int(n) for n in np.linspace(smallest, min(count, largest), points))


def smallest(count: int) -> int:
    """Images of the smallest subset: 5000, or half of fewer than twice as many."""
    return 5000 if count >= 10_000 else count // 2


def infinity(
    count: int, statistic: Callable[[np.ndarray], float], sizes: Sequence[int], seed: int
) -> Line:
    """Least-squares line of statistic(rows of a random subset) against 1 / size."""
    random = np.random.default_rng(seed)
    subsets = (np.sort(random.choice(count, size, replace=False)) for size in sizes)
    return line(sizes, [statistic(rows) for rows in subsets])


def line(sizes: Sequence[int], values: Sequence[float]) -> Line:
    """values = value + slope / sizes, by least squares, with the standard error of `value`."""
    inverse, values_T = 1 / np.asarray(sizes, np.float64), np.asarray(values, np.float64)
    apart = inverse - inverse.mean()
    slope = apart @ values_T / (apart @ apart)
    value = values_T.mean() - slope * inverse.mean()
    rest = values_T - value - slope * inverse
    variance = rest @ rest / (len(values_T) - 2)
    error = np.sqrt(variance * (1 / len(values_T) + inverse.mean() ** 2 / (apart @ apart)))
    return Line(
        float(value), float(error), float(slope), tuple(map(int, sizes)), tuple(map(float, values))
    )
