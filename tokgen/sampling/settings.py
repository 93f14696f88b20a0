"""The settings of a sampler: one number each, or one per decoding step, or per step and symbol."""

from __future__ import annotations

import math
import numbers

import jax.numpy as jnp
import numpy as np

from tokgen import interfaces

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def at_step(setting: float | tuple, step: interfaces.Array | int) -> interfaces.Array | float:
    """A setting's value at a step; static where it is the same at every step."""
    if not isinstance(setting, tuple):
        return setting
    if isinstance(step, int) and not 0 <= step < len(setting):
        raise interfaces.UserError(
            f"step {step} needs a setting of its own; found {len(setting)} entries: give one per "
            "decoding step, or one number for all"
        )
    return setting[0] if len(set(setting)) == 1 else jnp.asarray(setting)[step]


def of_symbols(entry: object, symbol: int, groups: int) -> object:
    """Of an entry with one number per symbol, those of `groups` symbols from `symbol` on.

    As [1, 1, G], or as one number where they agree; an entry that is one number comes back as is.
    """
    if not isinstance(entry, tuple) and jnp.ndim(entry) == 0:
        return entry
    if symbol + groups > len(entry):
        raise interfaces.UserError(
            f"settings per symbol need one number for each; found {len(entry)} for a position of "
            f"{symbol + groups} symbols or more: give one per symbol, or one number for all"
        )
    entry = entry[symbol : symbol + groups]
    if isinstance(entry, tuple) and len(set(entry)) == 1:
        return entry[0]
    return jnp.asarray(entry, jnp.float32)[None, None]


def checked(name: str, setting: object) -> float | tuple:
    """A number, or one entry per decoding step; lists, as JSON has them, become tuples."""
    if not isinstance(setting, tuple | list):
        if name == "guidance":
            raise interfaces.UserError(
                f"guidance needs one weight per decoding step; found {setting!r}; write "
                f"guidance.constant({setting!r}, steps)"
            )
        return _number(name, setting)
    if not setting and name != "guidance":
        raise interfaces.UserError(
            f"{name} needs a number, or one per decoding step; found none; leave it out to keep "
            "the default"
        )
    if name not in ("temperature", "guidance"):
        return tuple(_number(name, entry) for entry in setting)
    return _rows(name, setting)


def _rows(name: str, setting: tuple | list) -> tuple:
    """Entries of as many numbers each: one, or one per symbol of a position."""
    symbols = {len(entry) for entry in setting if isinstance(entry, tuple | list)}
    if not symbols:
        return tuple(_number(name, entry) for entry in setting)
    if len(symbols) > 1 or 0 in symbols:
        raise interfaces.UserError(
            f"an entry of {name} is one number, or one for every symbol of a position; found "
            f"entries of {' and '.join(map(str, sorted(symbols)))} numbers"
        )
    (width,) = symbols
    rows = (e if isinstance(e, tuple | list) else (e,) * width for e in setting)
    return tuple(tuple(_number(name, number) for number in row) for row in rows)


def _number(name: str, value: object) -> float | int:
    """One entry of a setting as a Python number, checked."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if name == "top_k":
        good = number and isinstance(value, numbers.Integral) and 0 <= value < 2**31
        need = "a whole number, 0 or more; 0 keeps all"
    elif name == "top_p":
        good = number and 0 < value <= 1
        need = "a number above 0 and at most 1; 1 keeps all"
    elif name == "jitter":
        good = number and 0 <= value <= LARGEST
        need = "a finite number, 0 or more; 0 adds nothing"
    elif name == "confidence_temperature":
        good = number and SMALLEST <= value <= LARGEST
        need = f"a number from {SMALLEST:.2g} to {LARGEST:.2g}; 1 changes nothing"
    elif name == "temperature":
        # float32 would make 0 of 1e-40 and infinity of 1e40, without a word
        good = number and (value == 0 or SMALLEST <= value <= LARGEST)
        need = f"0, which is greedy, or a number from {SMALLEST:.2g} to {LARGEST:.2g}"
    else:
        good = number and math.isfinite(value)
        need = "finite numbers, one per decoding step; 1 is no guidance"
    if not good:
        raise interfaces.UserError(f"{name} must be {need}; found {value!r}")
    return int(value) if name == "top_k" else float(value)
