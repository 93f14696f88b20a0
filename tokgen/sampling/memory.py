"""Does a batch fit the devices? Asked before any work on them.

What a decode keeps for every image, above all keys and values, is known from shapes alone. It is
held against what is free on the devices, where they say; a CPU does not, and nothing is refused
there. Temporaries are not counted: what is not refused here may still be too much.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import rng, sharding
from tokgen.interfaces import Generator, PyTree, Quantizer, Sampler, UserError
from tokgen.sampling import decode

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a decode of so many images keeps at its end."""

    images: int
    cache: int  # keys and values
    rest: int  # of the state: tokens, what adaptive blocks are told

    @property
    def all(self) -> int:
        """Both."""
        return self.cache + self.rest


def kept(
    generator: Generator, codec: Quantizer | None, cond: PyTree, sampler: Sampler, images: int
) -> Kept:
    """What a decode of `images` conditions like `cond` keeps; of shapes alone.

    Of a generator as it is laid out where it decodes.
    """
    layout, plan = generator.layout, generator.plan()
    guided = bool(np.any(np.asarray(sampler.guidance) != 1))  # of none at all: false
    rows = 2 * images if guided else images

    def last(generator: Generator, codec: Quantizer | None, cond: PyTree):
        shape = (rows, layout.length, layout.groups)
        given = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
        keys_B = rng.per_image(0, "sample", jnp.arange(rows))
        state = generator.start(cond, codec, keys_B=keys_B, given=given)
        if state.cache is not None:
            state = state.replace(cache=tuple(c.grow(plan[-1].slots) for c in state.cache))
        return state

    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), cond
    )
    state = jax.eval_shape(last, generator, codec, like)
    cache = _bytes(state.cache)
    return Kept(images, cache, _bytes(state) - cache)


def check(
    generator: Generator,
    codec: Quantizer | None,
    cond: PyTree,
    sampler: Sampler,
    batch: int,
    mesh: jax.sharding.Mesh,
    *,
    option: str = "--batch",
    particles: int = 1,
) -> None:
    """UserError where a batch over a mesh cannot fit its devices; with the largest that could.

    `option` is what it was asked for by; each of `particles` of an image is a row as one is.
    """
    free = room(mesh)
    if free is None:
        return
    generator = jax.eval_shape(decode.laid_out, generator)
    over, tensor = sharding.ways(mesh), mesh.shape["tensor"]
    heads = generator.transformer.heads if hasattr(generator.transformer, "heads") else 1
    tensor = tensor if heads % tensor == 0 else 1  # as `sharding.constrain` lays out the heads
    one, two = (kept(generator, codec, cond, sampler, images) for images in (1, 2))
    each = (two.cache - one.cache) // tensor + two.rest - one.rest
    always = one.cache // tensor + one.rest - each
    each *= 2 if particles > 1 else 1  # those that go on are copied beside those that were
    share = -(-batch // over) * particles
    need = always + share * each
    if need <= free:
        return
    rows = max(0, int((free - always) // each))
    most = rows // particles * over
    where = f"each of {mesh.size} devices" if mesh.size > 1 else "the device"
    fewer = "use more devices"
    if most:
        fewer = f"the largest {option} that fits is {most * particles}"
    elif rows and particles > 1:
        fewer = f"the most --particles that fit are {rows}"
    elif mesh.size > mesh.shape["fsdp"] * mesh.shape["tensor"]:
        fewer = f"split the network over the devices, --mesh 1,1,{mesh.size}"
    of_each = f" with {particles} particles each" if particles > 1 else ""
    cached = (two.cache - one.cache) // tensor * particles  # of an image
    raise UserError(
        f"a batch of {batch} images{of_each} needs {need / GB:.1f} GB on {where}, "
        f"{share * cached / particles / GB:.1f} GB of them keys and values ({cached / 1e6:.1f} MB "
        f"an image); found {free / GB:.1f} GB free: {fewer}"
    )


def room(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes free on the fullest of this process's devices; None where they do not say."""
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    if not all({"bytes_limit", "bytes_in_use"} <= said.keys() for said in found):
        return None
    return min(said["bytes_limit"] - said["bytes_in_use"] for said in found)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
