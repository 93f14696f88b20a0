"""Distances by kernels, KID and CMMD: squared maximum mean discrepancies; float64, on the host."""

from __future__ import annotations

import dataclasses

import numpy as np

from tokgen.interfaces import UserError
from tokgen.metrics import metric

ROWS = 2048  # of a block of a kernel matrix
SIGMA, SCALE = 10.0, 1000.0  # of CMMD


@dataclasses.dataclass(frozen=True)
class Kid:
    """Mean over subsets, their standard deviation, and the standard error of the mean."""

    value: float
    std: float  # between subsets; shrinks with their size, not with the number of images
    error: float  # another set of as many images would move the value by about this
    subsets: int
    size: int


def kid(
    generated_ND: np.ndarray,
    reference_MD: np.ndarray,
    *,
    seed: int,
    subsets: int = 100,
    size: int = 1000,
) -> Kid:
    """Kernel distance (arXiv:1801.01401): k(x, y) = (x.y / D + 1)^3, without bias, may be negative.

    Subsets are drawn without replacement inside each; in sets smaller than `size`, all of the
    smaller set. With torch-fidelity's seed, 2020, its subsets are drawn.
    """
    _check(generated_ND, reference_MD)
    size = min(size, len(generated_ND), len(reference_MD))
    if size < 3 or subsets < 1:
        raise UserError(f"KID needs 3 images or more of each set, and a subset; found {size}")
    random = np.random.RandomState(seed)  # the older generator of numpy: the same draws as theirs
    values, spreads = [], []
    for _ in range(subsets):
        x_nD = generated_ND[random.choice(len(generated_ND), size, replace=False)]
        y_nD = reference_MD[random.choice(len(reference_MD), size, replace=False)]
        value, *spread = _unbiased(x_nD.astype(np.float64), y_nD.astype(np.float64))
        values.append(value)
        spreads.append(spread)
    one, two = np.maximum(np.mean(spreads, 0), 0)
    count = min(len(generated_ND), len(reference_MD))
    # of a U-statistic of the second order over all images, and of taking only some subsets
    variance = (4 * (count - 2) * one + 2 * two) / (count * (count - 1))
    error = np.sqrt(variance + np.var(values) / max(subsets - 1, 1))
    return Kid(float(np.mean(values)), float(np.std(values)), float(error), subsets, size)


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64: what CMMD is defined on."""
    features_ND = np.asarray(features_ND, np.float64)
    length_N = np.linalg.norm(features_ND, axis=1)
    if not np.all(length_N > 0):
        raise UserError(
            f"features of length 0 have no direction; row {int(np.argmin(length_N > 0))} has: "
            "look at that image"
        )
    return features_ND / length_N[:, None]


def cmmd(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float = SIGMA) -> float:
    """1000 MMD^2 with exp(-|x - y|^2 / 2 sigma^2), with bias: means of whole kernel matrices.

    As in arXiv:2401.09603, on `unit` features. The kernel is close to 1 everywhere, so what is
    averaged is exp - 1, of which the three means differ in their first digits.
    """
    _check(x_ND, y_MD)
    centre_D = np.mean(x_ND, 0, dtype=np.float64)
    x_ND, y_MD = x_ND - centre_D[None], y_MD - centre_D[None]
    within = _within(x_ND, sigma) + _within(y_MD, sigma)
    return SCALE * (within - 2 * _across(x_ND, y_MD, sigma))


def _check(a_ND: np.ndarray, b_MD: np.ndarray) -> None:
    shapes = np.shape(a_ND), np.shape(b_MD)
    if any(len(shape) != 2 or not shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise UserError(f"both sets need features [images, width]; found {shapes[0]}, {shapes[1]}")
    for name, features in (("first", a_ND), ("second", b_MD)):
        fine_N = np.isfinite(features).all(1)
        if not fine_N.all():
            raise UserError(
                f"features must be finite; row {int(np.argmin(fine_N))} of the {name} set is not"
            )


def _unbiased(x_nD: np.ndarray, y_nD: np.ndarray) -> tuple[float, float, float]:
    """(MMD^2 without bias, and the variances of h: of its mean over one image, and of itself).

    h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), over i != j.
    """
    size = len(x_nD)
    within_nn = _cubic(x_nD, x_nD) + _cubic(y_nD, y_nD)
    np.fill_diagonal(within_nn, 0)
    across_nn = _cubic(x_nD, y_nD)
    value = within_nn.sum() / (size * (size - 1)) - 2 * across_nn.mean()
    h_nn = within_nn - across_nn - across_nn.T
    np.fill_diagonal(h_nn, 0)
    mean = h_nn.sum() / (size * (size - 1))
    two = (h_nn * h_nn).sum() / (size * (size - 1)) - mean**2
    # the mean of a row still holds the variance of its size - 1 entries
    one = np.var(h_nn.sum(1) / (size - 1), ddof=1) - two / (size - 1)
    return float(value), float(one), float(two)


def _cubic(x_nD: np.ndarray, y_mD: np.ndarray) -> np.ndarray:
    k_nm = x_nD @ y_mD.T
    k_nm /= x_nD.shape[1]
    k_nm += 1
    return k_nm * k_nm * k_nm


def _within(x_ND: np.ndarray, sigma: float) -> float:
    """Mean of exp(-|x - y|^2 / 2 sigma^2) - 1 over all pairs of a set, by half of its blocks."""
    blocks = [x_ND[n : n + ROWS] for n in range(0, len(x_ND), ROWS)]
    total = 0.0
    for number, x_nD in enumerate(blocks):
        total += _gaussian(x_nD, x_nD, sigma)
        total += 2 * sum(_gaussian(x_nD, y_mD, sigma) for y_mD in blocks[number + 1 :])
    return total / len(x_ND) ** 2


def _across(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float) -> float:
    """Mean of exp(-|x - y|^2 / 2 sigma^2) - 1 over all pairs of one from each set, by blocks."""
    total = 0.0
    for n in range(0, len(x_ND), ROWS):
        for m in range(0, len(y_MD), ROWS):
            total += _gaussian(x_ND[n : n + ROWS], y_MD[m : m + ROWS], sigma)
    return total / (len(x_ND) * len(y_MD))


def _gaussian(x_nD: np.ndarray, y_mD: np.ndarray, sigma: float) -> float:
    """Sum of exp(-|x - y|^2 / 2 sigma^2) - 1 over one block."""
    k_nm = x_nD @ y_mD.T
    k_nm *= 2
    k_nm -= np.einsum("nd,nd->n", x_nD, x_nD)[:, None]
    k_nm -= np.einsum("nd,nd->n", y_mD, y_mD)[None]
    np.minimum(k_nm, 0, out=k_nm)
    k_nm /= 2 * sigma**2
    return float(np.expm1(k_nm, out=k_nm).sum())


# ---------------------------------------------------------------- as metrics of a score


KID_SEED = 2020  # torch-fidelity's


def kid_of_all(compared: metric.Compared) -> dict:
    """1000 times the kernel distance, of all samples."""
    found = kid(compared.samples_ND, compared.real_nD, seed=KID_SEED)
    return {
        "value": 1000 * found.value,
        "error": 1000 * found.error,
        "std": 1000 * found.std,
        "subset": found.size,
    }


def cmmd_of_directions(compared: metric.Compared) -> dict:
    """CMMD's kernel on the directions of features, as many of either set."""
    rows_ND, real_nD = compared.pair()
    return {"value": cmmd(unit(rows_ND), unit(real_nD)), "images": len(rows_ND)}


METRICS = (
    metric.Metric(
        "kid",
        title="KID x 1000",
        better="lower",
        measure=kid_of_all,
        needs=(metric.features,),
        least=3,
        protocols=("adm-50k", "val-centercrop-rfid", "fd-dinov2", "cmmd", "local"),
        beside={"std": "std {}"},
        row=60,
    ),
    metric.Metric(
        "cmmd",
        title="CMMD kernel",
        better="lower",
        measure=cmmd_of_directions,
        needs=(metric.features,),
        protocols=("cmmd", "local"),
        row=120,
    ),
)
