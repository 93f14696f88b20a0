"""What lies in a published file: which of its entries are the weights, which their average."""

from __future__ import annotations

import dataclasses
import pathlib

from tokgen.interfaces import UserError
from tokgen.pretrained import system as systems
from tokgen.pretrained.formats import reader, stored

AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "module_ema")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a published file keeps what was read of it.

    Attributes:
        dtype: that of most of its arrays; ours are float32, which holds the smaller ones exactly.
        dtypes: of the arrays that have another one, by published name.
        entry, average: the entries with the live weights and with their moving average, dotted;
            None where the file said nothing (the average: where it has none, or keeps it under
            names of the same entry).
        average_dtype, average_dtypes: as `dtype` and `dtypes`.
        written: safetensors, torch or flax.
    """

    dtype: str = "float32"
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    entry: str | None = None
    average: str | None = None
    average_dtype: str = "float32"
    average_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    written: str = ""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The arrays of a published file that belong to a system, not read yet."""

    weights: dict[str, stored.Stored]
    average: dict[str, stored.Stored]  # of an entry of its own; empty where there is none
    form: Form
    notes: tuple[str, ...]


def weights(
    path: str | pathlib.Path, system: systems.System, *, unknown: str = "refuse"
) -> systems.Weights:
    """The live arrays of a published file, unwrapped as the system publishes them."""
    found = contents(path, system, unknown=unknown).weights
    return {key: array.read() for key, array in found.items()}


def contents(
    path: str | pathlib.Path, system: systems.System, *, entry: str = "", unknown: str = "refuse"
) -> Contents:
    """What a published file holds of a system; `entry` says which of its entries is meant.

    `unknown` is the reader's: what is to be done about objects of unknown classes.
    """
    outline = reader.outline(path, unknown)
    chosen, average = _chosen(path, outline, system, entry)
    flatten = outline.form == "flax"

    def read(name):
        within = filter(None, name.split("."))
        return reader.lying(path, *within, flatten=flatten, unknown=unknown)

    notes = []
    if average is not None:
        notes.append(
            f"its entries {chosen!r} and {average!r} are both kept; the average {average!r} is "
            f"used (--entry {chosen} takes the live weights alone)"
        )
    elif not entry and chosen not in ("", *system.unwrap):
        notes.append(f"read from its entry {chosen!r}")
    notes += _beside(outline, system, chosen, average)
    return Contents(
        read(chosen),
        {} if average is None else read(average),
        Form(entry=chosen, average=average, written=outline.form),
        tuple(notes),
    )


def _chosen(
    path: str | pathlib.Path, outline: reader.Outline, system: systems.System, entry: str
) -> tuple[str, str | None]:
    """(the entry with the weights, that with their average), or an error that names all."""
    if entry:
        if not outline.names(entry):
            raise UserError(
                f"weight file {path}: it has no arrays under --entry {entry}; there are "
                f"{_listed(outline)}"
            )
        return entry, None
    candidates = [name for name in system.unwrap if outline.names(name)]
    for outer in (*system.unwrap, *reader.CONTAINERS):
        inside = [f"{outer}.{inner}" for inner in reader.CONTAINERS]
        candidates += [name for name in (outer, *inside) if name in outline.entries]
    candidates += [name for name in ("", *AVERAGES) if name in outline.entries]
    if not candidates and len(outline.entries) == 1:
        candidates = list(outline.entries)
    if not candidates:
        raise UserError(
            f"weight file {path}: none of its entries is known to hold weights; there are "
            f"{_listed(outline)}: say which with --entry NAME"
        )
    chosen = candidates[0]
    outer = chosen.split(".")[:-1] if chosen else []
    for name in AVERAGES:
        for inner in ([], *([inner] for inner in reader.CONTAINERS)):
            found = ".".join([*outer, name, *inner])
            # an average of a few arrays is something else
            if found != chosen and 2 * len(outline.entries.get(found, ())) >= len(
                outline.names(chosen)
            ):
                return chosen, found
    return chosen, None


def _listed(outline: reader.Outline) -> str:
    shown = sorted(outline.entries.items(), key=lambda pair: -len(pair[1]))[:6]
    named = [f"{name or 'the outermost'} ({len(keys)} arrays)" for name, keys in shown]
    more = f" and {len(outline.entries) - 6} more" if len(outline.entries) > 6 else ""
    return (", ".join(f"{name:.80}" for name in named) or "no arrays at all") + more


def _beside(
    outline: reader.Outline, system: systems.System, chosen: str, average: str | None
) -> list[str]:
    """What else is in the file that someone may want."""
    known = systems.known()
    if system.beside in known:
        for name in known[system.beside].unwrap:
            # its own entry, or names within the one that was chosen; not what every trainer writes
            if "." in name and outline.names(name):
                return [
                    f"its tokenizer is in the file, too ({name}): import it with --system "
                    f"{system.beside}"
                ]
    enough = len(outline.names(chosen)) / 2
    others = [
        name
        for name, keys in outline.entries.items()
        if name not in (chosen, average) and len(keys) >= enough
    ]
    if not others:
        return []
    return [f"also in the file: {', '.join(others[:4])}; --entry NAME takes one of them"]
