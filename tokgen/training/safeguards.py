"""Safeguards of a tokenizer's training: how codes are used, when to stop, when to go back."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from typing import Annotated

import jax
import numpy as np

from tokgen import distributed, ranges, records, sharding, storage
from tokgen.interfaces import TokenLayout
from tokgen.metrics import codebook

KEPT = 2_000_000  # symbols that the meter looks back on
RETURNS = "returns.json"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The section `safeguards` of a config.

    Attributes:
        usage: a run stops when less than this share of the codes that its last tokens could
            reach is in use; 0 never.
        grace: share of the run during which that is forgiven.
        worse: with a discriminator, a run goes back to where the adversarial term began when the
            held-out squared error exceeds that moment's by this factor; 0 never.
        returns: so many times, at half the discriminator's weight each; then it is left out.
    """

    usage: ranges.Share = 0.0
    grace: ranges.Share = 0.1
    worse: ranges.Amount = 0.0
    returns: Annotated[int, ranges.Range(0, 1000)] = 3

    def __post_init__(self):
        ranges.check(self)


class Meter:
    """Usage of the codes over the last training tokens, per scale and symbol.

    Tokens stay on their device until figures are asked for.
    """

    def __init__(self, layout: TokenLayout):
        self.layout, self.kept = layout, collections.deque()

    def add(self, tokens_BLG: jax.Array, skipped: jax.Array | int = 0) -> None:
        """Remember the tokens of a step; one that was skipped is told by `skipped`, and is none."""
        self.kept.append((tokens_BLG, skipped))
        while sum(tokens.size for tokens, _ in self.kept) > KEPT and len(self.kept) > 1:
            self.kept.popleft()

    def figures(self) -> dict[str, float]:
        """Usage, perplexity and dead codes, of all tokens and per scale; then they are forgotten.

        `reached` compares usage with what as many uniform draws would reach. Where all codes of an
        alphabet are words of bits, `idle_bits` are those with one value in 99 % of the tokens.
        None of these where every step was skipped.
        """
        kept = [tokens for tokens, skipped in sharding.everywhere(list(self.kept)) if not skipped]
        self.kept.clear()
        if not kept:
            return {}
        tokens_BLG = np.concatenate(kept)
        found = measured(tokens_BLG, self.layout)
        if len(self.layout.grids) == 1:
            return found
        for scale, (start, size) in enumerate(self.layout.spans):
            grid = TokenLayout(self.layout.vocab, (self.layout.grids[scale],))
            part = measured(tokens_BLG[:, start : start + size], grid)
            found |= {f"{name}_{scale}": value for name, value in part.items()}
        return found


def measured(tokens_BLG: np.ndarray, layout: TokenLayout) -> dict[str, float]:
    """Figures of some tokens; of several symbols per position the worst."""
    usage, reached, perplexity, dead, idle = [], [], [], [], []
    for count_V in codebook.counts(tokens_BLG, layout):
        codes, draws = len(count_V), int(count_V.sum())
        usage.append(codebook.usage(count_V))
        # uniform draws leave a share exp(-n / V) of the codes untouched
        reached.append(usage[-1] / (1 - math.exp(-draws / codes)))
        perplexity.append(codebook.perplexity(count_V))
        dead.append(int((count_V == 0).sum()))
        if codes & (codes - 1) == 0:
            ids = np.arange(codes)
            ones = [
                count_V[(ids >> bit) & 1 == 1].sum() / draws
                for bit in range(codes.bit_length() - 1)
            ]
            idle.append(sum(min(share, 1 - share) < 0.01 for share in ones))
    figures = {
        "usage": min(usage),
        "reached": min(reached),
        "perplexity": min(perplexity),
        "dead_codes": float(max(dead)),
    }
    return figures | ({"idle_bits": float(max(idle))} if idle else {})


def collapsed(limits: Limits, figures: dict[str, float], step: int, steps: int) -> str:
    """Why a run must stop: its codebook is hardly used any more. Empty while all is well."""
    early = step <= limits.grace * steps
    if not limits.usage or early or figures.get("reached", 1.0) >= limits.usage:
        return ""
    return (
        f"step {step}: of the codes that the last tokens could reach only "
        f"{100 * figures['reached']:.1f} % are in use (perplexity {figures['perplexity']:.1f}), "
        f"and config.safeguards.usage={limits.usage:g} asks for more. Remedies: "
        "quantizer.revive, fewer codes or channels, normalize=True, an entropy term, a lower "
        "learning rate; safeguards.usage=0 lets it go on"
    )


def strength(limits: Limits, returns: int) -> float:
    """What is left of the discriminator's weight after so many returns."""
    return 0.0 if returns >= limits.returns else 0.5**returns


def returned(workdir: pathlib.Path) -> int:
    """How often a run went back to before its adversarial term."""
    return distributed.decided(_noted, workdir)["returns"]


def unsettled(workdir: pathlib.Path) -> bool:
    """Whether a return was begun whose later steps are still to be forgotten."""
    return not distributed.decided(_noted, workdir)["settled"]


def note_return(workdir: pathlib.Path) -> int:
    """One more; written before anything is undone, so that a kill in between repeats the rest."""
    count = returned(workdir) + 1
    _write(workdir, count, settled=False)
    return count


def settle(workdir: pathlib.Path) -> None:
    """All is undone: what is saved from now on is kept."""
    _write(workdir, returned(workdir), settled=True)


def _noted(workdir: pathlib.Path) -> dict:
    file = workdir / RETURNS
    with storage.reached(workdir):
        if not file.exists():
            return {"returns": 0, "settled": True}
    remedy = (
        'write {"returns": N, "settled": true} with the number of times that the run said "back at '
        'step", or remove it to begin to count anew'
    )
    return records.read(file, "the count of a run's returns", remedy, returns=int, settled=bool)


def _write(workdir: pathlib.Path, count: int, settled: bool) -> None:
    distributed.first(
        records.save, workdir / RETURNS, records.text({"returns": count, "settled": settled})
    )
