"""Images through a tokenizer and back: originals beside reconstructions, and figures."""

from __future__ import annotations

import argparse
import json
import pathlib

from tokgen import checkpoint, config, heldout, launch, report
from tokgen.data import captioned, reader
from tokgen.interfaces import UserError


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
    parser.add_argument("--number", type=int, default=1000, help="at most so many images")
    parser.add_argument("--shown", type=int, default=32, help="pairs in the picture")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16"), help="of the networks"
    )


def run(args: argparse.Namespace) -> None:
    """Write the pairs, print the figures."""
    if args.number < 1 or args.shown < 1:
        raise UserError(
            f"--number and --shown must be at least 1; found {args.number}, {args.shown}"
        )
    launch.devices()
    loaded = checkpoint.load_tokenizer(args.checkpoint, compute=args.precision)
    path = pathlib.Path(args.images)
    if path.is_file():
        source = OneImage(path)
    else:
        source = config.build({"name": "folder", "path": str(path)}, "data", split="all")
    if args.text:
        source = captioned.Source(source, args.text, split="all")
    elif loaded.config.decoder.get("text"):
        length, channels = loaded.config.decoder.text
        raise UserError(
            f"this tokenizer's decoder reads text: --text must name a folder with all.npy, "
            f"features [images, {length}, {channels}] in the order of the images; found none"
        )
    figures, (image, painted) = heldout.reconstruction(
        loaded.module,
        source,
        heldout.view_of(loaded.config),
        count=args.number,
        what="reconstruct",
        batch=max(min(args.shown, len(source)), min(50, len(source))),
    )
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    scale = max(1, 96 // image.shape[1])
    pairs = report.beside(image[: args.shown], painted[: args.shown], scale=scale)
    report.save_png(out / "pairs.png", pairs)
    record = {"checkpoint": str(loaded.step), "images": str(path), **figures}
    if "unreadable" in figures:
        record["unreadable_files"] = reader.unreadable(source).record()["files"]
    (out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")
    report.say(f"{out / 'pairs.png'}: each original with its reconstruction to the right")


class OneImage:
    """A single file as a source."""

    classes: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path):
        self.path, self.fingerprint = path, str(path)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, bytes | int]:
        return {"image": self.path.read_bytes(), "label": 0}

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.path)
