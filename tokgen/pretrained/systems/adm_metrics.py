"""The fixture of metrics, computed with ours from the features, logits and codes that it gives."""

from __future__ import annotations

import re

import numpy as np

from tokgen.interfaces import TokenLayout
from tokgen.metrics import codebook, frechet, inception_score, moments, neighbours
from tokgen.pretrained import system

Arrays = dict[str, np.ndarray]
CODES = 64  # of the fixture's codebook, by its description


def metrics(folder) -> Arrays:
    """Distances, scores, neighbours, and the use of a codebook."""
    reference, generated = folder.given("ref_features"), folder.given("gen_features")
    logits = folder.given("logits")
    both, few = min(len(reference), len(generated)), reference.shape[1] // 2
    arrays = {
        "fid": _distance(reference, generated),
        "fid_singular": frechet.from_features(reference, generated[:few]),
        "fid_self": _distance(reference, reference),
        "titok_rfid": _distance(reference[:both], generated[:both]),
        "probs": inception_score.shares(logits),
        "is_all": _score(logits, len(logits)),
        "titok_is": _score(logits[:both], both),
    }
    for size in _numbers(folder, r"is_split(\d+)"):
        arrays[f"is_split{size}"] = _score(logits, size)
    for k in _numbers(folder, r"(?:precision|recall|ref_radii)_k(\d+)"):
        found = {"ref_radii": neighbours.radii(reference, k) ** 2}  # published are squares
        found |= zip(
            ("precision", "recall"),
            neighbours.precision_recall(reference, generated, k),
            strict=True,
        )
        arrays |= {f"{name}_k{k}": np.asarray(value) for name, value in found.items()}
    codes_NL = folder.given("codes")
    layout = TokenLayout((CODES,), ((1, codes_NL.shape[-1]),))
    (count_V,) = codebook.counts(codes_NL.reshape(-1, layout.length, 1), layout)
    arrays["codebook_usage"] = codebook.usage(count_V)
    arrays["codebook_entropy"] = codebook.entropy(count_V) / np.log(2)  # theirs is in bits
    return {name: np.asarray(value) for name, value in arrays.items() if name in folder.arrays}


def _numbers(folder, pattern: str) -> list[int]:
    """The numbers in those of the fixture's names that match."""
    found = (re.fullmatch(pattern, name) for name in folder.arrays)
    return sorted({int(match[1]) for match in found if match})


def _distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    a, b = moments.Moments.of(a_ND), moments.Moments.of(b_MD)
    return frechet.distance(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)


def _score(logits_NK: np.ndarray, size: int) -> float:
    parts = inception_score.consecutive(len(logits_NK), size)
    return inception_score.score(logits_NK, parts).mean


SYSTEMS = {
    "metrics": system.System(
        metrics,
        home="github.com/openai/guided-diffusion and github.com/bytedance/1d-tokenizer",
        licence="MIT and Apache-2.0",
    ),
}
