"""Nearest neighbours between sets of features; precision, recall, density and coverage of them.

float32 on the accelerator bounds every distance from both sides, by the worst case of rounding; the
few pairs that the bounds leave open are settled in float64 on the host. So neither block size nor
device nor precision of the accelerator changes a result, and copies lie at a distance of exactly 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import interfaces
from tokgen.interfaces import Array
from tokgen.metrics import metric

BLOCK = 4096  # rows and columns of the largest tile: 64 MiB each of lower and upper bounds
LARGEST = 1e15  # of a feature: squares summed in float32 stay finite
ROUNDING = 2.0**-23
PAIRS = 2**22  # numbers of pairs in float64 at a time: 32 MiB
PART = 512  # rows looked through for copies at a time

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How far apart features are; the bounds may be of any rising function of it."""

    prepare: Callable[[np.ndarray], np.ndarray]  # [N, D] as given to what `bounds` takes
    bounds: Callable[..., tuple[Array, Array]]  # [N, D], [M, D], never_N: least and most [N, M]
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray]  # float64 [P, D], [P, D] to [P]


def euclidean(reference_MD: np.ndarray) -> Measure:
    """Distance; bounded by its square in the form |x|^2 + |y|^2 - 2 xy, around the mean."""
    # the shift cancels in exact arithmetic and keeps what is left small in rounded one
    shift_1D = np.mean(reference_MD, axis=0, dtype=np.float64, keepdims=True)

    def prepare(features_ND):
        dtype = np.result_type(features_ND.dtype, np.float32)
        return features_ND.astype(dtype, copy=False) - shift_1D.astype(dtype)

    return Measure(prepare, _square_bounds, _distance)


def cosine(reference_MD: np.ndarray) -> Measure:
    """1 - cos: 0 for the same direction, 2 for the opposite one."""
    return Measure(_unit, _cosine_bounds, lambda x_PD, y_PD: 1 - _cosine(x_PD, y_PD))


def absolute_cosine(reference_MD: np.ndarray) -> Measure:
    """1 - |cos|: 0 for one line, 1 for a right angle."""
    return Measure(_unit, _absolute_bounds, lambda x_PD, y_PD: 1 - np.abs(_cosine(x_PD, y_PD)))


