"""What drawing a batch needs, reckoned from shapes, step by step as the driver walks the plan.

The state is the generator's own, for as many rows as its guidance asks for; a step is traced with
it, phase by phase, and not compiled. Bytes of a step are those that no program can spare: each
parameter that it uses, once, keys and values of the slots that it reads, and what it is told. What
lies between layers is not counted, nor what a tokenizer's convolutions hand each other: of many
positions, or pixels, more is moved than that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import chips, flops, parameters, sharding
from tokgen.interfaces import Phase, PyTree
from tokgen.planning import draws, networks, reads, temporaries, tiles
from tokgen.sampling import decode, drawing


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does so many times, alike; operations and bytes of one time."""

    times: int
    operations: float
    bytes: float
    received: float = 0.0

    def waits(self, chip: chips.Chip) -> dict[str, float]:
        """Seconds of one time, by what is waited for."""
        return {
            "products": self.operations / chip.flops,
            "memory": self.bytes / chip.bandwidth,
            "links": self.received / chip.link if self.received else 0.0,
        }

    def seconds(self, chip: chips.Chip) -> float:
        """The least time of all: each time the longest of products, memory and links."""
        return self.times * max(self.waits(chip).values())


@dataclasses.dataclass(frozen=True)
class Part:
    """A phase of a decode, or the pixels that follow.

    Args:
        phase: None of the pixels.
        guided: whether the rows are two for each image.
        read: bytes that a step reads, by what of.
        works: the steps, and what is computed ahead of several.
        temporaries: bytes that a step computes with.
    """

    phase: Phase | None
    guided: bool
    read: dict[str, float]
    works: tuple[Work, ...]
    temporaries: float

    @property
    def operations(self) -> float:
        """Of all steps, and of what is computed ahead."""
        return sum(work.times * work.operations for work in self.works)

    @property
    def bytes(self) -> float:
        """That all steps read, and what is computed ahead."""
        return sum(work.times * work.bytes for work in self.works)

    def seconds(self, chip: chips.Chip) -> float:
        """The least time of it."""
        return sum(work.seconds(chip) for work in self.works)

    def bound(self, chip: chips.Chip) -> str:
        """What its steps wait for most."""
        waits = self.works[0].waits(chip)
        return max(waits, key=waits.get)


@dataclasses.dataclass(frozen=True)
class Decode:
    """A batch, drawn over a mesh; bytes and operations of one device.

    Args:
        images: on a device.
        weights: bytes of parameters, by network.
        cache: bytes of keys and values when they are most; of an image, the rows of its null
            condition left out.
        rest: bytes of the state beside them.
        growing: bytes of keys and values that lie there twice while room is made for more.
        logits: bytes of a step's, where they are most.
    """

    images: int
    sizes: tuple[int, int, int]
    weights: dict[str, float]
    cache: float
    cache_of_image: float
    rest: float
    growing: float
    logits: float
    parts: tuple[Part, ...]

    @property
    def kept(self) -> dict[str, float]:
        """Bytes that lie there while tokens are drawn, by component."""
        found = {**self.weights, draws.CACHED: self.cache, "rest of the state": self.rest}
        return {name: size for name, size in found.items() if size}

    @property
    def drawing(self) -> float:
        """Bytes at once while tokens are drawn."""
        return sum(self.kept.values()) + max(
            self.growing, *(p.temporaries for p in self.parts if p.phase)
        )

    @property
    def pixels(self) -> float:
        """Bytes at once while tokens are turned into pixels."""
        return sum(self.weights.values()) + self.parts[-1].temporaries

    @property
    def peak(self) -> float:
        """Bytes that must be there at once."""
        return max(self.drawing, self.pixels)

    def most(self, room: float) -> int:
        """How many images of a device have so much room: all but weights grows with them."""
        always = sum(self.weights.values())
        return max(0, int((room - always) / (self.peak - always) * self.images))

    def seconds(self, chip: chips.Chip) -> float:
        """The least time of a batch."""
        return sum(part.seconds(chip) for part in self.parts)


def reckoned(
    found: networks.Networks,
    batch: int,
    mesh: jax.sharding.AbstractMesh,
    lies: tiles.Lies = tiles.plain,
    *,
    grows: bool,
) -> Decode:
    """A batch over a mesh.

    Args:
        batch: that the mesh divides.
        lies: bytes of an array on a device.
        grows: whether caches grow by copies, as where layers are apart.
    """
    images, tensor = batch // sharding.ways(mesh), mesh.shape["tensor"]
    walked = decode.phases(found.generator, found.sampler, cached=draws.cached(found))
    states = [draws.state(found, phase, guided, images) for phase, guided in walked]
    heads = getattr(found.generator.transformer, "heads", 1)
    over = tensor if heads % tensor == 0 else 1  # as `sharding.constrain` lays out the heads
    caches = [size(each.cache, lies) / over for each in states]
    single = draws.state(found, walked[-1][0], False, 1).cache
    pairs = zip(caches, caches[1:], strict=False)
    growing = max((old for old, new in pairs if new > old), default=0.0) if grows else 0.0
    parts = [part(found, *pair, images, mesh, lies) for pair in walked]
    return Decode(
        images=images,
        sizes=tuple(mesh.shape[axis] for axis in sharding.AXES),
        weights=weights(found, mesh, lies),
        cache=max(caches),
        cache_of_image=size(single, lies),
        rest=max(size(each.replace(cache=None), lies) for each in states),
        growing=growing,
        logits=max(logits(found, *pair, images) for pair in walked),
        parts=(*parts, pixels(found, images, lies)),
    )


