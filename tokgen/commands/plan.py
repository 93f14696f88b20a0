"""What training or drawing needs, before anything runs: memory, time, links, and the mesh to take.

tokgen plan configs/generator/rar.py:xxl --devices v5e:16x16
tokgen plan runs/generator --decode --batch 256 --devices h100:1
"""

from __future__ import annotations

import argparse
import contextlib
import textwrap
from typing import TYPE_CHECKING

from tokgen import options
from tokgen.commands import sample
from tokgen.errors import UserError

if TYPE_CHECKING:
    from tokgen.planning import devices as planned

DECODING = ("batch", "preset", "temperature", "top_k", "top_p", "guidance", "steps", "noise")
DECODING += ("precision",)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="PATH[:variant], as the programs take it; with --decode also a checkpoint",
    )
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
        "that have room; of --decode, images over all devices",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="CONFIG",
        help="of a generator: the recipe of its tokens; default: the one that it is made for. Of a "
        "checkpoint: where its tokenizer lies now",
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
    group = parser.add_argument_group(
        "drawing images", "in the place of training; as tokgen sample"
    )
    group.add_argument("--decode", action="store_true", help="plan how images are drawn")
    group.add_argument("--batch", type=int, default=32, help="images drawn together")
    sample.choice_arguments(group)


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused without a network."""
    if args.price is not None and args.price < 0:
        raise UserError(f"--price is that of a device for an hour; found {args.price}")
    if not args.decode:
        options.check(args, dict.fromkeys(DECODING, "drawing images, --decode"))
    elif args.batch < 1:
        raise UserError(f"--batch must be at least 1; found {args.batch}")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    import jax

    from tokgen.planning import description, devices as planned, recipes

    devices = planned.read(args.devices)
    jax.config.update("jax_platforms", "cpu")  # it computes nothing, and leaves a device alone
    if args.decode:
        return _drawing(args, devices)
    sizes = options.sizes(args.mesh) if args.mesh else None
    _is_recipe(args.config)
    recipe = recipes.read(
        args.config,
        args.set,
        tokenizer=args.tokenizer,
        classes=args.classes,
        platform=devices.platform,
    )
    _head(f"{args.config} on {devices.called()}")
    how = dict(price=args.price, compile=not args.estimate)
    for line in description.lines(recipe, devices, sizes, **how):
        print(line, flush=True)


def _is_recipe(config: str) -> None:
    """UserError for what is no recipe: what draws is named otherwise, and planned with --decode."""
    import pathlib

    from tokgen.config import reading
    from tokgen.zoo import model as zoo

    if zoo.is_name(config):
        found = zoo.named(config)
        files = sorted((reading.programs() / "configs" / found.kind).glob("*.py"))
        work = config.partition("-")[0]
        recipe = next(
            (f.name for f in files if f.stem == found.system),
            next((f.name for f in files if f.stem.startswith(work)), "NAME.py"),
        )
        draws = "add --decode to plan how it draws, or " if found.kind == "generator" else ""
        raise UserError(
            f"{config} is a published model, and training is planned by a recipe: {draws}give as "
            f"CONFIG one that trains such a network, configs/{found.kind}/{recipe}:VARIANT"
        )
    if pathlib.Path(config).is_dir():
        raise UserError(
            f"{config} is a folder, and training is planned by a recipe, PATH[:VARIANT]; of a "
            "generator's checkpoint, add --decode to plan how it draws"
        )


def _drawing(args: argparse.Namespace, devices: planned.Devices) -> None:
    """Print the plan of a batch of images."""
    import jax

    from tokgen.planning import decoding_description, networks

    sizes = options.sizes(args.mesh) if args.mesh else None
    if devices.chip is None and not args.estimate:
        with contextlib.suppress(RuntimeError):  # jax has begun, with as many as it has
            jax.config.update("jax_num_cpu_devices", devices.count)
    found = networks.read(
        args.config,
        args.set,
        choice=sample.choice_of(args),
        precision=args.precision or "",
        tokenizer=args.tokenizer,
        classes=args.classes,
        on_cpu=devices.chip is None and (sizes is None or sizes[1:] == (1, 1)),
    )
    _head(f"{args.config}, {args.batch:,} images at a time, on {devices.called()}")
    how = dict(price=args.price, compile=not args.estimate)
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what was compiled before takes no time
    try:
        for line in decoding_description.lines(found, args.batch, devices, sizes, **how):
            print(line, flush=True)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _head(text: str) -> None:
    from tokgen.planning import description

    print(f"{textwrap.fill(text, description.COLUMNS)}\n", flush=True)
