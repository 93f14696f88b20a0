"""Images from a generator: PNGs, a grid, and an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.errors import UserError

if TYPE_CHECKING:
    from tokgen import samples
    from tokgen.evaluation import ranking
    from tokgen.sampling import presets


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="of a generator: a work directory, one step of it, or a published model's name",
    )
    parser.add_argument(
        "--out", required=True, help="folder for the images: new, empty, or of the same --total"
    )
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
    parser.add_argument(
        "--total",
        type=int,
        default=0,
        help="images in all, as 50000, in the place of --number; goes on with a folder of the same",
    )
    parser.add_argument(
        "--class-counts",
        default="equal",
        choices=("equal", "drawn"),
        help="of --total: as many of each class (default), or each image's class drawn uniformly",
    )
    parser.add_argument(
        "--part",
        default="",
        metavar="I/N",
        help="of --total: draw share I of N into the same --out",
    )
    sampling_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="where the tokenizer lies now, if moved",
    )
    ranking_arguments(parser)
    parser.add_argument(
        "--png",
        action=argparse.BooleanOptionalAction,
        help="a file for each image beside the grid and the .npz; default: unless --total",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="how the first images came to be, step by step: trace.gif and trace.png",
    )
    options.processes(parser)


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are drawn: the options of every command that draws."""
    parser.add_argument("--seed", type=int, default=0)
    choice_arguments(parser)
    parser.add_argument("--batch", type=int, default=32, help="images decoded together")
    options.mesh(parser)


def ranking_arguments(parser: argparse.ArgumentParser) -> None:
    """How many candidates of each image, and what ranks them."""
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        metavar="N",
        help="draw N of each image and keep the best (rejection sampling); takes N times as long",
    )
    parser.add_argument(
        "--rank",
        default="likelihood",
        metavar="likelihood|FILE",
        help="of --candidates: the likeliest under the generator (default), or the one whose class "
        "the classifier of a reference sees most surely (`tokgen reference DATA`)",
    )


def ranking_of(args: argparse.Namespace) -> ranking.Ranking:
    """What the options of `ranking_arguments` ask for."""
    from tokgen.evaluation import ranking

    if args.candidates == 1:
        options.check(args, {"rank": "--candidates above 1"})
    return ranking.Ranking(args.candidates, args.rank)


def choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Which settings images are drawn with, and in which precision."""
    parser.add_argument("--preset", default="default", help="sampling settings of the checkpoint")
    parser.add_argument("--temperature", type=float, help="in the place of the preset's")
    parser.add_argument("--top-k", type=int, help="in the place of the preset's; 0 keeps all")
    parser.add_argument("--top-p", type=float, help="in the place of the preset's")
    parser.add_argument(
        "--guidance", type=float, help="weight, in the preset's place; 1 off, of per_scale 0"
    )
    parser.add_argument("--steps", type=int, help="of a masked generator; 0 is its own number")
    parser.add_argument("--noise", type=float, help="of a masked generator's choice of tokens")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the networks; default: the preset's, float32 on a device without bfloat16 units",
    )


def choice_of(args: argparse.Namespace) -> presets.Choice:
    """What the options of `choice_arguments` ask for."""
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
        total=args.total,
        class_counts=args.class_counts,
        ranking=ranking_of(args),
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what is refused without a network."""
    from tokgen import sample_folder, traces

    idle = {"number": "images of each class, without --total"}
    if args.trace:
        traces.check(settings_of(args))
    if not (args.total or options.is_given(args, "total")):
        idle = dict.fromkeys(("class_counts", "part"), "a number of images in all, --total")
    elif not args.total:
        raise UserError("--total must be at least 1, images in all; found 0")
    options.check(args, idle)
    _share(args)
    sample_folder.check_write(settings_of(args), args.out, overwrite=args.overwrite, part=args.part)


def _share(args: argparse.Namespace) -> str:
    """Which part this process draws: of several, each one."""
    process = runtime.process()
    if process == (0, 1):
        return args.part
    if args.part or not args.total:
        raise UserError(
            f"{process[1]} processes draw a part each of --total images; found "
            f"{'--part' if args.part else '--number'}: say --total, and leave --part out"
        )
    return f"{process[0] + 1}/{process[1]}"


def run(args: argparse.Namespace) -> None:
    """Draw, and write everything that says how."""
    from tokgen import sample_folder

    how = dict(png=args.png, overwrite=args.overwrite, part=_share(args), trace=args.trace)
    with runtime.over(args.mesh):
        report.say(sample_folder.write(settings_of(args), args.out, **how))
