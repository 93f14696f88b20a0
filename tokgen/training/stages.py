"""Stages of training as data: which parameters learn, from which objective, for how long.

A config's `stages` is a list of sections; without any there is one stage that trains everything on
pixels. Shares are of the run's steps, so that a shortened run keeps its proportions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tokgen import choices, parameters, ranges
from tokgen.config import building as configs
from tokgen.interfaces import UserError
from tokgen.training import optimizer as optimizers

OBJECTIVES = ("pixels", "codes")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One section of `stages`.

    Attributes:
        share: of the run's steps.
        objective: "pixels", the image; or "codes", what the frozen tokenizer `config.teacher`
            writes for the image (TiTok's first stage, arXiv:2406.07550).
        train: pattern of the paths of the parameters that learn, such as "decoder/.*".
        loss: weights that differ from `config.loss`.
        optimizer: arguments that differ from `config.optimizer`; each stage starts afresh,
            from the averaged parameters of the one before.
        begin, end: its steps; set by `plan`.
    """

    share: ranges.Fraction = 1.0
    objective: str = "pixels"
    train: str = ".*"
    loss: Mapping[str, ranges.Weight] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    begin: int = 0
    end: int = 0


def plan(settings) -> tuple[Stage, ...]:
    """The stages of a config, with their steps."""
    sections = settings.get("stages", ()) or ({},)
    stages, begin, total = [], 0, 0.0
    for number, section in enumerate(sections):
        section = {key: configs.plain(value) for key, value in section.items()}
        stage = configs.call(Stage, section, f"stages[{number}]")
        if stage.objective not in OBJECTIVES:
            what = f"stages[{number}].objective"
            raise UserError(choices.refusal(OBJECTIVES, stage.objective, what))
        unknown = sorted(set(stage.loss) - set(settings.loss))
        if unknown:
            raise UserError(
                f"stages[{number}].loss may change the weights of config.loss, "
                f"{', '.join(settings.loss)}; found {', '.join(unknown)}"
            )
        total += stage.share
        end = settings.steps if number == len(sections) - 1 else round(settings.steps * total)
        stages.append(dataclasses.replace(stage, begin=begin, end=end))
        begin = end
    if abs(total - 1) > 1e-6 or any(stage.begin >= stage.end for stage in stages):
        shares = ", ".join(f"{stage.share:g}" for stage in stages)
        raise UserError(
            f"the shares of config.stages must be positive and add up to 1; found {shares}"
        )
    for stage in stages:
        optimizer(settings, stage)  # a mistake in the last stage is told before the first begins
    return tuple(stages)


def check(stages: tuple[Stage, ...], tokenizer) -> None:
    """Nothing, or the error of a stage that does not fit the tokenizer (shapes suffice)."""
    paths = parameters.paths(parameters.split(tokenizer)[1])
    for number, stage in enumerate(stages):
        try:
            found = any(re.fullmatch(stage.train, path) for path in paths)
        except re.error as error:
            raise UserError(f"stages[{number}].train is no pattern: {error}") from error
        if not found:
            raise UserError(
                f"stages[{number}].train={stage.train!r} matches no parameter, so nothing "
                f"would learn; their paths are like {', '.join(list(paths)[:3])}"
            )
        if stage.objective == "codes" and not hasattr(tokenizer.decoder, "logits"):
            raise UserError(
                f"stages[{number}].objective='codes' needs a decoder that predicts codes, "
                "config.decoder.name='two_stage'"
            )


def at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that step `step` belongs to."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def learns(stage: Stage, part: str) -> bool:
    """Whether a part of the tokenizer, such as "quantizer", learns in a stage."""
    return re.fullmatch(stage.train, f"{part}/any") is not None


def optimizer(settings, stage: Stage) -> optimizers.Optimizer:
    """The optimizer of a stage; its schedule counts from the stage's first step."""
    section = {**configs.plain(settings.optimizer), **stage.optimizer}
    context = dict(steps=stage.end - stage.begin, begin=stage.begin)
    return configs.call(optimizers.optimizer, section, "optimizer", **context)
