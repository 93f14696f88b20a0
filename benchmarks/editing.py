"""Edits by every family of generators, measured: do they hold together, and can one tell?

    tokgen demo --all --out DEMO
    python benchmarks/editing.py DEMO [--images 500] [--parts likelihood classes growing scales]

Of held-out shapes, in the folder that the demo trained its generators in:

likelihood  drawn at temperature 1 without guidance, by every family with every mask. Nats of the
            edited images under the raster generator, of their tokens under its tokenizer, beside
            those of the images themselves and of pasted ones, the masked part of which is that of
            another image of the same class. The share is (edited - real) / (pasted - real): 0 as
            good as real, 1 as bad as a paste (of nothing and all: as a paste of the left half).
classes     by the presets: how often the independent classifier sees the class in edits of the
            left half and of the centre, beside whole samples of the same model.
growing     left halves grown to twice their width, and whole images likewise. A classifier is
            trained to tell strips of 8 pixels over the seam from strips of whole samples of the
            same model, and asked about others: half of its answers are right where there is nothing
            to see. What stands beside the seam of a half stands in samples, too, at the same
            columns; margins of images, side by side, stand in none, seam or not.
scales      finer scales drawn upon coarse ones: the edits, brought down to the sides of the coarse
            grid, against the decode of the coarse scales alone, in dB; and the same of the images'
            own finer scales.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
import training_step
from flax import nnx
from PIL import Image

import tokgen
from tokgen import parameters, rng, runtime
from tokgen.data import shapes
from tokgen.demo import families
from tokgen.editing import edits
from tokgen.evaluation import local_classifier
from tokgen.nn import conv
from tokgen.nn.precision import FLOAT32

MASKS = ("left", "right", "top", "bottom", "center", "box", "free form", "nothing", "all")
PARTS = ("likelihood", "classes", "growing", "scales")
STRIP = 8  # pixels, half of them on either side of the seam
STEPS = 1500  # of the classifier of seams
BATCH = 640  # rows that are drawn at once: ten images, of 64 particles each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=pathlib.Path, help="what `tokgen demo --all` wrote")
    parser.add_argument("--images", type=int, default=500, help="a multiple of 10")
    parser.add_argument("--families", nargs="+", default=list(families.FAMILIES))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--particles", type=int, nargs="+", default=[edits.Settings().particles])
    parser.add_argument("--steps", type=int, default=32, help="of the masked family's likelihood")
    parser.add_argument("--noise", type=float, default=4.5, help="likewise")
    parser.add_argument("--sheets", type=pathlib.Path, help="folder for pictures of the edits")
    parser.add_argument("--quick", action="store_true", help="few strips: does it work?")
    asked = parser.parse_args()
    if asked.quick:
        globals()["STEPS"] = 5
    runtime.devices()
    print(machine.header(training_step.PACKAGES, machine.devices()), flush=True)
    for part in asked.parts:
        globals()[part](asked)


def model_of(demo: pathlib.Path, family: str) -> tokgen.ImageGenerator:
    """A family's generator, with the tokenizer that it was trained on."""
    folder, tokenizer, *_ = families.FAMILIES[family]
    return tokgen.load(demo / folder, tokenizer=str(demo / tokenizer))


