"""Frozen sampling settings by name; they travel inside checkpoints.

A preset is temperature, top_k, top_p, and a guidance schedule by name, weight and its own settings
(PLAIN), and for generators that draw all positions at every step and keep the surest (MASKED):

    steps, schedule,  of the generator: its number of steps, its mask schedule by name and that
    exponent          one's exponent; 0, "" and 0 leave it its own
    noise             Gumbel noise of the confidence, noise (1 - (s + 1) / T) at step s of T
    ranking           the confidence: "log_probability", or "raw_logit" (TiTok, arXiv:2406.07550)
    annealing         "softmax": logits divided by a_s = 0.5 + 0.8 (1 - (s + 1) / T), for the draw
                      and for the confidence (TiTok; MaskBit, arXiv:2409.16211); or "none"
    drawing           at the "temperature", or at the one that annealed "noise" makes (TiTok): the
                      arg-max of l / a_s + n_s Gumbel is a draw at a_s n_s, greedy at the last step

    precision         "float32" or "bfloat16", of the networks; the caller loads them so

A temperature is one number, or a list with one per step; it and a weight may be a list with one
per symbol of a position. A checkpoint's config holds its presets; "default" is used when none is
asked for, and "no_guidance" is always there.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokgen import choices, ranges, report
from tokgen.interfaces import Generator, UserError
from tokgen.nn import precision as precisions
from tokgen.sampling import decode, guidance, sampler as samplers

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": "constant", "weight": 1.0}
KNOBS = {"steps": 0, "schedule": "", "exponent": 0.0}
MASKED = KNOBS | {
    "noise": 0.0,
    "ranking": "log_probability",
    "annealing": "none",
    "drawing": "temperature",
}
CHOICES = {
    "ranking": tuple(samplers.RANKINGS),
    "annealing": ("none", "softmax"),
    "drawing": ("temperature", "noise"),
    "precision": ("float32", "bfloat16"),
}
LOADING = {"precision": "float32"}  # not the sampler's: how the networks are loaded
SCHEDULE = ("power", "first", "last")  # what a guidance schedule may take beside its weight


def prepare(
    generator: Generator, settings: Mapping[str, Any]
) -> tuple[Generator, samplers.Sampler]:
    """The generator as a preset wants it, a copy where it differs, and the Sampler for its plan."""
    _check(settings)
    knobs = generator.knobs
    departures = {k: v for k, v in settings.items() if k in MASKED and v != MASKED[k]}
    for name in departures:
        if name in KNOBS and name not in knobs:
            raise UserError(
                f"{name} needs a generator that decides it when sampling; found one whose "
                f"{name} cannot be changed{f' but {knobs}' if knobs else ''}: leave {name} at "
                f"{KNOBS[name]!r}, its own"
            )
        if name in ("noise", "ranking", "drawing") and not knobs:
            raise UserError(
                f"{name} needs a generator that keeps tokens by their confidence, a masked one; "
                f"found another: leave {name} at {MASKED[name]!r}"
            )
    wanted = {name: departures[name] for name in KNOBS if name in departures}
    if wanted:
        generator = jax.tree.map(lambda leaf: leaf, generator)
        for name, value in wanted.items():
            setattr(generator, name, value)
    rest = {name: value for name, value in settings.items() if name not in KNOBS}
    try:
        steps = decode.steps(generator)
    except UserError as error:
        raise UserError(f"sampling settings: {error}") from error
    return generator, sampler(rest, steps, generator.layout.groups)


def sampler(settings: Mapping[str, Any], steps: int, symbols: int = 1) -> samplers.Sampler:
    """The Sampler of a preset, for a plan of so many steps over positions of so many symbols."""
    _check(settings)
    extra = {name: settings[name] for name in SCHEDULE if name in settings}
    settings = PLAIN | MASKED | dict(settings)
    for name, own in KNOBS.items():
        if settings[name] != own:
            raise UserError(
                f"{name}={settings[name]!r} changes the generator, found a sampler asked for "
                "alone: use presets.prepare(generator, settings)"
            )
    left = [1 - (step + 1) / steps for step in range(steps)]
    jitter = tuple(settings["noise"] * share for share in left)
    softening = (1.0,) * steps
    if settings["annealing"] == "softmax":
        softening = tuple(0.5 + 0.8 * share for share in left)
    factors = softening
    if settings["drawing"] == "noise":
        factors = tuple(a * b for a, b in zip(softening, jitter, strict=True))
    try:
        return samplers.Sampler(
            temperature=_scaled(_temperature(settings["temperature"], steps, symbols), factors),
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            guidance=_weights(settings, extra, steps, symbols),
            confidence=samplers.RANKINGS[settings["ranking"]],
            jitter=jitter if settings["noise"] else 0.0,
            confidence_temperature=softening if set(softening) != {1.0} else 1.0,
        )
    except UserError as error:
        raise UserError(f"sampling settings: {error}") from error


def named(presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The settings of a checkpoint's preset.

    Its "no_guidance", where it has none of its own, keeps the steps and noise of its "default":
    a masked generator without them is another one.
    """
    own = {k: v for k, v in presets.get("default", {}).items() if k in MASKED}
    known = {"no_guidance": own} | {key: dict(value) for key, value in presets.items()}
    return PLAIN | choices.named(known, name, "preset")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A preset by name, and what is asked for in the place of its settings; None leaves them.

    Examples:
        >>> tokgen.SamplingChoice("no_guidance", temperature=0.9, top_k=100).asked()
        {'temperature': 0.9, 'top_k': 100}
    """

    preset: str = "default"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None  # the weight of the preset's schedule
    steps: int | None = None
    noise: float | None = None

    def asked(self) -> dict[str, Any]:
        """{field of a preset: its value} of what is asked for."""
        found = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        found |= {"weight": self.guidance, "steps": self.steps, "noise": self.noise}
        return {name: value for name, value in found.items() if value is not None}


def choose(
    generator: Generator,
    presets: Mapping[str, Mapping[str, Any]],
    choice: Choice,
    classes: Sequence[str],
) -> tuple[dict[str, Any], Generator, samplers.Sampler]:
    """(settings, generator, sampler) of a choice among a checkpoint's presets.

    Guidance is off where there are no `classes` to guide towards; asked for, it is an error.
    """
    settings = named(presets, choice.preset)
    now = PLAIN | MASKED | settings
    changed = {name: value for name, value in choice.asked().items() if value != now[name]}
    if changed:
        told = ", ".join(f"{name} {value}" for name, value in changed.items())
        report.say(f"departs from preset {choice.preset!r}: {told}")
    settings |= changed
    chosen, sampler_ = prepare(generator, settings)
    labels = generator.cond == "label"
    if sampler_.guidance and labels and not classes:
        if "weight" in changed:
            raise UserError(
                "--guidance needs classes to guide towards; the model has none: leave it out"
            )
        report.say("guidance is off: the model is unconditional, there is nothing to guide towards")
        settings = unguided(settings)
        chosen, sampler_ = prepare(generator, settings)
    # a preset may ask for more: published ones were written for larger alphabets
    if (choice.top_k or 0) > generator.layout.absent:
        raise UserError(
            f"top-k must be at most the alphabet, {generator.layout.absent}; found {choice.top_k}"
        )
    return settings, chosen, sampler_


def without_effect(choice: Choice, sampler: samplers.Sampler) -> dict[str, str]:
    """{option: when it has an effect} of what is asked for in vain: a draw is of the likeliest."""
    idle = {}
    if not np.any(sampler.temperature):
        idle = dict.fromkeys(("top_k", "top_p"), "temperatures above 0")
    elif np.all(np.equal(sampler.top_k, 1)):
        idle = dict.fromkeys(("temperature", "top_p"), "a top-k other than 1")
    return {name: when for name, when in idle.items() if getattr(choice, name) is not None}


def precision(meta: Mapping[str, Any], choice: Choice) -> str:
    """How a checkpoint's networks are loaded, by its `meta` record and the chosen preset.

    Float32 on a device without bfloat16 units, whatever the preset says.
    """
    if meta["kind"] != "generator":  # said when it is loaded
        return LOADING["precision"]
    compute = (LOADING | named(meta["config"]["presets"], choice.preset))["precision"]
    return precisions.fitting(compute)


def unguided(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's settings without guidance, whatever its schedule calls none."""
    kept = {name: value for name, value in settings.items() if name not in SCHEDULE}
    return kept | {"guidance": "constant", "weight": 1.0}


