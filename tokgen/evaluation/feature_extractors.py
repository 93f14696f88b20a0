"""Feature networks by name: read from the user's files, or trained on the user's data.

An extractor is a frozen network that maps uint8 images [B, H, W, 3] to named features [B, D] in
float32. Nothing is downloaded: a network is read from a file that the user names, and its
fingerprint travels with everything that was measured by it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import archives, boundary, choices, parameters, rng, sharding
from tokgen.backbones import features as networks
from tokgen.data import loader, sources, views
from tokgen.evaluation import local_classifier
from tokgen.interfaces import UserError
from tokgen.metrics import reconstruction
from tokgen.nn import resample
from tokgen.pretrained.formats import reader

EACH = 16  # images of a device at a time: fixed, so that a feature is the same on any mesh
LARGEST = 64  # pixels of a side that the local network sees


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A feature network in use.

    Attributes:
        name: one of `backbones.features.known()`, or "local".
        layers: its features by name; the first is the one that distances are taken in.
        record: what is told of it in results and references: name, fingerprint, where from.
    """

    name: str
    network: nnx.Module
    layers: tuple[str, ...]
    record: dict


class Local(nnx.Module):
    """A small classifier of the user's own images, by its features."""

    def __init__(self, network: local_classifier.PhotographClassifier):
        self.network = network

    def __call__(self, image_BHW3: jax.Array) -> dict[str, jax.Array]:
        """uint8 [B, H, W, 3] -> `pooled`, `spatial`, `logits`, all [B, D]."""
        size = seen(image_BHW3.shape[1:3])
        image_BHW3 = resample.resize(
            reconstruction.from_uint8(image_BHW3), size, resample.linear_antialias
        )
        return self.network.features(image_BHW3)


def seen(size: Sequence[int]) -> tuple[int, int]:
    """The size at which the local network sees images of a size: even, at most LARGEST."""
    ratio = min(1.0, LARGEST / max(size))
    rows, columns = (max(8, 2 * round(side * ratio / 2)) for side in size)
    return rows, columns


def from_file(name: str, path: str) -> Extractor:
    """The published network of that name, its weights from the file at `path`."""
    published = choices.named(networks.known(), name, "a feature network that is read from a file")
    if not path:
        raise UserError(
            f"the feature network {name} needs its weight file: --weights FILE. {published.source}"
        )
    if not pathlib.Path(path).is_file():
        raise UserError(f"no weight file at {path}. {published.source}")
    network = published.make(reader.network(path))
    record = {
        "name": name,
        "fingerprint": fingerprint(name, network),
        "file": pathlib.Path(path).name,
        "sha256": archives.sha256(path),
        "source": published.source,
    }
    return Extractor(name, network, published.layers, record)


def described(extractor: Extractor) -> str:
    """A network and where it is from, for the terminal."""
    record = extractor.record
    return (
        f"feature network {record['name']}: {record['file']} (sha256 {record['sha256'][:16]}...). "
        f"{record['source']}"
    )


def trained(
    source: sources.RandomAccess,
    size: tuple[int, int],
    *,
    seed: int = 1,
    recipe: local_classifier.Recipe = local_classifier.PHOTOGRAPHS,
) -> Extractor:
    """The local network of a source's images, trained now or read from the cache."""
    network = local_classifier.of_images(source, seen(size), seed=seed, recipe=recipe)
    return local(network, {"trained_on": source.fingerprint, "classes": list(source.classes)})


def local(network: local_classifier.PhotographClassifier, about: Mapping) -> Extractor:
    """The extractor of a local network."""
    module = Local(network)
    record = {"name": "local", "fingerprint": fingerprint("local", module), **about}
    return Extractor("local", module, ("pooled", "spatial", "logits"), record)


def arrays(extractor: Extractor) -> dict[str, np.ndarray]:
    """The arrays of a local network by path, to be kept in a file."""
    _, params, _ = parameters.split(extractor.network)
    return {path: np.asarray(leaf) for path, leaf in parameters.paths(params).items()}


