"""The demo's families of generators, side by side: train, measure, show."""

from __future__ import annotations

import html
import pathlib
import time
from collections.abc import Callable

import numpy as np
from flax import nnx

from tokgen import image_grid, image_models
from tokgen.checkpoints import loading
from tokgen.data import shapes, token_shards
from tokgen.demo import edited
from tokgen.evaluation import local_classifier, validation
from tokgen.sampling import decode, drawing, presets

TOKENIZER, GENERATOR = "configs/tokenizer/shapes.py", "configs/generator/shapes.py"
# Family -> (folder of its generator, of its tokenizer, of its tokens, how it draws)
FAMILIES = {
    "raster": ("generator", "tokenizer", "tokens", "one token after the other, row by row"),
    "random": ("random", "tokenizer", "tokens", "one token after the other, in a random order"),
    "masked": ("masked", "tokenizer", "tokens", "many tokens at a time, the surest first"),
    "next_scale": ("next_scale", "pyramid", "pyramid_tokens", "one grid at a time, coarse to fine"),
}
STEPS = {"random": 1200, "masked": 1200, "next_scale": 1000}  # so that all fit into 20 minutes
PYRAMID_STEPS = 2000
COLUMNS = 6  # samples of a class in a family's picture
EDITS = dict.fromkeys(FAMILIES, ("left", "classes")) | {"next_scale": ("left", "classes", "scales")}
ROWS = 4  # images of a kind of edit in a family's picture
TRACED = ("ring", "crescent")  # whose decode is shown, step by step


def train(
    folder: pathlib.Path,
    run: Callable,
    pretokenize: Callable,
    tokenizer_steps: int | None,
    generator_steps: int | None,
) -> None:
    """All but the raster generator, which the demo trains; `run` and `pretokenize` are its own."""
    steps = tokenizer_steps or PYRAMID_STEPS
    run("train_tokenizer.py", f"{TOKENIZER}:pyramid", folder / "pyramid", steps)
    pretokenize(folder / "pyramid", folder / "pyramid_tokens")
    for family, steps in STEPS.items():
        given = [f"--config.data.tokens={folder / FAMILIES[family][2]}"]
        steps = generator_steps or steps
        run("train_generator.py", f"{GENERATOR}:{family}", folder / family, steps, given)


def measure(
    folder: pathlib.Path, classifier: nnx.Module, number: int, seed: int
) -> tuple[dict, dict]:
    """({family: metrics}, {picture: uint8 image}) of trained families."""
    metrics, pictures = {}, {}
    for family in FAMILIES:
        metrics[family], image_NHW3 = _measured(folder, family, classifier, number, seed)
        by_class = image_NHW3.reshape(len(shapes.CLASSES), -1, *image_NHW3.shape[1:])
        shown = by_class[:, :COLUMNS]
        images = shown.reshape(-1, *image_NHW3.shape[1:])
        pictures[f"family_{family}"] = image_grid.grid(images, shown.shape[1])
        places = [folder / name for name in FAMILIES[family][:2]]
        asked = (*places, classifier, EDITS[family], seed)
        metrics[family]["edits"], sheets = edited.measure(*asked, rows=ROWS)
        pictures |= {f"edit_{kind}_{family}": sheet for kind, sheet in sheets.items()}
        model = image_models.load(places[0], tokenizer=str(places[1]))
        pictures[f"decode_{family}"] = model.trace(TRACED, seed=seed).gif()
    return metrics, pictures


def _measured(
    folder: pathlib.Path, family: str, classifier: nnx.Module, number: int, seed: int
) -> tuple[dict, np.ndarray]:
    """(metrics, samples sorted by class) of one family."""
    generator, tokenizer, token_set, _ = FAMILIES[family]
    loaded = loading.load_generator(folder / generator)
    decoder = loading.load_tokenizer_of(loaded, str(folder / tokenizer)).module
    held_out = token_shards.Source(folder / token_set, split="held_out")
    codec = decoder.quantizer
    likelihood = validation.likelihood(loaded.module, codec, held_out, count=1000)
    train_set = token_shards.Source(folder / token_set)
    unigram = validation.unigram(train_set, held_out, loaded.layout)
    chosen = presets.named(loaded.config.presets.to_dict(), "default")
    module, sampler = presets.prepare(decode.laid_out(loaded.module), chosen)
    wanted = np.repeat(np.arange(len(shapes.CLASSES), dtype=np.int32), number // 10)
    batch = min(100, len(wanted))

    def draw(label_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return drawing.draw(module, decoder, label_N, sampler, seed=seed, batch=batch, what=family)

    draw(wanted[:batch])  # compiles
    began = time.monotonic()
    _, image_NHW3 = draw(wanted)
    seconds = time.monotonic() - began
    hits = local_classifier.predictions(classifier, image_NHW3) == wanted
    length = loaded.layout.length
    return {
        "tokens": length,
        "nats_per_token": round(likelihood["nats_per_token"], 4),
        "nats_error": likelihood["nats_error"] and round(likelihood["nats_error"], 4),
        "nats_per_image": round(likelihood["nats_per_token"] * length, 2),
        "bound": not loaded.module.exact,
        "unigram_nats": round(unigram["unigram_nats"], 4),
        "class_accuracy": round(float(hits.mean()), 4),
        "ms_per_image": round(1000 * seconds / len(wanted), 2),
        "steps": loaded.meta["step"],
        "sampling": chosen,
    }, image_NHW3


def section(metrics: dict, picture: Callable[[str, str], str]) -> str:
    """The part of the demo's page; `picture(name, text)` is an image of it."""
    if not metrics:
        return ""
    heads = "".join(f"<th>{family.replace('_', ' ')}</th>" for family in metrics)
    rows = {
        "How it draws": [html.escape(FAMILIES[family][3]) for family in metrics],
        "Tokens of an image": [f"{one['tokens']}" for one in metrics.values()],
        "Nats per token, held out": [
            f"{'at most ' if one['bound'] else ''}{one['nats_per_token']:.3f} (unigram "
            f"{one['unigram_nats']:.3f})"
            for one in metrics.values()
        ],
        "Nats per image": [f"{one['nats_per_image']:.1f}" for one in metrics.values()],
        "Samples recognised": [f"{100 * one['class_accuracy']:.1f} %" for one in metrics.values()],
        "Milliseconds per image": [f"{one['ms_per_image']:.1f}" for one in metrics.values()],
        "Training steps": [f"{one['steps']:,}" for one in metrics.values()],
        "Samples": [picture(f"family_{family}", f"samples of {family}") for family in metrics],
        "Step by step": [picture(f"decode_{family}", f"decodes by {family}") for family in metrics],
    }
    for kind in dict.fromkeys(kind for kinds in EDITS.values() for kind in kinds):
        rows[edited.KINDS[kind].title] = [
            edited.recognised(one["edits"], kind)
            + picture(f"edit_{kind}_{family}", f"edits by {family}")
            if kind in EDITS[family]
            else ""
            for family, one in metrics.items()
        ]
    body = "\n".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
    )
    return f"""<h2>Four families</h2>
<p>One generator of each family, of the same width and depth. The next-scale one reads the tokens of
a tokenizer of its own, so its nats compare with its own unigram model only. A row of samples is a
class. Times are of a batch, decoding to pixels included, after compilation. Last come held-out
images, gray over what is drawn anew, each with its edit; finer scales are drawn upon the two
coarsest of an image's four grids.</p>
<div class="wide"><table class="families">
<tr><th></th>{heads}</tr>
{body}
</table></div>"""
