"""A checkpoint on held-out images: reconstruction of a tokenizer, likelihood of a generator.

With --protocol, scores: of samples, of a generator's, of a tokenizer's reconstructions.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.commands import sample
from tokgen.errors import UserError
from tokgen.evaluation import protocols

if TYPE_CHECKING:
    from tokgen.evaluation import score_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="a work directory, one step of it, or a published model's name; or samples: .npz, "
        "folder of images",
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
        "--orders", type=int, help="draws per image, where orders are drawn (default 8)"
    )
    parser.add_argument(
        "--out", default=None, help="append the metrics to this JSONL file; of a score: its folder"
    )
    parser.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="where the generator's tokenizer lies now",
    )
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
    options.accept(score)
    sample.sampling_arguments(score)
    options.processes(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused of any checkpoint."""
    if args.protocol:
        from tokgen.evaluation import score_settings

        score_settings.check(_settings_of(args))
        return
    if args.reference or args.weights or args.assume or args.samples or args.lpips:
        raise UserError(
            "--reference, --weights, --assume, --samples and --lpips are of a score: name its "
            f"--protocol, one of {', '.join(protocols.PROTOCOLS)}"
        )
    if args.overwrite:
        raise UserError("--overwrite is of a score; without --protocol metrics are added to --out")


def run(args: argparse.Namespace) -> None:
    """Print the metrics and, with --out, append them to a file; with --protocol, score."""
    with runtime.over(args.mesh):
        if args.protocol:
            _score(args)
        else:
            _validate(args)


def shared(args: argparse.Namespace) -> dict:
    """The fields of score_settings.Settings that tokgen sweep has options for as well."""
    names = ("protocol", "reference", "assume", "weights", "samples", "seed", "batch", "overwrite")
    return {name: getattr(args, name) for name in (*names, "text", "tokenizer")} | {
        "scored": args.checkpoint,
        "out": args.out or "",
        "accept": tuple(args.accept),
        "precision": args.precision or "",
    }


def _settings_of(args: argparse.Namespace) -> score_settings.Settings:
    """What the options of a score ask for."""
    from tokgen.evaluation import score_settings

    return score_settings.Settings(
        **shared(args),
        reconstruction=args.reconstruction,
        lpips=tuple(args.lpips),
        data=args.data,
        split=args.split,
        labels=args.labels,
        sampling=sample.choice_of(args),
    )


def _score(args: argparse.Namespace) -> None:
    from tokgen.evaluation import score, score_settings

    settings = _settings_of(args)
    kinds = {"": options.SAMPLES, "tokenizer": options.RECONSTRUCTED, "generator": options.DRAWN}
    options.check_mode(args, options.EVALUATE, kinds[score_settings.check_kind(settings)])
    report.result(score.table(score.score(settings)))


def _validate(args: argparse.Namespace) -> None:
    from tokgen import distributed
    from tokgen.checkpoints import checkpoint
    from tokgen.evaluation import checkpoint_validation

    settings = checkpoint_validation.Settings(
        checkpoint=args.checkpoint,
        data=args.data,
        split=args.split,
        labels=args.labels,
        images=args.images,
        text=args.text,
        tokenizer=args.tokenizer,
        order=args.order,
        orders=args.orders,
        seed=args.seed if args.seed or options.is_given(args, "seed") else None,
        batch=args.batch,
        precision=args.precision or "",
    )
    checkpoint_validation.check(settings)
    inputs = (args.checkpoint, args.data, args.text, args.tokenizer)
    place = contextlib.nullcontext([])
    if args.out is not None:
        place = output.lines(args.out, inputs=inputs)
    with distributed.led("the file of results", place) as lines:
        step = checkpoint.find(args.checkpoint)
        kind = checkpoint.read_meta(step)["kind"]
        if args.reconstruction and kind != "tokenizer":
            raise UserError(f"--reconstruction needs a tokenizer; {step} holds a {kind}")
        mode = options.TOKENIZER if kind == "tokenizer" else options.GENERATOR
        options.check_mode(args, options.EVALUATE, mode)
        record, shown = checkpoint_validation.validate(settings)
        if lines is not None:
            lines.append(record)
    report.result("\n".join(report.row(name, value) for name, value in shown.items()))