def from_arrays(kept: Mapping[str, np.ndarray], about: Mapping) -> Extractor:
    """The local network that `arrays` gave."""
    try:
        classes = kept["network/conv_out/kernel"].shape[-1]
        channels = kept["network/blocks/0/conv/kernel"].shape[-2] // 4
    except KeyError as error:
        raise UserError(f"the arrays of a local network lack {error}; make them again") from error

    def make():
        return Local(local_classifier.PhotographClassifier(channels, classes, rngs=rng.rngs(0)))

    graph, params, stats = parameters.split(nnx.eval_shape(make))
    wanted = {path: leaf.shape for path, leaf in parameters.paths(params).items()}
    found = {path: array.shape for path, array in kept.items()}
    if wanted != found:
        raise UserError(
            "the arrays are not those of a local network of this version; make them again"
        )
    archives.check_numbers(kept, "the local network of a reference")
    leaves = [jnp.asarray(kept[path]) for path in wanted]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    network = parameters.merge(graph, params, stats).network
    return local(network, {k: v for k, v in about.items() if k not in ("name", "fingerprint")})


def accuracy(
    extractor: Extractor,
    source: sources.RandomAccess,
    size: tuple[int, int],
    *,
    count: int = 10_000,
) -> tuple[float, int]:
    """(share of images whose class a local network sees, or which way is up; how many were seen).

    At most `count` of a source.
    """
    view = views.fixed("center", seen(size), 3)
    hits, step = [], 0
    for batch in loader.once(
        source, view, batch_size=200, indices=sources.evenly(len(source), count)
    ):
        image_BHW3, label_B = batch["image"], batch["label"]
        if not source.classes:
            ways = local_classifier.turns_of(seen(size))
            label_B = np.random.default_rng([0, step]).integers(0, ways, len(label_B))
            image_BHW3, step = local_classifier.turned(image_BHW3, label_B, ways), step + 1
        logits_BK = features(extractor, image_BHW3, ("logits",))["logits"]
        boundary.refuse(~np.isfinite(logits_BK).all(1), "the network's opinion of images")
        hits.append(logits_BK.argmax(-1) == label_B)
    hits = np.concatenate(hits)
    return float(hits.mean()), len(hits)


def features(
    extractor: Extractor,
    image_NHW3: np.ndarray,
    layers: tuple[str, ...] = (),
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, np.ndarray]:
    """float32 [N, D] of every layer that is asked for, over all devices."""
    mesh = sharding.current() if mesh is None else mesh
    layers, batch = layers or extractor.layers, EACH * mesh.size
    network, found = jax.device_put(extractor.network, sharding.replicated(mesh)), []
    for start in range(0, len(image_NHW3), batch):
        part = image_NHW3[start : start + batch]
        with jax.set_mesh(mesh):
            values = _seen(network, sharding.filled(part, batch, mesh), layers)
        found.append({name: np.asarray(value)[: len(part)] for name, value in values.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in layers}


@functools.partial(jax.jit, static_argnames="layers")
def _seen(
    network: nnx.Module, image_BHW3: jax.Array, layers: tuple[str, ...]
) -> dict[str, jax.Array]:
    def of(network, image_BHW3):
        # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
        with jax.default_matmul_precision("highest"):
            found = network(image_BHW3)
        return {name: found[name] for name in layers}

    return sharding.by_rows(of, (network,), (image_BHW3,))


def fingerprint(name: str, network: nnx.Module) -> str:
    """A hash of every number of a network and of its name, which says how it takes images."""
    _, params, stats = parameters.split(network)
    digest = hashlib.sha256(name.encode())
    for tree in (params, stats):
        for path, leaf in parameters.paths(tree).items():
            array = np.ascontiguousarray(leaf)
            digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
