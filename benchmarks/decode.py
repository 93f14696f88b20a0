"""Tokens per second of decoding, with a cache and without one, guided and not.

    python benchmarks/decode.py [--config PATH[:variant]] [--batch 1 8 64]

The network is a config's, with weights as they start: what is drawn doesn't matter, how long it
takes does. With a cache it is `sampling.decode.generate`, which `tokgen sample` uses. Without one,
every token costs a forward pass over the whole sequence: the same keys, so the same tokens, and the
share that agrees is printed (rounding may part them in rare draws). CPU seconds are of all threads.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np
import training_step
from flax import nnx

from tokgen import rng, runtime
from tokgen.config import building
from tokgen.interfaces import Generator, TokenBatch
from tokgen.sampling import decode, guidance, presets, sampler as samplers

WEIGHT = 2.0  # of the guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=training_step.CONFIGS[1], metavar="PATH[:variant]")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    arguments = parser.parse_args()
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
        drawn_B1G = sampler.draw(logits_B1GV, keys_B=keys_B, step=index).tokens_BlG
        position_B = jax.lax.dynamic_index_in_dim(orders_BL, index, 1, keepdims=False)
        return tokens_BLG.at[jnp.arange(B), position_B].set(drawn_B1G[:, 0])

    tokens_BLG = jnp.zeros((B, layout.length, layout.groups), jnp.int32)
    return jax.lax.fori_loop(0, layout.length, body, tokens_BLG)


if __name__ == "__main__":
    main()
