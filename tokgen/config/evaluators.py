"""What a run measures at periods of its own: the section `evaluators` of a config.

    config.evaluators = dict(
        fid=dict(kind="score", every=5000, reference="reference.npz"),
        unguided=dict(kind="score", every=20_000, reference="reference.npz", preset="no_guidance"),
    )

Each has a name, under which its figures are logged, a kind, a period in steps (0: off) and the
arguments of its kind. `tokgen.evaluation.evaluators` makes of them what measures. Steps are ranked
by `held_out` alone, which is measured every `report.save` steps.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

from tokgen import choices, ranges
from tokgen.config import building
from tokgen.interfaces import UserError

NAME = r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*"
# What a log has without them: its splits and its pictures
TAKEN = ("train", "held_out", "samples", "imported", "reconstructions")
SPLITS = ("held_out", "train")
ACCEPTED = ("few",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What every evaluator has: a kind, and after how many steps it measures again."""

    kind: str
    every: ranges.Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Evaluator):
    """Samples of a generator against a reference, under the protocol `local`.

    Args:
        reference: a file of `tokgen reference`, which holds the local network.
        samples: how many are drawn, as many of each class.
        preset: of the config's.
        metrics: by name; () is all of the protocol.
        seed: of what is drawn, and of the intervals; the same at every step.
        batch: images decoded together, over all devices.
        accept: "few" measures Frechet distances of fewer images than features.
    """

    reference: str
    samples: ranges.Count = 1000
    preset: str = "default"
    metrics: tuple[str, ...] = ()
    seed: ranges.Seed = 0
    batch: ranges.Batch = 32
    accept: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(Evaluator):
    """Nats of the tokens of `images` of a split."""

    images: ranges.Count
    split: str = "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Evaluator):
    """A picture of samples: ten classes, `columns` of each."""

    preset: str = "default"
    columns: Annotated[int, ranges.Range(1, 256)] = 8
    seed: ranges.Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionScore(Evaluator):
    """Reconstructions of `images` held-out images against a reference; the rest as of Score."""

    reference: str
    images: ranges.Count = 1000
    metrics: tuple[str, ...] = ()
    seed: ranges.Seed = 0
    accept: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Evaluator):
    """Figures of `images` reconstructions of a split, and a picture of the first `shown`."""

    images: ranges.Count
    split: str = "held_out"
    shown: Annotated[int, ranges.Range(1, 256)] = 32


# What is trained -> kind -> what such a section takes
KINDS: Mapping[str, Mapping[str, type[Evaluator]]] = {
    "generator": {"score": Score, "likelihood": Likelihood, "grid": Grid},
    "tokenizer": {"score": ReconstructionScore, "reconstruction": Reconstruction},
}


def kinds(settings: Any) -> Mapping[str, type[Evaluator]]:
    """The kinds of a config: of a generator's, or of a tokenizer's."""
    return KINDS["generator" if "generator" in settings else "tokenizer"]


def of(settings: Any) -> dict[str, Evaluator]:
    """The evaluators of a config that are on, by name, in its order; they were checked."""
    known, found = kinds(settings), {}
    for name, section in settings.get("evaluators", {}).items():
        one = building.call(known[section["kind"]], section, f"evaluators.{name}")
        if one.every:
            found[name] = one
    return found


def takes(settings: Any, path: str) -> type[Evaluator] | None:
    """What the section at `path` is held against; None where it is no evaluator's, or of none."""
    top, _, name = path.partition(".")
    section = building.at(settings, path)
    if top != "evaluators" or not name or not hasattr(section, "items"):
        return None
    kind = section.get("kind", "")
    return kinds(settings).get(kind) if isinstance(kind, str) else None


def checks(settings: Any) -> dict[str, tuple[type[Evaluator], tuple]]:
    """What `building.check` is to hold against each section that has a name and a kind."""
    found = {}
    for name in _sections(settings):
        target = takes(settings, f"evaluators.{name}")
        if target and re.fullmatch(NAME, name):
            found[f"evaluators__{name}"] = (target, ())
    return found


def problems(settings: Any) -> list[str]:
    """What is wrong with names, kinds and words; sections are held by `checks` before."""
    found = []
    for name, section in _sections(settings).items():
        here = f"evaluators.{name}"
        if not re.fullmatch(NAME, name) or name in TAKEN:
            found.append(
                f"{here}: its figures are logged under this name, of letters, digits and single _, "
                f"and none of {', '.join(TAKEN)}; give it another"
            )
        elif not hasattr(section, "items"):
            found.append(f"{here} must be a section; found {section!r}")
        elif takes(settings, here) is None:
            found.append(choices.refusal(kinds(settings), section.get("kind", ""), f"{here}.kind"))
        else:
            found += _words(here, section, settings)
    return found


def _words(here: str, section: Mapping[str, Any], settings: Any) -> list[str]:
    """Words of a section that are none of those that it may have."""
    found = []
    if section.get("split", SPLITS[0]) not in SPLITS:
        found.append(choices.refusal(SPLITS, section["split"], f"{here}.split"))
    for word in section.get("accept", ()):
        if word not in ACCEPTED:
            found.append(choices.refusal(ACCEPTED, word, f"{here}.accept"))
    known = {"default", "no_guidance", *settings.get("presets", {})}
    if section.get("preset", "default") not in known:
        found.append(choices.refusal(sorted(known), section["preset"], f"{here}.preset"))
    return found


def begun(settings: Any, name: str, kind: str) -> dict[str, Any]:
    """The section of an evaluator of another kind than it has, or none: what both take stays."""
    known = kinds(settings)
    if kind not in known:
        raise UserError(choices.refusal(known, kind, f"evaluators.{name}.kind"))
    taken = building.arguments_of(known[kind])
    old = building.at(settings, f"evaluators.{name}")
    old = dict(old.items()) if hasattr(old, "items") else {}
    return {n: value for n, value in old.items() if n in taken} | {"kind": kind}


def _sections(settings: Any) -> Mapping[str, Any]:
    section = settings.get("evaluators", {})
    return section if hasattr(section, "items") else {}
