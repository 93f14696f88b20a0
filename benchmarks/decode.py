"""Decoding: published networks beside their peers; and with a cache and without one.

    python benchmarks/decode.py --table [--peers DIR --python PYTHON] [--rows NAME ...]
    python benchmarks/decode.py [--config PATH[:variant]] [--batch 1 8 64]
    python benchmarks/decode.py --aot v5e:2x2 [--cases rar-xxl:64 ...]

The last compiles for a TPU that is not here (aot.py).

The first prints CPU seconds of one call of `ROWS` on one core, weights random, four images where
nothing else is said, and the same of the peer from its checkout (peers.py), turn by turn.

The second prints tokens per second, guided and not.
The network is a config's, with weights as they start: what is drawn doesn't matter, how long it
takes does. With a cache it is `sampling.decode.generate`, which `tokgen sample` uses. Without one,
every token costs a forward pass over the whole sequence: the same keys, so the same tokens, and the
share that agrees is printed (rounding may part them in rare draws). CPU seconds are of all threads.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import aot
import beside
import jax
import jax.numpy as jnp
import machine
import networks
import numpy as np
import roofline
import training_step
from flax import nnx

from tokgen import flops, rng, runtime
from tokgen.config import building
from tokgen.interfaces import Generator, TokenBatch, TokenLayout
from tokgen.sampling import decode, drawing, guidance, presets, sampler as samplers

WEIGHT = 2.0  # of the guidance
BATCH, CLASSES = 4, 1000  # of the rows


@dataclasses.dataclass(frozen=True)
class Row:
    """A network, how it is sampled, and the peer's name of the same."""

    config: str  # by its name in configs/
    layout: TokenLayout
    sampling: Mapping[str, Any]
    peer: beside.Peer
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config, changed
    tokenizer: str = ""  # whose quantizer is the codec
    pixels: bool = False  # tokens are decoded to pixels, too
    images: int = BATCH


SMALL = {"generator.width": 384, "generator.depth": 6, "generator.heads": 6}
VAR = dict(guidance="per_scale", weight=1.5, top_k=900, top_p=0.95)
RAR = dict(guidance="power_cosine", weight=16.0, power=2.75)
HALF = dict(guidance="interval", weight=2.0, first=0, last=127)
TITOK = dict(guidance="linear", weight=5.5, ranking="raw_logit", annealing="softmax")
TITOK |= dict(drawing="noise", noise=9.5, steps=8)
# of 64 steps all but the first have null rows: here both do
MASKBIT = dict(guidance="constant", weight=8.1, noise=7.8, steps=2)
WAYS = ("eager", "compiled", "frozen")
D6 = {"generator.width": 384, "generator.depth": 6, "generator.heads": 6}

ROWS = {
    "RAR 384x6": Row(
        *("generator/rar.py:b", networks.square(1024), RAR, beside.Peer("RAR 384x6")),
        SMALL | {"generator.hidden": 1536},
    ),
    "RAR-B": Row("generator/rar.py:b", networks.square(1024), RAR, beside.Peer("RAR-B")),
    "LlamaGen 384x6": Row(
        *("generator/llamagen.py:b", networks.square(16384), dict(guidance="constant", weight=2.0)),
        *(beside.Peer("LlamaGen 384x6", WAYS), SMALL),
    ),
    "LlamaGen 384x6, half": Row(
        *("generator/llamagen.py:b", networks.square(16384), HALF),
        *(beside.Peer("LlamaGen 384x6, half"), SMALL),
    ),
    "GPT-B": Row(
        *("generator/llamagen.py:b", networks.square(16384), dict(guidance="constant", weight=2.0)),
        beside.Peer("GPT-B"),
    ),
    "VAR-d6 tokens": Row(
        *("generator/var.py:d16", networks.PYRAMID, VAR, beside.Peer("VAR-d6 tokens"), D6),
        "tokenizer/var_vqvae.py:256",
    ),
    "VAR-d6": Row(
        *("generator/var.py:d16", networks.PYRAMID, VAR, beside.Peer("VAR-d6"), D6),
        *("tokenizer/var_vqvae.py:256", True),
    ),
    "VAR-d16": Row(
        *("generator/var.py:d16", networks.PYRAMID, VAR, beside.Peer("VAR-d16"), {}),
        *("tokenizer/var_vqvae.py:256", True),
    ),
    "MaskBit, 2 steps": Row(
        *("generator/maskbit.py:14bit", networks.square(128, 2), MASKBIT),
        beside.Peer("MaskBit, 2 steps"),
    ),
    "TiTok generator 384x6": Row(
        *("generator/titok.py:l32", TokenLayout((4096,), ((1, 32),)), TITOK),
        beside.Peer("TiTok generator 384x6"),
        SMALL | {"generator.hidden": 1536},
    ),
    "TiTok-L-32 generator": Row(
        *("generator/titok.py:l32", TokenLayout((4096,), ((1, 32),)), TITOK),
        beside.Peer("TiTok-L-32 generator"),
    ),
    "MaskGIT 384x6": Row(
        *("generator/maskgit.py:256", networks.square(1024), dict(noise=4.5, steps=8)),
        beside.Peer("MaskGIT in JAX", ours=True),
        SMALL | {"generator.hidden": 1536},
    ),
}
SAMPLER = "sampler, 1024 x 4096"
PEERS = {SAMPLER: beside.Peer("VAR's sampler"), **{name: row.peer for name, row in ROWS.items()}}
# --quick: of every row
TINY = {"generator.width": 32, "generator.depth": 1, "generator.heads": 2, "generator.hidden": 64}


