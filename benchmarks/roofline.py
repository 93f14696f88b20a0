"""What a chip allows at best: the roofline of decoding, from a generator's own shapes.

    python benchmarks/roofline.py [--chip H200] [--batch 64]

A step takes the longer of two times: its products at the chip's rate, and its bytes through the
chip's memory. Bytes are those that no program can spare: the matrices, once for all rows; keys and
values of the slots in use, once; and, where a step handles many positions, what goes in and out of
every layer. What every image is told (the maps to adaptive norms) is computed beforehand or in
every step, as is quicker. The rows of the network are two per image while guided.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import chips, parameters
from tokgen.config import building, reading
from tokgen.interfaces import Generator, TokenLayout

CLASSES = 1000


GRIDS = tuple((side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
# Published generators of 256 pixels: the recipe, and what their tokenizers give
PUBLISHED = {
    **{
        f"rar-{size}": (f"rar.py:{size}", ((1024,), ((16, 16),)))
        for size in ("b", "l", "xl", "xxl")
    },
    **{
        f"llamagen-{size}": (f"llamagen.py:{size}", ((16384,), ((16, 16),)))
        for size in ("b", "l", "xl", "xxl", "3b")
    },
    **{f"var-d{depth}": (f"var.py:d{depth}", ((4096,), GRIDS)) for depth in (16, 20, 24, 30)},
    "maskbit": ("maskbit.py:14bit", ((128, 128), ((16, 16),))),
}


def published(name: str) -> tuple[Generator, dict]:
    """A generator of PUBLISHED, shapes alone and bfloat16, and the presets of its recipe."""
    settings, layout = settings_of(name)
    make = lambda: building.generator(settings, layout, CLASSES, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(make), settings.presets


def settings_of(name: str):
    """(the recipe of a generator of PUBLISHED, bfloat16, and the layout of its tokens)."""
    recipe, layout = PUBLISHED[name]
    settings = reading.load(f"configs/generator/{recipe}")
    settings.precision = dict(params="bfloat16", compute="bfloat16")
    return settings, TokenLayout(*layout)


@dataclasses.dataclass(frozen=True)
class Network:
    """What of a generator decides its roofline; numbers of values, not bytes."""

    layers: int
    width: int
    hidden: tuple[int, ...]  # widths of the MLPs
    streamed: int  # of the matrices that every step reads, but for:
    adaptive: int  # the maps to adaptive norms
    told: int  # slots for which they are evaluated: 1 where all slots are told the same
    itemsize: int  # bytes of a value
    steps: tuple[tuple[int, int], ...]  # positions in, slots seen; step by step
    cached: bool  # whether those slots are read from a cache


def network(generator: Generator) -> Network:
    """The sizes of a generator, which may be shapes alone, its layers stacked or apart."""
    _, params, _ = parameters.split(generator)
    streamed = adaptive = 0
    for path, leaf in parameters.paths(params).items():
        inside = path.startswith(("transformer/", "head/")) and path.endswith("kernel")
        tied = path == "embeddings/table" and not hasattr(generator.head, "head")
        if "modulation" in path:
            adaptive += leaf.size * path.endswith("kernel")
        elif inside or tied:
            streamed += leaf.size
    transformer = generator.transformer
    kernel = next(
        leaf for path, leaf in parameters.paths(params).items() if path.endswith("mlp/down/kernel")
    )
    return Network(
        layers=transformer.depth,
        width=kernel.shape[-1],
        hidden=(kernel.shape[-2],),
        streamed=streamed,
        adaptive=adaptive,
        told=_told(generator),
        itemsize=transformer.precision.compute_dtype.itemsize,
        steps=tuple(_steps(generator)),
        cached=generator.plan()[0].slots > 0,
    )


def _told(generator: Generator) -> int:
    """For how many slots adaptive blocks are told something of their own."""
    if not hasattr(generator, "conditioning"):
        return 1
    slots, label_B = generator.layout.length, jax.ShapeDtypeStruct((1,), jnp.int32)
    adapt = lambda net, cond: net.adapt(cond, jnp.arange(slots))  # noqa: E731
    told = jax.eval_shape(adapt, generator.conditioning, label_B)
    return 1 if told is None else told.shape[1]


def _steps(generator: Generator) -> Iterator[tuple[int, int]]:
    for phase in generator.plan():
        for left in reversed(range(phase.steps)):
            if not phase.slots:  # both ways: all positions, and the slot of the label
                yield phase.size + 1, phase.size + 1
            else:
                positions = phase.slots if phase.first == 0 else phase.size
                yield positions, phase.slots - left * phase.size


@dataclasses.dataclass(frozen=True)
class Step:
    """Products and bytes of one decoding step."""

    flops: float
    bytes: float

    def seconds(self, chip: chips.Chip) -> float:
        """The longer of both."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


