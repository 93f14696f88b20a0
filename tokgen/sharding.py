"""How arrays lie over a mesh: the mesh, the parameter table, the strategies, `constrain`.

The mesh has three axes, `data`, `fsdp` and `tensor`, of size 1 when unused; the batch lies over
`data` and `fsdp` together. A parameter's path is looked up in the table, which gives its axes in
the project's letters; a strategy says which mesh axis serves which letter.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tokgen import ranges
from tokgen.interfaces import PyTree, UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
PAPER = "on paper"  # the kind of a device that runs nothing

# First match wins. Letters are aligned from the right: a stacked Y in front is left whole.
TABLE = (
    (r"attention/(query|key|value)/kernel", "DNK"),
    (r"attention/out/kernel", "NKD"),
    (r"mlp/(gate|up)/kernel", "DF"),
    (r"mlp/down/kernel", "FD"),
    (r"embeddings/table", "GVD"),
    (r"head/kernel", "DGV"),
    (r"modulation/kernel", "D.."),  # of adaptive blocks and heads: [D, 6 or 2, D]
    (r"skips/kernel", "D."),
    (r"readout/kernel", "D."),
    (r"embed/kernel", ".D"),
    (r"head/hidden/kernel", "DF"),
    (r"head/logits/kernel", "DV"),
    (r"head/patches/kernel", "D."),
    (r"trunk/.+", "."),  # frozen feature networks of discriminators
    (r"codebook", ".."),  # every device measures distances to the whole codebook
    (r"table", ".D"),  # labels, positions
    (r"(conv\w*|convs/\d+|first|last)/kernel", "...."),  # small: replicated
    (r"(scale|shift|hidden|logits|dense\w*)/kernel", ".."),
    (r"(scale|bias|token|counts|sums|updates|ns_coeffs)", "."),
    (r"(direction|mean|variance|absent)", "."),
)

# Letter -> mesh axis of the weights.
STRATEGIES: Mapping[str, Mapping[str, str]] = {
    "data": {},
    "fsdp": {"D": "fsdp"},
    "tensor": {"D": "fsdp", "N": "tensor", "F": "tensor", "V": "tensor"},
}

# Letter -> mesh axes of the activations; an axis of size 1 changes nothing.
ACTIVATIONS: Mapping[str, str | tuple[str, ...]] = {
    "B": BATCH,
    "N": "tensor",
    "F": "tensor",
    "V": "tensor",
}

LARGE = 1_000_000  # elements: a larger parameter may not stay whole by accident


@ranges.checked
def make_mesh(
    data: ranges.Axis = -1,
    fsdp: ranges.Axis = 1,
    tensor: ranges.Axis = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """A mesh over all devices, or those given; one size may be -1, "all that are left".

    It follows the links of a TPU, so where a device stands depends on the sizes: what a process
    computes together lies over one mesh, the one that is set (`current`).
    """
    devices = jax.devices() if devices is None else devices
    return _of(devices, *sizes_of(data, fsdp, tensor, len(devices)))


def sizes_of(data: int, fsdp: int, tensor: int, count: int) -> list[int]:
    """The sizes of a mesh of `count` devices; one may be -1, "all that are left"."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // max(rest, 1), 1)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"the mesh must use all devices: data x fsdp x tensor = {data} x {fsdp} x {tensor}, "
            f"devices = {count}; set one of them to -1 to take what is left"
        )
    return sizes


def letters(path: str) -> str:
    """The table's row for a parameter path such as `transformer/blocks/mlp/up/kernel`."""
    for pattern, axes in TABLE:
        if re.search(rf"(^|/){pattern}$", path):
            return axes
    rows = "\n".join(f"  {pattern}" for pattern, _ in TABLE)
    raise ValueError(f"no row of sharding.TABLE matches the parameter {path!r}; rows:\n{rows}")