def weights(
    found: networks.Networks, mesh: jax.sharding.AbstractMesh, lies: tiles.Lies
) -> dict[str, float]:
    """Bytes of a device's part of the networks: a generator's is split, a tokenizer whole."""
    _, params, stats = parameters.split(found.generator)
    own = sum(
        lies(draws.of_parameter(path, leaf, mesh).shard_shape(leaf.shape), leaf.dtype)
        for path, leaf in parameters.paths(params).items()
    )
    return {"generator": own + size(stats, lies), "tokenizer": size(found.tokenizer, lies)}


def size(tree: PyTree, lies: tiles.Lies = tiles.plain) -> float:
    """Bytes of all arrays; of a key two words."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += lies((*leaf.shape, 2), np.dtype("uint32"))
        else:
            total += lies(tuple(leaf.shape), leaf.dtype)
    return total


def part(
    found: networks.Networks,
    phase: Phase,
    guided: bool,
    images: int,
    mesh: jax.sharding.AbstractMesh,
    lies: tiles.Lies,
) -> Part:
    """What a device does in a phase, and what that takes."""
    now, tensor = draws.state(found, phase, guided, images), mesh.shape["tensor"]
    jaxpr, groups = draws.traced(found, now, phase, guided, images)
    read = reads.read(jaxpr, {n: group for n, group in enumerate(groups) if group})
    received = links(found, phase, guided, images, mesh)
    works = [Work(phase.steps, flops.products(jaxpr), sum(read.values()), received)]
    # of as many images as a device has: nothing is to be scaled
    inside = temporaries.most(jaxpr, jaxpr, 1.0, lies)
    if jax.tree.leaves(two := draws.ahead_of(found, now, images, phase, 2)[0]):
        span = decode.at_once(phase.steps, two)
        made, ahead = draws.ahead_of(found, now, images, phase, span)
        works.append(_work(ahead, found.generator, phase.steps // span, size(made)))
        inside += size(made, lies)
    if phase.first == 0:
        works.append(_work(draws.begun(found, guided, images), found.generator))
    shared = tuple(
        dataclasses.replace(w, operations=w.operations / tensor, bytes=w.bytes / tensor)
        for w in works
    )
    return Part(phase, guided, read, shared, inside)


def _work(jaxpr: Any, network: PyTree, times: int = 1, written: float = 0.0) -> Work:
    """The work of a program whose first arguments are a network's."""
    read = reads.read(jaxpr, dict.fromkeys(range(len(jax.tree.leaves(network))), draws.WEIGHTS))
    return Work(times, flops.products(jaxpr), sum(read.values()) + written)


def links(
    found: networks.Networks,
    phase: Phase,
    guided: bool,
    images: int,
    mesh: jax.sharding.AbstractMesh,
) -> float:
    """Bytes that a device receives in a step: weights over `fsdp`, sums of branches over `tensor`.

    What lies over `fsdp` is gathered in every step (`sharding.step_by_step`).
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    own = weights(found, mesh, tiles.plain)["generator"]
    gathered = own * (fsdp - 1)
    transformer = found.generator.transformer
    kernels = parameters.paths(parameters.split(found.generator)[1])
    width = next(k.shape[-1] for path, k in kernels.items() if path.endswith("mlp/down/kernel"))
    values = (2 if guided else 1) * images * phase.size * width * 2 * transformer.depth
    itemsize = transformer.precision.compute_dtype.itemsize
    return gathered + 2 * values * itemsize * (tensor - 1) / tensor


def logits(found: networks.Networks, phase: Phase, guided: bool, images: int) -> float:
    """Bytes of a step's logits, float32; both halves where it is guided."""
    layout = found.generator.layout
    rows = 2 * images if guided else images
    return 4 * rows * phase.size * layout.groups * layout.absent


def pixels(found: networks.Networks, images: int, lies: tiles.Lies) -> Part:
    """What a device does to turn the tokens of its images into pixels."""
    layout = found.generator.layout

    tokens_BLG = jax.ShapeDtypeStruct((images, layout.length, layout.groups), jnp.int32)
    jaxpr = jax.make_jaxpr(drawing.decode_pixels)(found.tokenizer, tokens_BLG).jaxpr
    work = _work(jaxpr, found.tokenizer)
    inside = temporaries.most(jaxpr, jaxpr, 1.0, lies)
    return Part(None, False, {draws.WEIGHTS: work.bytes}, (work,), inside)