def steps(
    net: Network, batch: int, *, guided: int | None = None, first: int = 0, ahead: bool
) -> list[Step]:
    """The steps of a decode of `batch` images, those before `guided` (all) with null rows.

    They need none before step `first` where nothing is cached. With `ahead`, what adaptive norms
    need was computed before, else in every step.
    """
    guided, found = len(net.steps) if guided is None else guided, []
    first = first if not net.cached and 16 * first >= (guided or 0) else 0  # as decode.py
    for number, (positions, slots) in enumerate(net.steps):
        rows = 2 * batch if first <= number < guided else batch
        flops = 2 * rows * positions * net.streamed
        flops += 4 * rows * positions * slots * net.width * net.layers
        values = net.streamed
        if net.cached:
            values += 2 * rows * slots * net.width * net.layers
        if positions > 2:
            values += 8 * rows * positions * net.width * net.layers
        if ahead and net.told > 1:
            values += (batch + 1) * net.adaptive / net.width
        elif not ahead:
            flops += 2 * rows * positions * net.adaptive
            values += net.adaptive
        found.append(Step(flops, net.itemsize * values))
    return found


def beforehand(net: Network, batch: int) -> Step:
    """What adaptive norms need, for all slots at once: the null row serves every image."""
    rows = (batch + 1) * net.told
    values = net.adaptive + (rows * net.adaptive / net.width if net.told > 1 else 0)
    return Step(2 * rows * net.adaptive, net.itemsize * values)


def seconds(
    net: Network, batch: int, chip: chips.Chip, *, ahead: bool | None = None, **how
) -> float:
    """The least seconds in which a chip can decode a batch; `ahead` None: as is quicker."""
    if ahead is None:
        return min(seconds(net, batch, chip, ahead=way, **how) for way in (False, True))
    total = sum(step.seconds(chip) for step in steps(net, batch, ahead=ahead, **how))
    return total + ahead * beforehand(net, batch).seconds(chip)


def images_per_second(
    net: Network, batch: int, chip: chips.Chip, *, pixels: float = 0, **how
) -> float:
    """The most images a second; `pixels` are the detokenizer's operations per image."""
    return batch / (seconds(net, batch, chip, **how) + batch * pixels / chip.flops)


def cache_per_row(net: Network) -> int:
    """Bytes of keys and values that one row keeps at the end of its decode."""
    return net.cached * 2 * net.itemsize * net.width * net.layers * net.steps[-1][1]


def this_cpu(dtype: str = "float32", *, side: int = 1024, repeats: int = 3) -> chips.Chip:
    """Rates of the CPU as this process has it just now: one large product, one long read."""
    draw = np.random.default_rng(0)
    matrix = jnp.asarray(draw.standard_normal((side, side)), dtype)
    # a matrix for one row: far larger than the processor's caches
    long = jnp.broadcast_to(matrix.astype(jnp.float32), (32, side, side)).copy()
    product = jax.jit(lambda a: a @ a)
    read = jax.jit(lambda a, v: jnp.einsum("rij,j->ri", a, v))
    rate = 2 * side**3 / _least(lambda: product(matrix), repeats)
    width = long.nbytes / _least(lambda: read(long, long[0, 0]), repeats)
    return chips.Chip(rate, width, 0, f"measured in this run, {dtype}")


def _least(way: Callable, repeats: int) -> float:
    jax.block_until_ready(way())
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(way())
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="H200", choices=chips.CHIPS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="one generator: does it work?")
    arguments = parser.parse_args()
    chip = chips.CHIPS[arguments.chip]
    print(
        f"{arguments.chip}: {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, "
        f"{chip.memory / 1e9:.0f} GB ({chip.source}); bfloat16, batch {arguments.batch}, guided"
    )
    print(
        f"{'generator':16}{'matrices':>10}{'maps':>8}{'GFLOP an image':>16}{'cache a row':>14}"
        f"{'images/s':>10}"
    )
    for name in PUBLISHED if not arguments.quick else ("rar-b",):
        net = network(published(name)[0])
        work = sum(step.flops for step in steps(net, 1, ahead=True))
        print(
            f"{name:16}{net.streamed / 1e6:8.0f} M{net.adaptive / 1e6:6.0f} M{work / 1e9:16.0f}"
            f"{cache_per_row(net) / 1e6:11.1f} MB"
            f"{images_per_second(net, arguments.batch, chip):10.1f}"
        )


if __name__ == "__main__":
    main()
