"""Images into packed token shards, once, for training generators."""

from __future__ import annotations

import argparse

from tokgen import options, output


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=options.checkpoint, required=True, help="checkpoint of the tokenizer"
    )
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
    options.processes(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse what is no tokenizer."""
    from tokgen import runtime
    from tokgen.checkpoints import pulling
    from tokgen.data import pretokenization

    pretokenization.check(batch=args.batch, max_bad=args.max_bad)
    pulling.check_kind(args.tokenizer, "tokenizer")
    # before it is pulled: an import starts jax, which counts its devices once
    runtime.devices(args.batch)


def run(args: argparse.Namespace) -> None:
    """Encode what is not there yet; a folder with other tokens is refused."""
    from tokgen import runtime, tokens
    from tokgen.data import views

    with runtime.over(""):
        tokens.pretokenize(
            args.tokenizer,
            args.out,
            data=args.data,
            labels=args.labels,
            views=views.stored(args.views),
            batch=args.batch,
            max_bad=args.max_bad,
            precision=args.precision,
            overwrite=args.overwrite,
        )
