"""The header of a folder of token shards: what it says of them, and what is held against it.

    layout.json    what was tokenized, by what, into what; the shards of each split with their
                   checksums, and the images among them that could not be read
    plan.json      what is known of this before there are shards; gone when the header is written

A header holds a digest of itself, so that what it says of the tokens cannot be changed without
being noticed. The whole format is told in `token_shards`.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from tokgen import interfaces, records, storage

FORMAT = 3  # the version of the whole folder
BY_VIEW = 3  # the first in which each view of an image is a record of its own
FORMATS = (1, 2, FORMAT)  # that are read; 1 knew no digest of the header
HEADER = "layout.json"
PLAN = "plan.json"  # the header before there are shards; what a resumed writer compares
RECORDS = {HEADER: ("format", "layout"), PLAN: ("format", "layout")}
SPLITS = ("train", "held_out")
REMEDY = "run `tokgen pretokenize` again, into an empty folder"

_DTYPES = ("uint8", "uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` of a split, and the file they go into."""

    split: str
    file: str
    start: int
    stop: int


def plain_layout(layout: Mapping) -> dict:
    """A layout as JSON gives it back: lists of integers."""
    return {
        "vocab": [int(size) for size in layout["vocab"]],
        "grids": [[int(rows), int(columns)] for rows, columns in layout["grids"]],
    }


def smallest_integer(vocab: Sequence[int]) -> str:
    """The smallest unsigned integer that holds the largest token."""
    # Not more than int32, which is what the tokens become on the device.
    if not vocab or min(vocab) < 1 or max(vocab) > 2**31:
        raise interfaces.UserError(
            f"alphabets must have between 1 and 2**31 symbols; found vocab={list(vocab)}"
        )
    return next(name for name in _DTYPES if max(vocab) - 1 <= np.iinfo(name).max)


def loaded_integer(vocab: Sequence[int]) -> str:
    """The integer that tokens of shards are in memory, and on their way to the devices."""
    stored = smallest_integer(vocab)
    return "int32" if stored == "uint32" else stored


def check_plan(plan: dict) -> None:
    """An error where no token set can be of this plan."""
    unknown = sorted(set(plan["images"]) - set(SPLITS))
    if unknown or not plan["images"] or min(plan["images"].values()) < 1:
        raise interfaces.UserError(
            f"the splits must be among {', '.join(SPLITS)}, each with an image at least; found "
            f"{plan['images']}"
        )
    if not plan["views"] or len(set(plan["views"])) != len(plan["views"]):
        raise interfaces.UserError(
            f"views must be different and at least one; found {plan['views']}"
        )
    if plan["shard_images"] < 1:
        raise interfaces.UserError(f"a shard needs an image at least; found {plan['shard_images']}")


def shards_of_split(split: str, count: int, shard_images: int) -> list[Shard]:
    """The shards of a split, from its count alone, so that every process agrees."""
    number = math.ceil(count / shard_images)
    return [
        Shard(
            split,
            f"{split}-{shard:05d}-of-{number:05d}.array_record",
            shard * shard_images,
            min(count, (shard + 1) * shard_images),
        )
        for shard in range(number)
    ]


def is_there(path: str | os.PathLike) -> bool:
    """Whether a folder has token shards, finished or begun."""
    return any((storage.path(path) / name).exists() for name in (HEADER, PLAN))


