"""Which generator fits which tokenizer: every pair is built, and what cannot be says why."""

from __future__ import annotations

import argparse

from tokgen import options, runtime


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="a checkpoint: only what fits this tokenizer's tokens",
    )


def run(args: argparse.Namespace) -> None:
    """Print the table, then the reasons."""
    from tokgen.checkpoints import loading
    from tokgen.config import compatibility

    runtime.devices()
    if args.tokenizer:
        loaded = loading.load_tokenizer(args.tokenizer)
        codecs = {compatibility.described(loaded.layout): loaded.module.quantizer}
    else:
        codecs = compatibility.stand_ins()
    print(compatibility.table(codecs))
