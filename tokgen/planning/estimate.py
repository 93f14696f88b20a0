"""What a training step needs, reckoned from shapes: no compiler is asked.

Bytes of what is kept between steps are exact, but for what a device's layout fills up. Operations
are those of the products and convolutions of the step as it is written. What devices exchange
follows from the table of parameters (`sharding.TABLE`):

- a parameter over `fsdp` is gathered in every pass that reads it, and its gradient is scattered;
- gradients are summed over `data`, and those of whole parameters over all devices, as often as
  `sums` finds them;
- over `tensor`, what a block's two branches give is summed, in every pass.

What Muon exchanges of its layers is not reckoned.

A pass reads the weights once: one forward, one backward. With remat a third computes the block
again, of which the backward one takes over what was gathered; but for the maps to adaptive vectors,
which stand at its begin, and whose slopes come last: these are gathered three times (so libtpu's
programs, benchmarks/RESULTS.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax

from tokgen import parameters, sharding
from tokgen.interfaces import PyTree
from tokgen.planning import steps, sums, temporaries, tiles
from tokgen.training import train_state

FROZEN, BATCH = "quantizer and frozen networks", "a batch"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step; bytes and operations.

    Args:
        kept: bytes by component, of what lies there between steps and of a batch.
        temporaries: bytes that a step computes with (`temporaries.most`).
        work: operations of the model's products: not of remat, nor of the optimizer.
        operations: all of them.
        exchanged: bytes received, by what for.
    """

    kept: Mapping[str, float]
    temporaries: float
    work: float
    operations: float
    exchanged: Mapping[str, float]

    @property
    def arguments(self) -> float:
        """Bytes of a step's arguments."""
        return sum(self.kept.values())

    @property
    def told(self) -> float:
        """Bytes of the arguments that a step only reads."""
        return sum(self.kept.get(name, 0.0) for name in (FROZEN, BATCH))

    @property
    def peak(self) -> float:
        """Bytes that must be there at once."""
        return self.arguments + self.temporaries


def of(
    step: steps.Step,
    network: steps.Network,
    mesh: jax.sharding.AbstractMesh,
    strategy: str,
    *,
    work: float,
    operations: float,
    lies: tiles.Lies = tiles.plain,
) -> Estimate:
    """The estimate of a step over a mesh.

    Args:
        work, operations: of all devices together.
        lies: bytes of an array on a device.
    """
    state, batch, frozen = step.over(mesh, strategy)
    ways = sharding.ways(mesh)
    return Estimate(
        kept=kept(*step.read((state, batch, frozen)), lies),
        temporaries=computed_with(step, network, mesh, strategy, lies=lies),
        work=work / mesh.size,
        operations=operations / mesh.size,
        exchanged=exchanged(
            state,
            mesh,
            itemsize=network.itemsize,
            passes=network.parts * network.passes,
            parts=network.parts,
            gradients=sums.of(step, step.images // ways, parts=network.parts),
            summed=step.images * network.positions * network.width * network.layers / ways,
        ),
    )


def computed_with(
    step: steps.Step,
    network: steps.Network,
    mesh: jax.sharding.AbstractMesh,
    strategy: str,
    *,
    lies: tiles.Lies = tiles.plain,
    share: float = 1.0,
) -> float:
    """Bytes that a device computes with, of its images a `share`."""
    state, _, _ = step.over(mesh, strategy)
    images, own = step.images // sharding.ways(mesh), part(state, lies)
    return temporaries.of(step, images, part=own, lies=lies, parts=network.parts, share=share)


def part(state: PyTree, lies: tiles.Lies) -> float:
    """What a device has of the parameters, as a share of what one alone would have."""
    leaves = jax.tree.leaves(steps.parameters_of(state))
    return size(leaves, lies) / sum(lies(tuple(leaf.shape), leaf.dtype) for leaf in leaves)


def kept(state: PyTree, batch: PyTree, frozen: PyTree, lies: tiles.Lies) -> dict[str, float]:
    """Bytes of one device by component."""
    networks = state if isinstance(state, Mapping) else {"": state}
    parts: dict[str, float] = {}
    for name, network in networks.items():
        if not isinstance(network, train_state.TrainState):
            parts[name] = size(network, lies)
            continue
        for what, tree in (
            ("parameters", network.params),
            ("statistics", network.stats),
            ("optimizer moments", network.opt_state),
            ("average of weights", network.ema),
        ):
            if found := size(tree, lies):
                of = f"{name} " if name == "discriminator" else ""
                parts[of + what] = found
        parts["counters"] = parts.get("counters", 0) + size(
            (network.step, network.skipped, network.skips), lies
        )
    parts |= {FROZEN: size(frozen, lies)} if size(frozen, lies) else {}
    return parts | {BATCH: size(batch, lies)}


def size(tree: PyTree, lies: tiles.Lies) -> float:
    """Bytes of one device's part of what lies over a mesh."""
    return sum(tiles.of(leaf, lies) for leaf in jax.tree.leaves(tree))


def exchanged(
    state: PyTree,
    mesh: jax.sharding.AbstractMesh,
    *,
    itemsize: int,
    passes: int,
    parts: int,
    gradients: float,
    summed: float,
) -> dict[str, float]:
    """Bytes that a device receives in a step, by what for; ways of a ring, the fewest there are.

    Args:
        gradients: bytes of what is summed over a batch, where a device has all parameters.
        summed: the values of a device of what the blocks' branches give, for all layers.
    """
    found = dict.fromkeys(("gathered", "scattered", "summed over data", "summed over tensor"), 0.0)
    fsdp, tensor, data = (mesh.shape[axis] for axis in ("fsdp", "tensor", "data"))
    networks = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, train_state.TrainState))
    moved = [n.params for n in networks if isinstance(n, train_state.TrainState)]
    # of a parameter as much as of all: more than its size where it is used several times
    each = gradients / sum(leaf.size for leaf in jax.tree.leaves(moved))
    for params in moved:
        for path, leaf in parameters.paths(params).items():
            axes = [axis for axis in leaf.sharding.spec if axis]
            part = math.prod(leaf.sharding.shard_shape(leaf.shape))
            if "fsdp" in axes:
                times = passes if "modulation/" in path else 2 * parts
                found["gathered"] += times * part * itemsize * (fsdp - 1)
                found["scattered"] += part * each * (fsdp - 1)
                ways = data
            else:
                ways = data * fsdp
            found["summed over data"] += 2 * part * each * (ways - 1) / ways
    if tensor > 1:
        # two branches a block, as often as the block is computed, and once backward
        share = (tensor - 1) / tensor / parts
        found["summed over tensor"] = 2 * passes * 2 * summed * itemsize * share
    return {what: amount for what, amount in found.items() if amount}