def recorded_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes, in their order, of a folder of shards, finished or begun; none without one."""
    path = os.fspath(path)
    for name in (HEADER, PLAN):
        if has(path, name):
            found = load(path, name).get("classes")
            named = isinstance(found, list) and all(isinstance(name, str) for name in found)
            return tuple(found) if named else ()
    return ()


def plan_of(header: dict) -> dict:
    """The plan that a finished header came from; a plan as it is."""
    if "splits" not in header:
        return header
    plan = {key: value for key, value in header.items() if key not in ("splits", "digest")}
    return {**plan, "images": {name: part["images"] for name, part in header["splits"].items()}}


def shards_by_file(header: dict) -> dict[str, dict]:
    """{file: what a header says of it} of the shards of every split."""
    return {shard["file"]: shard for part in header["splits"].values() for shard in part["shards"]}


def read_plan(path: str) -> dict:
    """The plan of a folder that is not finished."""
    return load(path, PLAN)


def read(path: str) -> dict:
    """The header of a finished folder, checked; or the error that says what is wrong with it."""
    folder = storage.path(path)
    with storage.reached(path):
        there, found = storage.is_dir(folder), "a file" if folder.exists() else "nothing"
    if not there:
        raise interfaces.UserError(
            f"token shards are needed at {path}; found {found} there; make them with "
            "`tokgen pretokenize`"
        )
    if not has(path, HEADER):
        if has(path, PLAN):
            raise interfaces.UserError(
                f"the token shards in {path} were not finished: run the same `tokgen pretokenize` "
                "command again, and it goes on where it was stopped"
            )
        raise interfaces.UserError(
            f"{path} has no {HEADER}, so it holds no token shards; make them with "
            "`tokgen pretokenize`"
        )
    header = load(path, HEADER)
    problem = _problem(header)
    if problem:
        raise damage(os.path.join(path, HEADER), problem)
    return header


def _problem(header: dict) -> str:
    """What is wrong with a header; empty if it can be used."""
    if header.get("format") not in FORMATS:
        return f"format {FORMAT} is needed; found {header.get('format')}"
    try:
        if header["layout"] != plain_layout(header["layout"]):
            return f"{header['layout']} is no layout"
        plan = plan_of(header)
        check_plan(plan)
        needed = smallest_integer(header["layout"]["vocab"])
        if header["dtype"] != needed:
            return f"tokens of {header['layout']['vocab']} need {needed}; found {header['dtype']}"
        if not all(isinstance(name, str) for name in header["classes"] + header["views"]):
            return "classes and views must be names"
        if not isinstance(header["tokenizer"]["fingerprint"], str):
            return "the tokenizer has no fingerprint"
        if not isinstance(header["data"], dict):
            return "the data are not described"
        for split, count in plan["images"].items():
            listed = len(header["splits"][split]["shards"])
            # before as many are made as it claims
            if math.ceil(count / header["shard_images"]) != listed:
                return f"{count} images of {split} do not lie in the {listed} shards that it lists"
            planned = shards_of_split(split, count, header["shard_images"])
            need = [(shard.file, shard.stop - shard.start) for shard in planned]
            found = [
                (shard["file"], shard["images"]) for shard in header["splits"][split]["shards"]
            ]
            if need != found:
                return f"{count} images of {split} are {len(need)} shards; found {found[:3]} ..."
            for shard, there in zip(planned, header["splits"][split]["shards"], strict=True):
                for index, told in unreadable(there).items():
                    if not isinstance(index, int) or not shard.start <= index < shard.stop:
                        return f"{index!r} is no image of {shard.file}"
                    if not all(isinstance(text, str) for text in told):
                        return f"image {index} of {split} needs a name and why it is unreadable"
            if not all(isinstance(s["sha256"], str) for s in header["splits"][split]["shards"]):
                return f"a shard of {split} has no checksum"
        if (header["format"] > 1 or "digest" in header) and header["digest"] != digest(header):
            return "it was changed since it was written: it does not have the digest that it states"
    except KeyError as error:
        return f"{error} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        return f"it does not have the form of a header ({error})"
    return ""


def canonical(header: dict) -> dict:
    """What a header says of the tokens, in every format alike.

    Where the tokenizer lies is no part of it: that may change without changing a token.
    """
    told = {key: value for key, value in header.items() if key != "digest"}
    return {**told, "format": 1, "tokenizer": {**header["tokenizer"], "path": ""}}


def digest(header: dict) -> str:
    """The hash of what a header says, which it holds itself."""
    what = {**canonical(header), "format": header["format"]}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def unreadable(note: Mapping) -> dict[int, tuple[str, str]]:
    """{index: (name, why)} of the images of a shard that could not be read."""
    return {index: (name, why) for index, name, why in note.get("unreadable", [])}


def damage(path: str, problem: str) -> interfaces.UserError:
    """The error for a file of a token set that cannot be used."""
    return interfaces.UserError(f"{path} cannot be used: {problem}; {REMEDY}")


def has(path: str, name: str) -> bool:
    """Whether a file is there in a folder of shards."""
    with storage.reached(path):
        return (storage.path(path) / name).exists()


def load(path: str, name: str) -> dict:
    """A file of JSON in a folder of shards."""
    file = os.path.join(path, name)
    try:
        with storage.reached(path):
            content = records.load(storage.path(file))
    except storage.NotReached:
        raise
    except ValueError as error:
        raise damage(file, f"it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise damage(file, "it does not have the form of a header")
    return content


def save(path: str, name: str, content: dict) -> None:
    """A file of JSON in a folder of shards, written whole or not at all."""
    # Several processes may write the plan, all of them the same.
    with storage.reached(path):
        records.save(storage.path(path) / name, json.dumps(content, indent=1) + "\n")
