"""Images from a generator: PNGs, a grid, and an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokgen import options, output, report, runtime
from tokgen.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tokgen.interfaces import PyTree
    from tokgen.sampling import presets

# Without --classes: all of so many, or some of them evenly over all
FEW, SOME = 16, 8
RECORDS = {"samples.json": ("checkpoint", "settings")}
COLUMNS = 16  # images of a row of grid.png
PIXELS, SIDE = 2**26, 2**14  # of grid.png, at most; SIDE is its height


def chosen(text: str, classes: tuple[str, ...]) -> list[int]:
    """Labels of `--classes`: names, numbers or ranges (`0-9`), comma between, or `all`.

    Without any: all where they are few, else some evenly over them. Where the names are numbers
    themselves, numbers and ranges are of names.
    """
    from tokgen.data import classes as names_

    count = max(len(classes), 1)
    if not text and count > FEW:
        return [n * count // SOME for n in range(SOME)]
    if not text or (text.strip() == "all" and "all" not in classes):
        return list(range(count))
    label_of = {number: number for number in range(count)}
    if names_.numbered(classes):
        label_of = {int(name): label for label, name in enumerate(classes)}
    labels = []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(-?[0-9]{1,18})(?:-([0-9]{1,18}))?", part)
        if part in classes:
            labels.append(classes.index(part))
        elif span:
            low = int(span[1])
            high = low if span[2] is None else int(span[2])
            if not low <= high <= low + count or not all(
                number in label_of for number in range(low, high + 1)
            ):
                ids = f"{min(label_of)} to {max(label_of)}"
                if len(label_of) <= max(label_of) - min(label_of):
                    ids = f"among {ids}"
                named = f" ({', '.join(classes[:10])}{' ...' if count > 10 else ''})"
                raise UserError(f"class ids are {ids}{named if classes else ''}; found {part}")
            labels.extend(label_of[number] for number in range(low, high + 1))
        else:
            raise UserError(
                f"unknown class {part!r}; need ids 0 to {count - 1} or names: "
                f"{', '.join(classes[:20]) or 'none, the model is unconditional'}"
            )
    return labels


def conditions(args: argparse.Namespace, loaded) -> tuple[PyTree, np.ndarray, list[str]]:
    """(the condition of every image, the number of its class or text [N], names of the classes)."""
    import jax
    import numpy as np

    from tokgen.data import captioned, classes as names_

    kind = loaded.module.cond
    if kind == "label" and args.text:
        raise UserError(
            "--text needs a generator that reads text; found one of "
            f"{len(loaded.classes)} classes: use --classes"
        )
    if kind == "label":
        labels = chosen(args.classes, loaded.classes)
        if not args.classes and len(labels) < len(loaded.classes):
            report.say(
                f"{len(labels)} of {len(loaded.classes)} classes are drawn, evenly over them: "
                f"{names_.listed([loaded.classes[i] for i in labels])}; --classes chooses others, "
                f"--classes all draws {len(loaded.classes) * args.number:,} images"
            )
        label_N = np.repeat(np.asarray(labels, np.int32), args.number)
        return label_N, label_N, [loaded.classes[i] if loaded.classes else "" for i in labels]
    if args.classes or not args.text:
        raise UserError(
            "the generator reads text: it needs --text FILE.npz with arrays features [N, T, E] "
            f"and mask [N, T]; found {'--classes' if args.classes else 'none'}"
        )
    text = captioned.conditions(args.text)
    row_N = np.repeat(np.arange(len(text.mask_BT), dtype=np.int32), args.number)
    return jax.tree.map(lambda leaf: leaf[row_N], text), row_N, []


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="of a generator: a work directory, or one step of it")
    parser.add_argument("--out", required=True, help="folder for the images; must be new or empty")
    output.arguments(parser)
    parser.add_argument(
        "--classes",
        default="",
        help="names, ids or ranges, as 0-9,cat; or all "
        f"(default: all of {FEW} or fewer, else {SOME} evenly over them)",
    )
    parser.add_argument(
        "--text", default="", help=".npz with features [N, T, E] and mask [N, T], for text models"
    )
    parser.add_argument(
        "--number", type=int, default=8, help="images per class or text (default 8)"
    )
    sampling_arguments(parser)
    parser.add_argument("--tokenizer", default="", help="where the tokenizer lies now, if moved")
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


def run(args: argparse.Namespace) -> None:
    """Draw, and write everything that says how."""
    if args.number < 1 or args.batch < 1:
        raise UserError(
            f"--number and --batch must be at least 1; found {args.number}, {args.batch}"
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2**32); found {args.seed}")
    given = dict(overwrite=args.overwrite, inputs=(args.checkpoint, args.tokenizer, args.text))
    with output.folder(args.out, records=RECORDS, **given) as out:
        told = _sampled(args, out)
    report.say(told)


def _sampled(args: argparse.Namespace, out: output.Folder) -> str:
    """Draw what an unfinished result does not have yet, and write all; what is to be said."""
    from tokgen import image_grid
    from tokgen.checkpoints import checkpoint
    from tokgen.data import classes as names_
    from tokgen.evaluation import made_images
    from tokgen.sampling import drawing, presets

    runtime.devices()
    choice = choice_of(args)
    precision = args.precision
    if not precision:
        meta = checkpoint.read_meta(checkpoint.find(args.checkpoint))
        precision = presets.precision(meta, choice)
    loaded = checkpoint.load_generator(args.checkpoint, compute=precision)
    tokenizer = checkpoint.load_tokenizer_of(loaded, args.tokenizer)
    cond, kind_N, classes = conditions(args, loaded)
    settings, generator, sampler = presets.choose(
        loaded.module, loaded.config.presets.to_dict(), choice, loaded.classes
    )
    options.refuse(presets.without_effect(choice, sampler))
    record = {
        "checkpoint": str(loaded.step),
        "fingerprint": loaded.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "seed": args.seed,
        "preset": args.preset,
        "settings": settings,
        "classes": classes,
        "names": list(loaded.classes),  # what the numbers of samples.npz are called
        "text": args.text,
        "number": args.number,
        "precision": precision,
        "versions": checkpoint.versions(),
    }
    parts = out.path / "parts"
    out.claim(record | {"conditions": made_images.conditions(cond), "png": not args.no_png})
    done = sum(len(image_BHW3) for _, image_BHW3 in _kept(parts))
    for tokens_BLG, image_BHW3 in drawing.drawn(
        *(generator, tokenizer.module, cond, sampler), seed=args.seed, batch=args.batch, done=done
    ):
        for i, image_HW3 in enumerate(image_BHW3, done):
            if not args.no_png:
                kind = f"text{kind_N[i]}"
                if not args.text:
                    kind = names_.file_name(int(kind_N[i]), loaded.classes)
                image_grid.save_png(out.path / f"seed{args.seed}-{i:05d}-{kind}.png", image_HW3)
        # last: what is in a part has its pictures
        part = {"tokens": tokens_BLG, "image": image_BHW3}
        made_images.save_part(parts / f"{done:07d}.npz", part)
        done += len(image_BHW3)
    shown = _written(out.path, parts, kind_N, args.number)
    shutil.rmtree(parts)
    (out.path / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    return (
        f"{len(kind_N)} images in {args.out}: grid.png ({shown}), samples.npz (arr_0 images, "
        "arr_1 labels), samples.json (settings)"
    )


def _kept(parts: pathlib.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens and images of the parts that were made, from the first on without a gap."""
    from tokgen.evaluation import made_images

    start = 0
    while (found := made_images.loaded_part(parts / f"{start:07d}.npz")) is not None:
        yield found["tokens"], found["image"]
        start += len(found["image"])


