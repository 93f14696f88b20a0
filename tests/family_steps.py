"""Steps of every generator family on a mesh, by one process of a job: what test_processes compares.

    python -m tests.family_steps FILE DATA,FSDP,TENSOR FAMILY ... [--permuted] [--coordinator ...]

Plain descent: Adam turns the rounding of a gradient near 0 into a whole step. Process 0 writes the
losses of all steps, and the gradients of the first.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

import train_generator
from tests import test_devices
from tokgen import options, parameters, runtime, sharding
from tokgen.training import optimizer as optimizers, train_state

STEPS, BATCH = 20, 16
# As the chips of v5e:4x4 lie: a process has rows that do not follow each other
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
PLAIN = optimizers.Optimizer(optax.trace(decay=0.0), lambda step: jnp.float32(0.05))


def mesh_of(sizes, permuted):
    devices = np.array(jax.devices())
    devices = devices[ORDER] if permuted else devices
    devices = devices[: int(np.prod(sizes))].reshape(sizes)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def begun(name):
    """(structure, state) on the host, the same in every process."""
    module, codec = test_devices.network(name)
    graph, params, stats = parameters.split(module)
    zero = np.zeros((), np.int32)
    params, stats = jax.device_get((params, stats))
    # numbers of the size that training starts with: large ones make steps that never settle
    params = jax.tree.map(lambda leaf: leaf / 3, params)
    momentum = PLAIN.chain.init(params)
    state = train_state.TrainState(zero, zero, params, stats, momentum, None)
    return graph, state, codec, module.layout


def steps(name, mesh, strategy):
    """(losses of all steps, gradients of the first by path)."""
    graph, state, codec, layout = begun(name)
    settings = ml_collections.ConfigDict(dict(seed=0, ema=0.0))
    with jax.set_mesh(mesh):
        state = jax.device_put(state, train_state.shardings(state, mesh, strategy))
        codec = jax.device_put(jax.device_get(codec), sharding.replicated(mesh))
        step = train_generator.train_step(settings, graph, PLAIN)
        numbers, losses, first = np.random.default_rng(0), [], None
        rows = sharding.rows_here(BATCH, mesh)
        for _ in range(STEPS):
            shape = (BATCH, layout.length, layout.groups)
            batch = {
                "tokens": numbers.integers(0, layout.vocab, shape).astype(np.int32),
                "label": numbers.integers(0, 10, BATCH).astype(np.int32),
            }
            own = {key: array[rows] for key, array in batch.items()}
            state, scalars = step(state, sharding.global_batch(own, mesh), codec)
            losses.append(float(scalars["nats_per_token"]))
            if first is None:
                first = parameters.paths(sharding.everywhere(state.opt_state.trace))
    return np.array(losses), first


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("mesh")
    parser.add_argument("families", nargs="+")
    parser.add_argument("--permuted", action="store_true")
    options.processes(parser)
    runtime.join(sys.argv[1:])
    args = parser.parse_args()
    runtime.devices()
    mesh = mesh_of(tuple(map(int, args.mesh.split(","))), args.permuted)
    strategy = "tensor" if mesh.shape["tensor"] > 1 else "fsdp"
    found = {}
    for name in args.families:
        losses, gradients = steps(name, mesh, strategy)
        found |= {f"{name}:{path}": array for path, array in gradients.items()}
        found[f"{name}:"] = losses
    if jax.process_index() == 0:
        np.savez(args.file, **found)


if __name__ == "__main__":
    sys.exit(runtime.call("family_steps", main))
