"""Frechet distances between normals fitted to features: FID and its relatives, in float64.

|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) of means and covariances (Dowson and Landau,
1982; arXiv:1706.08500). With any roots A = F F^T and B = G G^T the last trace is the sum of the
singular values of F^T G. So no root of a product is taken, nothing can become complex, and small
directions keep their digits: singular values of F^T G are right to 1e-16 of the largest, where
eigenvalues of A B would have to be right to 1e-32 for as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tokgen.interfaces import UserError
from tokgen.metrics import bootstrap, metric, moments as moments_

ROUNDING = 1e-3  # a distance this far below 0 is still 0
INDEFINITE = 1e-3  # of the largest eigenvalue: below minus this, it is no covariance
CHUNKS = 32  # random parts of the images, that intervals are made of
WIDE = 512  # features beyond which a distance takes seconds: fewer are drawn again
CLASS_IMAGES, CLASS_WIDTH = 1000, 64  # fewer images of a class than that: at most so many axes


@dataclasses.dataclass(frozen=True)
class Distance:
    """A distance, and how much of it to expect from the finite number of images of either set."""

    value: float
    bias: float
    reference_bias: float


@dataclasses.dataclass(frozen=True)
class Classwise:
    """A distance per class, and how the classes are shared out."""

    value: float  # mean over classes
    value_K: np.ndarray
    divergence: float  # KL of the class masses, reference from generated; inf: a class is missing
    missing: tuple[int, ...]  # classes of which there are no two generated images


@dataclasses.dataclass(frozen=True)
class _Normal:
    mean_D: np.ndarray
    trace: float
    root_Dr: np.ndarray


def distance(
    mean_a_D: np.ndarray,
    covariance_a_DD: np.ndarray,
    mean_b_D: np.ndarray,
    covariance_b_DD: np.ndarray,
) -> float:
    """Frechet distance of two normals."""
    return _apart(_normal(mean_a_D, covariance_a_DD), _normal(mean_b_D, covariance_b_DD))[0]


def between(
    generated: moments_.Moments, reference: moments_.Moments, least: int | None = None
) -> Distance:
    """Distance with its bias; sets of fewer than `least` images (width + 1) are refused."""
    width = generated.width
    least = width + 1 if least is None else least
    for name, found in (("generated", generated), ("reference", reference)):
        if found.count < least:
            raise UserError(
                f"a Frechet distance of {width} features needs at least {least} images, better "
                f"ten times as many; found {found.count:g} {name} ones: use a kernel distance, or "
                "fewer features"
            )
    a, b = _normal_of(generated), _normal_of(reference)
    value, spectrum_r = _apart(a, b)
    return Distance(
        value,
        _bias(a.trace, spectrum_r, generated.count),
        _bias(b.trace, spectrum_r, reference.count),
    )


def against(reference: moments_.Moments) -> Callable[[moments_.Moments], float]:
    """The distance to one reference, whose root is taken once: for many sets (replicates)."""
    b = _normal_of(reference)
    return lambda generated: _apart(_normal_of(generated), b)[0]


def from_features(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Frechet distance of two sets; exact for fewer images than features, too.

    There the centred rows themselves are the root of the covariance, which is never formed.
    """
    sides = []
    for rows in (a_ND, b_MD):
        found = moments_.Moments.of(rows)
        if len(rows) > rows.shape[1]:
            sides.append(_normal_of(found))
            continue
        root_DN = (rows - found.mean_D[None]).T / np.sqrt(len(rows) - 1)
        sides.append(_Normal(found.mean_D, float(np.trace(found.covariance_DD)), root_DN))
    return _apart(*sides)[0]


def bias(width: int, count: float) -> float:
    """Expected distance of `count` standard normal images to their own distribution.

    d / N for the mean and d (d + 1) / 4N for the covariance; of two samples, their sum.
    """
    return width / count + width * (width + 1) / (4 * count)


def infinity(
    features_ND: np.ndarray,
    reference: moments_.Moments,
    *,
    seed: int,
    smallest: int = 5000,
    largest: int = 50_000,
    points: int = 15,
) -> bootstrap.Line:
    """FID-infinity: distances of random subsets against 1 / size, continued to 0.

    As in arXiv:1911.07023, with subsets of equally spaced sizes. Subsets share images, so the
    standard error of the intercept is of the line, not of another set of images.
    """
    apart = against(reference)

    def value(rows: np.ndarray) -> float:
        return apart(moments_.Moments.of(features_ND[rows]))

    sizes = bootstrap.subset_sizes(len(features_ND), smallest, largest, points)
    return bootstrap.infinity(len(features_ND), value, sizes, seed)


def principal(reference: moments_.Moments, width: int) -> np.ndarray:
    """[D, width] principal axes of the reference: features @ axes are what classes can afford."""
    if not 0 < width <= reference.width:
        raise UserError(f"width must be from 1 to {reference.width}; found {width}")
    _, axes_DD = np.linalg.eigh(reference.covariance_DD)
    return axes_DD[:, ::-1][:, :width]


