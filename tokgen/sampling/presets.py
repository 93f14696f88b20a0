"""Frozen sampling settings by name; they travel inside checkpoints.

A preset is the keyword arguments of `sampler`: temperature, top_k, top_p, and a guidance schedule
by name, weight and its own settings. A checkpoint's config holds its presets; "default" is used
when none is asked for, and "no_guidance" is always there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokgen.interfaces import UserError
from tokgen.sampling import filters, guidance

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": "constant", "weight": 1.0}


def sampler(settings: Mapping[str, Any], steps: int) -> filters.Sampler:
    """The Sampler of a preset, for a plan of so many steps."""
    unknown = sorted(set(settings) - set(PLAIN) - {"power", "first", "last"})
    if unknown:
        raise UserError(f"a preset has no field {unknown[0]!r}; it has {', '.join(PLAIN)}")
    settings = PLAIN | dict(settings)
    extra = {k: settings[k] for k in ("power", "first", "last") if k in settings}
    weights = guidance.schedule(settings["guidance"], settings["weight"], steps, **extra)
    # not by the weight itself: 1 is no guidance for most schedules, 0 is for `per_scale`
    weights = () if set(weights) == {1.0} else weights
    try:
        return filters.Sampler(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            guidance=weights,
        )
    except ValueError as error:
        raise UserError(f"sampling settings: {error}") from error


def named(presets: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The settings of a checkpoint's preset."""
    known = {"no_guidance": PLAIN} | {key: dict(value) for key, value in presets.items()}
    if name not in known:
        raise UserError(f"preset must be one of {', '.join(sorted(known))}; found {name!r}")
    return PLAIN | known[name]
