"""Small classifiers, independent of every tokenizer and generator.

One is of procedural shapes: it says how many of the drawn shapes are what they should be. Trained
on real shapes of the freest form in half a minute. Each image's mean is removed and every batch is
turned and flipped, so that it tells form and not colour or pose. The other tells small
photographs, and is trained on the images of a folder, flipped and shifted. Both are kept in the
cache under the hash of their code, their data and their seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokgen import archives, boundary, parameters, report, rng, runtime, sharding
from tokgen.data import (
    folder,
    folder_layout,
    folder_listing,
    folder_split,
    loader,
    pixels,
    shapes,
    sources,
    views,
)
from tokgen.interfaces import PyTree, UserError
from tokgen.metrics import reconstruction
from tokgen.nn import conv, norms
from tokgen.nn.precision import Precision
from tokgen.training import optimizer as optimizers, train_state

STEPS, BATCH, RATE = 2000, 32, 2e-3
WIDTHS = (48, 96, 96, 96)
STRIDES = (1, 2, 1, 2)

SHIFT = 2  # pixels, either way
SPATIAL = 7  # channels of the map that `spatial` keeps
VIEWS = ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))  # corners in an image with a pixel around it


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, a cosine, and an average of the weights."""

    steps: int
    batch: int
    rate: float
    ema: float
    weight_decay: float = 1e-2


PHOTOGRAPHS = Recipe(steps=5500, batch=64, rate=3e-3, ema=0.998, weight_decay=5e-2)