def way_of(
    name: str, precision: str, quick: bool
) -> tuple[Callable[[], object], Callable[[], float | None]]:
    """(what one turn of a row calls, in how many seconds this core could do it at best)."""
    if name == SAMPLER:
        return sampler_way(), lambda: None
    row = ROWS[name]
    fields = {**row.fields, **(TINY if quick else {})}
    generator, shapes = networks.generator(row.config, fields, row.layout, CLASSES, precision)
    shapes, _ = presets.prepare(shapes, dict(row.sampling))  # as many steps
    generator, sampler = presets.prepare(generator, dict(row.sampling))
    codec = tokenizer = None
    if row.tokenizer:
        tokenizer = networks.tokenizer(row.tokenizer, {}, precision)
        tokenizer.encoder = None
        codec = tokenizer.quantizer
    label_B = jnp.arange(row.images)
    keys_B = rng.per_image(0, "sample", jnp.arange(row.images))

    def way():
        tokens_BLG, *_ = drawing.draw_tokens(generator, codec, label_B, keys_B, sampler)
        found = drawing.decode_pixels(tokenizer, tokens_BLG) if row.pixels else tokens_BLG
        return jax.block_until_ready(found)

    def least() -> float:
        chip, net = roofline.this_cpu(precision), roofline.network(shapes)
        guided = np.flatnonzero(np.asarray(sampler.guidance) != 1)
        first, end = (int(guided[0]), int(guided[-1]) + 1) if len(guided) else (0, 0)
        seconds = roofline.seconds(net, row.images, chip, first=first, guided=end)
        if row.pixels:
            tokens_BLG = jnp.zeros((row.images, row.layout.length, row.layout.groups), jnp.int32)
            seconds += flops.of(drawing.decode_pixels, tokenizer, tokens_BLG) / chip.flops
        return seconds

    return way, least


