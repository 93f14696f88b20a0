"""Images into packed token shards, once, for training generators."""

from __future__ import annotations

import argparse
import math

from tokgen import options, output, report, runtime
from tokgen.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="checkpoint of the tokenizer")
    parser.add_argument("--data", default="", help="image folder; default: the tokenizer's data")
    parser.add_argument("--out", required=True, help="folder of the token shards")
    options.labels(parser, "as in the tokenizer's config")
    output.arguments(parser)
    parser.add_argument(
        "--views",
        default="center,flip",
        help="stored views, of: center, flip (default both), ten (LlamaGen's and RAR's ten crops)",
    )
    parser.add_argument("--batch", type=int, default=100, help="images encoded together")
    parser.add_argument(
        "--max-bad",
        type=float,
        default=1e-3,
        help="share of the images that may be unreadable (default 0.001; up to 10 always may)",
    )
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16"), help="of the encoder"
    )


def run(args: argparse.Namespace) -> None:
    """Encode what is not there yet; a folder with other tokens is refused."""
    from tokgen.data import pixels as images, token_shards

    views = images.stored(args.views)
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1; found {args.batch}")
    if not 0.0 <= args.max_bad <= 1.0:
        raise UserError(f"--max-bad is a share between 0 and 1; found {args.max_bad}")
    given = dict(overwrite=args.overwrite, inputs=(args.tokenizer, args.data))
    with output.growing(args.out, records=token_shards.RECORDS, lock=".lock", **given) as out:
        _filled(args, views, out)


def _filled(args: argparse.Namespace, views: tuple[str, ...], out: output.Folder) -> None:
    """Encode what a folder does not have yet."""
    import jax

    from tokgen import sharding
    from tokgen.checkpoints import checkpoint
    from tokgen.data import datasets, pixels as images, token_shards, unreadable

    runtime.devices(args.batch)
    loaded = checkpoint.load_tokenizer(args.tokenizer, compute=args.precision)
    if loaded.layout is None:
        raise UserError(
            f"{loaded.step} holds a continuous tokenizer, which writes no tokens; need one with a "
            "discrete quantizer (vq, fsq, lfq, bsq, multiscale)"
        )
    settings, mesh = loaded.config, sharding.make_mesh()
    # those who go on keep the order of the classes; what replaces a set has one of its own
    order = () if out.staged else token_shards.recorded_classes(out.path)
    sources = {
        split: datasets.image_source(settings, args.data, split, labels=args.labels, order=order)
        for split in token_shards.SPLITS
    }
    datasets.tell(datasets.called(settings.get("data", {}), args.data), **sources)
    if not args.data and settings.data.name == "shapes":
        described = settings.data.to_dict()
    else:
        described = {"path": args.data} if args.data else settings.data.to_dict()
    about = dict(
        images={split: len(source) for split, source in sources.items() if len(source)},
        layout=loaded.layout.to_json(),
        tokenizer={
            "path": str(loaded.step.resolve()),
            "fingerprint": loaded.fingerprint,
            "precision": args.precision,
        },
        data=described | {"fingerprint": {s: sources[s].fingerprint for s in sources}},
        views=views,
        classes=sources["train"].classes,
    )
    if out.staged:  # else the plan of the shards says of what they are
        made_by = {name: about["tokenizer"][name] for name in ("fingerprint", "precision")}
        out.claim(about | {"tokenizer": made_by})
    earlier = {s: sources[s].earlier for s in sources}
    writer = token_shards.Writer(out.path, **about, earlier=earlier)
    for split, source in sources.items():  # of shards that an earlier run wrote
        record = source.unreadable
        for shard, missing in writer.written(split):
            record.looked += shard.stop - shard.start
            for index, (_, reason) in missing.items():
                record.add(index, reason)
    process = jax.process_index(), jax.process_count()
    remaining = writer.remaining(process)
    total = sum(shard.stop - shard.start for shard in remaining)
    if not remaining:
        report.say(f"every shard of {args.out} is there already")
    fixed = [
        images.fixed(name, tuple(settings.view.size), settings.view.channels) for name in views
    ]
    batch = min(args.batch, max((shard.stop - shard.start for shard in remaining), default=1))
    with report.bar(total, unit="image", what="pretokenize") as bar:
        for shard in remaining:
            source = sources[shard.split]
            tokens_BXLG, label_B, missing = _shard(
                loaded.module, source, shard, fixed, batch, mesh, bar
            )
            # before it is written: what is there stays, and the next run may allow more
            record = source.unreadable
            record.looked += shard.stop - shard.start
            record.check(args.max_bad, "--max-bad")
            writer.write(shard, tokens_BXLG, label_B, missing)
    writer.finish()
    counts = ", ".join(
        f"{len(source) - len(source.unreadable)} {split}" for split, source in sources.items()
    )
    for source in sources.values():
        source.unreadable.tell(unreadable.LEFT_OUT)
    bits = math.ceil(math.log2(loaded.layout.absent))
    report.say(
        f"{args.out}: {counts} images, {len(views)} views of {loaded.layout.length} tokens "
        f"({bits} bits each), made by tokenizer {loaded.fingerprint[:16]}"
    )


def _shard(tokenizer, source, shard, views, batch, mesh, bar) -> tuple:
    """(tokens [images, views, L, G], labels, {index: (name, reason)} of the unreadable) of a shard.

    Those that could not be read keep their places, with zeros.
    """
    import jax
    import numpy as np

    from tokgen import boundary, sharding
    from tokgen.data import datasets, loader, pixels as images

    count = shard.stop - shard.start
    layout = tokenizer.layout
    tokens_BXLG = np.zeros((count, len(views), layout.length, layout.groups), np.int32)
    label_B, seen_B = np.zeros(count, np.int32), np.zeros(count, bool)
    passing = loader.once(
        source,
        images.Every(tuple(views)),
        batch_size=batch,
        indices=np.arange(shard.start, shard.stop),
        least=0,
        threads=loader.THREADS,
    )
    with passing:
        for part in passing:
            rows, named = part["index"] - shard.start, datasets.named(source, part["index"])
            label_B[rows], seen_B[rows] = part["label"], True
            for number in range(len(views)):
                laid = sharding.filled(part["image"][:, number], batch, mesh)
                found_BLG = jax.device_get(datasets.encode(tokenizer, laid))[: len(rows)]
                invalid_B = (found_BLG < 0).any((1, 2))
                boundary.refuse(invalid_B, "what the encoder sees in an image", named)
                tokens_BXLG[rows, number] = found_BLG
            bar.update(len(rows))
    broken = shard.start + np.flatnonzero(~seen_B)
    return tokens_BXLG, label_B, source.unreadable.among(broken)
