"""Images and tokens per second and core of the data stream, against bare decoding and training.

    python benchmarks/data_loading.py [--photos DIR] [--images 256] [--repeats 3] [--quick]

The files are those of DIR, or JPEGs that the program makes: 500 x 375, quality 92, smooth noise,
about as large as ImageNet's. Bare decoding is what a library needs from the bytes to its own pixels
in memory, and nothing else. A plain PIL loop does the least that can be called loading: open,
convert, resize the shorter side (bicubic), cut the middle. All others end with uint8 batches of
256 x 256. The seconds are of the CPU, of all threads together, so that other work on the machine
counts little; the median of the repeats is printed with the smallest and largest, and the median of
each repeat's share of the bare decoding that came with it.

Tokens are those of a set that is written first, 256 of two bytes in ten views; the bytes read are
the ones that the system handed over. The fastest step is an arithmetic: that of the smallest
published generators, 111 M weights, on an H200.
"""

import argparse
import functools
import io
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import machine
import numpy as np
import simplejpeg
from PIL import Image

from tokgen.data import folder, loader, shapes, sources, token_shards, token_writer, views

SIZE = (256, 256)
BATCH = 64
PACKAGES = ("grain", "pillow", "simplejpeg", "numpy")
TOKENS, VIEWS = 256, views.TEN
# Tokens per second of a training step at 55 % of 989 TFLOP/s: 6 operations for a weight and token.
FASTEST = 0.55 * 989e12 / (6 * 111e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", default="", help="folder of JPEGs in the place of made ones")
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
        if not arguments.photos:
            write_jpegs(pathlib.Path(path), arguments.images)
        source = First(folder.Source(arguments.photos or path, split="all"), arguments.images)
        pixels_(source, arguments.repeats)
    drawn = shapes.Source(count=BATCH if arguments.quick else 20_000)
    rates = [
        rate(lambda: take(drawn, views.View((32, 32), flip=True), threads=1))
        for _ in range(arguments.repeats)
    ]
    print(f"shapes of 32 x 32, stream: {statistics.median(rates):.0f} images per CPU second")
    with tempfile.TemporaryDirectory() as path:
        tokens(path, 2 * BATCH if arguments.quick else 16_384, arguments.repeats)


class First(sources.Around):
    """The first images of a source, as many as are asked for, that are JPEGs of three colours."""

    def __init__(self, source, count: int):
        super().__init__(source)
        plain = (i for i in sources.evenly(len(source), len(source)) if is_plain(source[i]))
        self.chosen = list(itertools.islice(plain, count))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict:
        return self.inner[self.chosen[index]]


def is_plain(record: dict) -> bool:
    with Image.open(io.BytesIO(record["image"])) as image:
        return image.format == "JPEG" and image.mode == "RGB"


def pixels_(source: sources.RandomAccess, repeats: int) -> None:
    """Print the rates of images."""
    files = [source[index]["image"] for index in range(len(source))]
    size = statistics.mean(map(len, files))
    print(f"{len(files)} JPEGs of {size / 1000:.0f} kB on average, to {SIZE}")
    bare = {
        "pil": lambda: sum(bool(Image.open(io.BytesIO(data)).load()) for data in files),
        "simplejpeg": lambda: sum(len(simplejpeg.decode_jpeg(data, "RGB")) > 0 for data in files),
    }
    ways = {"bare, " + name: (way, name) for name, way in bare.items()}
    ways["plain PIL loop"] = functools.partial(plain, files), "pil"
    for name in bare:
        for resize, crop in itertools.product(views.RESIZES, ("center", "random")):
            view = views.View(SIZE, crop=crop, flip=crop == "random", resize=resize, decoder=name)
            ways[f"{crop}, {resize}, {name}"] = functools.partial(streamed, source, view), name
    view = views.View(SIZE)
    ways["center, adm, pil, 4 threads"] = functools.partial(streamed, source, view, 4), "pil"
    measured = {name: [] for name in ways}
    for _ in range(repeats):  # in turn, so that a busy moment hits all of them
        for name, (way, _) in ways.items():
            measured[name].append(rate(way))
    print(f"{'':32}{'images per CPU second':>22}{'least':>9}{'most':>9}{'of bare':>13}")
    for name, rates in measured.items():
        of = measured["bare, " + ways[name][1]]
        share = statistics.median(rate / other for rate, other in zip(rates, of, strict=True))
        print(
            f"{name:32}{statistics.median(rates):22.0f}{min(rates):9.0f}{max(rates):9.0f}"
            f"{share:13.2f}"
        )


def tokens(path: str, count: int, repeats: int) -> None:
    """Print the rates of tokens."""
    writer = token_writer.Writer(
        path,
        images={"train": count},
        layout={"vocab": [16384], "grids": [[16, 16]]},
        tokenizer={"path": "", "fingerprint": "", "precision": "float32"},
        data={"fingerprint": ""},
        views=VIEWS,
        classes=[str(number) for number in range(1000)],
    )
    draw = np.random.default_rng(0)
    for shard in writer.remaining():
        shape = (shard.stop - shard.start, len(VIEWS), TOKENS, 1)
        writer.write(shard, draw.integers(0, 16384, shape), draw.integers(0, 1000, shape[0]))
    writer.finish()
    begun = time.process_time()
    source = token_shards.Source(path, verify="always")
    seconds = time.process_time() - begun
    size = sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
    print(
        f"{count} images of {len(VIEWS)} x {TOKENS} tokens: {size / count:.0f} bytes each on disk, "
        f"verified whole in {seconds / count * 1e6:.1f} CPU us each"
    )
    rates, read = [], []
    for _ in range(repeats):
        before = bytes_read()
        rates.append(rate(lambda: take(source, None, threads=1, batch=min(256, count))))
        read.append((bytes_read() - before) / count)
    (batch,) = itertools.islice(loader.once(source, batch_size=BATCH), 1)
    middle = statistics.median(rates) * TOKENS
    print(
        f"one view of each, stream: {statistics.median(rates):.0f} images per CPU second "
        f"({min(rates):.0f} to {max(rates):.0f}), {middle:.3g} tokens, "
        f"{statistics.median(read):.0f} bytes read and {batch['tokens'].nbytes // BATCH} to the "
        f"device for each image; {middle / FASTEST:.1f} times the fastest step ({FASTEST:.3g} "
        "tokens) a core"
    )


def bytes_read() -> int:
    """Bytes that this process asked the system for so far; 0 where the system does not tell."""
    file = pathlib.Path("/proc/self/io")
    return int(file.read_text().split()[1]) if file.exists() else 0


def write_jpegs(path: pathlib.Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (47, 63, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (375, 500, 3))
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        stream_of_bytes = io.BytesIO()
        Image.fromarray(pixels).save(stream_of_bytes, "JPEG", quality=92)
        (path / f"{number:06d}.jpg").write_bytes(stream_of_bytes.getvalue())


def plain(files: list[bytes]) -> int:
    """The loop that anybody would write."""
    batch = np.empty((BATCH, *SIZE, 3), np.uint8)
    for index, data in enumerate(files):
        with Image.open(io.BytesIO(data)) as image:
            image = image.convert("RGB")
        scale = max(SIZE[0] / image.height, SIZE[1] / image.width)
        width, height = round(image.width * scale), round(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIZE[1]) // 2, (height - SIZE[0]) // 2
        batch[index % BATCH] = image.crop((left, top, left + SIZE[1], top + SIZE[0]))
    return len(files)


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


def take(
    source: sources.RandomAccess, view: views.View | None, threads: int, batch: int = BATCH
) -> int:
    """As many batches as an epoch has; the images in them."""
    with loader.batches(
        source, view, seed=0, batch_size=batch, threads=threads, prefetch=threads
    ) as batches:
        for _ in range(len(source) // batch):
            next(batches)
        return batches.seen


def rate(way: Callable[[], int]) -> float:
    """Images per CPU second."""
    start = time.process_time()
    count = way()
    return count / (time.process_time() - start)


if __name__ == "__main__":
    main()