class ShapeClassifier(nnx.Module):
    """Four convolutions on 2 x 2 pixels at a time, and a linear map to the classes."""

    def __init__(self, size: tuple[int, int], channels: int, classes: int, *, rngs: nnx.Rngs):
        options = dict(precision=Precision(compute="float32"), rngs=rngs)
        convs, width = [], 4 * channels
        for outputs, stride in zip(WIDTHS, STRIDES, strict=True):
            convs.append(Block(width, outputs, stride, **options))
            width = outputs
        self.blocks = nnx.List(convs)
        rows, columns = (-(-side // 8) for side in size)
        self.conv_out = conv.Conv(rows * columns * width, classes, 1, gain=0.1, **options)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        """Logits [B, classes] of images in [0, 1]."""
        x_BHWC = conv.space_to_depth(image_BHW3 - image_BHW3.mean((1, 2), keepdims=True), 2)
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return self.conv_out(x_BHWC.reshape(len(x_BHWC), 1, 1, -1))[:, 0, 0]

    def classes(self, image_BHW3: jax.Array) -> jax.Array:
        """[B] the likeliest class."""
        return self(image_BHW3).argmax(-1)


class PhotographClassifier(nnx.Module):
    """Convolutions on 2 x 2 pixels at a time, a residual block after each halving, their mean."""

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = (48, 96, 192),
        *,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=Precision(compute="float32"), rngs=rngs)
        blocks, width = [Block(4 * channels, widths[0], 1, **options)], widths[0]
        for outputs in widths[1:]:
            blocks.append(Block(width, outputs, 2, **options))
            blocks.append(conv.LightResidual(outputs, outputs, norm=norms.RMSNorm, **options))
            width = outputs
        self.blocks = nnx.List(blocks)
        self.norm_out = norms.RMSNorm(width, **options)
        self.conv_out = conv.Conv(width, classes, 1, gain=0.1, **options)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        """Logits [B, classes] of images in [0, 1]."""
        return self.features(image_BHW3)["logits"]

    def features(self, image_BHW3: jax.Array) -> dict[str, jax.Array]:
        """What is seen in images in [0, 1]: `pooled` [B, C], `logits` [B, classes], `spatial`.

        The last are the first seven channels of the last map, flat, as sFID has it of Inception.
        """
        x_BHWC = conv.space_to_depth(4 * image_BHW3 - 2, 2)
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        x_BHWC = self.norm_out(x_BHWC)
        x_B11C = x_BHWC.mean((1, 2), keepdims=True)
        return {
            "pooled": x_B11C[:, 0, 0],
            "spatial": x_BHWC[..., :SPATIAL].reshape(len(x_BHWC), -1),
            "logits": self.conv_out(x_B11C)[:, 0, 0],
        }

    def classes(self, image_BHW3: jax.Array) -> jax.Array:
        """[B] the likeliest class by ten views: in place and a pixel aside, each also mirrored."""
        _, rows, columns, _ = image_BHW3.shape
        wider_BHW3 = jnp.pad(image_BHW3, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        total = 0.0
        for row, column in VIEWS:
            view_BHW3 = wider_BHW3[:, row : row + rows, column : column + columns]
            total += self(view_BHW3) + self(view_BHW3[:, :, ::-1])
        return total.argmax(-1)


class Block(nnx.Module):
    """relu(convolution)."""

    def __init__(self, inputs: int, outputs: int, stride: int, **options):
        self.conv = conv.Conv(inputs, outputs, stride=stride, gain=2**0.5, **options)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, H / stride, W / stride, O]."""
        return jax.nn.relu(self.conv(x_BHWC))


def load_or_train(
    size: tuple[int, int] = (32, 32), channels: int = 3, *, seed: int = 1
) -> ShapeClassifier:
    """The classifier of shapes of a size: from the cache, or trained now."""
    recipe = Recipe(STEPS, BATCH, RATE, ema=0.995)

    def make():
        rngs = rng.rngs(rng.key(seed, "init"))
        return ShapeClassifier(size, channels, len(shapes.CLASSES), rngs=rngs)

    def train():
        source = shapes.Source(size, channels, split="train", seed=seed, form="hard", count=40_000)
        view = views.fixed("center", size, channels)
        with loader.batches(source, view, seed=seed, batch_size=recipe.batch) as batches:
            return _trained(make, batches, recipe, _turned, seed)

    return _kept((shapes, conv), (size, channels, seed), make, train)


def of_photographs(
    path: str | os.PathLike,
    size: tuple[int, int] = (32, 32),
    channels: int = 3,
    *,
    seed: int = 1,
    recipe: Recipe = PHOTOGRAPHS,
) -> PhotographClassifier:
    """The classifier of a folder's classes, trained on its split `train`, or cached."""
    return of_images(folder.Source(path, split="train"), size, channels, seed=seed, recipe=recipe)


def of_images(
    source: sources.RandomAccess,
    size: tuple[int, int],
    channels: int = 3,
    *,
    seed: int = 1,
    recipe: Recipe = PHOTOGRAPHS,
) -> PhotographClassifier:
    """The classifier of a source's classes; of one without classes, of which way is up.

    Which quarter turn an image was given is learned in the place of classes (arXiv:1803.07728).
    All images are held in memory.
    """
    classes = len(source.classes) or turns_of(size)

    def make():
        return PhotographClassifier(channels, classes, rngs=rng.rngs(rng.key(seed, "init")))

    def train():
        view = views.fixed("center", size, channels)
        look = _shifted if source.classes else _moved
        with contextlib.closing(_shuffled(source, view, recipe.batch, seed)) as batches:
            told = batches if source.classes else _upright(batches, classes, seed)
            return _trained(make, told, recipe, look, seed)

    what = (size, channels, seed, recipe, source.fingerprint)
    understanding = (folder, folder_layout, folder_listing, folder_split)  # who is of which class
    return _kept((*understanding, pixels, views, conv, norms), what, make, train)


def turns_of(size: tuple[int, int]) -> int:
    """How many turns leave an image its size."""
    return 4 if size[0] == size[1] else 2


def turned(image_BHW3: np.ndarray, way_B: np.ndarray, ways: int) -> np.ndarray:
    """Each image turned `way` times by a quarter, or by a half where there are two ways."""
    found = image_BHW3.copy()
    for way in range(1, ways):
        rows = way_B == way
        found[rows] = np.rot90(image_BHW3[rows], way * 4 // ways, axes=(1, 2))
    return found


def _upright(batches: Iterator[dict], ways: int, seed: int) -> Iterator[dict]:
    """The batches, each image turned; the label is how."""
    for step, batch in enumerate(batches):
        way_B = np.random.default_rng([seed, step, rng.TURN]).integers(0, ways, len(batch["label"]))
        turned_BHW3 = turned(batch["image"], way_B, ways)
        yield {"image": turned_BHW3, "label": way_B.astype(np.int32)}


def _kept(modules: tuple, what: tuple, make: Callable, train: Callable) -> nnx.Module:
    """The network that `make` shapes, its parameters from the cache or from `train`."""
    sources = [
        inspect.getsource(module) for module in (inspect.getmodule(ShapeClassifier), *modules)
    ]
    text = repr((sources, *what, np.__version__, jax.__version__))
    name = f"classifier-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    file = runtime.cache_folder() / name
    graph, params, stats = parameters.split(nnx.eval_shape(make))
    if file.exists():
        leaves = _cached(file, {p: leaf.shape for p, leaf in parameters.paths(params).items()})
        report.say(f"classifier: read from {file}")
        return parameters.merge(
            graph, jax.tree.unflatten(jax.tree.structure(params), leaves), stats
        )
    params = train()
    part = pathlib.Path(f"{file}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            np.savez(
                out, **{path: np.asarray(leaf) for path, leaf in parameters.paths(params).items()}
            )
        part.replace(file)
    except OSError as error:  # the cache saves time, and nothing else
        report.say(f"classifier: not kept for the next time: {error}")
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return parameters.merge(graph, params, stats)


def _cached(file: pathlib.Path, wanted: Mapping[str, tuple[int, ...]]) -> list[jax.Array]:
    """Parameters in the order of `wanted`, their shapes by path."""
    saved = archives.arrays(file)
    if any(path not in saved or saved[path].shape != shape for path, shape in wanted.items()):
        raise UserError(f"{file} is damaged: it is not what was kept; remove it")
    return [jnp.asarray(saved[path]) for path in wanted]


def _trained(
    make: Callable[[], nnx.Module],
    batches: Iterator[dict],
    recipe: Recipe,
    look: Callable[[jax.Array, jax.Array], jax.Array],
    seed: int,
) -> PyTree:
    """Averaged parameters; `look(image_BHW3, key)` is what the network sees of a batch.

    On one device, also where there are more: sums over several would round otherwise, and the
    network be another one on another machine. It is too small to gain much.
    """
    optimizer = optimizers.optimizer(
        recipe.steps,
        learning_rate=recipe.rate,
        warmup=50,
        b2=0.99,
        weight_decay=recipe.weight_decay,
    )
    mesh = sharding.single()
    graph, network = train_state.create(make, optimizer, mesh=mesh, ema=recipe.ema)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(network, batch):
        key = rng.key(seed, "train", network.step)
        image_BHW3 = look(reconstruction.from_uint8(batch["image"]), key)

        def loss(params):
            logits = parameters.merge(graph, params, network.stats)(image_BHW3)
            costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return costs.mean()

        total, gradients = jax.value_and_grad(loss)(network.params)
        return train_state.apply_gradients(
            network, gradients, optimizer, ema=recipe.ema, loss=total
        )[0]

    with jax.set_mesh(mesh), report.bar(recipe.steps, what="classifier") as bar:
        for _ in range(recipe.steps):
            network = step(network, sharding.global_batch(next(batches), mesh))
            bar.update()
    return jax.device_get(train_state.averaged(network))


def _shuffled(
    source: sources.RandomAccess, view: views.View, batch: int, seed: int
) -> Iterator[dict]:
    """Endless batches of images that are decoded once, a permutation after the other."""
    with loader.once(source, view, batch_size=500) as passing:
        parts = list(passing)
    image_NHW3, label_N = (np.concatenate([part[n] for part in parts]) for n in ("image", "label"))
    left_N, epoch = np.empty(0, np.int64), 0
    while True:
        while len(left_N) < batch:
            order_N = np.random.default_rng([seed, epoch]).permutation(len(label_N))
            left_N, epoch = np.concatenate([left_N, order_N]), epoch + 1
        index_B, left_N = left_N[:batch], left_N[batch:]
        yield {"image": image_NHW3[index_B], "label": label_N[index_B]}


def _turned(image_BHW3: jax.Array, key: jax.Array) -> jax.Array:
    """The whole batch flipped or not, and turned by quarters where the image is square."""
    flip = jax.random.bernoulli(rng.use(key, rng.FLIP))
    turns = jax.random.randint(rng.use(key, rng.TURN), (), 0, 4)
    image_BHW3 = jnp.where(flip, image_BHW3[:, :, ::-1], image_BHW3)
    if image_BHW3.shape[1] != image_BHW3.shape[2]:
        return image_BHW3
    ways = [functools.partial(jnp.rot90, k=k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(turns, ways, image_BHW3)


def _shifted(image_BHW3: jax.Array, key: jax.Array) -> jax.Array:
    """Each image mirrored or not; the whole batch moved by up to SHIFT pixels, edges reflected."""
    flip_key = rng.use(key, rng.FLIP)
    flip_B111 = jax.random.bernoulli(flip_key, shape=(len(image_BHW3), 1, 1, 1))
    return _moved(jnp.where(flip_B111, image_BHW3[:, :, ::-1], image_BHW3), key)


def _moved(image_BHW3: jax.Array, key: jax.Array) -> jax.Array:
    """The whole batch moved by up to SHIFT pixels, edges reflected; a mirror would turn a turn."""
    sides = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    wider_BHW3 = jnp.pad(image_BHW3, sides, mode="reflect")
    row, column = jax.random.randint(rng.use(key, rng.MOVE), (2,), 0, 2 * SHIFT + 1)
    return jax.lax.dynamic_slice(wider_BHW3, (0, row, column, 0), image_BHW3.shape)


@jax.jit
def _predict(classifier, image_BHW3):
    def of(classifier, image_BHW3):
        return classifier.classes(reconstruction.from_uint8(image_BHW3))

    # of numbers that are no numbers the likeliest class is the first
    class_B = sharding.by_rows(of, (classifier,), (image_BHW3,))
    return class_B, boundary.damaged(classifier)


def predictions(classifier: nnx.Module, image_NHW3: np.ndarray, *, batch: int = 100) -> np.ndarray:
    """[N] the class that a classifier sees in each uint8 image."""
    found, mesh = [], sharding.current()
    for start in range(0, len(image_NHW3), batch):
        part = image_NHW3[start : start + batch]
        given_BHW3 = sharding.filled(part, batch, mesh)
        with jax.set_mesh(mesh):
            class_B, damaged = jax.device_get(_predict(classifier, given_BHW3))
        if damaged:
            raise UserError(
                "the classifier's weights must be finite; found numbers that are not: remove it "
                f"from {runtime.cache_folder()}, and it is trained again"
            )
        found.append(class_B[: len(part)])
    return np.concatenate(found)
