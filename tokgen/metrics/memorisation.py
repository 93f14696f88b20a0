"""Whether generated images are copies of training images: four metrics, and whom to look at.

None of them parts copying from underfitting cleanly: each belongs beside the same figure of
held-out real images. All take the features of the whole training set.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.stats

from tokgen import interfaces
from tokgen.metrics import bootstrap, frechet, metric, neighbours

CELLS, WIDTH, FEWEST = 3, 64, 20  # of the C_T score: cells, dimensions, samples of a cell
STARTS, STEPS = 10, 300  # of k-means
QUANTILES = (0.5, 0.99, 1.0)
TINY = 1e-15


@dataclasses.dataclass(frozen=True)
class MiFID:
    """The distance after the penalty; the mean distance to the training set; who was left out."""

    value: float
    distance: float
    dropped_generated: int
    dropped_training: int


def mifid(
    fid: float, generated_ND: np.ndarray, training_MD: np.ndarray, threshold: float = 0.1
) -> MiFID:
    """FID / M, M the mean of min 1 - |cos| over the training set where below the threshold, or 1.

    arXiv:2106.03062. The threshold belongs to the features: 0.1 for Inception's pool3.
    Rows of zeros have no direction: they are dropped.
    """
    generated_ND, dropped = _directed(generated_ND, "generated")
    training_MD, missing = _directed(training_MD, "training")
    _, distance_N1 = neighbours.nearest(
        generated_ND, training_MD, measure=neighbours.absolute_cosine
    )
    distance = float(np.mean(distance_N1))
    penalty = distance if distance < threshold else 1.0
    return MiFID(fid / (penalty + TINY), distance, dropped, missing)


def authentic(generated_ND: np.ndarray, training_MD: np.ndarray) -> np.ndarray:
    """[N] whether a sample is farther from its nearest training point than that one's nearest is.

    arXiv:2102.08921; AuthPct is 100 times the mean.
    """
    nearest_N1, distance_N1 = neighbours.nearest(generated_ND, training_MD)
    # only of the points that were met: the training set is long
    met_U, place_N = np.unique(nearest_N1[:, 0], return_inverse=True)
    _, other_U1 = neighbours.nearest(training_MD[met_U], training_MD, excluded_N=met_U)
    return other_U1[place_N, 0] < distance_N1[:, 0]


def copying(
    generated_ND: np.ndarray, test_ND: np.ndarray, training_ND: np.ndarray, *, seed: int = 0
) -> float:
    """C_T: are samples nearer to the training set than real test images are? << 0: they copy.

    arXiv:2004.05675: z of the Mann-Whitney U of distances to the training points of the
    same cell, averaged by the share of the test points; cells are k-means' on the training set.
    Beyond 64 dimensions the principal ones of the training set are taken. Cells with fewer than 20
    samples do not count.
    """
    generated_ND, test_ND, training_ND = _projected(generated_ND, test_ND, training_ND)
    centre_KD = _centres(training_ND, CELLS, np.random.default_rng(seed))
    sets = generated_ND, test_ND, training_ND
    cells = [_cell(features_ND, centre_KD) for features_ND in sets]
    values, weights = [], []
    for cell in range(len(centre_KD)):
        samples, tests, known = (
            features_ND[cell_N == cell] for features_ND, cell_N in zip(sets, cells, strict=True)
        )
        if len(samples) >= FEWEST and len(tests) and len(known):
            distance_N, distance_M = (
                neighbours.nearest(points_ND, known)[1][:, 0] for points_ND in (samples, tests)
            )
            values.append(_mann_whitney(distance_N, distance_M))
            weights.append(len(tests))
    if not values:
        raise interfaces.UserError(
            f"C_T needs a cell with {FEWEST} samples and a test image; found none among "
            f"{len(generated_ND)} samples and {len(test_ND)} test images: give more"
        )
    return float(np.average(values, weights=weights))


@dataclasses.dataclass(frozen=True)
class Report:
    """Similarity (cosine) to the nearest training image, of samples and of held-out real images.

    `sample_N`, `training_N`, `similarity_N`: the samples most like a training image, most alike
    first, and which image that is. The quantiles are p50, p99 and the most.
    """

    sample_N: np.ndarray
    training_N: np.ndarray
    similarity_N: np.ndarray
    generated_quantiles: tuple[float, ...]
    held_out_quantiles: tuple[float, ...]


def report(
    generated_ND: np.ndarray, held_out_ND: np.ndarray, training_MD: np.ndarray, count: int = 20
) -> Report:
    """Whom to look at, and whether the samples lean on the training set more than real images."""
    nearest_N, similarity_N = _similarity(generated_ND, training_MD)
    _, held_out_N = _similarity(held_out_ND, training_MD)
    sample_N = np.argsort(-similarity_N, kind="stable")[:count]
    return Report(
        sample_N,
        nearest_N[sample_N],
        similarity_N[sample_N],
        *(tuple(np.quantile(values, QUANTILES).tolist()) for values in (similarity_N, held_out_N)),
    )


def _similarity(features_ND, training_MD):
    nearest_N1, distance_N1 = neighbours.nearest(
        features_ND, training_MD, measure=neighbours.cosine
    )
    return nearest_N1[:, 0], 1 - distance_N1[:, 0]


def _directed(features_ND: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    kept_N = np.any(features_ND != 0, axis=1)
    dropped = len(kept_N) - int(np.count_nonzero(kept_N))
    if dropped == len(kept_N):
        raise interfaces.UserError(f"the {name} features are all zero: nothing to compare")
    return (features_ND[kept_N] if dropped else features_ND), dropped


def _mann_whitney(x_N: np.ndarray, y_M: np.ndarray) -> float:
    """z of the number of pairs with x > y, ties as halves; > 0 where x is the larger one."""
    n, m = len(x_N), len(y_M)
    rank_X = scipy.stats.rankdata(np.concatenate([x_N, y_M]))
    larger = rank_X[:n].sum() - n * (n + 1) / 2
    return float((larger - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _projected(*sets_ND: np.ndarray) -> list[np.ndarray]:
    """Every set in the principal dimensions of the last one."""
    training_ND = sets_ND[-1]
    if training_ND.shape[1] <= WIDTH:
        return [np.asarray(features_ND, np.float64) for features_ND in sets_ND]
    mean_1D = np.mean(training_ND, axis=0, dtype=np.float64, keepdims=True)

    def centred(features_ND):  # in float64, a block at a time
        for start in range(0, len(features_ND), neighbours.BLOCK):
            yield features_ND[start : start + neighbours.BLOCK] - mean_1D

    scatter_DD = sum(part_BD.T @ part_BD for part_BD in centred(training_ND))
    basis_DK = np.linalg.eigh(scatter_DD)[1][:, -WIDTH:]
    return [
        np.concatenate([part_BD @ basis_DK for part_BD in centred(features_ND)])
        for features_ND in sets_ND
    ]


def _cell(features_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    return np.argmin(_squares(features_ND, centre_KD), axis=1)


def _squares(features_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    return np.stack(
        [np.sum(np.square(features_ND - centre_1D), axis=1) for centre_1D in centre_KD[:, None]], 1
    )


def _centres(features_ND: np.ndarray, cells: int, draws: np.random.Generator) -> np.ndarray:
    """k-means from several starts, of which the tightest is kept: centres [cells, D]."""
    if len(features_ND) < cells:
        raise interfaces.UserError(f"{cells} cells need as many points; found {len(features_ND)}")
    found = [_means(features_ND, cells, draws) for _ in range(STARTS)]
    return min(found, key=lambda pair: pair[0])[1]


def _means(
    features_ND: np.ndarray, cells: int, draws: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Lloyd's iteration from k-means++: the inertia and the centres of one start."""
    chosen = [int(draws.integers(len(features_ND)))]
    while len(chosen) < cells:
        square_N = _squares(features_ND, features_ND[chosen]).min(axis=1)
        total = square_N.sum()
        share_N = square_N / total if total > 0 else None  # all points alike: any will do
        chosen.append(int(draws.choice(len(features_ND), p=share_N)))
    centre_KD = features_ND[chosen]
    before_N = None
    for _ in range(STEPS):
        square_NK = _squares(features_ND, centre_KD)
        cell_N = square_NK.argmin(axis=1)
        if before_N is not None and np.array_equal(cell_N, before_N):
            break
        before_N = cell_N
        centre_KD = np.stack(
            [
                features_ND[cell_N == k].mean(axis=0) if np.any(cell_N == k) else centre_KD[k]
                for k in range(cells)
            ]
        )
    return float(square_NK.min(axis=1).sum()), centre_KD


# ---------------------------------------------------------------- as metrics of a score


def authenticity(compared: metric.Compared) -> dict:
    """Share of samples farther from their nearest real image than that one's neighbour is."""
    authentic_N = authentic(compared.samples_ND, compared.real_nD)
    interval = bootstrap.of_mean(authentic_N, seed=compared.seed)
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def punished_distance(compared: metric.Compared) -> dict:
    """The Frechet distance, larger where samples lie on real images."""
    distance = compared.once(frechet.fid)["value"]
    found = mifid(distance, compared.samples_ND, compared.real_nD)
    return {"value": found.value, "distance": found.distance, "images": len(compared.real_nD)}


METRICS = (
    metric.Metric(
        "authenticity",
        title="authentic",
        better="higher",
        measure=authenticity,
        needs=(metric.features,),
        least=2,
        protocols=("adm-50k", "fd-dinov2", "local"),
        percent=True,
        row=110,
    ),
    metric.Metric(
        "mifid",
        title="MiFID",
        better="lower",
        measure=punished_distance,
        needs=(metric.features,),
        least=2,
        protocols=("adm-50k", "local"),
        row=140,
    ),
)
