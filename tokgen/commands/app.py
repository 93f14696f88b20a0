"""A page to play with, in a browser: draw, watch a decode, edit, compare, look at tokens."""

from __future__ import annotations

import argparse
import importlib.util

from tokgen import options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=options.checkpoint,
        metavar="CKPT",
        help="of generators and tokenizers: work directories, steps of them, or published names",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address that the page answers at (default 127.0.0.1: on this machine alone)",
    )
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0 chooses a free one")


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused before a model is fetched or loaded."""
    from tokgen.app import server

    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
    server.check(args.checkpoints, args.host, args.port)


def run(args: argparse.Namespace) -> None:
    """Load, and serve until it is interrupted."""
    from tokgen.app import server

    server.serve(args.checkpoints, host=args.host, port=args.port)
