"""Trained generators of several families side by side: likelihood, what a classifier sees, speed.

    python benchmarks/families.py --data DIR --tokens DIR --tokenizer CKPT --out DIR \\
        --generators raster=CKPT masked=CKPT ...

DATA is the folder of images that the tokens were made of, with class folders; a classifier of its
classes is trained on its `train` split (once: it is kept in the cache), TOKENS the shards that
`tokgen pretokenize` wrote. Printed are its own accuracy on held-out images and on their
reconstructions, which bounds what samples can reach; then for each generator the held-out nats per
token and per image (≤: an upper bound), the share of samples that are classified as the class that
was asked for, and the seconds to sample an image, of the clock and of the CPU, the median of the
repeats with the smallest and largest. Settings of sampling are the checkpoint's preset. A grid of
each, a row per class, is written to OUT.
"""

import argparse
import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax import nnx

from tokgen import image_grid, parameters, rng, runtime
from tokgen.checkpoints import loading
from tokgen.data import datasets, folder, loader, online_tokens, token_shards
from tokgen.evaluation import local_classifier, validation
from tokgen.interfaces import Generator, UserError
from tokgen.sampling import drawing, presets, sampler as samplers

PACKAGES = ("jax", "flax", "optax", "numpy")
SHOWN = 12  # samples of a class in a grid
COLUMNS = "| {:<12} | {:>11} | {:<18} | {:>14} | {:<16} | {:<24} | {:<24} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="image folder with classes")
    parser.add_argument("--tokens", required=True, help="token shards of these images")
    parser.add_argument("--tokenizer", required=True, help="checkpoint of what made the shards")
    parser.add_argument("--generators", nargs="+", required=True, metavar="NAME=CKPT")
    parser.add_argument("--out", required=True, help="folder for the grids")
    parser.add_argument("--preset", default="default")
    parser.add_argument(
        "--samples", type=int, default=500, help="classified ones of each generator"
    )
    parser.add_argument("--images", type=int, default=1000, help="held-out ones")
    parser.add_argument("--batch", type=int, default=50, help="images sampled together")
    parser.add_argument("--repeats", type=int, default=3, help="of a batch, for its seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of all: does it work?")
    arguments = parser.parse_args()
    recipe = local_classifier.PHOTOGRAPHS
    if arguments.quick:
        arguments.samples = arguments.images = arguments.batch = 10
        arguments.repeats, recipe = 1, dataclasses.replace(recipe, steps=2, batch=4)
    runtime.devices(recipe.batch)
    print(machine.header(PACKAGES, machine.devices()), flush=True)
    tokenizer = loading.load_tokenizer(arguments.tokenizer)
    held_out = token_shards.Source(arguments.tokens, split="held_out")
    loading.check_tokens(tokenizer, held_out.header, held_out.path)
    size, channels = tuple(tokenizer.config.view.size), tokenizer.config.view.channels
    classifier = local_classifier.of_photographs(arguments.data, size, channels, recipe=recipe)
    examine(classifier, tokenizer, arguments)
    print(
        COLUMNS.format(
            *("generator", "parameters", "nats per token", "nats per image", "class accuracy"),
            *("ms per image", "CPU ms per image"),
        )
    )
    for text in arguments.generators:
        name, _, path = text.rpartition("=")
        measure(name or pathlib.Path(path).name, path, (classifier, tokenizer, held_out), arguments)


def examine(
    classifier: nnx.Module, tokenizer: loading.Loaded, arguments: argparse.Namespace
) -> None:
    """What the classifier makes of real images, and of what the tokenizer keeps of them."""
    source = folder.Source(arguments.data, split="held_out")
    datasets.tell(arguments.data, held_out=source)
    chosen = validation.spread(len(source), arguments.images)
    view = datasets.view_of(tokenizer.config)
    seen, reconstructed = [], []
    for part in loader.once(source, view, batch_size=arguments.batch, indices=chosen):
        image_BHW3, missing = part["image"], arguments.batch - len(part["image"])
        padded = np.concatenate([image_BHW3, np.repeat(image_BHW3[-1:], missing, axis=0)])
        decoded, _ = drawing.decode_pixels(
            tokenizer.module, online_tokens.encode(tokenizer.module, padded)
        )
        reconstructed.append(
            local_classifier.predictions(classifier, np.asarray(decoded)[: len(image_BHW3)])
            == part["label"]
        )
        seen.append(local_classifier.predictions(classifier, image_BHW3) == part["label"])
    held_out, kept = (share(np.concatenate(parts)) for parts in (seen, reconstructed))
    print(
        f"the classifier is right on {held_out} of {sum(map(len, seen))} held-out images, "
        f"and on {kept} of their reconstructions",
        flush=True,
    )


