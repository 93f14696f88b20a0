"""Images per second of the training steps of some configs: the step alone, no data, no checkpoints.

    python benchmarks/training_step.py [--config PATH[:variant] ...] [--devices N]
    python benchmarks/training_step.py --table [--peers DIR --python PYTHON] [--rows NAME ...]

The step is the one of the training programs, compiled and run on made-up images or tokens of the
config's size. CPU seconds are of all threads together, so that other work on the machine counts
little; on a GPU or TPU only the clock means anything. The median of the repeats is printed with the
smallest and largest.

The second prints CPU seconds of one step of `ROWS` on one core in float32, and the same of the
peer's from its checkout (peer_steps.py), turn by turn: the same batch and dropout, losses, clip and
AdamW of both, no average of the parameters.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import beside
import jax
import machine
import ml_collections
import networks
import numpy as np
import roofline
from flax import nnx

from tokgen import flops, parameters as parameters_, rng, runtime, sharding
from tokgen.config import building, reading
from tokgen.data import token_header
from tokgen.interfaces import Quantizer, TokenLayout
from tokgen.training import (
    gan as gans,
    generator_step,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

PACKAGES = ("jax", "flax", "optax", "numpy")
CONFIGS = ("configs/tokenizer/shapes.py", "configs/generator/shapes.py")
LAYOUT, CLASSES = TokenLayout((240,), ((8, 8),)), 10  # of the shapes; a generator's config has none

# What --quick makes of a config: enough to see that a program works, too little to measure.
QUICK = {
    "tokenizer": (
        *("encoder.widths=(16,)", "encoder.blocks=1", "decoder.widths=(16,)", "decoder.blocks=1"),
        "batch_size=4",
    ),
    "generator": ("generator.width=32", "generator.depth=1", "batch_size=4"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A generator's step, and the peer's name of the same."""

    config: str  # by its name in configs/
    layout: TokenLayout
    batch: int
    peer: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config, changed
    tokenizer: str = ""  # whose quantizer is the codec


# six layers, apart, of which all is kept
SMALL = {"generator.width": 384, "generator.depth": 6, "generator.heads": 6}
SMALL |= {"generator.remat": "none"}
ROWS = {
    "RAR 384x6": Row(
        *("generator/rar.py:b", networks.square(1024), 8, "RAR 384x6 step"),
        SMALL | {"generator.hidden": 1536},
    ),
    "LlamaGen 384x6": Row(
        *("generator/llamagen.py:b", networks.square(16384), 8, "LlamaGen 384x6 step"),
        SMALL,
    ),
    "VAR-d6": Row(
        *("generator/var.py:d16", networks.PYRAMID, 4, "VAR-d6 step"),
        SMALL | {"generator.rates.path": 0.1 * 6 / 24},
        "tokenizer/var_vqvae.py:256",
    ),
    "MaskBit 384x6": Row(
        *("generator/maskbit.py:14bit", networks.square(128, 2), 4, "MaskBit 384x6 step"),
        SMALL | {"generator.hidden": 1536, "ema": 0.0},
    ),
    "RAR-B": Row("generator/rar.py:b", networks.square(1024), 8, "RAR-B step"),
}
PEERS = {name: beside.Peer(row.peer) for name, row in ROWS.items()}
# --quick: of every row
TINY = {"generator.width": 32, "generator.depth": 1, "generator.heads": 2, "generator.hidden": 64}


