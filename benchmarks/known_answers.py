"""Every family of generators on a language of known entropy: how far from it does training end?

    python benchmarks/known_answers.py [--families raster random masked next_scale]

The languages are those of `tokgen.data.markov`: a causal Markov mesh of 6 x 6 cells, and a
pyramid for next-scale generators. Each training step sees fresh images. Printed are the held-out
nats per token given the class, the entropy, and the excess: the mean over images of what the model
pays for an image beyond the language itself, which is the Kullback-Leibler divergence of the two,
as a share of the entropy, with its standard error. A masked generator has no likelihood of its own:
its figure is an upper bound, averaged over random orders. The CPU seconds are of training, of all
threads, compilation included.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable

import jax
import machine
import ml_collections
import numpy as np
from flax import nnx

from tokgen import parameters as parameters_, report, rng, runtime, sharding
from tokgen.config import building, reading
from tokgen.data import loader, markov
from tokgen.interfaces import Generator, Quantizer, TokenBatch, TokenLayout
from tokgen.training import generator_step, optimizer as optimizers, train_state

PACKAGES = ("jax", "flax", "optax", "numpy")
ORDERS = 8  # of an image, over which the bound of a masked generator is averaged
BATCH = 100  # held-out images scored together
TRANSFORMER = dict(width=96, depth=3, heads=4, unroll=3, label_drop=0.0)
NARROW = dict(variant="llama_narrow")
OPTIMIZER = dict(name="muon", learning_rate=4e-3, warmup=100, b2=0.95, weight_decay=0.01, clip=1.0)


def no_codec(language: markov.Language) -> None:
    """For generators that look at tokens only."""


def pyramid_codec(language: markov.Language):
    """A quantizer over the language's grids, without convolutions, whose codes keep apart."""
    grids = tuple(map(tuple, language.layout["grids"]))
    V = language.symbols
    inner = dict(name="vq", codes=V, channels=V, normalize=False, update="frozen")
    section = dict(name="multiscale", quantizer=inner, scales=grids, phi=0)
    codec = building.build(section, "quantizer", grid=grids[-1], rngs=nnx.Rngs(0))
    codec.inner.codebook[...] = jax.numpy.asarray(markov.codes(V))
    return codec


def by_own_order(
    generator: Generator, batch: TokenBatch, codec: Quantizer, key: jax.Array
) -> jax.Array:
    """[B, L] exact, in an order of its own for each image."""
    order_BL = generator.orders(jax.random.split(key, len(batch.tokens_BLG)))
    return generator.nats(batch.replace(order_BL=order_BL), codec)


def by_scale(
    generator: Generator, batch: TokenBatch, codec: Quantizer, key: jax.Array
) -> jax.Array:
    """[B, L] exact, coarse to fine."""
    return generator.nats(batch, codec)