def measure(name: str, path: str, known: tuple, arguments: argparse.Namespace) -> None:
    """Print the metrics of one generator and write its grid."""
    classifier, tokenizer, held_out = known
    loaded = loading.load_generator(path)
    wanted = loaded.meta["tokenizer"]["fingerprint"]
    loading.check_tokenizer(tokenizer, wanted, f"generator {loaded.step}")
    classes = folder.Source(arguments.data, split="held_out").classes
    if loaded.classes != classes:
        raise UserError(
            f"the classifier knows the classes {', '.join(classes)}; {loaded.step} those of "
            f"{', '.join(loaded.classes) or 'none'}: give the folder that its tokens were made of"
        )
    metrics = validation.likelihood(
        loaded.module, tokenizer.module.quantizer, held_out, count=arguments.images
    )
    settings = presets.named(loaded.config.presets.to_dict(), arguments.preset)
    generator, sampler = presets.prepare(loaded.module, settings)
    each = max(1, arguments.samples // len(classes))
    label_N = np.repeat(np.arange(len(classes), dtype=np.int32), each)
    _, image_NHW3 = drawing.draw(
        *(generator, tokenizer.module, label_N, sampler),
        seed=arguments.seed,
        batch=arguments.batch,
        what=name,
    )
    hits_N = local_classifier.predictions(classifier, image_NHW3) == label_N
    walls, cpus = seconds(generator, tokenizer.module, sampler, len(classes), arguments)
    mark = "" if generator.exact else "≤ "
    length = loaded.layout.length
    print(
        COLUMNS.format(
            name,
            f"{parameters.count(parameters.split(generator)[1]):,}",
            f"{mark}{metrics['nats_per_token']:.3f} ± {metrics['nats_error']:.3f}",
            f"{mark}{length * metrics['nats_per_token']:.1f}",
            share(hits_N),
            machine.middle([1000 * wall / arguments.batch for wall in walls]),
            machine.middle([1000 * cpu / arguments.batch for cpu in cpus]),
        ),
        flush=True,
    )
    shown = min(SHOWN, each)
    rows = image_NHW3.reshape(len(classes), each, *image_NHW3.shape[1:])[:, :shown]
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    grid = image_grid.grid(rows.reshape(-1, *image_NHW3.shape[1:]), shown, scale=2)
    image_grid.save_png(out / f"{name}.png", grid)


def seconds(
    generator: Generator,
    tokenizer: nnx.Module,
    sampler: samplers.Sampler,
    classes: int,
    arguments: argparse.Namespace,
) -> tuple[list[float], list[float]]:
    """Of the clock and of the CPU, to draw a batch and decode it to pixels; once per repeat."""
    label_B = jnp.arange(arguments.batch) % classes
    keys_B = rng.per_image(arguments.seed, "sample", jnp.arange(arguments.batch))

    def way():
        drawn_BLG, *_ = drawing.draw_tokens(
            generator, tokenizer.quantizer, label_B, keys_B, sampler
        )
        jax.block_until_ready(drawing.decode_pixels(tokenizer, drawn_BLG))

    way()  # compiles
    return machine.measured(way, arguments.repeats)


def share(hits_N: np.ndarray) -> str:
    """In percent, with its standard error."""
    mean = float(hits_N.mean())
    return f"{100 * mean:.1f} ± {100 * math.sqrt(mean * (1 - mean) / len(hits_N)):.1f} %"


if __name__ == "__main__":
    sys.exit(runtime.call("families.py", main))
