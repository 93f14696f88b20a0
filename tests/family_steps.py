"""Steps of every family of configs on a mesh: what test_sharded_steps compares.

    python -m tests.family_steps FILE DATA,FSDP,TENSOR FAMILY ... [--data N] [--permuted]
        [--coordinator ...]

Plain descent: Adam turns the rounding of a gradient near 0 into a whole step. Process 0 writes the
losses of all steps, the gradients of the first, and what the last left.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

from tests import recipes, test_devices, test_recipes
from tokgen import losses, options, parameters, runtime, sharding
from tokgen.config import building
from tokgen.discriminators import feature_heads
from tokgen.training import (
    gan as gans,
    generator_step,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

STEPS, BATCH = 20, 16
# Batches to compare on, one seed after the other until one agrees. Which of two codes is nearer, or
# which side of a hinge a logit lies, is rounding's to decide where they tie, and differs from
# processor to processor: what follows differs by far more than rounding. A fault is in all of them.
SEEDS = (0, 1, 2)
# As the chips of v5e:4x4 lie: a process has rows that do not follow each other
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
MARK = "=== compiling"
RATES = {"generator": 0.05, "tokenizer": 1e-3}  # of a GAN: far from where steps part

# Every family of configs/generator: name -> recipe, alphabet of a position, what differs
SMALL = (16,)
GENERATORS = {name: (*row, {}) for name, row in test_devices.FAMILIES.items()} | {
    "adaptive_label": ("generator/ibq", SMALL, {}),
    "groups": ("generator/npp", SMALL, dict(groups=((2, 10),))),  # a stage each for half the steps
    "bert": ("generator/titok", SMALL, {}),
    "u_shaped": ("generator/titok:s128", SMALL, {}),
    "shared": ("generator/var:d36s", SMALL, {}),
    "captions": ("generator/llamagen:t2i_xl_256", SMALL, dict(texts=(3, 8))),
    "columns": ("generator/cifar10:columns", SMALL, {}),
    "sequence": ("generator/cifar10:sequence", SMALL, {}),
}
# Every family of configs/tokenizer, with its discriminator: name -> recipe, what makes it small
SHAPES = dict(test_recipes.CONV, discriminator=dict(weight=0.1, network=test_recipes.PATCHES))
SIDE = test_recipes.SIZE
SMALLER = dict(
    view=dict(size=(SIDE, SIDE)),
    quantizer=dict(scales=(1, 3, SIDE), phi=2, **test_recipes.FEW),
)
TOKENIZERS = {
    **{name: (name, shrunk) for name, shrunk in test_recipes.SHRUNK.items()},
    # with its own discriminator it needs no more pixels than the others
    "var_vqvae": ("var_vqvae", test_recipes.SHRUNK["var_vqvae"] | SMALLER),
    # its latents lie close at first: of codes that are revived from them several would be one
    "tatitok": (
        "tatitok",
        test_recipes.SHRUNK["tatitok"]
        | dict(quantizer=dict(test_recipes.FEW["quantizer"], revival="random", revive=0)),
    ),
    "shapes": ("shapes", SHAPES),
    # few codes: of as many as there are latents, those revived lie 1e-5 apart, and rounding chooses
    "shapes:ema": ("shapes:ema", SHAPES | dict(quantizer=dict(codes=8))),
    "shapes:pyramid": (
        "shapes:pyramid",
        SHAPES | dict(quantizer=dict(scales=(1, 2, 4), quantizer=dict(codes=8))),
    ),
    "cifar10_f4:gan": ("cifar10_f4:gan", SHAPES),
    "ablation:bsq": ("ablation:bsq", dict(test_recipes.CONV, quantizer=dict(bits=4))),
    "ablation:vq_clustering": (
        "ablation:vq_clustering",
        dict(test_recipes.CONV, quantizer=dict(codes=8)),
    ),
    # its second stage: the first learns the codes of a teacher
    "titok:pixels": ("titok", test_recipes.SHRUNK["titok"]),
}
# What VAR's discriminator looks through, in the place of DINO
TRUNK = dict(size=16, patch=4, width=8, depth=2, heads=2, levels=(0, 1), kernel=3)


@dataclasses.dataclass(frozen=True)
class Run:
    """A family before its first step, the same in every process: on the host."""

    state: Any
    frozen: Any  # what the step is told beside state and batch
    make: Callable[..., Callable]  # the compiled step, under a strategy, of a batch in parts
    batch: Callable[[np.random.Generator], dict[str, np.ndarray]]
    losses: Callable[[dict[str, jax.Array]], list[jax.Array]]


def plain(kind):
    return optimizers.Optimizer(optax.trace(decay=0.0), lambda step: jnp.float32(RATES[kind]))


def mesh_of(sizes, permuted=False):
    devices = np.array(jax.devices())
    devices = devices[ORDER] if permuted else devices
    devices = devices[: int(np.prod(sizes))].reshape(sizes)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def strategy_of(mesh):
    return "tensor" if mesh.shape["tensor"] > 1 else "fsdp"


@functools.cache
def begun(name):
    """The Run of a family."""
    return tokenizer(name) if name in TOKENIZERS else generator(name)


def _state(params, stats, kind):
    zero = np.zeros((), np.int32)
    momentum = plain(kind).chain.init(params)
    # numpy's: what lies on a device already would be donated to the first step
    return jax.device_get(train_state.TrainState(zero, zero, params, stats, momentum, params))


def generator(name, **changed):
    reference, vocab, own = GENERATORS[name]
    module, codec = test_devices.built(reference, vocab, **own, **changed)
    graph, params, stats = parameters.split(module)
    # numbers of the size that training starts with: large ones make steps that never settle
    params = jax.tree.map(lambda leaf: leaf / 3, params)
    layout = module.layout

    def make(strategy, accumulate=1):
        fields = dict(seed=0, ema=0.9, strategy=strategy, accumulate=accumulate)
        settings = ml_collections.ConfigDict(fields)
        return generator_step.step(settings, graph, plain("generator"))

    def batch(numbers):
        shape = (BATCH, layout.length, layout.groups)
        found = {
            "tokens": numbers.integers(0, layout.vocab, shape).astype(np.int32),
            "label": numbers.integers(0, 10, BATCH).astype(np.int32),
        }
        if module.cond == "text":
            found["text"] = numbers.normal(size=(BATCH, *module.text)).astype(np.float32)
            found["mask"] = np.arange(module.text[0]) >= numbers.integers(0, 2, (BATCH, 1))
        return found

    return Run(
        state=_state(params, stats, "generator"),
        frozen=jax.device_get(codec),
        make=make,
        batch=batch,
        losses=lambda scalars: [scalars["nats_per_token"]],
    )


def tokenizer(name, **network):
    """`network`: of the discriminator."""
    reference, shrunk = TOKENIZERS[name]
    settings = recipes.load(f"tokenizer/{reference}")
    settings.view.size = (test_recipes.SIZE,) * 2
    settings.update(shrunk | dict(steps=2 * STEPS, batch_size=BATCH))
    settings.precision.compute, settings.ema = "float32", 0.9
    playing = settings.discriminator.weight > 0
    with settings.unlocked():
        settings.discriminator.update(dict(network=network) if network else {})
    settings.discriminator.update(dict(start=0.0, warmup=0.0) if playing else {})
    *_, last = plan = stages.plan(settings)
    stage = last if name.endswith(":pixels") else plan[0]
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    made = lambda: building.tokenizer(settings, rngs=nnx.Rngs(0))  # noqa: E731
    graphs, networks = {}, {}
    graphs["model"], *variables = parameters.split(jax.jit(made)())
    networks["model"] = _state(*variables, "tokenizer")
    if playing:
        graphs["discriminator"], *variables = parameters.split(rival(gan, settings))
        networks |= {"discriminator": _state(*variables, "tokenizer")}
        networks |= {"averages": jax.device_get(losses.averages())}
    frozen = {"perceptual": {}}
    if stage.objective == "codes":
        small = test_recipes.shrunk("maskgit_vqgan")
        teacher = jax.jit(lambda: building.tokenizer(small, rngs=nnx.Rngs(1)))()
        frozen["teacher"] = jax.device_get(teacher)

    def make(strategy, accumulate=1):
        settings.strategy = strategy
        with settings.unlocked():
            settings.accumulate = accumulate
        with mock.patch.object(stages, "optimizer", lambda *_: plain("tokenizer")):
            limits = safeguards.Limits()
            steps = tokenizer_step.Steps(settings, gan, limits, graphs, plain("tokenizer"), 0)
            return steps(stage, playing)

    def batch(numbers):
        image_BHW3 = numbers.integers(0, 256, (BATCH, *settings.view.size, 3)).astype(np.uint8)
        found = {"image": image_BHW3}
        if "text" in settings.decoder:
            shape = BATCH, *settings.decoder.text
            found["text"] = numbers.normal(size=shape).astype(np.float32)
        return found

    def seen(scalars):
        weights = {**settings.loss, **stage.loss}
        own = sum(weights[term] * scalars[term] for term in weights if term in scalars)
        return [own, *(scalars[n] for n in ("discriminator_loss",) if n in scalars)]

    return Run(networks, frozen, make, batch, seen)


def rival(gan, settings):
    """The discriminator; VAR's sees the features of a network of random numbers.

    Its logits are about as large as the margin of the hinge: where all lie inside, the gradients of
    the last bias, of images and of reconstructions, cancel, and what is left of them is rounding.
    """
    features = functools.partial(feature_heads.Discriminator, **TRUNK)
    usual = functools.partial(gans.build, gan, settings)
    make = features if gan.network["name"] == "feature_heads" else usual

    def scaled():
        made = make(rngs=nnx.Rngs(1))
        noise_BHW3 = jax.random.uniform(jax.random.key(0), (BATCH, *settings.view.size, 3))
        if "hinge" in gan.loss and hasattr(made, "last"):
            made.last.kernel[...] /= made(2 * noise_BHW3 - 1).std()
        return made

    return jax.jit(scaled)()


def laid(run, mesh, strategy, accumulate=1):
    """(the compiled step, state, what it is told beside the batch) on a mesh that is set."""
    state = jax.device_put(run.state, train_state.shardings(run.state, mesh, strategy))
    frozen = jax.device_put(run.frozen, sharding.replicated(mesh))
    return run.make(strategy, accumulate), state, frozen


def batches(run, mesh, seed):
    numbers, rows = np.random.default_rng(seed), sharding.rows_here(BATCH, mesh)
    while True:
        own = {key: array[rows] for key, array in run.batch(numbers).items()}
        yield sharding.global_batch(own, mesh)


def steps(name, mesh, seed=0, accumulate=1):
    """By path: "losses" [STEPS, 1 or 2], gradients of the first step, and what is there `after`."""
    run, strategy, losses, found = begun(name), strategy_of(mesh), [], {}
    with jax.set_mesh(mesh):
        step, state, frozen = laid(run, mesh, strategy, accumulate)
        places = train_state.shardings(run.state, mesh, strategy)
        for _, batch in zip(range(STEPS), batches(run, mesh, seed), strict=False):
            state, scalars, *_ = step(state, batch, frozen)
            losses.append([float(value) for value in run.losses(scalars)])
            if len(losses) == 1:
                found["gradients"] = traces(state)
                check_places(state, places)
        found["after"] = _each(state, lambda n: [n.params, n.stats, n.ema])
        if mesh.size == 1:
            first = jax.device_put(stirred(run.state), places)
            state, *_ = step(first, next(batches(run, mesh, seed)), frozen)
            found["stirred"] = traces(state)
        return parameters.paths(found) | {"losses": np.array(losses)}


def traces(state):
    """The gradients of the last step, of each network."""
    return _each(state, lambda network: network.opt_state.trace)


def stirred(state):
    """A state whose parameters are moved by one in their last digit."""
    random = np.random.default_rng(0)

    def moved(leaf):
        side = np.where(random.random(leaf.shape) < 0.5, -np.inf, np.inf)
        return np.nextafter(leaf, side.astype(leaf.dtype))

    def network(tree):
        return tree.replace(params=jax.tree.map(moved, tree.params)) if _is_network(tree) else tree

    return jax.tree.map(network, state, is_leaf=_is_network)


def _each(state, part):
    """Something of each network, on the host."""
    networks = jax.tree.leaves(state, is_leaf=_is_network)
    arrays = [part(each) for each in networks if _is_network(each)]
    return jax.tree.map(np.array, sharding.everywhere(arrays))  # copies: a step donates its own


def _is_network(tree):
    return isinstance(tree, train_state.TrainState)


def check_places(state, places):
    """Assert that a step has left every array where it was found."""
    places = parameters.paths(places)
    moved = {
        path: (leaf.sharding, places[path])
        for path, leaf in parameters.paths(state).items()
        if not leaf.sharding.is_equivalent_to(places[path], leaf.ndim)
    }
    assert not moved, moved


def compile_alone(name, mesh, strategy):
    """Nothing but compiling: XLA says on stderr what it finds."""
    run = begun(name)
    with jax.set_mesh(mesh):
        step, state, frozen = laid(run, mesh, strategy)
        step.lower(state, next(batches(run, mesh, 0)), frozen).compile()


def compare(found, expected):
    """Assert that `steps` are those of one device, to the rounding of float32.

    A gradient is so where it is within 1e-5 of the leaf's largest entry, or within twice what it
    moves by where the parameters move in their last digit; one of a bias, a sum of what cancels,
    within 2e-5.
    """
    expected, noise = dict(expected), {}
    for path in [path for path in expected if path.startswith("stirred/")]:
        noise[path.replace("stirred/", "gradients/")] = expected.pop(path)
    assert found.keys() == expected.keys()
    losses, alone = found["losses"], expected["losses"]
    assert np.isfinite(alone).all() and (alone[0] != alone[-1]).all()
    np.testing.assert_allclose(losses[0], alone[0], rtol=1e-6)
    paths = [path for path in expected if path.startswith("gradients/")]
    largest = {path: np.abs(expected[path]).max() for path in paths}
    top, apart = max(largest.values()), {}
    for path in paths:
        of = largest[path] if largest[path] > 1e-5 * top else top
        departs = np.abs(found[path] - expected[path]).max() / of
        bound = 2e-5 if path.endswith("bias") else 1e-5
        rounding = 2 * np.abs(noise[path] - expected[path]).max() / of
        if departs > max(bound, min(rounding, 1e-4)):  # more is another code, not rounding
            apart[path] = departs, rounding
    assert not apart, apart
    np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
    for path in (path for path in expected if path.startswith("after/")):
        # rows that are drawn anew from latents (clustering) carry their rounding, times the rate
        close = dict(rtol=1e-5, atol=1e-4, err_msg=path)
        np.testing.assert_allclose(found[path], expected[path], **close)


def agreed(found_with, expected_with):
    """Assert that with the batches of one of the seeds `compare` finds nothing."""
    for seed in SEEDS:
        try:
            return compare(found_with(seed), expected_with(seed))
        except AssertionError as error:
            print(f"with seed {seed}: {error}")
            told = error
    raise told


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("mesh")
    parser.add_argument("families", nargs="+")
    parser.add_argument("--data", type=int, default=0, help="the seed of the batches")
    parser.add_argument("--permuted", action="store_true")
    parser.add_argument("--compile", metavar="STRATEGY", help="compile, and write nothing")
    options.processes(parser)
    runtime.join(sys.argv[1:])
    args = parser.parse_args()
    runtime.devices()
    mesh = mesh_of(tuple(map(int, args.mesh.split(","))), args.permuted)
    if args.compile:
        for name in args.families:
            print(MARK, name, file=sys.stderr, flush=True)
            compile_alone(name, mesh, args.compile)
        return
    found = {}
    for name in args.families:
        found |= {f"{name} {path}": array for path, array in steps(name, mesh, args.data).items()}
    if jax.process_index() == 0:
        np.savez(args.file, **found)


def read(file, name):
    """`steps` of a family, of a file that `main` wrote."""
    with np.load(file) as arrays:
        own = [key for key in arrays if key.startswith(f"{name} ")]
        return {key.removeprefix(f"{name} "): arrays[key] for key in own}


if __name__ == "__main__":
    sys.exit(runtime.call("family_steps", main))