def nearest(
    features_ND: np.ndarray,
    reference_MD: np.ndarray,
    k: int = 1,
    *,
    excluded_N: np.ndarray | None = None,
    measure: Callable[[np.ndarray], Measure] = euclidean,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest points of the reference, nearest first: indices [N, k], distances [N, k].

    Of equal distances the smaller index comes first. `excluded_N` names one point of the reference
    per feature that does not count: itself, where the features are of the reference.
    """
    count = len(features_ND)
    others = len(reference_MD) - (excluded_N is not None)
    never_N = np.full(count, -1) if excluded_N is None else np.asarray(excluded_N)
    sets = _sets(features_ND, reference_MD, never_N, measure, block)
    if not 1 <= k <= others:
        raise interfaces.UserError(
            f"{k} neighbours need that many other points; found {others}: give more features or "
            "a smaller k"
        )
    parts = [_search(sets, start, k) for start in range(0, count, sets.rows)]
    index_NK, distance_NK = (np.concatenate(part) for part in zip(*parts, strict=True))
    return index_NK, distance_NK


def radii(features_ND: np.ndarray, k: int, *, block: int = BLOCK) -> np.ndarray:
    """[N] distance of each point to the k-th nearest other one; copies are others."""
    itself_N = np.arange(len(features_ND))
    _, distance_NK = nearest(features_ND, features_ND, k, excluded_N=itself_N, block=block)
    return distance_NK[:, -1]


def inside(
    points_ND: np.ndarray,
    centres_MD: np.ndarray,
    radius_M: np.ndarray,
    compare: Compare,
    *,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """How many balls hold each point [N], and how many points are in each ball [M].

    `compare(distance, radius)` says who is in: `np.less_equal` or `np.less`.
    """
    sets = _sets(points_ND, centres_MD, np.full(len(points_ND), -1), euclidean, block)
    balls_N = np.zeros(len(points_ND), np.int64)
    points_M = np.zeros(len(centres_MD), np.int64)
    limit_M = np.square(radius_M).astype(np.float32)
    for start in range(0, len(points_ND), sets.rows):
        for first, least, most in _tiles(sets, start):
            limit_1M = limit_M[None, first : first + sets.columns]
            certain = most < limit_1M
            balls_N[start : start + sets.rows] += np.count_nonzero(certain, axis=1)
            points_M[first : first + sets.columns] += np.count_nonzero(certain, axis=0)
            row_P, column_P = np.nonzero((least <= limit_1M) & ~certain)
            row_P, column_P = row_P + start, column_P + first
            held_P = compare(_exact(sets, row_P, column_P), radius_M[column_P])
            balls_N += np.bincount(row_P[held_P], minlength=len(balls_N))
            points_M += np.bincount(column_P[held_P], minlength=len(points_M))
    return balls_N, points_M


def precision_recall(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    k: int = 3,
    *,
    compare: Compare = np.less_equal,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Share of generated points in a real ball, share of real points in a generated ball.

    arXiv:1904.06991, with k = 3 and <= as the evaluator of ADM has them.
    """
    real_N, generated_M = radii(real_ND, k, block=block), radii(generated_MD, k, block=block)
    held_M, _ = inside(generated_MD, real_ND, real_N, compare, block=block)
    held_N, _ = inside(real_ND, generated_MD, generated_M, compare, block=block)
    return float(np.mean(held_M > 0)), float(np.mean(held_N > 0))


def density_coverage(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    k: int = 5,
    *,
    compare: Compare = np.less,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Real balls around a generated point, per k; share of the real balls that are not empty.

    arXiv:2002.09797, with k = 5 and < as the authors' program has them.
    """
    real_N = radii(real_ND, k, block=block)
    balls_M, points_N = inside(generated_MD, real_ND, real_N, compare, block=block)
    return float(np.mean(balls_M) / k), float(np.mean(points_N > 0))


@dataclasses.dataclass(frozen=True)
class _Sets:
    """Two sets of features, how they are cut into tiles, and which of their rows are copies."""

    features_ND: np.ndarray
    reference_MD: np.ndarray
    never_N: np.ndarray
    measure: Measure
    rows: int
    columns: int
    first_N: np.ndarray
    first_M: np.ndarray


def _sets(
    features_ND: np.ndarray,
    reference_MD: np.ndarray,
    never_N: np.ndarray,
    measure: Callable[[np.ndarray], Measure],
    block: int,
) -> _Sets:
    for name, array in (("features", features_ND), ("reference", reference_MD)):
        if array.ndim != 2 or not len(array):
            raise interfaces.UserError(
                f"{name} need the form [points, features]; found {array.shape}"
            )
    if features_ND.shape[1] != reference_MD.shape[1]:
        raise interfaces.UserError(
            f"both sets need features of one network; found {features_ND.shape[1]} and "
            f"{reference_MD.shape[1]} numbers a point"
        )
    first_N, first_M = _first(features_ND, "features"), _first(reference_MD, "reference")
    # equal parts, none beyond the block: one shape, so one program
    rows, columns = (-(-len(x) // -(-len(x) // block)) for x in (features_ND, reference_MD))
    found = measure(reference_MD)
    return _Sets(features_ND, reference_MD, never_N, found, rows, columns, first_N, first_M)


def _first(features_ND: np.ndarray, name: str) -> np.ndarray:
    """[N] the first row with the same numbers, of rows that are all finite."""
    draws = np.random.default_rng(0)
    code_N = np.empty(len(features_ND), np.uint64)
    for start in range(0, len(features_ND), PART):
        part_ND = np.ascontiguousarray(features_ND[start : start + PART])
        fine_N = np.all(np.abs(part_ND) < LARGEST, axis=1)
        if not fine_N.all():
            raise interfaces.UserError(
                f"{name} need finite numbers below {LARGEST:.0e}; row "
                f"{start + int(np.argmin(fine_N))} has others: look at its image"
            )
        bytes_NX = part_ND.view(np.uint8)
        if not start:
            factor_X = draws.integers(0, 2**64, bytes_NX.shape[1], np.uint64)
        code_N[start : start + PART] = bytes_NX.astype(np.uint64) @ factor_X
    _, index_U, place_N = np.unique(code_N, return_index=True, return_inverse=True)
    first_N = index_U[place_N]
    for row in np.flatnonzero(first_N != np.arange(len(first_N))):  # codes may agree by chance
        if not np.array_equal(features_ND[row], features_ND[first_N[row]]):
            first_N[row] = row
    return first_N


def _search(sets: _Sets, start: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` for the rows of one tile: indices [N, k], distances [N, k]."""
    count = min(sets.rows, len(sets.features_ND) - start)
    best_NK = np.full((count, k), np.finfo(np.float32).max, np.float32)  # the least upper bounds
    kept = []
    for first, least, most in _tiles(sets, start):
        width = min(k, most.shape[1])
        best_NK = np.concatenate([best_NK, np.partition(most, width - 1, axis=1)[:, :width]], 1)
        best_NK = np.partition(best_NK, k - 1, axis=1)[:, :k]
        row_P, column_P = np.nonzero(least <= best_NK[:, -1:])
        kept.append((row_P, column_P + first, least[row_P, column_P]))
    row_P, column_P, least_P = (np.concatenate(part) for part in zip(*kept, strict=True))
    open_P = least_P <= best_NK[row_P, -1]  # the bound has come down since
    row_P, column_P = row_P[open_P], column_P[open_P]
    distance_P = _exact(sets, row_P + start, column_P)
    order_P = np.lexsort((column_P, distance_P, row_P))
    count_N = np.bincount(row_P, minlength=count)
    chosen_NK = order_P[(np.cumsum(count_N) - count_N)[:, None] + np.arange(k)[None]]
    return column_P[chosen_NK], distance_P[chosen_NK]


def _tiles(sets: _Sets, start: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The first column and the bounds of each tile along the reference."""
    part_ND = sets.features_ND[start : start + sets.rows]
    never_N = np.full(sets.rows, -1, np.int64)
    never_N[: len(part_ND)] = sets.never_N[start : start + sets.rows]
    x_ND = _padded(sets.measure.prepare(part_ND), sets.rows)
    for first in range(0, len(sets.reference_MD), sets.columns):
        part_MD = sets.reference_MD[first : first + sets.columns]
        y_MD = _padded(sets.measure.prepare(part_MD), sets.columns)
        bounds = sets.measure.bounds(x_ND, y_MD, (never_N - first).astype(np.int32))
        least, most = (np.asarray(bound)[: len(part_ND), : len(part_MD)] for bound in bounds)
        yield first, least, most


def _padded(features_ND: np.ndarray, size: int) -> Array:
    padded_ND = np.zeros((size, features_ND.shape[1]), np.float32)
    padded_ND[: len(features_ND)] = features_ND
    return jnp.asarray(padded_ND)


def _exact(sets: _Sets, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """[P] distances of pairs; the same for a pair wherever it stands, and taken once for copies."""
    pair_P = sets.first_N[row_P] * len(sets.reference_MD) + sets.first_M[column_P]
    pair_U, place_P = np.unique(pair_P, return_inverse=True)
    row_U, column_U = np.divmod(pair_U, len(sets.reference_MD))
    step = max(1, PAIRS // sets.features_ND.shape[1])
    found_U = np.empty(len(pair_U))
    for start in range(0, len(pair_U), step):
        part = slice(start, start + step)
        found_U[part] = sets.measure.exact(
            sets.features_ND[row_U[part]].astype(np.float64),
            sets.reference_MD[column_U[part]].astype(np.float64),
        )
    return found_U[place_P]


def _bounded(middle_NM: Array, slack_NM: Array, never_N: Array) -> tuple[Array, Array]:
    """Least and most [N, M]; infinite for the pairs that never count."""
    never_NM = never_N[:, None] == jnp.arange(middle_NM.shape[1])[None]
    return tuple(
        jnp.where(never_NM, jnp.inf, bound)
        for bound in (middle_NM - slack_NM, middle_NM + slack_NM)
    )


def _products(x_ND: Array, y_MD: Array) -> Array:
    return jnp.matmul(x_ND, y_MD.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _square_bounds(x_ND: Array, y_MD: Array, never_N: Array) -> tuple[Array, Array]:
    """Of |x - y|^2. D products and D sums err by at most D * 2^-24 of |x|^2 + |y|^2, twice."""
    x_N1 = jnp.sum(x_ND * x_ND, axis=1, keepdims=True)
    y_1M = jnp.sum(y_MD * y_MD, axis=1)[None]
    size_NM = x_N1 + y_1M
    slack_NM = (x_ND.shape[1] + 16) * ROUNDING * size_NM + 1e-30
    return _bounded(size_NM - 2 * _products(x_ND, y_MD), slack_NM, never_N)


@jax.jit
def _cosine_bounds(x_ND: Array, y_MD: Array, never_N: Array) -> tuple[Array, Array]:
    return _bounded(1 - _products(x_ND, y_MD), _cosine_slack(x_ND), never_N)


@jax.jit
def _absolute_bounds(x_ND: Array, y_MD: Array, never_N: Array) -> tuple[Array, Array]:
    return _bounded(1 - jnp.abs(_products(x_ND, y_MD)), _cosine_slack(x_ND), never_N)


def _cosine_slack(x_ND: Array) -> Array:
    return jnp.full((1, 1), (x_ND.shape[1] + 16) * ROUNDING, jnp.float32)


def _unit(features_ND: np.ndarray) -> np.ndarray:
    norm_N = np.sqrt(np.sum(np.square(features_ND, dtype=np.float64), axis=1))
    return features_ND / np.maximum(norm_N, np.finfo(np.float64).tiny)[:, None]


def _distance(x_PD: np.ndarray, y_PD: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.square(x_PD - y_PD), axis=1))


def _cosine(x_PD: np.ndarray, y_PD: np.ndarray) -> np.ndarray:
    """cos; exactly 1 for copies."""
    size_P = np.sum(x_PD * x_PD, axis=1) * np.sum(y_PD * y_PD, axis=1)
    product_P = np.sum(x_PD * y_PD, axis=1)
    return product_P / np.maximum(np.sqrt(size_P), np.finfo(np.float64).tiny)


# ---------------------------------------------------------------- as metrics of a score


DENSITY_NEIGHBOURS = 5  # k of density and coverage, as in their paper


def share(value: float, about: dict) -> dict:
    """A share of images, with its standard error: the other set's balls are taken as they are."""
    if about["images"] < 2:
        return {"value": value, **about}
    return {"value": value, "error": math.sqrt(value * (1 - value) / about["images"]), **about}


def _precision_recall(compared: metric.Compared) -> tuple[dict, dict]:
    """Share of samples inside a ball of the real images, and the other way round."""
    rows_ND, real_nD = compared.pair(compared.against)
    k = min(compared.neighbours, len(rows_ND) - 1, len(real_nD) - 1)
    precise, recalled = precision_recall(real_nD, rows_ND, k)
    precision = share(precise, {"k": k, "images": len(rows_ND)})
    return precision, share(recalled, {"k": k, "images": len(real_nD)})


def _density_coverage(compared: metric.Compared) -> tuple[dict, dict]:
    """Real balls around a sample, per k; share of the real balls that are not empty."""
    rows_ND, real_nD = compared.pair()
    k = min(DENSITY_NEIGHBOURS, len(rows_ND) - 1)
    about = {"k": k, "images": len(rows_ND)}
    dense, covered = density_coverage(real_nD, rows_ND, k)
    return {"value": dense, **about}, share(covered, about | {"expected": 1 - 0.5**k})


def _inside_balls(name: str, side: Callable[[tuple], dict], row: int) -> metric.Metric:
    return metric.Metric(
        name,
        title=name,
        better="higher",
        measure=lambda compared: side(compared.once(_precision_recall)),
        needs=(metric.features,),
        least=2,
        protocols=("adm-50k", "val-centercrop-rfid", "fd-dinov2", "local"),
        percent=True,
        beside={"k": "k = {}"},
        row=row,
    )


METRICS = (
    _inside_balls("precision", lambda both: both[0], row=40),
    _inside_balls("recall", lambda both: both[1], row=50),
    metric.Metric(
        "density",
        title="density",
        better="higher",
        measure=lambda compared: compared.once(_density_coverage)[0],
        needs=(metric.features,),
        least=2,
        protocols=("adm-50k", "fd-dinov2", "local"),
        beside={"k": "k = {}"},
        row=70,
    ),
    metric.Metric(
        "coverage",
        title="coverage",
        better="higher",
        measure=lambda compared: compared.once(_density_coverage)[1],
        needs=(metric.features,),
        least=2,
        protocols=("adm-50k", "fd-dinov2", "local"),
        percent=True,
        beside={"expected": "{} expected of equal sets", "k": "k = {}"},
        row=80,
    ),
)
