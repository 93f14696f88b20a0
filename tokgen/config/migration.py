"""What earlier versions wrote, in today's words; and today's words in those that came first.

Checkpoints, exports and logs outlive the words of the code. Each table below says where a word
stood, what it was then, and what it is now; nothing else knows the old ones. What is read is told
in today's words, what is written is written in them, and fingerprints are taken of the first words,
so that a network keeps the one that its token sets and generators noted.

To add a row, rename the thing in the code and write `Row(where, then, now)` into its table:

    FIELDS      names of fields of a config. `where` is the path of the section that holds it, with
                dots, as r"discriminator" or, for any depth, r"(encoder|decoder)(\\..*)?"; "" is the
                top. Sections in a list have their number in the path: `stages.0.loss`.
    VALUES      what a field holds, a word, or True or False. `where` is the path of the field.
    PARAMETERS  segments of the paths of arrays, as `model/params/encoder/conv_in/kernel`. `where`
                is the path before the segment: "" at its start, r"(.*/)?heads" right below `heads`.
                Patterns of such paths in a config (PATTERNS) are rewritten alike.
    METRICS     names of figures in a checkpoint's record and in metrics.jsonl; `where` is not read.

`where` is a regular expression that matches the whole path, whose other words are today's already.
Rows must be one to one, and today's word at a place must be no other's earlier one there: then both
directions are functions, and what is told in today's words stays as it is (tests/config).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One word: where it stands, what it was in the first place, what it is now."""

    where: str
    then: str | bool  # True and False are values alone
    now: str


FIELDS: tuple[Row, ...] = (
    Row("", "critic", "discriminator"),
    Row("discriminator", "painter", "generator_loss"),
    Row("discriminator", "critic_weight", "loss_weight"),
    Row("", "guard", "safeguards"),
    Row(r"generator|(encoder|decoder)(\..*)?", "parts", "variant"),
    Row("generator", "places", "positions"),
    Row("generator", "prefix", "conditioning"),
)

REMAT = r"(generator|(encoder|decoder)(\..*)?)\.remat"

VALUES: tuple[Row, ...] = (
    Row(r"discriminator\.network\.name", "features", "feature_heads"),
    Row(r"discriminator\.first", "painter", "tokenizer"),
    Row(r"discriminator\.first", "critic", "discriminator"),
    Row(r"generator\.conditioning", "told_label", "adaptive_label"),
    Row(r"generator\.inputs", "symbols", "tokens"),
    Row(r"generator\.head", "tied_per_place", "tied_per_position"),
    Row(REMAT, False, "none"),
    Row(REMAT, True, "full"),
)

PARAMETERS: tuple[Row, ...] = (
    Row("", "critic", "discriminator"),
    Row(r".*", "symbols", "embeddings"),
    Row(r".*", "places", "positions"),
    Row(r".*", "latent_places", "latent_positions"),
    Row(r".*", "prefix", "conditioning"),
)

METRICS: tuple[Row, ...] = (
    Row("", "critic", "discriminator_loss"),
    Row("", "critic_real", "logits_real"),
    Row("", "critic_fake", "logits_fake"),
    Row("", "critic_skipped", "discriminator_skipped"),
    Row("", "critic_skips", "discriminator_skips"),
)

# fields whose value is a pattern of parameters' paths, without the names of TrainStates before them
PATTERNS = r"(.*\.)?optimizer\.decayed|stages\.\d+\.train"


def config(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a config in today's words. ValueError where a field has both words."""
    return _section(record, "", back=False)


def first_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a config, which is in today's words, in the first ones."""
    return _section(record, "", back=True)


def field(path: str) -> str:
    """The dotted path of a field in today's words."""
    here = ""
    for name in path.split("."):
        here = _below(here, ".", _renamed(FIELDS, here, name, back=False))
    return here


def parameter(path: str) -> str:
    """The path of an array in today's words."""
    here = ""
    for name in path.split("/"):
        here = _below(here, "/", _renamed(PARAMETERS, here, name, back=False))
    return here


def first_parameter(path: str) -> str:
    """The path of an array, which is in today's words, in the first ones."""
    here, first = "", []
    for name in path.split("/"):
        first.append(_renamed(PARAMETERS, here, name, back=True))
        here = _below(here, "/", name)
    return "/".join(first)


def metrics(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by name, of which some may be earlier names, by today's."""
    return {_renamed(METRICS, None, name, back=False): value for name, value in figures.items()}


def _section(section: Mapping[str, Any], where: str, *, back: bool) -> dict[str, Any]:
    """The fields of a section whose own path, in today's words, is `where`."""
    told = {}
    for name, value in section.items():
        other = _renamed(FIELDS, where, name, back=back)
        if other in told or (other != name and other in section):
            raise ValueError(f"field {_below(where, '.', name)} is there as {other} too")
        told[other] = _value(value, _below(where, ".", name if back else other), back=back)
    return told


def _value(value: Any, where: str, *, back: bool) -> Any:
    if isinstance(value, Mapping):
        return _section(value, where, back=back)
    if isinstance(value, list | tuple):
        items = (_value(item, f"{where}.{n}", back=back) for n, item in enumerate(value))
        return type(value)(items)
    if not isinstance(value, str | bool):
        return value
    if isinstance(value, str) and re.fullmatch(PATTERNS, where):
        return _pattern(value, back=back)
    return _renamed(VALUES, where, value, back=back)


def _pattern(text: str, *, back: bool) -> str:
    """A pattern of paths: what comes before a segment is anything, so `where` is not looked at."""
    for row in PARAMETERS:
        source, target = (row.now, row.then) if back else (row.then, row.now)
        if row.where:  # a TrainState's name is in no pattern
            text = re.sub(rf"(?<!\w){re.escape(source)}(?!\w)", target, text)
    return text


def _renamed(rows: tuple[Row, ...], where: str | None, name: Any, *, back: bool) -> Any:
    """The other word for `name` at a place, or itself; None is any place."""
    for row in rows:
        source, target = (row.now, row.then) if back else (row.then, row.now)
        if name == source and (where is None or re.fullmatch(row.where, where)):
            return target
    return name


def _below(where: str, between: str, name: str) -> str:
    return f"{where}{between}{name}" if where else name
