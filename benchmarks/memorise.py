"""16 images with 16 labels, learned by heart by every family and sampled back.

    python benchmarks/memorise.py [--family raster random masked next_scale]

The tokens are drawn at random, so that nothing but the label tells them apart. Printed are held
nats per token (masked: mean over the masked tokens, half of them masked), the share of greedily
sampled tokens that are right, the steps taken and the CPU seconds of all threads, compilation
included. The aim: under 0.05 nats, all tokens right, under 180 CPU seconds.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
import training_step
from flax import nnx

from tokgen import parameters, rng, runtime, sharding
from tokgen.config import building
from tokgen.interfaces import Generator, Quantizer, TokenBatch, TokenLayout
from tokgen.quantizers import multiscale
from tokgen.sampling import decode, sampler
from tokgen.training import optimizer as optimizers, train_state

COUNT, CODES = 16, 64
FLAT = TokenLayout((CODES,), ((8, 8),))
SCALES = (1, 2, 4, 6)
NETWORK = dict(width=128, depth=3, heads=4, label_drop=0.0, unroll=3)
FAMILIES = {
    "raster": dict(name="autoregressive", positions="rotary", variant="llama_narrow"),
    "random": dict(
        name="autoregressive", order="random", positions="target_aware", variant="llama_narrow"
    ),
    "masked": dict(name="masked", steps=8, schedule="cosine", variant="llama_narrow"),
    "next_scale": dict(name="next_scale", channels=CODES, variant="var", gates=0.1),
}
ENOUGH = 0.004  # nats per token at which training ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=2000, help="at most so many")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        NETWORK.update(width=16, depth=1, heads=2)
    runtime.devices(COUNT)
    print(machine.header(training_step.PACKAGES, machine.devices()))
    print(f"{'family':12}{'nats per token':<16}{'sampled right':<15}{'steps':<7}CPU seconds")
    for family in arguments.family:
        before = time.process_time()
        nats, right, steps = memorised(family, 4 if arguments.quick else arguments.steps)
        seconds = time.process_time() - before
        print(f"{family:12}{nats:<16.4f}{right:<15.2%}{steps:<7}{seconds:.1f}")


def memorised(family: str, most: int) -> tuple[float, float, int]:
    """(nats per token, share of sampled tokens that are right, steps taken)."""
    codec = pyramid() if family == "next_scale" else None
    layout = FLAT if codec is None else codec.layout
    random = np.random.default_rng(0)
    tokens_BLG = jnp.asarray(random.integers(0, CODES, (COUNT, layout.length, 1)), jnp.int32)
    batch = TokenBatch(tokens_BLG, jnp.arange(COUNT))
    settings = dict(
        generator=FAMILIES[family] | NETWORK, precision=dict(params="float32", compute="float32")
    )

    def make():
        return building.generator(settings, layout, COUNT, rngs=nnx.Rngs(rng.key(0, "init")))

    optimizer = optimizers.optimizer(most, name="muon", learning_rate=3e-3, warmup=20, b2=0.95)
    graph, network = train_state.create(make, optimizer, mesh=sharding.make_mesh())

    @functools.partial(jax.jit, donate_argnums=0)
    def train(network):
        key = rng.key(0, "train", network.step)

        def loss(params):
            generator = parameters.merge(graph, params, network.stats)
            return generator.loss(batch, codec, step=network.step, key=key)[0]

        gradients = jax.grad(loss)(network.params)
        return train_state.apply_gradients(network, gradients, optimizer)[0]

    measure = jax.jit(
        lambda network: nats(parameters.merge(graph, network.params, {}), batch, codec)
    )
    for step in range(1, most + 1):
        network = train(network)
        if step % 50 == 0 or step == most:
            found = float(measure(network))
            if found < ENOUGH:
                break
    generator = parameters.merge(graph, network.params, network.stats)
    keys_B = rng.per_image(0, "sample", jnp.arange(COUNT))
    drawn = jax.jit(
        lambda generator: (
            decode.generate(
                generator, codec, batch.cond, sampler.Sampler(temperature=0.0), keys_B=keys_B
            ).tokens_BLG
        )
    )(generator)
    return found, float(jnp.mean(drawn == tokens_BLG)), step


def nats(generator: Generator, batch: TokenBatch, codec: Quantizer) -> jax.Array:
    """Nats per token; of a masked model those of masked tokens, where half are masked."""
    if generator.exact:
        return generator.nats(batch, codec).mean()
    keys_B = rng.per_image(0, "eval", jnp.arange(COUNT))
    half = generator.layout.length // 2
    order_BL = jax.vmap(lambda key: jax.random.permutation(key, generator.layout.length))(keys_B)
    mask_BLG = (order_BL < half)[..., None]
    return generator.masked_loss(batch, mask_BLG)[1]["nats_per_token"]


def pyramid() -> multiscale.Quantizer:
    """A pyramid of random codes."""
    inner = dict(name="vq", codes=CODES, channels=CODES)
    side = SCALES[-1]
    return multiscale.Quantizer(inner, SCALES, phi=0, grid=(side, side), rngs=nnx.Rngs(0))


if __name__ == "__main__":
    main()