def _check(settings: Mapping[str, Any]) -> None:
    fields = PLAIN | MASKED | LOADING
    unknown = sorted(set(settings) - set(fields) - set(SCHEDULE))
    if unknown:
        raise UserError(f"a preset has no field {unknown[0]!r}; it has {', '.join(fields)}")
    settings = fields | dict(settings)
    for name, known in CHOICES.items():
        if settings[name] not in known:
            raise UserError(choices.refusal(known, settings[name], name))
    steps = settings["steps"]
    if isinstance(steps, bool) or (steps != 0 and not ranges.fits(steps, ranges.Steps)):
        raise UserError(
            f"steps must be {ranges.described(ranges.Steps)}, or 0 for the generator's own; found "
            f"{steps!r}"
        )
    for name, what in (("noise", "none"), ("exponent", "the generator's own")):
        value = settings[name]
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value < 0:
            raise UserError(
                f"{name} must be a finite number, 0 or more; found {value!r}; 0 is {what}"
            )
    if not isinstance(settings["schedule"], str):
        raise UserError(
            f"schedule must be the name of a mask schedule, or '' for the generator's own; found "
            f"{settings['schedule']!r}"
        )


def _temperature(setting: Any, steps: int, symbols: int) -> Any:
    """A list with one number per symbol as an entry for every step; all else as it is."""
    if not isinstance(setting, tuple | list) or symbols == 1 or len(setting) != symbols:
        return setting
    if any(isinstance(entry, tuple | list) for entry in setting):
        return setting
    if steps == symbols:
        raise UserError(
            f"temperature has {symbols} numbers for {steps} steps and {symbols} symbols alike; "
            "write a list with one number per symbol for every step"
        )
    return (tuple(setting),) * steps


