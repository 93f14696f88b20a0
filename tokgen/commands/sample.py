"""Images from a generator: PNGs, a grid, and an .npz in the layout of ADM's evaluator."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re

import jax
import numpy as np

from tokgen import archives, checkpoint, launch, report, rng, sharding
from tokgen.interfaces import PyTree, Text, UserError
from tokgen.metrics import reconstruction
from tokgen.sampling import decode, presets


@functools.partial(jax.jit, static_argnames="sampler")
def draw_tokens(generator, codec, cond, keys_B, sampler, given=None):
    """(tokens_BLG, invalid_B): one program per sampler and batch size."""
    state = decode.generate(generator, codec, cond, sampler, keys_B=keys_B, given=given)
    return state.tokens_BLG, state.invalid_B


@jax.jit
def paint(tokenizer, tokens_BLG):
    """uint8 images of tokens."""
    return reconstruction.to_uint8(tokenizer.decode(tokens_BLG))


def draw(
    generator,
    tokenizer,
    cond: PyTree,
    sampler,
    *,
    seed: int,
    batch: int,
    first: int = 0,
    given: tuple[np.ndarray, np.ndarray] | None = None,
    what: str = "sample",
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, L, G], uint8 images [N, H, W, 3]) of conditions, numbered from `first`.

    `what` names the job on a progress bar; there is none without a name.

    `cond` is label_N, or a tree of arrays that lead with the images, such as a Text. Image i
    depends on (seed, i, its condition) only: not on the batch, nor on its neighbours.
    """
    N = len(jax.tree.leaves(cond)[0])
    tokens, images, mesh = [], [], sharding.current()
    batch = max(min(batch, N), 1)
    # the mesh is set, so that the networks can say how their activations lie
    with jax.set_mesh(mesh), report.bar(N, unit="image", what=what, shown=bool(what)) as bar:
        for start in range(0, N, batch):
            rows = slice(start, min(start + batch, N))
            asked = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf[rows]), (cond, given))
            index_B = first + np.arange(rows.start, rows.stop)
            (cond_B, held), index_B = sharding.filled((asked, index_B), batch, mesh)
            keys_B = rng.per_image(seed, "sample", index_B)
            tokens_BLG, invalid_B = draw_tokens(
                generator, tokenizer.quantizer, cond_B, keys_B, sampler, held
            )
            kept = min(batch, N - start)
            if np.asarray(invalid_B)[:kept].any():
                raise UserError(
                    f"image {first + start + int(np.asarray(invalid_B).argmax())} has logits that "
                    "are not finite; the checkpoint's weights are damaged or its run diverged: use "
                    "an earlier step"
                )
            tokens.append(np.asarray(tokens_BLG)[:kept])
            images.append(np.asarray(paint(tokenizer, tokens_BLG))[:kept])
            bar.update(kept)
    return np.concatenate(tokens), np.concatenate(images)


def chosen(text: str, classes: tuple[str, ...]) -> list[int]:
    """Labels of `--classes`: names, numbers or ranges (`0-9`), comma between; "" is all."""
    count = max(len(classes), 1)
    if not text:
        return list(range(count))
    labels = []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
        if part in classes:
            labels.append(classes.index(part))
        elif span:
            low = int(span[1])
            high = low if span[2] is None else int(span[2])
            if not 0 <= low <= high < count:
                named = f" ({', '.join(classes[:10])}{' ...' if count > 10 else ''})"
                raise UserError(
                    f"class ids are 0 to {count - 1}{named if classes else ''}; found {part}"
                )
            labels.extend(range(low, high + 1))
        else:
            raise UserError(
                f"unknown class {part!r}; need ids 0 to {count - 1} or names: "
                f"{', '.join(classes[:20]) or 'none, the model is unconditional'}"
            )
    return labels


def captions(path: str) -> Text:
    """The conditions of `--text`: features [N, T, E], and a mask [N, T] that is true to the end."""
    try:
        found = archives.arrays(path)
    except UserError as error:
        raise UserError(
            f"--text needs an .npz file of arrays; found {path}: {error}; save features and mask "
            "with numpy.savez"
        ) from error
    if missing := {"features", "mask"} - set(found):
        raise UserError(
            f"--text needs arrays features [N, T, E] and mask [N, T]; {path} has no "
            f"{' and no '.join(sorted(missing))}"
        )
    features_NTE, mask_NT = found["features"], found["mask"]
    numbers = features_NTE.dtype in (np.float16, np.float32) and features_NTE.ndim == 3
    if not numbers or not len(features_NTE) or not np.isfinite(features_NTE).all():
        raise UserError(
            "features must be finite float16 or float32 numbers [N, T, E]; found "
            f"{features_NTE.dtype} {features_NTE.shape} in {path}"
        )
    if mask_NT.shape != features_NTE.shape[:2] or not np.isin(mask_NT, (0, 1)).all():
        raise UserError(
            f"mask must hold 0 or 1 for each of the features {features_NTE.shape[:2]}; found "
            f"{mask_NT.dtype} {mask_NT.shape} in {path}"
        )
    mask_NT = mask_NT.astype(bool)
    if not mask_NT[:, -1].all() or (mask_NT[:, :-1] & ~mask_NT[:, 1:]).any():
        raise UserError(
            f"features are padded on the left, so that every row of the mask ends in 1 and has no "
            f"0 after a 1; found other rows in {path}: move the padding to the front"
        )
    return Text(features_NTE.astype(np.float32), mask_NT)


