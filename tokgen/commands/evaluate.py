"""Held-out figures of a checkpoint: reconstruction of a tokenizer, likelihood of a generator.

With --protocol, scores: of samples, of a generator's, of a tokenizer's reconstructions.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import time
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.commands import sample
from tokgen.errors import UserError
from tokgen.evaluation import protocols

if TYPE_CHECKING:
    from tokgen.checkpoints import checkpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a work directory or one step of it; or samples: .npz, folder of images"
    )
    parser.add_argument(
        "--reconstruction", action="store_true", help="of a tokenizer; told from the checkpoint"
    )
    parser.add_argument("--data", default="", help="image folder, or token shards; default: config")
    parser.add_argument("--split", default="held_out", help="held_out (default), train or all")
    options.labels(parser, "as in the tokenizer's config, of samples folders")
    parser.add_argument("--images", type=int, default=1000, help="at most so many (default 1000)")
    parser.add_argument(
        "--text", default="", help="folder of text features, for text models; default: config"
    )
    parser.add_argument(
        "--order", default="", help="of a generator: its nats under raster, columns or random order"
    )
    parser.add_argument(
        "--orders", type=int, default=8, help="draws per image, where orders are drawn (default 8)"
    )
    parser.add_argument(
        "--out", default=None, help="append the figures to this JSONL file; of a score: its folder"
    )
    parser.add_argument("--tokenizer", default="", help="where the generator's tokenizer lies now")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier score at --out, as a whole"
    )
    score = parser.add_argument_group("scores of samples or reconstructions against a reference")
    score.add_argument("--protocol", default="", help=", ".join(protocols.PROTOCOLS))
    score.add_argument("--reference", default="", help="what tokgen reference wrote, or ADM's .npz")
    score.add_argument("--assume", default="", help="the protocol of a reference without a record")
    score.add_argument("--weights", default="", help="weight file of a published feature network")
    score.add_argument(
        "--lpips", nargs="*", default=[], metavar="FILE", help="LPIPS weights: trunk and heads"
    )
    score.add_argument(
        "--samples",
        type=int,
        default=0,
        help="default: the protocol's; all that are given; of a generator 1000",
    )
    score.add_argument(
        "--accept",
        action="extend",
        nargs="+",
        default=[],
        choices=("duplicates", "constant", "few", "lossy"),
        help="score although there are copies, images of one colour, few samples, or JPEGs",
    )
    sample.sampling_arguments(score)


def run(args: argparse.Namespace) -> None:
    """Print the figures and, with --out, append them to a file; with --protocol, score."""
    from tokgen.evaluation import score as scores

    if args.images < 1 or args.orders < 1:
        raise UserError(
            f"--images and --orders must be at least 1; found {args.images}, {args.orders}"
        )
    if args.protocol:
        scores.run(args)
        return
    if args.reference or args.weights or args.assume or args.samples or args.lpips:
        raise UserError(
            "--reference, --weights, --assume, --samples and --lpips are of a score: name its "
            f"--protocol, one of {', '.join(protocols.PROTOCOLS)}"
        )
    if args.batch < 1 or not 0 <= args.seed < 2**32:
        raise UserError(
            f"--batch must be at least 1, --seed in [0, 2**32); found {args.batch}, {args.seed}"
        )
    if args.overwrite:
        raise UserError("--overwrite is of a score; without --protocol figures are added to --out")
    inputs = (args.checkpoint, args.data, args.text, args.tokenizer)
    place = contextlib.nullcontext([])
    if args.out is not None:
        place = output.lines(args.out, inputs=inputs)
    with place as lines:
        record, shown = _measured(args)
        lines.append(record)
    for name, value in shown.items():
        print(report.row(name, value))


def _measured(args: argparse.Namespace) -> tuple[dict, dict]:
    """(the figures with what they are of, the figures by the names that people read)."""
    from tokgen.checkpoints import checkpoint

    runtime.devices()
    step = checkpoint.find(args.checkpoint)
    kind = checkpoint.read_meta(step)["kind"]
    if args.reconstruction and kind != "tokenizer":
        raise UserError(f"--reconstruction needs a tokenizer; {step} holds a {kind}")
    mode = options.TOKENIZER if kind == "tokenizer" else options.GENERATOR
    options.check_mode(args, options.EVALUATE, mode)
    measured = _tokenizer if kind == "tokenizer" else _generator
    figures, title, source, precision = measured(step, args)
    record = {
        "checkpoint": str(step),
        "split": args.split,
        "data": args.data,
        "order": args.order,
        "seed": args.seed,
        "precision": precision,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **figures,
    }
    if "unreadable" in figures:
        record["unreadable_files"] = source.unreadable.record()["files"]
    named = {title if name == "nats_per_token" else name: v for name, v in figures.items()}
    return record, named


def _tokenizer(step: pathlib.Path, args: argparse.Namespace) -> tuple:
    """(figures, what their first is called, the source that they are of, the precision)."""
    from tokgen.checkpoints import checkpoint
    from tokgen.data import captioned, datasets
    from tokgen.evaluation import validation

    loaded = checkpoint.load_tokenizer(step, compute=args.precision or "")
    source = datasets.image_source(
        loaded.config, args.data, args.split, labels=args.labels, doubtful="drop"
    )
    if args.text and not loaded.config.decoder.get("text"):
        raise UserError("--text is for a tokenizer whose decoder reads text; found another")
    if args.text:
        pictures = source.inner if isinstance(source, captioned.Source) else source
        source = captioned.Source(pictures, args.text, split=args.split)
    what = datasets.called(loaded.config.get("data", {}), args.data)
    datasets.tell(what, **{args.split: source})
    datasets.check_filled(source, args.split)
    report.say(f"{min(args.images, len(source))} of {len(source)} images, step {step.name}")
    view = datasets.view_of(loaded.config)
    batch = min(args.batch, validation.bounded(view, args.images))
    found, _ = validation.reconstruction(
        *(loaded.module, source, view), count=args.images, batch=batch, what="reconstruct"
    )
    return found, "", source, loaded.config.precision.compute


def _generator(step: pathlib.Path, args: argparse.Namespace) -> tuple:
    """(figures, what their first is called, the source that they are of, the precision)."""
    from tokgen.checkpoints import checkpoint
    from tokgen.data import classes, datasets, token_shards, unreadable
    from tokgen.evaluation import validation

    loaded = checkpoint.load_generator(step, compute=args.precision or "")
    if loaded.module.exact and args.order != "random":
        when = "orders that are drawn: of a masked generator, or with --order random"
        options.check(args, {"orders": when, "seed": when})
    tokenizer = checkpoint.load_tokenizer_of(loaded, args.tokenizer)
    data = _data_of(loaded, args.data)
    data["text"] = args.text or data.get("text", "")
    datasets.check_text(loaded.module, data["text"], "--text")
    if data["tokens"]:
        options.check(args, {"labels": "images, not for token shards"})
        train = token_shards.Source(data["tokens"])  # whole, before anything is measured
        source = datasets.generator_source(data, args.split)
        checkpoint.check_tokens(tokenizer, source.header, source.path)
    else:
        encoder = checkpoint.load_tokenizer(tokenizer.step, compute="float32")
        source = datasets.generator_source(data, args.split, encoder, labels=args.labels)
    datasets.tell(datasets.called(data, args.data), **{args.split: source})
    datasets.check_filled(source, args.split)
    label_C = None
    if not data["text"]:
        where = args.data or "the data"
        label_C, said = classes.matched(source.classes, loaded.classes, where, "the generator")
        if said:
            report.say(said)
    report.say(f"{min(args.images, len(source))} of {len(source)} images, step {step.name}")
    figures = validation.likelihood(
        *(loaded.module, tokenizer.module.quantizer, source),
        count=args.images,
        batch=args.batch,
        what="likelihood",
        order=args.order,
        draws=args.orders,
        seed=args.seed,
        label_C=label_C,
    )
    how = [] if loaded.module.exact else ["upper bound"]
    how += [f"order {args.order}"] if args.order else []
    how += [f"{figures['orders']} orders"] if "orders" in figures else []
    title = f"nats_per_token ({', '.join(how)})" if how else "nats_per_token"
    if data["tokens"]:  # images would all have to be encoded for it
        unreadable.share(source, train)
        figures |= validation.unigram(train, source, loaded.layout)
    return figures, title, source, loaded.config.precision.compute


def _data_of(loaded: checkpoint.Loaded, path: str) -> dict:
    """The config's `data`, with the shards or images that lie at `path`, if one is given."""
    from tokgen.checkpoints import checkpoint
    from tokgen.data import token_shards

    data = {"tokens": "", **dict(loaded.config.get("data", {}))}
    record = loaded.meta["tokens"]
    data["tokens"] = str(checkpoint.referred(record, loaded.step)) if record else ""
    shards = any(
        (pathlib.Path(path) / name).exists() for name in (token_shards.HEADER, token_shards.PLAN)
    )
    if path and shards:
        data["tokens"] = path
    elif path:
        data |= {"tokens": "", "images": path}
    return data
