"""Images into packed token shards, once, for training generators.

    with pretokenization.folder("tokens") as out:
        pretokenization.pretokenize(loading.load_tokenizer("runs/tokenizer"), out)

What is there already stays, and a folder with tokens of something else is refused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from tokgen import boundary, distributed, output, report, sharding, storage
from tokgen.data import (
    datasets,
    loader,
    online_tokens,
    sources,
    token_header,
    token_writer,
    unreadable,
    views,
)
from tokgen.interfaces import UserError

if TYPE_CHECKING:
    import tqdm


@contextlib.contextmanager
def folder(
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | os.PathLike] = (),
) -> Iterator[output.Folder]:
    """The folder that token shards are written into, for this process alone, or this job.

    `inputs` are what must not lie in it: it may be replaced.
    """
    about = dict(records=token_header.RECORDS, overwrite=overwrite, inputs=inputs)
    place = output.growing_in_bucket if storage.is_remote(path) else output.growing
    with distributed.led("the folder of shards", place(path, lock=".lock", **about)) as found:
        yield _everywhere(found)


def _everywhere(found: output.Folder | None) -> output.Folder:
    """The folder of process 0, in every process."""
    if not distributed.many():
        return found
    told = [str(found.target), str(found.path), found.staged] if found else []
    target, path, staged = json.loads(distributed.gathered("where it is", json.dumps(told))[0])
    target, path = storage.path(target), storage.path(path)
    return found or output.Folder(target, path, "--out", token_header.PLAN, "tokens", staged)


def check(*, batch: int, max_bad: float) -> None:
    """An error where one of the numbers cannot be meant."""
    if batch < 1:
        raise UserError(f"--batch must be at least 1; found {batch}")
    if not 0.0 <= max_bad <= 1.0:
        raise UserError(f"--max-bad is a share between 0 and 1; found {max_bad}")


def pretokenize(
    tokenizer: online_tokens.Tokenizer,
    out: output.Folder,
    *,
    data: str = "",
    labels: str = "",
    views: Sequence[str] = ("center", "flip"),
    batch: int = 100,
    max_bad: float = 1e-3,
) -> None:
    """Encode what `out` does not have yet, of both parts of a set of images, and say so.

    Args:
      data: a folder of images; empty for the data set of the tokenizer's config.
      labels: how the classes of a folder are read; empty for as in that config.
      views: stored views, of views.STORED.
      batch: images encoded together.
      max_bad: the share of the images that may be unreadable.
    """
    check(batch=batch, max_bad=max_bad)
    if tokenizer.layout is None:
        raise UserError(
            f"{tokenizer.step} holds a continuous tokenizer, which writes no tokens; need one with "
            "a discrete quantizer (vq, fsq, lfq, bsq, multiscale)"
        )
    settings = tokenizer.config
    # those who go on keep the order of the classes; what replaces a set has one of its own
    order = ()
    if not out.staged:
        order = tuple(distributed.decided(token_header.recorded_classes, str(out.path)))
    parts = {
        split: datasets.image_source(settings, data, split, labels=labels, order=order)
        for split in token_header.SPLITS
    }
    datasets.tell(datasets.called(settings.get("data", {}), data), **parts)
    distributed.check_alike({f"{split} data": s.fingerprint for split, s in parts.items()})
    planned = functools.partial(_writer, tokenizer, parts, out, views=views, data=data)
    writer = distributed.first(planned)
    if writer is None:  # process 0 has written the plan
        distributed.awaited(lambda: token_header.is_there(out.path) or None, out.path)
        writer = planned()
    _noted(parts, writer)  # of shards that an earlier run wrote
    _write(tokenizer.module, parts, writer, datasets.views_of(settings, views), batch, max_bad)
    if distributed.many():
        distributed.together("shards")
        distributed.awaited(lambda: writer.is_written() or None, out.path)
        _noted(parts, writer)  # and other processes
    distributed.first(writer.finish)
    for source in parts.values():
        source.unreadable.tell(unreadable.LEFT_OUT)
    counts = ", ".join(f"{len(s) - len(s.unreadable)} {split}" for split, s in parts.items())
    bits = math.ceil(math.log2(tokenizer.layout.absent))
    report.say(
        f"{out.target}: {counts} images, {len(views)} views of {tokenizer.layout.length} tokens "
        f"({bits} bits each), made by tokenizer {tokenizer.fingerprint[:16]}"
    )


def _noted(parts: Mapping[str, sources.RandomAccess], writer: token_writer.Writer) -> None:
    """Add the unreadable images of all shards that are there to what sources know of theirs."""
    for split, source in parts.items():
        written = writer.written(split)
        seen = sum(shard.stop - shard.start for shard, _ in written)
        source.unreadable.looked = max(source.unreadable.looked, seen)
        for _, missing in written:
            for index, (_, reason) in missing.items():
                source.unreadable.add(index, reason)


def _writer(
    tokenizer: online_tokens.Tokenizer,
    parts: Mapping[str, sources.RandomAccess],
    out: output.Folder,
    *,
    views: Sequence[str],
    data: str,
) -> token_writer.Writer:
    """The writer of the shards, with all that their header is to say."""
    described = {"path": data} if data else tokenizer.config.data.to_dict()
    about = dict(
        images={split: len(source) for split, source in parts.items() if len(source)},
        layout=tokenizer.layout.to_json(),
        tokenizer={
            "path": str(storage.resolved(tokenizer.step)),
            "fingerprint": tokenizer.fingerprint,
            "precision": tokenizer.config.precision.compute,
        },
        data=described | {"fingerprint": {s: parts[s].fingerprint for s in parts}},
        views=views,
        classes=parts["train"].classes,
    )
    if out.staged and jax.process_index() == 0:  # else the plan of the shards says of what they are
        made_by = {name: about["tokenizer"][name] for name in ("fingerprint", "precision")}
        out.claim(about | {"tokenizer": made_by})
    earlier = {split: source.earlier for split, source in parts.items()}
    return token_writer.Writer(out.path, **about, earlier=earlier)


def _write(
    tokenizer: nnx.Module,
    parts: Mapping[str, sources.RandomAccess],
    writer: token_writer.Writer,
    fixed: Sequence[views.View],
    batch: int,
    max_bad: float,
) -> None:
    """The shards of this process that are not there yet."""
    remaining = writer.remaining((jax.process_index(), jax.process_count()))
    if not remaining:
        report.say(f"every shard of {writer.path} is there already")
        return
    counts = [shard.stop - shard.start for shard in remaining]
    batch, mesh = min(batch, max(counts)), sharding.current()
    with report.bar(sum(counts), unit="image", what="pretokenize") as bar:
        for shard, count in zip(remaining, counts, strict=True):
            source = parts[shard.split]
            tokens_BXLG, label_B, missing = _shard(
                tokenizer, source, shard, fixed, batch, mesh, bar
            )
            # before it is written: what is there stays, and the next run may allow more
            source.unreadable.looked += count
            source.unreadable.check(max_bad, "--max-bad")
            writer.write(shard, tokens_BXLG, label_B, missing)


def _shard(
    tokenizer: nnx.Module,
    source: sources.RandomAccess,
    shard: token_header.Shard,
    fixed: Sequence[views.View],
    batch: int,
    mesh: jax.sharding.Mesh,
    bar: tqdm.tqdm | report.Lines,
) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[str, str]]]:
    """(tokens [images, views, L, G], labels, {index: (name, reason)} of the unreadable) of a shard.

    Those that could not be read keep their places, with zeros.
    """
    count = shard.stop - shard.start
    layout = tokenizer.layout
    tokens_BXLG = np.zeros((count, len(fixed), layout.length, layout.groups), np.int32)
    label_B, seen_B = np.zeros(count, np.int32), np.zeros(count, bool)
    passing = loader.once(
        source,
        views.Every(tuple(fixed)),
        batch_size=batch,
        indices=np.arange(shard.start, shard.stop),
        least=0,
        threads=loader.THREADS,
    )
    with passing:
        for part in passing:
            rows, named = part["index"] - shard.start, datasets.named(source, part["index"])
            label_B[rows], seen_B[rows] = part["label"], True
            for number in range(len(fixed)):
                laid = sharding.filled(part["image"][:, number], batch, mesh)
                with jax.set_mesh(mesh):
                    found_BLG = jax.device_get(online_tokens.encode(tokenizer, laid))[: len(rows)]
                invalid_B = (found_BLG < 0).any((1, 2))
                boundary.refuse(invalid_B, "what the encoder sees in an image", named)
                tokens_BXLG[rows, number] = found_BLG
            bar.update(len(rows))
    broken = shard.start + np.flatnonzero(~seen_B)
    return tokens_BXLG, label_B, source.unreadable.among(broken)
