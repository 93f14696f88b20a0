"""Images through a tokenizer and back: originals beside reconstructions, and figures."""

from __future__ import annotations

import argparse
import json
import pathlib

from tokgen import output, report, runtime
from tokgen.errors import UserError

PIXELS = 2**26  # of pairs.png, at most
RECORDS = {"figures.json": ("checkpoint", "images")}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="of a tokenizer: a work directory, or one step of it")
    parser.add_argument("images", help="an image, or a folder of images")
    parser.add_argument("--out", required=True, help="folder for pairs.png and figures.json")
    parser.add_argument(
        "--text",
        default="",
        help="for a decoder that reads text: folder with all.npy, a row of features per image in "
        "the order of their paths",
    )
    output.arguments(parser)
    parser.add_argument("--number", type=int, default=1000, help="at most so many images")
    parser.add_argument("--shown", type=int, default=32, help="pairs in the picture")
    parser.add_argument(
        "--batch", type=int, default=0, help="images at a time; default: by their size"
    )
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16"), help="of the networks"
    )


def run(args: argparse.Namespace) -> None:
    """Write the pairs, print the figures."""
    if args.number < 1 or args.shown < 1 or args.batch < 0:
        raise UserError(
            "--number and --shown must be at least 1 and --batch at least 0; found "
            f"{args.number}, {args.shown}, {args.batch}"
        )
    given = dict(overwrite=args.overwrite, inputs=(args.checkpoint, args.images, args.text))
    with output.folder(args.out, records=RECORDS, **given) as out:
        figures = _reconstructed(args, out)
    for name, value in figures.items():
        print(report.row(name, value))
    pairs = pathlib.Path(args.out) / "pairs.png"
    report.say(f"{pairs}: each original with its reconstruction to the right")


def _reconstructed(args: argparse.Namespace, out: output.Folder) -> dict:
    """The figures, after all is written."""
    from tokgen import image_grid
    from tokgen.checkpoints import checkpoint
    from tokgen.config import building
    from tokgen.data import captioned, datasets, folder
    from tokgen.evaluation import validation

    runtime.devices()
    loaded = checkpoint.load_tokenizer(args.checkpoint, compute=args.precision)
    path = pathlib.Path(args.images)
    if path.is_file():
        source = folder.OneImage(path)
    else:
        section = {"name": "folder", "path": str(path), "labels": "none"}  # of any folder
        source = building.build(section, "data", split="all")
        datasets.tell(str(path), all=source)
    if args.text and not loaded.config.decoder.get("text"):
        raise UserError(
            "--text is for a tokenizer whose decoder reads text; found another: leave it out"
        )
    if args.text:
        source = captioned.Source(source, args.text, split="all")
    elif loaded.config.decoder.get("text"):
        length, channels = loaded.config.decoder.text
        raise UserError(
            f"this tokenizer's decoder reads text: --text must name a folder with all.npy, "
            f"features [images, {length}, {channels}] in the order of the images; found none"
        )
    view = datasets.view_of(loaded.config)
    scale = max(1, 96 // view.size[0])
    fitting = max(1, PIXELS // (2 * scale**2 * view.size[0] * view.size[1]))
    if fitting < min(args.shown, args.number, len(source)):
        report.say(f"pairs.png shows {fitting} pairs of {view.size} pixels; no program opens more")
    figures, (image, decoded) = validation.reconstruction(
        loaded.module,
        source,
        view,
        count=args.number,
        what="reconstruct",
        batch=args.batch,
        shown=min(args.shown, fitting),
    )
    image_grid.save_png(out.path / "pairs.png", image_grid.beside(image, decoded, scale=scale))
    record = {"checkpoint": str(loaded.step), "images": str(path), **figures}
    if "unreadable" in figures:
        record["unreadable_files"] = source.unreadable.record()["files"]
    (out.path / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    return figures
