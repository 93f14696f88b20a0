"""Images from a generator: PNGs, a grid, and an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokgen import options, output, report

if TYPE_CHECKING:
    from tokgen import samples
    from tokgen.sampling import presets


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="of a generator: a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("--out", required=True, help="folder for the images; must be new or empty")
    output.arguments(parser)
    parser.add_argument(
        "--classes",
        default="",
        help="names, ids or ranges, as 0-9,cat; or all (default: all of few, some of many)",
    )
    parser.add_argument(
        "--text", default="", help=".npz with features [N, T, E] and mask [N, T], for text models"
    )
    parser.add_argument(
        "--number", type=int, default=8, help="images per class or text (default 8)"
    )
    sampling_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="where the tokenizer lies now, if moved",
    )
    parser.add_argument("--no-png", action="store_true", help="only the grid and the .npz")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are drawn: the options of every command that draws."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="default", help="sampling settings of the checkpoint")
    parser.add_argument("--temperature", type=float, help="in the place of the preset's")
    parser.add_argument("--top-k", type=int, help="in the place of the preset's; 0 keeps all")
    parser.add_argument("--top-p", type=float, help="in the place of the preset's")
    parser.add_argument(
        "--guidance", type=float, help="weight, in the preset's place; 1 off, of per_scale 0"
    )
    parser.add_argument("--steps", type=int, help="of a masked generator; 0 is its own number")
    parser.add_argument("--noise", type=float, help="of a masked generator's choice of tokens")
    parser.add_argument("--batch", type=int, default=32, help="images decoded together")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the networks; default: the preset's",
    )


def choice_of(args: argparse.Namespace) -> presets.Choice:
    """What the options of `sampling_arguments` ask for."""
    from tokgen.sampling import presets

    return presets.Choice(
        preset=args.preset,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        guidance=args.guidance,
        steps=args.steps,
        noise=args.noise,
    )


def settings_of(args: argparse.Namespace) -> samples.Settings:
    """What the options of this command ask for."""
    from tokgen import samples

    return samples.Settings(
        checkpoint=args.checkpoint,
        classes=args.classes,
        text=args.text,
        number=args.number,
        seed=args.seed,
        batch=args.batch,
        precision=args.precision or "",
        tokenizer=args.tokenizer,
        sampling=choice_of(args),
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused without a network."""
    from tokgen import samples

    samples.check_write(settings_of(args), args.out, overwrite=args.overwrite)


def run(args: argparse.Namespace) -> None:
    """Draw, and write everything that says how."""
    from tokgen import samples

    settings = settings_of(args)
    report.say(samples.write(settings, args.out, png=not args.no_png, overwrite=args.overwrite))
