"""What is understood of a set of images or of token shards, line by line, for people.

Lines come as they are found: a set of millions is scanned for a while.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from tokgen import report, storage
from tokgen.data import classes, datasets, scan, token_header, token_shards
from tokgen.interfaces import UserError

SCANS = ("headers", "full")


def kind_of(path: str | os.PathLike) -> str:
    """What a path names: "tokens", "tfds", "npz" or "folder"."""
    if (storage.path(path) / token_header.HEADER).exists():
        return "tokens"
    return datasets.kind_of(path)


def lines(
    path: str | os.PathLike,
    *,
    scanned: str = "headers",
    labels: str = "",
    splits: Sequence[str] = ("train", "test"),
    data_dir: str = "",
    label: str = "",
    held_out: float = 0.02,
    channels: int = 3,
) -> Iterator[str]:
    """Splits, classes, counts, sizes, and by name what cannot be read.

    Args:
      path: an image folder, `tfds:NAME`, or a folder of token shards.
      scanned: "headers"; or "full": every image is decoded, or every record of shards is checked.
      labels, splits, data_dir, label, held_out: of images, as `datasets.from_path` takes them.
      channels: of images that are decoded, 1 or 3.
    """
    if scanned not in SCANS:
        raise UserError(f"a scan is one of {', '.join(SCANS)}; found {scanned!r}")
    kind = kind_of(path)
    if kind == "tokens":
        return _of_tokens(path, scanned)
    if kind == "npz":
        raise UserError(
            f"{path} holds pixels, of which nothing is decoded and no part is held out; give "
            "an image folder, tfds:NAME or a folder of token shards"
        )
    given = dict(labels=labels, splits=tuple(splits), data_dir=data_dir, label=label)
    sources = {"train": datasets.from_path(path, "train", held_out=held_out, **given)}
    try:
        sources["held_out"] = datasets.from_path(path, "held_out", held_out=held_out, **given)
    except UserError as error:  # a set without such a part can be looked at all the same
        report.say(str(error))
    return _of_images(path, sources, scanned, channels)


def _of_images(
    path: str | os.PathLike, sources: dict, scanned: str, channels: int
) -> Iterator[str]:
    """What is understood of images, and what a scan of each split sees."""
    yield classes.told(path, sources)
    total, looked, broken = 0, 0, {}
    for split, source in sources.items():
        found = scan.full(source, channels) if scanned == "full" else scan.headers(source)
        unreadable = source.unreadable
        total, looked = total + len(source), looked + found.count
        broken |= unreadable.files()
        told = f", {len(unreadable)} unreadable" if found.count else ""
        yield f"{split:<9} {len(source):,} images{told}"
        if found.sizes:
            yield f"{'':9} rows x columns: {_sizes(found.sizes)}"
            forms = sorted(found.forms.items(), key=lambda item: -item[1])
            yield f"{'':9} formats: {', '.join(f'{form} {count:,}' for form, count in forms)}"
        of_bytes = f", all bytes {found.sha256[:16]}" if found.sha256 else ""
        yield f"{'':9} fingerprint {source.fingerprint[:16]}{of_bytes}"
    for name, reason in broken.items():
        yield f"unreadable  {name}: {reason}"
    if scanned == "full":
        yield f"{total:,} images decoded, {len(broken)} of them cannot be read"
    elif not looked:
        yield (
            f"{total:,} images, none of them looked at: the set has no files whose headers could "
            "be read alone; --scan full decodes every image"
        )
    else:
        yield (
            f"{total:,} images by their headers, {len(broken)} of them cannot be read; --scan full "
            "decodes every image"
        )


def _of_tokens(path: str | os.PathLike, scanned: str) -> Iterator[str]:
    """What the header of a token set says; of a full scan, what its records hold."""
    sources, wrong = {}, {}
    for split in token_header.SPLITS:
        verify = "always" if scanned == "full" else "never"
        try:
            sources[split] = token_shards.Source(path, split=split, verify=verify)
        except UserError as error:
            wrong[split] = error
    if not sources:
        raise next(iter(wrong.values()))
    for error in wrong.values():
        report.say(str(error))
    yield classes.told(path, sources)
    for split, source in sources.items():
        yield (
            f"{split:<9} {len(source):,} images in {len(source.views)} views, "
            f"{len(source.missing)} without tokens"
        )
        for name, reason in source.missing.values():
            yield f"unreadable  {name}: {reason}"


def _sizes(sizes: dict[tuple[int, int], int]) -> str:
    """The most frequent sizes, and between which the others lie."""
    most = sorted(sizes.items(), key=lambda item: -item[1])
    told = [f"{rows} x {columns} ({count:,})" for (rows, columns), count in most[:5]]
    if len(most) > 5:
        least, largest = (
            min(sizes, key=lambda s: s[0] * s[1]),
            max(sizes, key=lambda s: s[0] * s[1]),
        )
        told.append(
            f"and {len(most) - 5} others, from {least[0]} x {least[1]} to {largest[0]} x "
            f"{largest[1]}"
        )
    return ", ".join(told)