def sampler_way() -> Callable[[], object]:
    """1,024 draws of 4,096 logits, as VAR's last scale of four images has them."""
    sampler = samplers.Sampler(top_k=900, top_p=0.95)
    logits_BlGV = 3 * jax.random.normal(jax.random.key(0), (BATCH, 256, 1, 4096))
    keys_B = rng.per_image(0, "sample", jnp.arange(BATCH))
    draw = jax.jit(lambda logits_BlGV: sampler.draw(logits_BlGV, keys_B=keys_B, step=0))
    return lambda: jax.block_until_ready(draw(logits_BlGV))


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=training_step.CONFIGS[1], metavar="PATH[:variant]")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=beside.PRECISIONS, help="default: float32; all")
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    parser.add_argument("--table", action="store_true", help="the published networks")
    parser.add_argument("--aot", metavar="TOPOLOGY", help="compile for a TPU, as v5e:2x2")
    parser.add_argument("--cases", nargs="+", default=(), help="of --aot, as rar-xxl:64")
    parser.add_argument("--apart", action="store_true", help="--aot: layers apart, not scanned")
    beside.arguments(parser)
    arguments = parser.parse_args()
    if arguments.aot:
        cases = [
            (name, int(batch)) for name, _, batch in (c.partition(":") for c in arguments.cases)
        ]
        return not aot.run(arguments.aot, cases, scanned=not arguments.apart)
    if arguments.serve:
        return machine.serve(lambda: way_of(arguments.serve, arguments.precision, arguments.quick))
    if arguments.table:
        print(machine.header(training_step.PACKAGES))
        precisions = (arguments.precision,) if arguments.precision else beside.PRECISIONS
        return beside.table("decode.py", PEERS, precisions, arguments)
    arguments.precision = arguments.precision or "float32"
    if arguments.quick:
        arguments.batch, arguments.repeats = (2,), 1
    runtime.devices()
    print(machine.header(training_step.PACKAGES, machine.devices()))
    settings = training_step.load(arguments.config, arguments.quick)
    settings.precision.compute = arguments.precision
    generator = make(settings)
    length = generator.layout.length
    print(f"{arguments.config}: {length} tokens an image, {arguments.precision}; weights at random")
    print(
        f"{'batch':>5}  {'guidance':8}  {'cache':5}  {'tokens per second':<28}"
        f"{'CPU ms per token':<24}same tokens"
    )
    for batch in arguments.batch:
        label_B = jnp.asarray(np.arange(batch) % training_step.CLASSES)
        keys_B = rng.per_image(0, "sample", jnp.arange(batch))
        for weight in (1.0, WEIGHT):
            sampler = presets.sampler({"weight": weight}, decode.steps(generator))
            drawn = {}
            for name, way in (("yes", with_cache), ("no", without_cache)):
                run = functools.partial(way, generator, label_B, keys_B, sampler)
                drawn[name] = np.asarray(run())  # compiles
                walls, cpus = machine.measured(
                    lambda run=run: jax.block_until_ready(run()), arguments.repeats
                )
                count = batch * length
                rate = machine.middle([count / wall for wall in walls], 0)
                cost = machine.middle([1000 * cpu / count for cpu in cpus], 3)
                same = np.mean(drawn[name] == drawn["yes"])
                print(f"{batch:5}  {weight:<8}  {name:5}  {rate:<28}{cost:<24}{same:.2%}")


def make(settings):
    """The generator of a config, as it starts."""
    layout, classes = training_step.LAYOUT, training_step.CLASSES
    return building.generator(settings, layout, classes, rngs=nnx.Rngs(rng.key(0, "init")))


@functools.partial(jax.jit, static_argnames="sampler")
def with_cache(
    generator: Generator, label_B: jax.Array, keys_B: jax.Array, sampler: samplers.Sampler
) -> jax.Array:
    """Tokens [B, L, G], by the driver."""
    return decode.generate(generator, None, label_B, sampler, keys_B=keys_B).tokens_BLG


@functools.partial(jax.jit, static_argnames="sampler")
def without_cache(
    generator: Generator, label_B: jax.Array, keys_B: jax.Array, sampler: samplers.Sampler
) -> jax.Array:
    """Tokens [B, L, G], by a forward pass over the whole sequence for every place of it."""
    B, layout = len(label_B), generator.layout
    orders_BL = generator.orders(keys_B)
    guided = len(sampler.guidance) > 0
    cond = jnp.concatenate([label_B, generator.null(label_B)]) if guided else label_B

    def body(index, tokens_BLG):
        both = [jnp.concatenate([a, a]) if guided else a for a in (tokens_BLG, orders_BL)]
        logits_BLGV = generator.logits(TokenBatch(both[0], cond, both[1]))
        logits_B1GV = jax.lax.dynamic_slice_in_dim(logits_BLGV, index, 1, axis=1)
        if guided:
            weight = jnp.asarray(sampler.guidance, jnp.float32)[index]
            logits_B1GV = guidance.merge(logits_B1GV[:B], logits_B1GV[B:], weight)
        drawn_B1G, *_ = sampler.draw(logits_B1GV, keys_B=keys_B, step=index)
        position_B = jax.lax.dynamic_index_in_dim(orders_BL, index, 1, keepdims=False)
        return tokens_BLG.at[jnp.arange(B), position_B].set(drawn_B1G[:, 0])

    tokens_BLG = jnp.zeros((B, layout.length, layout.groups), jnp.int32)
    return jax.lax.fori_loop(0, layout.length, body, tokens_BLG)


if __name__ == "__main__":
    sys.exit(main())