def conditions(args: argparse.Namespace, loaded) -> tuple[PyTree, np.ndarray, list[str]]:
    """(the condition of every image, the number of its class or text [N], names of the classes)."""
    kind = getattr(loaded.module, "cond", "label")
    if kind == "label" and args.text:
        raise UserError(
            "--text needs a generator that reads text; found one of "
            f"{len(loaded.classes)} classes: use --classes"
        )
    if kind == "label":
        labels = chosen(args.classes, loaded.classes)
        label_N = np.repeat(np.asarray(labels, np.int32), args.number)
        return label_N, label_N, [loaded.classes[i] if loaded.classes else "" for i in labels]
    if args.classes or not args.text:
        raise UserError(
            "the generator reads text: it needs --text FILE.npz with arrays features [N, T, E] "
            f"and mask [N, T]; found {'--classes' if args.classes else 'none'}"
        )
    text = captions(args.text)
    row_N = np.repeat(np.arange(len(text.mask_BT), dtype=np.int32), args.number)
    return jax.tree.map(lambda leaf: leaf[row_N], text), row_N, []


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="of a generator: a work directory, or one step of it")
    parser.add_argument("--out", required=True, help="folder for the images")
    parser.add_argument("--classes", default="", help="names, ids or ranges, as 0-9,cat; all")
    parser.add_argument(
        "--text", default="", help=".npz with features [N, T, E] and mask [N, T], for text models"
    )
    parser.add_argument(
        "--number", type=int, default=8, help="images per class or text (default 8)"
    )
    drawing(parser)
    parser.add_argument("--tokenizer", default="", help="where the tokenizer lies now, if moved")
    parser.add_argument("--no-png", action="store_true", help="only the grid and the .npz")


def drawing(parser) -> None:
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


def prepared(args: argparse.Namespace, loaded) -> tuple:
    """(settings, generator, sampler): the preset, with what the command line puts in its place."""
    settings = presets.named(loaded.config.presets.to_dict(), args.preset)
    asked = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    asked |= {"weight": args.guidance, "steps": args.steps, "noise": args.noise}
    now = presets.PLAIN | presets.MASKED | settings
    changed = {k: v for k, v in asked.items() if v is not None and v != now[k]}
    if changed:
        report.say(f"departs from preset {args.preset!r}: {changed}")
    settings |= changed
    generator, sampler = presets.prepare(loaded.module, settings)
    labels = getattr(loaded.module, "cond", "label") == "label"
    if sampler.guidance and labels and not loaded.classes:
        report.say("guidance is off: the model is unconditional, there is nothing to guide towards")
        settings = presets.unguided(settings)
        generator, sampler = presets.prepare(loaded.module, settings)
    # a preset may ask for more: published ones were written for larger alphabets
    if (args.top_k or 0) > loaded.layout.absent:
        raise UserError(
            f"top-k must be at most the alphabet, {loaded.layout.absent}; found {args.top_k}"
        )
    return settings, generator, sampler


def precision_of(args: argparse.Namespace) -> str:
    """What is asked for, or what the preset says; read before the networks are loaded."""
    if args.precision:
        return args.precision
    meta = checkpoint.read_meta(checkpoint.find(args.checkpoint))
    if meta["kind"] != "generator":  # said when it is loaded
        return presets.LOADING["precision"]
    return (presets.LOADING | presets.named(meta["config"]["presets"], args.preset))["precision"]


def run(args: argparse.Namespace) -> None:
    """Draw, and write everything that says how."""
    if args.number < 1 or args.batch < 1:
        raise UserError(
            f"--number and --batch must be at least 1; found {args.number}, {args.batch}"
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2**32); found {args.seed}")
    launch.devices()
    precision = precision_of(args)
    loaded = checkpoint.load_generator(args.checkpoint, compute=precision)
    tokenizer = checkpoint.load_tokenizer_of(loaded, args.tokenizer)
    cond, kind_N, classes = conditions(args, loaded)
    settings, generator, sampler = prepared(args, loaded)
    tokens_NLG, image_NHW3 = draw(
        generator, tokenizer.module, cond, sampler, seed=args.seed, batch=args.batch
    )
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.no_png:
        for i, image_HW3 in enumerate(image_NHW3):
            name = f"seed{args.seed}-{i:05d}-{'text' if args.text else 'class'}{kind_N[i]}.png"
            report.save_png(out / name, image_HW3)
    columns = min(args.number, 16)
    scale = max(1, 64 // image_NHW3.shape[1])
    report.save_png(out / "grid.png", report.grid(image_NHW3, columns, scale=scale))
    with open(out / "samples.npz.part", "wb") as file:
        np.savez(file, arr_0=image_NHW3, arr_1=kind_N.astype(np.int64))
    (out / "samples.npz.part").replace(out / "samples.npz")
    np.save(out / "tokens.npy", tokens_NLG)
    record = {
        "checkpoint": str(loaded.step),
        "seed": args.seed,
        "preset": args.preset,
        "settings": settings,
        "classes": classes,
        "text": args.text,
        "number": args.number,
        "precision": precision,
        "versions": checkpoint.versions(),
    }
    (out / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    report.say(
        f"{len(kind_N)} images in {out}: grid.png (a row per class or text), samples.npz (arr_0 "
        "images, arr_1 labels), samples.json (settings)"
    )
