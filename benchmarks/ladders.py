"""Do the metrics say what eyes say? Real, reconstructed, blurred, noisy and JPEG images, scored.

    tokgen reference DATA --out REF.npz
    python benchmarks/ladders.py --data DATA --reference REF.npz --tokenizer CKPT --out DIR

REF is a `local` reference of DATA's train split. Scored against it are DATA's held-out images as
they are, put through the tokenizer, and damaged along ladders: blur (sigma in pixels), Gaussian
noise (standard deviation in grey levels), JPEG (quality), and pure noise in the end. The JPEG
ladder begins far below the quality of usual photographs: re-encoded near their own quality, images
show the marks of a second quantization, which come and go with it. Printed is the table of all
metrics, then whether the order of sets holds and which metrics rise along every ladder; OUT gets
the plot and the table as JSON.
"""

import argparse
import io
import json
import pathlib
import sys

import jax
import machine
import numpy as np
import scipy.ndimage
from PIL import Image

from tokgen import runtime
from tokgen.checkpoints import loading
from tokgen.data import datasets, folder, loader, sources, views
from tokgen.evaluation import (
    collect,
    feature_extractors,
    made_images,
    metric_table,
    protocols,
    references,
    validation,
)

PACKAGES = ("jax", "flax", "numpy", "scipy", "pillow")
BLUR, NOISE, JPEG = (0.5, 1.0, 2.0), (8, 16, 32, 64), (30, 20, 10, 5)
DISTANCES = ("fid", "sfid", "kid", "cmmd", "fid_infinity", "mifid", "classwise")
ORDER = ("real", "reconstructed", "blur 1.0", "noise")
PART = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="image folder with classes")
    parser.add_argument("--reference", required=True, help="local reference of its train split")
    parser.add_argument("--tokenizer", required=True, help="checkpoint")
    parser.add_argument("--out", required=True, help="folder for ladders.png and ladders.json")
    parser.add_argument("--images", type=int, default=5000, help="held-out ones")
    parser.add_argument("--quick", action="store_true", help="little of all: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images = 64
    runtime.devices()
    print(machine.header(PACKAGES, machine.devices()), flush=True)
    reference = references.read(arguments.reference)
    network = feature_extractors.from_arrays(reference.network, reference.record["extractor"])
    source = folder.Source(arguments.data, split="held_out")
    datasets.tell(arguments.data, held_out=source)
    image_NHW3, label_N = pixels(source, tuple(reference.record["size"]), arguments.images)
    tokenizer = loading.load_tokenizer(arguments.tokenizer)
    rows = {}
    for name, changed in ladder(image_NHW3, tokenizer.module):
        rows[name] = measured(changed, label_N, network, reference, len(source.classes))
        shown = " ".join(f"{key} {figure['value']:.4g}" for key, figure in rows[name].items())
        print(f"{name}: {shown}", flush=True)
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ladders.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    conclude(rows)
    plot(rows, out / "ladders.png")


def pixels(
    source: sources.RandomAccess, size: tuple[int, int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images of a source and their labels, evenly over it."""
    index_N = np.arange(min(count, len(source))) * len(source) // min(count, len(source))
    view = views.fixed("center", size, 3)
    parts = list(loader.once(source, view, batch_size=PART, indices=index_N))
    return tuple(np.concatenate([part[name] for part in parts]) for name in ("image", "label"))


def ladder(image_NHW3: np.ndarray, tokenizer):
    """(name, uint8 images) of every set; each is a function of the images alone."""
    draws = np.random.default_rng(0)
    yield "real", image_NHW3
    yield "reconstructed", reconstructed(image_NHW3, tokenizer)
    for sigma in BLUR:
        blurred = scipy.ndimage.gaussian_filter(
            image_NHW3.astype(np.float32), (0, sigma, sigma, 0), mode="reflect"
        )
        yield f"blur {sigma}", np.rint(blurred).astype(np.uint8)
    for deviation in NOISE:
        noisy = image_NHW3 + deviation * draws.standard_normal(image_NHW3.shape, np.float32)
        yield f"noise {deviation}", np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
    for quality in JPEG:
        yield f"jpeg {quality}", np.stack([jpeg(image, quality) for image in image_NHW3])
    yield "noise", draws.integers(0, 256, image_NHW3.shape, np.uint8)


def reconstructed(image_NHW3: np.ndarray, tokenizer) -> np.ndarray:
    """Reconstructions."""
    parts = [image_NHW3[start : start + 100] for start in range(0, len(image_NHW3), 100)]
    found = [validation.reconstruct(tokenizer, {"image": part}, batch=100)[1] for part in parts]
    return made_images.coloured(np.concatenate(found))


def jpeg(image_HW3: np.ndarray, quality: int) -> np.ndarray:
    """What is left of an image."""
    data = io.BytesIO()
    Image.fromarray(image_HW3).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def measured(
    image_NHW3: np.ndarray,
    label_N: np.ndarray,
    network: feature_extractors.Extractor,
    reference: references.Reference,
    classes: int,
) -> dict[str, dict]:
    """Every metric of the local protocol."""
    found = [
        feature_extractors.features(network, image_NHW3[start : start + PART])
        for start in range(0, len(image_NHW3), PART)
    ]
    features = {name: np.concatenate([part[name] for part in found]) for name in network.layers}
    seen = collect.Found(features, {}, {}, {}, label_N, np.zeros(0), np.zeros(0))
    compared = collect.compared(
        *(seen, network, protocols.named("local"), reference),
        classes=classes,
        accepted=("few",),
        seed=0,
    )
    return metric_table.score(compared, what="")[0]


def table(rows: dict[str, dict]) -> str:
    """Sets by metrics, as Markdown."""
    names = list(next(iter(rows.values())))
    lines = ["| set | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, metrics in rows.items():
        values = [f"{metrics[key]['value']:.4g}" if key in metrics else "" for key in names]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def conclude(rows: dict[str, dict]) -> None:
    """How every metric goes along the ladders; of distances, whether the order of sets holds."""
    for key in next(iter(rows.values())):
        said = ", ".join(f"{kind} {climbs(rows, key, kind)}" for kind in ("blur", "noise", "jpeg"))
        if key in DISTANCES:
            values = [rows[name][key]["value"] for name in ORDER]
            rising = all(a < b for a, b in zip(values, values[1:], strict=False))
            said += f"; {' < '.join(ORDER)}: {'yes' if rising else 'no'}"
        print(f"{key}: {said}")


def climbs(rows: dict[str, dict], key: str, kind: str) -> str:
    """How a figure goes along a ladder, from the real images on."""
    steps = ["real"] + [name for name in rows if name.startswith(f"{kind} ")]
    values = [rows[name][key]["value"] for name in steps]
    pairs = list(zip(values, values[1:], strict=False))
    if all(a < b for a, b in pairs):
        return "rises"
    return "falls" if all(a > b for a, b in pairs) else "goes up and down"


def plot(rows: dict[str, dict], file: pathlib.Path) -> None:
    """A panel per figure, a line per ladder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(rows.values())))
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(names) // columns),
        columns,
        figsize=(3.2 * columns, 2.4 * -(-len(names) // columns)),
        layout="constrained",
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, names, strict=False):
        for kind in ("blur", "noise", "jpeg"):
            steps = ["real"] + [name for name in rows if name.startswith(f"{kind} ")]
            values = [rows[name][key]["value"] for name in steps]
            axis.plot(range(len(steps)), values, marker="o", markersize=3, label=kind)
        axis.axhline(rows["reconstructed"][key]["value"], color="gray", linestyle=":", linewidth=1)
        axis.set_title(key.replace("_", " "), fontsize=9)
        axis.set_xticks(range(5))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.supxlabel("steps of damage; dotted: reconstructions", fontsize=8)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    sys.exit(runtime.call("ladders.py", main))