def held_out(model: tokgen.ImageGenerator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 images, their labels), the classes in turn."""
    view = model.tokenizer.config.view
    source = shapes.Source(tuple(view.size), view.channels, split="held_out", form="easy")
    return source.batch(range(images)), np.arange(images) % len(shapes.CLASSES)


def masks_of(name: str, images: np.ndarray) -> np.ndarray:
    """[N, H, W] of a mask by its name; boxes and free forms are drawn, another for each image."""
    N, H, W, _ = images.shape
    numbers = np.random.default_rng(0)
    if name == "nothing":
        return np.zeros((N, H, W), bool)
    if name == "box":
        height_N, width_N = numbers.integers(H // 4, 3 * H // 4, (2, N))
        row_N, column_N = numbers.integers(0, H - height_N), numbers.integers(0, W - width_N)
        rows, columns = np.arange(H)[None, :, None], np.arange(W)[None, None]
        inside = (rows >= row_N[:, None, None]) & (rows < (row_N + height_N)[:, None, None])
        right = (columns >= column_N[:, None, None]) & (
            columns < (column_N + width_N)[:, None, None]
        )
        return inside & right
    if name == "free form":  # a thick walk
        found = np.zeros((N, H, W), bool)
        for mask_HW in found:
            place = numbers.integers(0, (H, W))
            for _ in range(40):
                place = np.clip(place + numbers.integers(-2, 3, 2), 2, (H - 3, W - 3))
                mask_HW[place[0] - 2 : place[0] + 3, place[1] - 2 : place[1] + 3] = True
        return found
    return edits.masks(name, images)


def edited(
    model: tokgen.ImageGenerator, images: np.ndarray, labels: list[int], *, masks=None, **how
) -> edits.Edits:
    """Edits of images, ten classes in turn, each ten by a seed of their own.

    The same draw of two images has the same numbers: errors of means need others for each.
    """
    found, each = [], len(shapes.CLASSES)
    for start in range(0, len(images), each):
        part = slice(start, start + each)
        asked = how if masks is None else how | {"mask": masks[part]}
        found.append(
            model.edit(images[part], labels[part], seed=start, batch=BATCH, progress=False, **asked)
        )
    names = ("image_NHW3", "original_KHW3", "mask_KHW")
    arrays = {name: np.concatenate([getattr(one, name) for one in found]) for name in names}
    return edits.Edits(tokens_NLG=None, source_N=np.arange(len(images)), **arrays)


# ---------------------------------------------------------------- likelihood


def likelihood(asked: argparse.Namespace) -> None:
    """A row for each family, mask and number of particles."""
    judge = model_of(asked.demo, "raster")
    images, labels = held_out(judge, asked.images)
    others = np.roll(images, -len(shapes.CLASSES), axis=0)

    def nats(image_NHW3):
        return -judge.log_likelihood(image_NHW3, classes=labels.tolist(), batch=100)

    real_N = nats(images)
    left = edits.masks("left", images)
    half = nats(np.where(left[..., None], others, images)).mean() - real_N.mean()
    print(f"\nnats of {len(images)} real images: {said(real_N)}")
    print(f"{'family':12}{'mask':12}{'particles':11}{'pasted':17}{'edited':17}{'share':17}CPU s")
    for family in asked.families:
        model = model_of(asked.demo, family)
        how = dict(steps=asked.steps, noise=asked.noise) if family == "masked" else {}
        for name in asked.masks:
            masks = masks_of(name, images)
            pasted_N = nats(np.where(masks[..., None], others, images))
            for particles in asked.particles:
                began = time.process_time()
                found = edited(
                    *(model, images, labels.tolist()),
                    masks=masks,
                    particles=particles,
                    temperature=1.0,
                    guidance=1.0,
                    **how,
                )
                seconds = time.process_time() - began
                edited_N = nats(found.image_NHW3)
                # a paste of all, or of nothing, is a real image
                gap = half if name in ("nothing", "all") else pasted_N.mean() - real_N.mean()
                error = (edited_N - real_N).std() / len(images) ** 0.5 / gap
                share = f"{(edited_N - real_N).mean() / gap:.3f} +- {error:.3f}"
                print(
                    f"{family:12}{name:12}{particles:<11}{said(pasted_N):17}{said(edited_N):17}"
                    f"{share:17}{seconds:.1f}",
                    flush=True,
                )
                keep(asked, f"{family}-{name}-{particles}", found)


def said(value_N: np.ndarray) -> str:
    return f"{value_N.mean():.2f} +- {value_N.std() / len(value_N) ** 0.5:.2f}"


def keep(asked: argparse.Namespace, name: str, found: edits.Edits, count: int = 12) -> None:
    """A sheet of the first edits."""
    if asked.sheets:
        asked.sheets.mkdir(parents=True, exist_ok=True)
        tokgen.save_png(asked.sheets / f"{name.replace(' ', '-')}.png", found.first(count).sheet())


# ---------------------------------------------------------------- classes


def classes(asked: argparse.Namespace) -> None:
    """How often the classifier sees the class, in samples and in edits."""
    print(f"\n{'family':12}{'drawn':12}class seen, of {asked.images}")
    for family in asked.families:
        model = model_of(asked.demo, family)
        images, labels = held_out(model, asked.images)
        classifier = local_classifier.load_or_train(images.shape[1:3], images.shape[3])
        each = asked.images // len(shapes.CLASSES)
        samples = model.sample("all", number=each, progress=False)
        drawn = {"samples": (samples.image_NHW3, samples.kind_N)}
        for name in ("left", "center"):
            found = edited(model, images, labels.tolist(), mask=name)
            drawn[name] = found.image_NHW3, labels
            keep(asked, f"{family}-{name}-preset", found)
        for name, (image_NHW3, label_N) in drawn.items():
            hits = (local_classifier.predictions(classifier, image_NHW3) == label_N).mean()
            error = (hits * (1 - hits) / len(label_N)) ** 0.5
            print(f"{family:12}{name:12}{hits:.3f} +- {error:.3f}", flush=True)


# ---------------------------------------------------------------- growing


class Seams(nnx.Module):
    """A strip's logit: does it lie over a seam?"""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        options = dict(precision=FLOAT32, gain=2**0.5, rngs=rngs)
        self.first = conv.Conv(channels, 32, **options)
        self.second = conv.Conv(32, 64, stride=2, **options)
        self.third = conv.Conv(64, 64, stride=2, **options)
        self.last = conv.Conv(64, 1, 1, precision=FLOAT32, gain=0.1, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        x_BHWC = 4 * image_BHW3 - 2
        for layer in (self.first, self.second, self.third):
            x_BHWC = jax.nn.relu(layer(x_BHWC))
        return self.last(x_BHWC.mean((1, 2), keepdims=True))[:, 0, 0, 0]


def growing(asked: argparse.Namespace) -> None:
    """Of images twice as wide: can a classifier tell where they were grown?"""
    print(f"\n{'family':12}{'grown':8}seam told, of {2 * asked.images} strips not trained on")
    for family in asked.families:
        model = model_of(asked.demo, family)
        how = dict(temperature=1.0, guidance=1.0)
        each, classes = 4 * asked.images // len(shapes.CLASSES), len(shapes.CLASSES)
        # of photographs one tells at a glance what a decoder drew: both sides are of this one
        first, second = (
            model.sample("all", number=each, seed=2**20 + n, batch=500, progress=False, **how)
            for n in (0, 1)
        )
        turn_N = np.arange(classes * each).reshape(classes, each).T.reshape(-1)  # classes in turn
        images, labels = first.image_NHW3[turn_N], first.kind_N[turn_N].tolist()
        width, mixed_N = images.shape[2], np.random.default_rng(0).permutation(len(images))
        grown = {
            "halves": (width // 2, dict(mask="right")),
            "wholes": (width, dict(grow=f"right={width}", overlap=STRIP / 2 / width)),
        }
        for name, (seam, asked_for) in grown.items():
            found = edited(model, images, labels, particles=asked.particles[0], **asked_for, **how)
            keep(asked, f"{family}-grown-{name}", found)
            seams = found.image_NHW3[:, :, seam - STRIP // 2 : seam + STRIP // 2]
            # of wholes what is drawn is a sample's left margin
            begin = seam - STRIP // 2 if seam < width else 0
            plain = second.image_NHW3[turn_N][:, :, begin : begin + STRIP]
            right = told_apart(seams[mixed_N], plain[mixed_N], len(images) - asked.images)
            print(f"{family:12}{name:8}{right:.3f}", flush=True)


def told_apart(seams: np.ndarray, plain: np.ndarray, trained: int) -> float:
    """Share of right answers about strips that come after those trained on."""
    strips = np.concatenate([seams[:trained], plain[:trained]])
    wanted = np.repeat([1.0, 0.0], trained)
    graph, params, stats = parameters.split(Seams(seams.shape[-1], rngs=rng.rngs(0)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=1e-2)

    @jax.jit
    def step(params, state, image_BHW3, wanted_B):
        def loss(params):
            logits_B = parameters.merge(graph, params, stats)(image_BHW3 / 255.0)
            return optax.sigmoid_binary_cross_entropy(logits_B, wanted_B).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, numbers = optimizer.init(params), np.random.default_rng(1)
    for _ in range(STEPS):
        chosen = numbers.integers(0, len(strips), 64)
        flipped = strips[chosen] if numbers.random() < 0.5 else strips[chosen][:, ::-1]
        params, state = step(params, state, flipped.astype(np.float32), wanted[chosen])

    @functools.partial(jax.jit)
    def seen(image_BHW3):
        return parameters.merge(graph, params, stats)(image_BHW3 / 255.0) > 0

    rest = seams[trained:], plain[trained:]
    answers = [np.asarray(seen(jnp.asarray(part, jnp.float32))) for part in rest]
    return float((answers[0].sum() + (~answers[1]).sum()) / sum(map(len, rest)))


# ---------------------------------------------------------------- scales


def scales(asked: argparse.Namespace) -> None:
    """Of coarse scales kept: how near the edits are to them, at their own size."""
    model = model_of(asked.demo, "next_scale")
    images, labels = held_out(model, asked.images)
    tokens = model.encode(images, batch=100)
    module = model.tokenizer.decoder.module
    print("\ndB to the coarse decode, at the grid's size")
    print(f"{'scales kept':13}{'grid':9}{'edits':17}the images' own finer scales")
    whole = model.reconstruct(images, batch=100)
    for kept in range(1, len(model.layout.grids)):
        found = edited(model, images, labels.tolist(), scales=kept)
        latents = module.quantizer.empty(len(images))
        for scale, (start, size) in enumerate(model.layout.spans[:kept]):
            part = jnp.asarray(tokens[:, start : start + size])
            latents = module.quantizer.absorb(latents, part, scale)
        coarse = np.asarray(jnp.rint(255 * module.decode_latents(latents))).astype(np.uint8)
        sides = model.layout.grids[kept - 1]
        figures = [said(decibels(fine, coarse, sides)) for fine in (found.image_NHW3, whole)]
        print(f"{kept:<13}{f'{sides[0]} x {sides[1]}':9}{figures[0]:17}{figures[1]}", flush=True)
        keep(asked, f"scales-{kept}", found)


def decibels(fine_NHW3: np.ndarray, coarse_NHW3: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """[N] PSNR of images to coarse ones, both brought down to the cells of a grid."""
    pairs = zip(fine_NHW3, coarse_NHW3, strict=True)
    errors = [np.mean((down(a, sides) - down(b, sides)) ** 2) for a, b in pairs]
    return -10 * np.log10(np.maximum(errors, 1e-10))


def down(image_HW3: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Means over the cells of a grid, in [0, 1]."""
    image = image_HW3[..., 0] if image_HW3.shape[-1] == 1 else image_HW3
    small = Image.fromarray(image).resize(sides[::-1], Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


if __name__ == "__main__":
    main()
