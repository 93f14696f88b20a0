"""What a training run needs, before anything runs: memory, time, links, and the mesh to take.

tokgen plan configs/generator/rar.py:xxl --devices v5e:16x16
"""

from __future__ import annotations

import argparse
import textwrap

from tokgen import options
from tokgen.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="PATH[:variant], as the programs take it")
    parser.add_argument(
        "--devices",
        required=True,
        metavar="SPEC",
        help="cpu:8, h200:1, h100:8x8 (hosts x devices), v5e:16x16, v5p:4x4x4; kinds: cpu, a100, "
        "h100, h200, v4, v5e, v5p, v6e",
    )
    parser.add_argument(
        "--mesh",
        default="",
        metavar="DATA,FSDP,TENSOR",
        help="as --mesh=64,4,1; one may be -1; default: the mesh with the shortest step of those "
        "that have room",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="CONFIG",
        help="of a generator: the recipe of its tokens; default: the one that it is made for",
    )
    parser.add_argument("--classes", type=int, help="of a generator; default: as it is made for")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the config; may be repeated",
    )
    parser.add_argument("--price", type=float, metavar="MONEY", help="of a device for an hour")
    parser.add_argument(
        "--estimate", action="store_true", help="compile nothing; needs no libtpu for a TPU"
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    import jax

    from tokgen.planning import description, devices as planned, recipes

    jax.config.update("jax_platforms", "cpu")  # it computes nothing, and leaves a device alone
    devices = planned.read(args.devices)
    sizes = options.sizes(args.mesh) if args.mesh else None
    recipe = recipes.read(args.config, args.set, tokenizer=args.tokenizer, classes=args.classes)
    if args.price is not None and args.price < 0:
        raise UserError(f"--price is that of a device for an hour; found {args.price}")
    heading = textwrap.fill(f"{args.config} on {devices.called()}", description.COLUMNS)
    print(f"{heading}\n", flush=True)
    for line in description.lines(
        recipe, devices, sizes, price=args.price, compile=not args.estimate
    ):
        print(line, flush=True)
