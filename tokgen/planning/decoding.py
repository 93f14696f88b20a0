"""What drawing a batch needs, reckoned from shapes, step by step as the driver walks the plan.

The state is the generator's own, for as many rows as its guidance asks for; a step is traced with
it, phase by phase, and not compiled. Bytes of a step are those that no program can spare: each
parameter that it uses, once, keys and values of the slots that it reads, and what it is told. What
lies between layers is not counted, nor what a tokenizer's convolutions hand each other: of many
positions, or pixels, more is moved than that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import chips, flops, parameters, sharding
from tokgen.interfaces import Phase, PyTree
from tokgen.planning import draws, networks, reads, temporaries, tiles
from tokgen.sampling import decode, drawing

# Tables of what is told ahead that lie there at once, as in programs that libtpu 0.0.42 compiled
AHEAD = 4


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
        copied: bytes of keys and values that lie there twice for a while.
        logits: bytes of a step's, where they are most.
    """

    images: int
    sizes: tuple[int, int, int]
    weights: dict[str, float]
    cache: float
    cache_of_image: float
    rest: float
    copied: float
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
        most = max(part.temporaries for part in self.parts if part.phase)
        return sum(self.kept.values()) + self.copied + most

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
    platform: str,
) -> Decode:
    """A batch over a mesh.

    Args:
        batch: that the mesh divides.
        lies: bytes of an array on a device.
        platform: of the devices. Where layers are decoded apart, caches grow by copies.
    """
    with jax.sharding.use_abstract_mesh(sharding.on_paper(platform)):
        return _reckoned(found, batch, mesh, lies, platform in decode.SCANNED)


def _reckoned(
    found: networks.Networks,
    batch: int,
    mesh: jax.sharding.AbstractMesh,
    lies: tiles.Lies,
    stacked: bool,
) -> Decode:
    images, tensor = batch // sharding.ways(mesh), mesh.shape["tensor"]
    walked = decode.phases(found.generator, found.sampler, cached=draws.cached(found))
    states = [draws.state(found, phase, guided, images) for phase, guided in walked]
    heads = getattr(found.generator.transformer, "heads", 1)
    over = tensor if heads % tensor == 0 else 1  # as `sharding.constrain` lays out the heads
    caches = [size(each.cache, lies) / over for each in states]
    single = draws.state(found, walked[-1][0], False, 1).cache
    parts = [part(found, *pair, images, mesh, lies, AHEAD if stacked else 1) for pair in walked]
    return Decode(
        images=images,
        sizes=tuple(mesh.shape[axis] for axis in sharding.AXES),
        weights=weights(found, mesh, lies),
        cache=max(caches),
        cache_of_image=size(single, lies),
        rest=max(size(each.replace(cache=None), lies) for each in states),
        copied=copied(caches, [phase for phase, _ in walked], stacked),
        logits=max(logits(found, *pair, images) for pair in walked),
        parts=(*parts, pixels(found, images, lies)),
    )


def copied(caches: Sequence[float], phases: Sequence[Phase], stacked: bool) -> float:
    """Bytes of keys and values that lie there twice: what was there before there was more room.

    Of stacked layers there is room for all at once. Between steps that share no loop libtpu 0.0.42
    copies them all the same.
    """
    if stacked:
        return max(caches[1:], default=0.0) if phases[-1].steps == 1 else 0.0
    pairs = zip(caches, caches[1:], strict=False)
    return max((old for old, new in pairs if new > old), default=0.0)


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
    ahead: int,
) -> Part:
    """What a device does in a phase, and what that takes: `ahead` tables of what is told."""
    now, tensor = draws.state(found, phase, guided, images), mesh.shape["tensor"]
    span = draws.span(found, now, images, phase)
    made, making = draws.ahead_of(found, now, images, phase, span)
    # of many rows it may be too much: then a step computes it for itself
    told = draws.ahead_of(found, now, images, phase, 1)[0] if jax.tree.leaves(made) else None
    jaxpr, groups = draws.traced(found, now, phase, guided, images, told)
    read = reads.read(jaxpr, {n: group for n, group in enumerate(groups) if group})
    received = gathered(found, jaxpr, mesh) + summed(found, phase, guided, images, mesh)
    works = [Work(phase.steps, flops.products(jaxpr), sum(read.values()), received)]
    # of as many images as a device has: nothing is to be scaled
    inside = temporaries.most(jaxpr, jaxpr, 1.0, lies)
    if told is not None:
        works.append(_begun(found, making, mesh, phase.steps // span, size(made)))
        inside += ahead * size(made, lies)
    if phase.first == 0:
        works.append(_begun(found, draws.begun(found, guided, images), mesh))
    shared = tuple(
        dataclasses.replace(w, operations=w.operations / tensor, bytes=w.bytes / tensor)
        for w in works
    )
    return Part(phase, guided, read, shared, inside)


def _work(jaxpr: Any, network: PyTree, times: int = 1) -> Work:
    """The work of a program whose first arguments are a network's."""
    read = reads.read(jaxpr, dict.fromkeys(range(len(jax.tree.leaves(network))), draws.WEIGHTS))
    return Work(times, flops.products(jaxpr), sum(read.values()))


def _begun(
    found: networks.Networks,
    jaxpr: Any,
    mesh: jax.sharding.AbstractMesh,
    times: int = 1,
    written: float = 0.0,
) -> Work:
    """The work of what is computed before steps."""
    work = _work(jaxpr, found.generator, times)
    received = gathered(found, jaxpr, mesh)
    return dataclasses.replace(work, bytes=work.bytes + written, received=received)


def gathered(found: networks.Networks, jaxpr: Any, mesh: jax.sharding.AbstractMesh) -> float:
    """Bytes that a device receives of the generator's weights that lie over `fsdp`.

    Of those that a program reads; every step gathers its own anew (`sharding.step_by_step`).
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(found.generator)
    paths = ["/".join(map(parameters.entry, path)).removesuffix("/value") for path, _ in leaves]
    own = parameters.paths(parameters.split(found.generator)[1])
    total = 0.0
    for path in reads.read(jaxpr, dict(enumerate(paths))).keys() & own.keys():
        where = draws.of_parameter(path, own[path], mesh)
        if "fsdp" in where.spec:
            part = own[path].dtype.itemsize * math.prod(where.shard_shape(own[path].shape))
            total += part * (mesh.shape["fsdp"] - 1)
    return total


def summed(
    found: networks.Networks,
    phase: Phase,
    guided: bool,
    images: int,
    mesh: jax.sharding.AbstractMesh,
) -> float:
    """Bytes that a device receives in a step of what branches give, over `tensor`."""
    tensor, transformer = mesh.shape["tensor"], found.generator.transformer
    kernels = parameters.paths(parameters.split(found.generator)[1])
    width = next(k.shape[-1] for path, k in kernels.items() if path.endswith("mlp/down/kernel"))
    values = (2 if guided else 1) * images * phase.size * width * 2 * transformer.depth
    return 2 * values * transformer.precision.compute_dtype.itemsize * (tensor - 1) / tensor


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
