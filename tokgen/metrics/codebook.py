"""How well the symbols of an alphabet are used; on counts, on the host, in float64."""

from __future__ import annotations

import numpy as np

from tokgen import boundary
from tokgen.interfaces import TokenLayout
from tokgen.metrics import metric


def counts(tokens_BLG: np.ndarray, layout: TokenLayout) -> tuple[np.ndarray, ...]:
    """How often every symbol occurs, one array [alphabet] per symbol of a position."""
    # a symbol of another alphabet would be counted as one of this one's
    boundary.tokens(np.asarray(tokens_BLG), layout)
    return tuple(
        np.bincount(np.asarray(tokens_BLG)[..., g].reshape(-1), minlength=size)
        for g, size in enumerate(layout.vocab)
    )


def usage(count_V: np.ndarray) -> float:
    """Share of the alphabet that occurs at all."""
    return float(np.mean(count_V > 0))


def entropy(count_V: np.ndarray) -> float:
    """Entropy of the distribution of the symbols, in nats: what a unigram model pays at best."""
    share_V = count_V / max(count_V.sum(), 1)
    positive = share_V[share_V > 0]
    return float(-(positive * np.log(positive)).sum())


def perplexity(count_V: np.ndarray) -> float:
    """exp(entropy): the number of equally used symbols that would be as even."""
    return float(np.exp(entropy(count_V)))


# ---------------------------------------------------------------- as metrics of a score


METRICS = (
    metric.Metric(
        "codebook_usage",
        title="codebook usage",
        better="higher",
        beside={"expected": "{} expected of as many tokens at random"},
        row=240,
    ),
    metric.Metric("codebook_perplexity", title="codebook perplexity", better="higher", row=250),
)