def spec(
    path: str, shape: tuple[int, ...], strategy: str, mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """The partition of one parameter.

    A mesh axis serves the first letter that asks for it and divides it; a dimension that does not
    divide passes the axis on to the next dimension of the same parameter that does. What is large
    and no letter has split lies over the longest dimension that divides, of any letter: a device
    has no room for it whole.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy must be one of {sorted(STRATEGIES)}; found {strategy!r}")
    axes = letters(path)
    named = dict(
        zip(range(len(shape) - 1, -1, -1), reversed(axes), strict=False)
    )  # dimension -> letter
    rules, parts = STRATEGIES[strategy], [None] * len(shape)
    for dimension in sorted(named):
        axis = rules.get(named[dimension])
        if axis is None or mesh.shape[axis] == 1 or axis in parts:
            continue
        candidates = [dimension, *(d for d in sorted(named) if d > dimension)]
        for candidate in candidates:
            free = parts[candidate] is None and named[candidate] != "."
            if free and shape[candidate] % mesh.shape[axis] == 0:
                parts[candidate] = axis
                break
    used = [axis for axis in dict.fromkeys(rules.values()) if mesh.shape[axis] > 1]
    if math.prod(shape) > LARGE and used and not any(parts):
        _over_longest(path, shape, named, parts, used, strategy, mesh)
    return PartitionSpec(*parts)


def _over_longest(
    path: str,
    shape: tuple[int, ...],
    named: Mapping[int, str],
    parts: list[str | None],
    used: list[str],
    strategy: str,
    mesh: jax.sharding.Mesh,
) -> None:
    """Lay what no letter has split over its longest dimension that an axis divides."""
    longest = sorted(named, key=lambda dimension: (-shape[dimension], -dimension))
    pairs = ((axis, d) for axis in used for d in longest if shape[d] % mesh.shape[axis] == 0)
    if found := next(pairs, None):
        axis, dimension = found
        parts[dimension] = axis
    else:
        sizes = {2**n for n in range(1, 13) for d in named if shape[d] % 2**n == 0}
        fitting = f"sizes that do: {', '.join(map(str, sorted(sizes)))}" if sizes else "none does"
        raise UserError(
            f"parameter {path} of shape {shape} stays whole under strategy {strategy!r} on mesh "
            f"{dict(mesh.shape)}: no size of {' or '.join(used)} divides one of its dimensions; "
            f"{fitting}, the rest of the devices as data"
        )


def of_parameter(
    path: str, shape: tuple[int, ...], strategy: str, mesh: jax.sharding.Mesh
) -> NamedSharding:
    """The sharding of one parameter (or of its moment or its average: the shape is the same)."""
    return NamedSharding(mesh, spec(path, shape, strategy, mesh))


def of_network(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a parameter of what draws or measures: over `fsdp` and `tensor`, if used."""
    return of_parameter(path, shape, "tensor", mesh)


def replicated(mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh) -> NamedSharding:
    """The sharding of an array that leads with the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def told(mesh) -> str:
    """A mesh in words: `mesh data 8, fsdp 1, tensor 1`."""
    return "mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def ways(mesh) -> int:
    """Over how many devices a batch lies."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(
    batch: int, mesh: jax.sharding.Mesh, name: str = "config.batch_size", parts: int = 1
) -> None:
    """An error with the numbers that fit where a batch does not lie evenly over its devices.

    Nor do `parts` of it, one after the other. For training, where another number of images would
    be another run; `filled` is for the rest.
    """
    over = ways(mesh) * parts
    if batch % over:
        fitting = [n for n in (batch // over * over, -(-batch // over) * over) if n]
        what = "a batch" if parts == 1 else f"each of config.accumulate={parts} parts of a batch"
        fewer = [n for n in range(1, parts) if batch % (ways(mesh) * n) == 0]
        others = f", accumulate={fewer[-1]}" if fewer else ""
        raise UserError(
            f"{what} lies evenly over the {ways(mesh)} devices of the mesh {dict(mesh.shape)}; "
            f"found {name}={batch}: give {' or '.join(map(str, fitting))}{others}, or a number of "
            f"devices that divides {batch // parts} (config.mesh, CUDA_VISIBLE_DEVICES)"
        )


def current() -> jax.sharding.Mesh:
    """The mesh that is set, or one of all devices over which batches lie."""
    mesh = jax.sharding.get_mesh()
    return make_mesh() if mesh.empty else mesh


def single() -> jax.sharding.Mesh:
    """A mesh of one device of this process."""
    return _of(jax.local_devices()[:1], 1, 1, 1)


def _of(devices: Sequence[jax.Device], *sizes: int) -> jax.sharding.Mesh:
    # Auto stated: jax.make_mesh defaults to explicit axes in current JAX
    types = (AxisType.Auto,) * 3
    # of GPUs every host is called a slice, and what lies over several is the user's choice
    slices = {getattr(device, "slice_index", None) for device in devices}
    if len(slices) > 1 and devices[0].platform == "tpu":
        return jax.sharding.Mesh(_over_slices(devices, len(slices), sizes), AXES, axis_types=types)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no axis of the torus is as long, as on v6e:16x16 for 2 x 128 x 1
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(arranged, AXES, axis_types=types)


def _over_slices(devices: Sequence[jax.Device], slices: int, sizes: Sequence[int]) -> np.ndarray:
    """Devices of several slices of TPUs: `data` spans them, the other axes stay within one.

    Between slices is the network of the data centre, which is slower than the links of chips.
    """
    data, fsdp, tensor = sizes
    if data % slices:
        inner = len(devices) // slices
        raise UserError(
            f"these are {slices} slices of {inner} devices: the data axis spans them, and must be "
            f"a multiple of {slices}; found data x fsdp x tensor = {data} x {fsdp} x {tensor}; "
            f"fsdp x tensor may be {inner} or a part of it"
        )
    within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def filled(tree: PyTree, rows: int, mesh: jax.sharding.Mesh) -> PyTree:
    """Arrays that lead with images, laid over the devices of a batch.

    Filled up by their last row, to `rows` and on to a number that the devices divide: one program
    serves all, and each device does its share. Callers take as many rows as they gave.
    """

    def fill(array: np.ndarray) -> np.ndarray:
        return padded(array, -(-max(rows, len(array)) // ways(mesh)) * ways(mesh))

    # every process has all of it: `by_rows` takes each device's part
    where = replicated(mesh) if spans(mesh) else of_batch(mesh)
    return jax.device_put(jax.tree.map(fill, tree), where)


def spans(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> bool:
    """Whether a mesh has devices of several processes, and not of this one alone."""
    return mesh.size > jax.local_device_count()


def by_rows(program: Callable[..., PyTree], whole: tuple, rows: tuple) -> PyTree:
    """program(*whole, *rows), of `rows` that lead with images, by all devices: each its own images.

    For what makes something of each image, that leads with the images, too. Where every device has
    the networks in `whole` to itself, none waits for another; where they lie over several, on a
    mesh of `fsdp` or `tensor`, the compiler divides the work. As it is without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return program(*whole, *rows)
    many, own = spans(mesh), PartitionSpec(BATCH)
    if ways(mesh) < mesh.size or mesh.shape["fsdp"] > 1:
        found = program(*whole, *jax.lax.with_sharding_constraint(rows, own))
        # of many processes, each reads all of it
        return jax.lax.with_sharding_constraint(found, PartitionSpec()) if many else found

    def alone(whole: tuple, rows: tuple) -> PyTree:
        found = program(*whole, *rows)
        return jax.lax.all_gather(found, BATCH, tiled=True) if many else found

    out = PartitionSpec() if many else own
    specs = dict(in_specs=(PartitionSpec(), own), out_specs=out)
    return jax.shard_map(alone, **specs, check_vma=False)(whole, rows)


def step_by_step(networks: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    """Both, such that what is gathered of networks over several devices is of this step alone.

    The compiler would gather it before all steps and keep it: no network larger than a device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return networks, state
    return jax.lax.optimization_barrier((networks, state))


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """An array of images filled up to so many rows, by its last one."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])


def rows_here(batch: int, mesh) -> np.ndarray:
    """The rows of a batch that devices of this process hold, in order.

    Of several processes each has its own, or some have the same, where `tensor` spans them; on most
    TPU topologies they are not one run of rows: a mesh follows the links, and not the hosts.
    """
    return rows_of(mesh, batch, jax.process_index())


def rows_of(mesh: jax.sharding.Mesh, batch: int, process: int) -> np.ndarray:
    """`rows_here`, of any process of a job."""
    check_batch(batch, mesh)
    held = of_batch(mesh).devices_indices_map((batch,))
    rows = [np.arange(batch)[at] for device, at in held.items() if device.process_index == process]
    return np.unique(np.concatenate(rows))


def global_batch(batch: Mapping[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """One array per entry, over all devices, of the rows that lie here (`rows_here`)."""
    where, shares = of_batch(mesh), len(rows_here(ways(mesh), mesh))

    def laid(array: np.ndarray) -> jax.Array:
        each, over = divmod(len(array), shares)
        size = len(array) * ways(mesh) // shares
        check_batch(size if not over else size + 1, mesh)
        rows = rows_here(each * ways(mesh), mesh)

        def held(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            at = int(np.searchsorted(rows, first))  # rows are in order: a device's are a run here
            return array[at : at + last - first]

        return jax.make_array_from_callback((size, *array.shape[1:]), where, held)

    return {name: laid(array) for name, array in batch.items()}


def everywhere(tree: PyTree) -> PyTree:
    """Arrays over all devices as numpy's, whole, in every process."""
    if jax.process_count() > 1:
        mesh = current()
        with jax.set_mesh(mesh):
            tree = _whole(tree, replicated(mesh))
    return jax.device_get(tree)


@functools.partial(jax.jit, static_argnums=1)
def _whole(tree: PyTree, where: NamedSharding) -> PyTree:
    return jax.lax.with_sharding_constraint(tree, where)


def looked_up(path: str, x: jax.Array) -> jax.Array:
    """A parameter as a step of training reads it: a table of rows is gathered over D before.

    Vectors of a split table would be laid out as the table is, and copied whole to every device to
    be laid over the batch. Not for decoding, which would gather it before all of its steps.
    """
    axes = letters(path) if re.search(r"(^|/)table$", path) else ""
    return constrain(x, axes.rjust(x.ndim, ".")) if "D" in axes else x


def by_layers(stack: jax.Array) -> jax.Array:
    """Stacked layers [Y, ...] over the devices of the mesh, each of them whole on one.

    Axis by axis, as far as a device is left with fewer layers: a step of one axis is an all-to-all,
    or takes a part of what is there; of several at once the compiler gathers all of it first. What
    does not divide is filled up by the compiler.
    """
    steps = _layer_axes(len(stack))
    for axes in steps:
        stack = _over_layers(stack, axes)
    if steps[-1]:  # and nothing else is split
        return jax.lax.with_sharding_constraint(stack, PartitionSpec(steps[-1]))
    return stack


def from_layers(stack: jax.Array) -> jax.Array:
    """What `by_layers` laid out, axis by axis back to where it is needed next."""
    for axes in reversed(_layer_axes(len(stack))):
        stack = _over_layers(stack, axes)
    return stack


def _layer_axes(layers: int) -> list[tuple[str, ...]]:
    """The mesh axes that layers lie over, step by step: none, one, two, ..."""
    mesh = jax.sharding.get_abstract_mesh()
    steps, ways = [()], 1
    for axis in () if mesh.empty or mesh.manual_axes else ("fsdp", "tensor", "data"):
        more = ways * mesh.shape[axis]
        if math.ceil(layers / more) < math.ceil(layers / ways):
            steps, ways = [*steps, (*steps[-1], axis)], more
    return steps


def _over_layers(stack: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`stack` with its layers over some axes, its other dimensions as the compiler wants them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return stack
    free = (PartitionSpec.UNCONSTRAINED,) * (stack.ndim - 1)
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(axes or None, *free))


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """`x` laid out by the activation rules, one letter per dimension; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # a device's own rows lie on it
        return x
    return jax.lax.with_sharding_constraint(x, activation(axes, x.shape))


def matrix(kernel: jax.Array, rank: int) -> jax.Array:
    """A kernel of `rank` axes of inputs, then those of outputs, as the matrix that it is.

    Over `fsdp` by its D, as the kernel is: its gradient is scattered as it is summed. That of a
    kernel [D, N, K] the compiler of TPUs sums whole on every device before each takes its part,
    which is twice as much over the links.
    """
    inputs, outputs = kernel.shape[:rank], kernel.shape[rank:]
    flat = kernel.reshape(math.prod(inputs), math.prod(outputs))
    mesh = jax.sharding.get_abstract_mesh()
    if kernel.ndim == 2 or mesh.empty or mesh.manual_axes or mesh.shape["fsdp"] == 1:
        return flat
    # D is what is not heads, gates or groups
    parts = ["fsdp", PartitionSpec.UNCONSTRAINED]
    parts = parts if rank == 1 else parts[::-1]
    if flat.shape[parts.index("fsdp")] % mesh.shape["fsdp"]:
        return flat
    return jax.lax.with_sharding_constraint(flat, PartitionSpec(*parts))


def activation(axes: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How `constrain` lays an array over the mesh that is set."""
    mesh, parts = jax.sharding.get_abstract_mesh(), []
    for letter, size in zip(axes, shape, strict=True):
        names = ACTIVATIONS.get(letter)
        names = (names,) if isinstance(names, str) else names
        ways = math.prod(mesh.shape[name] for name in names) if names else 1
        parts.append(names if ways > 1 and size % ways == 0 else None)
    return PartitionSpec(*parts)


def by_device(function: Callable, axes: Sequence[str], *operands: jax.Array) -> jax.Array:
    """`function` of each device's part of arrays, laid out as `constrain` lays them by `axes`.

    For kernels, which no compiler splits. What is returned lies as the first array does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function(*operands)
    places = tuple(activation(a, x.shape) for a, x in zip(axes, operands, strict=True))
    # whether a kernel's results differ between devices, jax cannot know
    run = jax.shard_map(function, in_specs=places, out_specs=places[0], check_vma=False)
    return run(*operands)


def platform() -> str:
    """Of the devices that run what is being traced: those of the mesh that is set, or jax's own.

    A process of a CPU compiles for the mesh of a TPU that is not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_paper(platform: str) -> AbstractMesh:
    """One device of a platform that runs nothing: what is traced over it is to be counted."""
    device = AbstractDevice(PAPER, None, platform)
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh((1,) * len(AXES), AXES, axis_types=types, abstract_device=device)


def counted() -> bool:
    """Whether what is being traced is to be counted alone, as over the mesh of `on_paper`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind == PAPER
