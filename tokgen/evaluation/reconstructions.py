"""Images of a folder through a tokenizer and back: a picture of pairs, and metrics, as files."""

from __future__ import annotations

import json
import os
import pathlib

from tokgen import image_grid, output, report, runtime
from tokgen.checkpoints import loading
from tokgen.config import building
from tokgen.data import captioned, datasets, folder, sources
from tokgen.evaluation import validation
from tokgen.interfaces import UserError

PAIRS, METRICS = "pairs.png", "figures.json"  # what is written
RECORDS = {METRICS: ("checkpoint", "images")}
PIXELS = 2**26  # of the picture, at most
_WIDTH = 96  # pixels of an image in it, at least: smaller ones are enlarged


def reconstruct(
    tokenizer: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    text: str = "",
    count: int = 1000,
    shown: int = 32,
    batch: int = 0,
    precision: str = "float32",
    overwrite: bool = False,
) -> dict[str, float]:
    """Write pairs.png, originals beside reconstructions, and figures.json; the metrics of it.

    Args:
      tokenizer: its checkpoint: a work directory, or one step of it.
      images: an image, or a folder of images; classes do not matter.
      out: the folder of what is written; what lies in it is replaced with `overwrite` only.
      text: for a decoder that reads text: a folder with all.npy, a row of features per image in
        the order of their paths.
      count: images that are measured, at most, evenly over the folder.
      shown: pairs in the picture, at most.
      batch: images at a time; 0 is by their size.
      precision: of the networks, "float32" or "bfloat16".
    """
    if count < 1 or shown < 1 or batch < 0:
        raise UserError(
            "--number and --shown must be at least 1 and --batch at least 0; found "
            f"{count}, {shown}, {batch}"
        )
    inputs = tuple(map(os.fspath, (tokenizer, images, text)))
    with output.folder(out, records=RECORDS, overwrite=overwrite, inputs=inputs) as place:
        runtime.devices()
        loaded = loading.load_to_code(tokenizer, compute=precision)
        source = _source(loaded, images, text)
        view = datasets.view_of(loaded.config)
        scale = max(1, _WIDTH // view.size[0])
        fitting = max(1, PIXELS // (2 * scale**2 * view.size[0] * view.size[1]))
        if fitting < min(shown, count, len(source)):
            report.say(
                f"{PAIRS} shows {fitting} pairs of {view.size} pixels; no program opens more"
            )
        metrics, (image_BHW3, decoded_BHW3) = validation.reconstruction(
            loaded.module,
            source,
            view,
            count=count,
            what="reconstruct",
            batch=batch,
            shown=min(shown, fitting),
        )
        pairs = image_grid.beside(image_BHW3, decoded_BHW3, scale=scale)
        image_grid.save_png(place.path / PAIRS, pairs)
        record = {"checkpoint": str(loaded.step), "images": str(images), **metrics}
        if "unreadable" in metrics:
            record["unreadable_files"] = source.unreadable.record()["files"]
        (place.path / METRICS).write_text(json.dumps(record, indent=2) + "\n")
    return metrics


def _source(loaded: loading.Loaded, images: str | os.PathLike, text: str) -> sources.RandomAccess:
    """The images, with the text that the decoder reads."""
    path = pathlib.Path(images)
    if path.is_file():
        source = folder.OneImage(path)
    else:
        section = {"name": "folder", "path": str(path), "labels": "none"}  # of any folder
        source = building.build(section, "data", split="all")
        datasets.tell(str(path), all=source)
    reads_text = loaded.config.decoder.get("text")
    if text and not reads_text:
        raise UserError(
            "--text is for a tokenizer whose decoder reads text; found another: leave it out"
        )
    if text:
        return captioned.Source(source, text, split="all")
    if reads_text:
        length, channels = reads_text
        raise UserError(
            f"this tokenizer's decoder reads text: --text must name a folder with all.npy, "
            f"features [images, {length}, {channels}] in the order of the images; found none"
        )
    return source
