"""Whether a run is the one that a step was saved by: what may have changed, and what may not."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from tokgen.config import reading
from tokgen.interfaces import UserError

# Fields of a config that may change between a run and its continuation; all others decide what
# is trained, and a change is refused. Data may move: their fingerprint is compared.
FREE = (
    *("steps", "report.", "keep.", "mesh.", "strategy", "held_out.", "max_bad", "init_from"),
    *("data.path", "data.data_dir", "data.tokens", "data.tokenizer", "data.images", "data.text"),
    "data.labels",  # of the fingerprint and the classes, which are compared
    *("safeguards.usage", "safeguards.grace", "accumulate", "profile"),
    *("made_for.", "evaluators."),  # of plans, and of what is measured
)
RUNNING = (".remat", ".unroll")  # endings of those that say how a network runs, at any depth


# Fields that earlier configs did not have, with the value that they trained by: that says the same.
UNSAID = {
    **{"average": "muse", "optimizer.warmup": 0, "discriminator.optimizer.warmup": 0},
    **{"optimizer.start": None, "discriminator.optimizer.start": None},
}
AUGMENTED = {True: ["color", "translation", "cutout"], False: []}  # what these meant


def as_trained(fields: dict) -> dict:
    """Fields of a config with today's values, for those that earlier versions wrote otherwise.

    A distance that was given no weight files was left out: its weight is 0.
    `discriminator.augmented` was all kinds or none; a field that was not there yet has the value
    that went without saying.
    """
    off = {
        f"loss.{n.removeprefix('perceptual.')}"
        for n, v in fields.items()
        if v == "" and n.startswith("perceptual.")
    }
    said = {n: v for n, v in fields.items() if n not in UNSAID or v != UNSAID[n]}
    for section in ("optimizer", "discriminator.optimizer"):
        if f"{section}.warmup" not in said:  # which `start` is of
            said.pop(f"{section}.start", None)
    said |= {name: 0.0 for name in off if name in fields}
    augmented = said.get("discriminator.augmented")
    if isinstance(augmented, bool):
        said["discriminator.augmented"] = AUGMENTED[augmented]
    return said


def check(
    meta: dict,
    step: pathlib.Path,
    workdir: pathlib.Path,
    config: dict,
    here: dict,
    *,
    fields: Sequence[str] = (),
    earlier: Sequence[str] = (),
    accept: Sequence[str] = (),
) -> None:
    """Refuse to go on from a step of another model, data set, batch size or seed.

    `meta` is the record of the step; `config` and `here` are the config and the record of the run
    that would go on from it; `fields`, `earlier` and `accept` as `run.start` takes them.
    """
    if meta["kind"] != here["kind"]:
        raise UserError(
            f"{step} holds a {meta['kind']}; this program trains a {here['kind']}: use another "
            "--workdir"
        )
    old = as_trained(reading.flat(json.loads(json.dumps(meta["config"]))))
    new = as_trained(reading.flat(json.loads(json.dumps(config))))
    if fields:
        old = {n: v for n, v in old.items() if n in new or n.partition(".")[0] in fields}
    changes = [
        f"  {name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} here"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
        and not name.startswith(FREE)
        and not name.endswith(RUNNING)
    ]
    # data that this run began with, and was told to leave, are still its own: it may go back there
    left = here.get("data_changes", ())
    own = {here["data"], *earlier, *(change["from"] for change in left)}
    told = "data" in accept
    if not told and meta["data"] not in own:
        changes.append(f"  data: {meta['data']} there, {here['data']} here")
    a, b = meta.get("held_out"), here["held_out"]
    # best steps are those of the same images
    if a and b and a != b and not told and a not in {change.get("held_out") for change in left}:
        changes.append(f"  held-out data: {a} there, {b} here")
    images, names = ["  data: ", "  held-out data: "], ["layout", "classes", "tokenizer"]
    if meta["kind"] == "tokenizer":  # it learns no classes: they come with its images
        images.append("  classes: ")
        if told or meta["classes"] in [change.get("classes") for change in left]:
            names.remove("classes")
    for name in names:
        a, b = (json.loads(json.dumps(m[name])) for m in (meta, here))
        if name == "tokenizer" and a and b:
            a, b = a["fingerprint"], b["fingerprint"]
        if a != b:
            changes.append(f"  {name}: {str(a)[:200]} there, {str(b)[:200]} here")
    if changes and all(line.startswith(tuple(images)) for line in changes):
        raise UserError(
            f"{workdir} holds a run on other images than these (names, labels, sizes or "
            "contents differ). If you repaired, removed or added some, go on with them by "
            "--accept-data; else give the images it began with, or another --workdir:\n"
            + "\n".join(changes)
        )
    if changes:
        raise UserError(
            "\n".join(
                [
                    f"{workdir} holds a run with another config; use its values (a copy of its "
                    "config file, or overrides), or another --workdir:",
                    *changes,
                ]
            )
        )
