"""Images per second and core of the data stream, against a plain PIL loop over the same files.

    python benchmarks/data_loading.py [--images 256] [--repeats 3] [--quick]

The files are JPEGs that the program makes: 500 x 375, quality 92, smooth noise, about as large as
ImageNet's. Both sides end with uint8 batches of 256 x 256; the loop does the least that can be
called loading: open, convert, resize the shorter side (bicubic), cut the middle. The seconds are
of the CPU, of all threads together, so that other work on the machine counts little; the median of
the repeats is printed with the smallest and largest.
"""

import argparse
import io
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import machine
import numpy as np
from PIL import Image

from tokgen.data import folder, loader, shapes, sources, views

SIZE = (256, 256)
BATCH = 64
PACKAGES = ("grain", "pillow", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one batch, once: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.repeats = BATCH, 1
    if arguments.images < BATCH or arguments.repeats < 1:
        parser.error(f"--images must be at least {BATCH} and --repeats at least 1")
    print(machine.header(PACKAGES))
    with tempfile.TemporaryDirectory() as path:
        size = write_jpegs(pathlib.Path(path), arguments.images)
        print(f"{arguments.images} JPEGs of {size / 1000:.0f} kB on average, to {SIZE}")
        source = folder.Source(path, split="all")
        ways = {
            "plain PIL loop": lambda: plain(source),
            "stream, centre crop": lambda: streamed(source, views.View(SIZE)),
            "stream, random crop and flip": lambda: streamed(
                source, views.View(SIZE, crop="random", flip=True)
            ),
            "stream, 4 threads": lambda: streamed(source, views.View(SIZE), threads=4),
        }
        measured = {name: [] for name in ways}
        for _ in range(arguments.repeats):  # in turn, so that a busy moment hits all of them
            for name, way in ways.items():
                measured[name].append(rate(way))
    drawn = shapes.Source(count=BATCH if arguments.quick else 20_000)
    measured["shapes of 32 x 32, stream"] = [
        rate(lambda: take(drawn, views.View((32, 32), flip=True), threads=1))
        for _ in range(arguments.repeats)
    ]
    loop = statistics.median(measured["plain PIL loop"])
    print(f"{'':32}{'images per CPU second':>22}{'least':>9}{'most':>9}{'of the loop':>13}")
    for name, rates in measured.items():
        middle = statistics.median(rates)
        print(
            f"{name:32}{middle:22.0f}{min(rates):9.0f}{max(rates):9.0f}"
            + (f"{middle / loop:13.2f}" if "shapes" not in name else "")
        )


def write_jpegs(path: pathlib.Path, count: int) -> float:
    """Mean size in bytes of what was written."""
    rng = np.random.default_rng(0)
    total = 0
    for number in range(count):
        coarse = rng.integers(0, 256, (47, 63, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (375, 500, 3))
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        stream_of_bytes = io.BytesIO()
        Image.fromarray(pixels).save(stream_of_bytes, "JPEG", quality=92)
        total += (path / f"{number:06d}.jpg").write_bytes(stream_of_bytes.getvalue())
    return total / count


def plain(source: folder.Source) -> int:
    """The loop that anybody would write."""
    batch = np.empty((BATCH, *SIZE, 3), np.uint8)
    for index in range(len(source)):
        with Image.open(os.path.join(source.path, source.name(index))) as image:
            image = image.convert("RGB")
        scale = max(SIZE[0] / image.height, SIZE[1] / image.width)
        width, height = round(image.width * scale), round(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIZE[1]) // 2, (height - SIZE[0]) // 2
        batch[index % BATCH] = image.crop((left, top, left + SIZE[1], top + SIZE[0]))
    return len(source)


class Counted(sources.Around):
    """A source that counts what is read of it: threads run ahead, and that costs CPU time too."""

    def __init__(self, source):
        super().__init__(source)
        self.read = itertools.count()

    def __getitem__(self, index: int) -> dict:
        next(self.read)
        return self.inner[index]


def streamed(source: sources.RandomAccess, view: views.View, threads: int = 1) -> int:
    """As many batches as an epoch has; the images that were loaded for them and ahead of them."""
    counted = Counted(source)
    take(counted, view, threads)
    return next(counted.read)


def take(source: sources.RandomAccess, view: views.View, threads: int) -> int:
    """As many batches as an epoch has; the images in them."""
    with loader.batches(
        source, view, seed=0, batch_size=BATCH, threads=threads, prefetch=threads
    ) as batches:
        for _ in range(len(source) // BATCH):
            next(batches)
        return batches.seen


def rate(way: Callable[[], int]) -> float:
    """Images per CPU second."""
    start = time.process_time()
    count = way()
    return count / (time.process_time() - start)


if __name__ == "__main__":
    main()