def way_of(name: str, quick: bool) -> tuple[Callable[[], object], Callable[[], float]]:
    """(one step of a row, in how many seconds this core could do it at best)."""
    row, codec = ROWS[name], None
    settings = networks.settled(row.config, {**row.fields, **(TINY if quick else {})}, "float32")
    settings.batch_size = row.batch
    if row.tokenizer:
        codec = networks.tokenizer(row.tokenizer, {}, "float32").quantizer
    step, (moving, *fixed), _ = training(settings, row.layout, networks.CLASSES, codec)
    count = flops.of_training(step, moving, *fixed)

    def way():
        nonlocal moving
        moving, scalars = step(moving, *fixed)
        jax.block_until_ready((moving, scalars))

    return way, lambda: count / roofline.this_cpu("float32").flops


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="PATH[:variant]")
    parser.add_argument("--devices", type=int, help="of the CPU; default: as the programs do")
    parser.add_argument("--steps", type=int, default=50, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    parser.add_argument("--table", action="store_true", help="beside the peers")
    beside.arguments(parser)
    # what beside tells every program
    parser.add_argument("--precision", choices=("float32",), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return machine.serve(lambda: way_of(arguments.serve, arguments.quick))
    if arguments.table:
        print(machine.header(PACKAGES))
        return beside.table("training_step.py", PEERS, ("float32",), arguments)
    if arguments.quick:
        arguments.steps, arguments.repeats = 2, 1
    loaded = {reference: load(reference, arguments.quick) for reference in arguments.config}
    set_devices(arguments.devices, [settings.batch_size for settings in loaded.values()])
    print(machine.header(PACKAGES, machine.devices()))
    for reference, settings in loaded.items():
        measure(reference, settings, arguments.steps, arguments.repeats)


def load(reference: str, quick: bool):
    """A config; with `quick`, shrunk."""
    settings = reading.load(reference)
    if quick:
        reading.override(settings, QUICK[kind_of(settings)])
    return settings


def kind_of(settings) -> str:
    """What a config trains."""
    return "generator" if "generator" in settings else "tokenizer"


def set_devices(count: int | None, batch_sizes) -> None:
    """So many CPU devices, or as many as the training programs would take."""
    if count:
        # as runtime.devices: XLA sizes its thread pool by NPROC, and collectives need more of it
        os.environ.setdefault("NPROC", str(4 * count))
        jax.config.update("jax_num_cpu_devices", count)
    else:
        runtime.devices(math.gcd(*batch_sizes))


def training(
    settings,
    layout: TokenLayout = LAYOUT,
    classes: int = CLASSES,
    codec: Quantizer | None = None,
):
    """(step, what it is called on, parameters): the step returns its first argument, moved on.

    Of a generator, layout, classes and codec are those that its tokenizer would give.
    """
    mesh = sharding.make_mesh()
    jax.set_mesh(mesh)
    draw = np.random.default_rng(0)
    rngs = rng.key(settings.seed, "init")
    if kind_of(settings) == "generator":
        optimizer = building.call(
            optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
        )
        graph, network = train_state.create(
            lambda: building.generator(settings, layout, classes, rngs=nnx.Rngs(rngs)),
            optimizer,
            mesh=mesh,
            strategy=settings.strategy,
            ema=settings.ema,
        )
        shape = (settings.batch_size, layout.length, layout.groups)
        dtype = token_header.loaded_integer(layout.vocab)
        batch = {
            "tokens": draw.integers(0, layout.absent, shape, dtype),
            "label": draw.integers(0, classes, settings.batch_size, np.int32),
        }
        step = generator_step.step(settings, graph, optimizer)
        batch = sharding.global_batch(batch, mesh)
        return step, (network, batch, codec), parameters_.count(network.params)
    plan = stages.plan(settings)
    gan = building.call(
        gans.GAN, {**settings.discriminator, "start": 0.0, "warmup": 0.0}, "discriminator"
    )
    limits = building.call(safeguards.Limits, settings.safeguards, "safeguards")
    networks, graphs, discriminator_optimizer = tokenizer_step.create(settings, plan[-1], gan, mesh)
    count = parameters_.count(networks["model"].params)
    steps = tokenizer_step.Steps(settings, gan, limits, graphs, discriminator_optimizer, 0)
    step = steps(plan[-1], gan.weight > 0)
    shape = (settings.batch_size, *settings.view.size, settings.view.channels)
    batch = sharding.global_batch({"image": draw.integers(0, 256, shape, np.uint8)}, mesh)
    return step, (networks, batch, {}), count


def measure(reference: str, settings: ml_collections.ConfigDict, steps: int, repeats: int) -> None:
    """Print the measurements of one config."""
    step, (moving, *fixed), parameters = training(settings)
    began = time.perf_counter()
    moving, *_ = jax.block_until_ready(step(moving, *fixed))
    compiled = time.perf_counter() - began

    def take(count):
        nonlocal moving
        for _ in range(count):
            moving, *_ = step(moving, *fixed)
        jax.block_until_ready(moving)

    take(2)  # the first steps after a compilation fill the allocator
    walls, cpus = machine.measured(lambda: take(steps), repeats)
    images = steps * settings.batch_size
    discriminator = kind_of(settings) == "tokenizer" and settings.discriminator.weight > 0
    print(
        f"{reference}: batch {settings.batch_size}, {parameters:,} parameters, compute "
        f"{settings.precision.compute}, {'with discriminator, ' if discriminator else ''}"
        f"first step {compiled:.1f} s (compiled, or from the cache)"
    )
    for name, values, places in (
        ("images per second", [images / wall for wall in walls], 1),
        ("milliseconds per step", [1000 * wall / steps for wall in walls], 1),
        ("CPU milliseconds per image", [1000 * cpu / images for cpu in cpus], 2),
    ):
        print(f"  {name:<28}{machine.middle(values, places)}")


if __name__ == "__main__":
    sys.exit(main())