def by_drawn_orders(
    generator: Generator, batch: TokenBatch, codec: Quantizer, key: jax.Array
) -> jax.Array:
    """[B, L] an upper bound: the mean over orders that the key draws."""
    keys = jax.random.split(key, ORDERS)
    return jax.lax.map(lambda key: generator.nats(batch, codec, key=key), keys).mean(0)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is trained on what."""

    generator: dict  # the section of a config
    language: Callable[..., markov.Language]
    codec: Callable[[markov.Language], object]
    nats: Callable
    limit: float  # the excess that is promised, in percent
    steps: int
    batch_size: int = 64


FAMILIES = {
    "raster": Family(
        dict(name="autoregressive", order="raster", positions="rotary") | NARROW | TRANSFORMER,
        markov.mesh,
        no_codec,
        by_own_order,
        limit=2.0,
        steps=1500,
    ),
    "random": Family(
        dict(name="autoregressive", order="random", positions="target_aware")
        | NARROW
        | TRANSFORMER,
        markov.mesh,
        no_codec,
        by_own_order,
        limit=5.0,
        steps=4000,
    ),
    "masked": Family(
        dict(name="masked", schedule="linear") | NARROW | TRANSFORMER,
        markov.mesh,
        no_codec,
        by_drawn_orders,
        limit=5.0,
        steps=4000,
    ),
    "next_scale": Family(
        dict(name="next_scale", channels=8, variant="var", gates=0.1) | TRANSFORMER,
        markov.pyramid,
        pyramid_codec,
        by_scale,
        limit=2.0,
        steps=2000,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=0, help="default: each family's own")
    parser.add_argument("--images", type=int, default=2000, help="held-out ones")
    parser.add_argument("--seed", type=int, default=0, help="of the training, not of the language")
    parser.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="fields of every config, as generator.width=64",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.images = 2, BATCH
        arguments.set = ("generator.width=16", "generator.depth=1", "batch_size=8")
    if arguments.images < BATCH:
        parser.error(f"--images must be at least {BATCH}")
    runtime.devices(8 if arguments.quick else 64)
    print(machine.header(PACKAGES, machine.devices()))
    print(
        f"{'family':<12}{'parameters':>11}{'steps':>7}  {'nats per token':<19}{'entropy':>8}  "
        f"{'excess %':<16}{'promised':>8}{'CPU s':>8}",
        flush=True,
    )
    missed = [name for name in arguments.families if not reached(name, arguments)]
    if missed and not arguments.quick:
        print(f"beyond what is promised: {', '.join(missed)}")
        return 1
    return 0


def reached(name: str, arguments: argparse.Namespace) -> bool:
    """Whether a family's excess is what is promised; its line is printed."""
    family = FAMILIES[name]
    settings = settings_of(family, arguments)
    layout = TokenLayout.from_json(family.language().layout)
    codec = family.codec(family.language())
    began = time.process_time()
    generator, parameters = trained(family, settings, layout, codec)
    seconds = time.process_time() - began
    costs, own = scored(family, generator, codec, arguments)
    entropy = family.language().entropy()
    excess = 100 * (costs - own) / entropy
    line = f"{name:<12}{parameters:>11,}{settings.steps:>7}  "
    line += f"{with_error(costs, 4):<19}{entropy:>8.4f}  {with_error(excess, 2):<16}"
    print(f"{line}{family.limit:>8.1f}{seconds:>8.0f}", flush=True)
    return excess.mean() <= family.limit


def settings_of(family: Family, arguments: argparse.Namespace) -> ml_collections.ConfigDict:
    """The config that a family is trained by."""
    settings = ml_collections.ConfigDict()
    settings.seed, settings.steps = arguments.seed, arguments.steps or family.steps
    settings.batch_size, settings.ema, settings.strategy = family.batch_size, 0.998, "data"
    settings.precision = dict(params="float32", compute="float32")
    settings.generator, settings.optimizer = family.generator, OPTIMIZER
    reading.override(settings, arguments.set)
    return settings


def trained(
    family: Family, settings: ml_collections.ConfigDict, layout: TokenLayout, codec: Quantizer
) -> tuple[Generator, int]:
    """(the generator with its averaged weights, number of its parameters)."""
    source, key = family.language(seed=settings.seed), rng.key(settings.seed, "init")
    optimizer = building.call(
        optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
    )
    mesh = sharding.make_mesh()
    jax.set_mesh(mesh)
    graph, network = train_state.create(
        lambda: building.generator(settings, layout, len(source.classes), rngs=nnx.Rngs(key)),
        optimizer,
        mesh=mesh,
        ema=settings.ema,
    )
    step = generator_step.step(settings, graph, optimizer)
    batches = loader.batches(source, seed=settings.seed, batch_size=settings.batch_size)
    with batches, report.bar(settings.steps, what=settings.generator.name) as bar:
        for _ in range(settings.steps):
            network, _ = step(network, sharding.global_batch(next(batches), mesh), codec)
            bar.update()
    generator = parameters_.merge(graph, train_state.averaged(network), network.stats)
    return generator, parameters_.count(network.params)


def scored(
    family: Family, generator: Generator, codec: Quantizer, arguments: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """[N] nats per token of held-out images: of the model, and of the language itself."""
    source = family.language(split="held_out")
    nats = jax.jit(family.nats)
    costs, own = [], []
    indices = range(arguments.images // BATCH * BATCH)
    passing = loader.once(source, batch_size=BATCH, indices=indices)
    for number, part in enumerate(passing):
        key = rng.key(arguments.seed, "eval", number)
        batch = TokenBatch(*jax.device_put((part["tokens"], part["label"])))
        costs.append(np.asarray(nats(generator, batch, codec, key), np.float64).mean(-1))
        own.append(source.nats(part["tokens"], part["label"]).mean(-1))
    return np.concatenate(costs), np.concatenate(own)


def with_error(values: np.ndarray, places: int) -> str:
    """The mean, with its standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{values.mean():.{places}f} ± {error:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