def _written(out: pathlib.Path, parts: pathlib.Path, kind_N: np.ndarray, number: int) -> str:
    """samples.npz, tokens.npy and grid.png of the parts, read one by one; what the grid shows."""
    import numpy as np

    from tokgen import image_grid
    from tokgen.evaluation import given_images

    first_BHW3 = next(_kept(parts))[1]
    rows, columns, colours = first_BHW3.shape[1:]
    scale = max(1, 64 // rows)
    layout_RX, told = sheet(len(kind_N), number, (scale * rows, scale * columns))
    wanted = dict.fromkeys(layout_RX[layout_RX >= 0].tolist())
    shape = (len(kind_N), *first_BHW3.shape[1:])
    with given_images.writing(out / "samples.npz", shape, kind_N) as add:
        tokens, start = [], 0
        for tokens_BLG, image_BHW3 in _kept(parts):
            add(image_BHW3)
            tokens.append(tokens_BLG)
            stop = start + len(image_BHW3)
            wanted |= {i: image_BHW3[i - start] for i in wanted if start <= i < stop}
            start = stop
    np.save(out / "tokens.npy", np.concatenate(tokens))
    blank = np.full((rows, columns, colours), 255, np.uint8)
    shown = np.stack([wanted[i] if i >= 0 else blank for i in layout_RX.reshape(-1).tolist()])
    image_grid.save_png(out / "grid.png", image_grid.grid(shown, layout_RX.shape[1], scale=scale))
    return told


def sheet(count: int, number: int, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """(which image stands where [rows, columns], -1 for none; in words) of `grid.png`.

    A class, of which there are `number` images of `size` pixels, begins a row. A picture of more
    than PIXELS pixels no program opens: then only some of the images stand in it.
    """
    import numpy as np

    columns = min(number, COLUMNS)
    room = max(1, PIXELS // (columns * size[0] * size[1]))
    room = min(room, max(1, SIDE // size[0]))
    kinds = count // number
    chosen = np.arange(min(kinds, room)) * kinds // min(kinds, room)
    each = max(1, min(-(-number // columns), room // len(chosen)))
    index_KX = np.arange(each * columns)
    index_KX = np.where(index_KX < number, chosen[:, None] * number + index_KX, -1)
    told = "a row per class or text" if each == 1 else f"{each} rows per class or text"
    left = count - int((index_KX >= 0).sum())
    told += f", {count - left} of {count} images" if left else ""
    return index_KX.reshape(-1, columns), told