def _scaled(temperature: Any, factors: tuple[float, ...]) -> Any:
    """A temperature with the factor of each step in it; untouched where all are 1."""
    if set(factors) == {1.0}:
        return temperature
    # checked before it is multiplied: [0.9] * 8 is a list
    entries = samplers.Sampler(temperature=temperature).temperature
    entries = entries if isinstance(entries, tuple) else (entries,) * len(factors)
    if len(entries) != len(factors):
        raise UserError(
            f"temperature needs one entry for every step of {len(factors)}; found {len(entries)}"
        )
    return tuple(
        tuple(number * factor for number in entry) if isinstance(entry, tuple) else entry * factor
        for entry, factor in zip(entries, factors, strict=True)
    )


def _weights(settings: Mapping[str, Any], extra: Mapping[str, Any], steps: int, symbols: int):
    """Guidance per step, or per step and symbol; () where it is none."""
    weight = settings["weight"]
    if isinstance(weight, tuple | list) and symbols > 1:
        if len(weight) != symbols:
            raise UserError(
                f"weight needs one number, or one for each of {symbols} symbols; found "
                f"{len(weight)} numbers"
            )
        columns = [guidance.schedule(settings["guidance"], w, steps, **extra) for w in weight]
        weights = tuple(zip(*columns, strict=True))
    else:
        weights = guidance.schedule(settings["guidance"], weight, steps, **extra)
    # not by the weight itself: 1 is no guidance for most schedules, 0 is for `per_scale`
    return () if np.all(np.asarray(weights) == 1) else weights
