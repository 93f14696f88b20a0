"""Parts of images drawn anew: in-painting, out-painting, variations, finer scales."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.commands import sample

if TYPE_CHECKING:
    from tokgen import edit_folder


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file of an image, or several")
    parser.add_argument(
        "--generator",
        required=True,
        type=options.checkpoint,
        metavar="CKPT",
        help="a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("--out", required=True, help="folder for the edits")
    output.arguments(parser)
    what = parser.add_argument_group("what is drawn anew, one of these")
    what.add_argument(
        "--mask",
        metavar="REGION",
        help="left, right, top, bottom, center, all, box=ROW,COLUMN,HEIGHT,WIDTH, or the file of "
        "an image of the same size: white is drawn, black keeps every byte",
    )
    what.add_argument(
        "--grow",
        metavar="SIDES",
        help="a larger canvas: pixels added at each side, as right=128,bottom=64",
    )
    what.add_argument(
        "--strength",
        type=float,
        help="a variation: the share of the tokens, from 0 to 1, that the generator is least "
        "certain of; of several scales the share of these, the finest",
    )
    what.add_argument(
        "--scales",
        type=int,
        help="more detail: so many of the coarsest scales are kept, the finer ones drawn; IMAGE "
        "may have any size",
    )
    parser.add_argument(
        "--label",
        default="",
        help="the class, by name or id, of what is drawn: one for all images, or as many with "
        "commas between",
    )
    parser.add_argument(
        "--text", default="", help=".npz with features [N, T, E] and mask [N, T], for text models"
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="cut images, and a mask's file, in the middle and resize them to the model's size",
    )
    parser.add_argument("--number", type=int, default=4, help="draws of each image (default 4)")
    parser.add_argument(
        "--particles",
        type=int,
        default=64,
        help="where a generator's order has kept pixels after drawn ones: so many draws are held "
        "against what is kept, step by step, for one that stays (default 64)",
    )
    parser.add_argument(
        "--feather",
        type=float,
        help="pixels inside of the mask over which both meet (default: a 32nd of the side)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="of --grow: the share of a window's side that lies over what is there (default 0.5)",
    )
    sample.sampling_arguments(parser)
    sample.ranking_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="where the tokenizer lies now, if moved",
    )


def settings_of(args: argparse.Namespace) -> edit_folder.Settings:
    """What the options of this command ask for."""
    from tokgen import edit_folder
    from tokgen.editing import edits

    return edit_folder.Settings(
        images=tuple(args.images),
        generator=args.generator,
        edit=edits.Settings(
            mask=args.mask,
            grow=args.grow,
            strength=args.strength,
            scales=args.scales,
            number=args.number,
            seed=args.seed,
            particles=args.particles,
            feather=args.feather,
            batch=args.batch,
            overlap=args.overlap,
            ranking=sample.ranking_of(args),
        ),
        label=args.label,
        text=args.text,
        fit=args.fit,
        precision=args.precision or "",
        tokenizer=args.tokenizer,
        sampling=sample.choice_of(args),
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused without a network."""
    from tokgen import edit_folder

    idle = {"overlap": "--grow"} if args.grow is None else {}
    idle |= {"feather": "--mask and --grow"} if args.mask is None and args.grow is None else {}
    options.check(args, idle)
    edit_folder.check_write(settings_of(args), args.out, overwrite=args.overwrite)


def run(args: argparse.Namespace) -> None:
    """Draw, and write the edits beside what they are of."""
    from tokgen import edit_folder

    with runtime.over(args.mesh):
        report.say(edit_folder.write(settings_of(args), args.out, overwrite=args.overwrite))