def class_width(images: int, width: int) -> int:
    """How many axes a class of so many images affords: all from 1000 on, else a quarter, up to 64.

    A covariance is only known where images are several times as many as axes.
    """
    return width if images >= CLASS_IMAGES else max(1, min(width, CLASS_WIDTH, images // 4))


def classwise(
    generated: Sequence[moments_.Moments], reference: Sequence[moments_.Moments]
) -> Classwise:
    """Class-aware Frechet distance: the mean over classes (arXiv:1803.07474).

    Moments per class are those of `moments.grouped`, of features times `principal` axes where
    classes are small. A class without two generated images is infinitely far.
    """
    if len(generated) != len(reference):
        raise UserError(
            f"both sets need the same classes; found {len(generated)} and {len(reference)}"
        )
    poor = [str(k) for k, found in enumerate(reference) if found.count < 2]
    if poor:
        raise UserError(
            f"the reference needs 2 images of every class; it has fewer of {', '.join(poor[:10])}"
        )
    missing = tuple(k for k, found in enumerate(generated) if found.count < 2)
    value_K = np.full(len(reference), np.inf)
    for k, (a, b) in enumerate(zip(generated, reference, strict=True)):
        if k not in missing:
            value_K[k] = _apart(_normal_of(a), _normal_of(b))[0]
    share_K, given_K = (
        np.array([found.count for found in sets]) / sum(found.count for found in sets)
        for sets in (reference, generated)
    )
    with np.errstate(divide="ignore"):
        divergence = float(share_K @ (np.log(share_K) - np.log(given_K)))
    return Classwise(float(value_K.mean()), value_K, divergence, missing)


def _normal_of(found: moments_.Moments) -> _Normal:
    return _normal(found.mean_D, found.covariance_DD)


def _normal(mean_D: np.ndarray, covariance_DD: np.ndarray) -> _Normal:
    mean_D, covariance_DD = (np.asarray(array, np.float64) for array in (mean_D, covariance_DD))
    if mean_D.ndim != 1 or covariance_DD.shape != mean_D.shape * 2:
        raise UserError(
            "a normal needs a mean (D,) and a covariance (D, D); found "
            f"{mean_D.shape} and {covariance_DD.shape}"
        )
    if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
        raise UserError("mean and covariance must be finite; these are not: make them anew")
    symmetric_DD = (covariance_DD + covariance_DD.T) / 2
    return _Normal(mean_D, float(np.trace(symmetric_DD)), _root(symmetric_DD))


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """F with F F^T = covariance; of a singular one, without the columns that are rounding."""
    try:
        return np.linalg.cholesky(covariance_DD)
    except np.linalg.LinAlgError:
        value_D, axes_DD = np.linalg.eigh(covariance_DD)
    if value_D[0] < -INDEFINITE * max(value_D[-1], 0):
        raise UserError(
            "a covariance has no negative eigenvalues; this one's are from "
            f"{value_D[0]:.3g} to {value_D[-1]:.3g}: is the file that of statistics?"
        )
    # negative ones are nothing but rounding, and tell how large it is
    kept = value_D > max(-2 * value_D[0], np.finfo(np.float64).eps * value_D[-1])
    return axes_DD[:, kept] * np.sqrt(value_D[kept])[None]


def _apart(a: _Normal, b: _Normal) -> tuple[float, np.ndarray]:
    """(distance, eigenvalues of the root of the product of the covariances)."""
    if a.mean_D.shape != b.mean_D.shape:
        raise UserError(
            f"both sets need the same features; found {len(a.mean_D)} and {len(b.mean_D)} of them"
        )
    cross_rs = a.root_Dr.T @ b.root_Dr
    spectrum_r = np.linalg.svd(cross_rs, compute_uv=False) if cross_rs.size else np.zeros(0)
    step_D = a.mean_D - b.mean_D
    value = float(step_D @ step_D + (a.trace + b.trace - 2 * spectrum_r.sum()))
    if value < -ROUNDING:
        raise UserError(
            f"a Frechet distance is not negative; found {value:.3g}: these covariances were "
            "summed in too few digits, or are none"
        )
    return max(value, 0.0), spectrum_r


def _bias(trace: float, spectrum_r: np.ndarray, count: float) -> float:
    """How much a finite number of images adds to the distance if features are normal.

    To second order, with s the eigenvalues of (A B)^(1/2) and A estimated from N images,
        tr A / N + 1 / (2 (N - 1)) sum_ij (1 + [i = j]) s_i s_j / (s_i + s_j):
    by the divided differences of 1 / (2 sqrt) a change E of A adds
        1/2 sum_ij |E'_ij|^2 / (s_i s_j (s_i + s_j)),  E' = B^(1/2) E B^(1/2) in its own axes,
    and E |E'_ij|^2 = (1 + [i = j]) s_i^2 s_j^2 / (N - 1) for a Wishart matrix. A = B = I gives
    `bias`. Simulated, it is right to 3 % where images are 30 times as many as features. Of tails
    heavier than normal ones it knows nothing: `bootstrap.of_moments` and `infinity` measure those.
    """
    s = spectrum_r[spectrum_r > 0]
    pairs = (s[:, None] * s[None]) / (s[:, None] + s[None])
    return trace / count + float(pairs.sum() + s.sum() / 2) / (2 * (count - 1))


# ---------------------------------------------------------------- as metrics of a score


def spatial(compared: metric.Compared) -> str:
    """Moments of the layer `spatial`, and more images than it has features."""
    if "spatial" not in compared.moments:
        return "the reference has no moments of the layer spatial"
    real = compared.moments["spatial"]
    fewest = min(len(compared.features["spatial"]), real.count)
    if compared.least is None and fewest <= real.width:
        return f"its {real.width} features need more images than that; found {fewest:g}"
    return ""


def fid(compared: metric.Compared) -> dict:
    """Frechet distance, with its interval and the bias of so many images."""
    return _of_layer(compared, compared.layer)


def sfid(compared: metric.Compared) -> dict:
    """Frechet distance of the features of the layer `spatial`, with its interval and bias."""
    return _of_layer(compared, "spatial")


def _of_layer(compared: metric.Compared, layer: str) -> dict:
    rows_ND, real = compared.features[layer], compared.moments[layer]
    count, width = rows_ND.shape
    if width != len(real.mean_D):
        raise UserError(
            f"the layer {layer} of the samples has {width} features, that of the reference "
            f"{len(real.mean_D)}: they are of other networks, or of images of another size"
        )
    chunks = min(CHUNKS, count // 2)
    chunk_N = moments_.chunk_of(0, count, max(chunks, 1), compared.seed)
    parts = moments_.grouped([(rows_ND, chunk_N)], max(chunks, 1))
    found = between(moments_.merged(parts), real, compared.least)
    measured = {"value": found.value, "features": width}
    if chunks < 8:
        return measured | {"bias": found.bias}
    interval = bootstrap.of_moments(
        parts,
        against(real),
        seed=compared.seed,
        replicates=100 if width <= WIDE else 20,
    )
    bounds = {"low": interval.low, "high": interval.high, "error": interval.error}
    # as measured: features have heavier tails than the normals of the closed form
    return measured | bounds | {"bias": interval.bias}


def fid_infinity(compared: metric.Compared) -> dict:
    """The distance continued to infinitely many samples."""
    rows_ND = compared.samples_ND
    line = infinity(
        rows_ND,
        compared.moments[compared.layer],
        seed=compared.seed,
        smallest=bootstrap.smallest(len(rows_ND)),
    )
    return {"value": line.value, "error": line.error, "slope": line.slope}


def by_class(compared: metric.Compared) -> dict:
    """Frechet distance within classes, their mean; and how the classes are shared out."""
    rows_ND, real_nD = compared.samples_ND, compared.real_nD
    fewest = int(np.bincount(compared.label_n, minlength=compared.classes).min())
    fewest = min(fewest, int(np.bincount(compared.label_N, minlength=compared.classes).min()))
    width = class_width(max(fewest, 4), rows_ND.shape[1])
    axes_Dw = principal(compared.moments[compared.layer], width)
    sets = [
        moments_.grouped([(rows @ axes_Dw, label)], compared.classes)
        for rows, label in ((rows_ND, compared.label_N), (real_nD, compared.label_n))
    ]
    found = classwise(*sets)
    return {
        "value": found.value,
        "divergence": found.divergence,
        "by_class": [round(float(value), 4) for value in found.value_K],
        "axes": width,
    }


BIAS = {"bias": "of which the number of samples makes {}"}
METRICS = (
    metric.Metric(
        "fid",
        title="Frechet distance",
        better="lower",
        measure=lambda compared: compared.once(fid),  # MiFID is made of it as well
        least=2,
        protocols=("adm-50k", "val-centercrop-rfid", "fd-dinov2", "local"),
        beside=BIAS,
        row=10,
    ),
    metric.Metric(
        "sfid",
        title="spatial Frechet distance",
        better="lower",
        measure=sfid,
        needs=(spatial,),
        least=2,
        protocols=("adm-50k", "val-centercrop-rfid", "local"),
        beside=BIAS,
        row=20,
    ),
    metric.Metric(
        "fid_infinity",
        title="Frechet distance, infinite",
        better="lower",
        measure=fid_infinity,
        needs=(metric.many,),
        protocols=("adm-50k", "fd-dinov2", "local"),
        row=90,
    ),
    metric.Metric(
        "classwise",
        title="Frechet distance by class",
        better="lower",
        measure=by_class,
        needs=(metric.features, metric.labels, metric.classes),
        protocols=("local",),
        beside={"axes": "{} axes", "divergence": "KL of the classes {}"},
        row=150,
    ),
)
