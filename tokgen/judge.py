"""A small classifier of procedural shapes, independent of every tokenizer and generator.

It says how many of the drawn shapes are what they should be. Trained on real shapes of the freest
form in half a minute, and kept in the cache under the hash of its code, its data's code and its
seed. Each image's mean is removed and every batch is turned and flipped, so that it judges form
and not colour or pose.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokgen import launch, report, rng, sharding, state
from tokgen.data import images, shapes, stream
from tokgen.metrics import reconstruction
from tokgen.nn import conv
from tokgen.nn.precision import Precision

STEPS, BATCH, RATE = 2000, 32, 2e-3
WIDTHS = (48, 96, 96, 96)
STRIDES = (1, 2, 1, 2)


class Judge(nnx.Module):
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


class Block(nnx.Module):
    """relu(convolution)."""

    def __init__(self, inputs: int, outputs: int, stride: int, **options):
        self.conv = conv.Conv(inputs, outputs, stride=stride, gain=2**0.5, **options)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, H / stride, W / stride, O]."""
        return jax.nn.relu(self.conv(x_BHWC))


def load_or_train(size: tuple[int, int] = (32, 32), channels: int = 3, *, seed: int = 1) -> Judge:
    """The judge of shapes of a size: from the cache, or trained now."""
    sources = [inspect.getsource(module) for module in (inspect.getmodule(Judge), shapes, conv)]
    what = repr((sources, size, channels, seed, np.__version__, jax.__version__))
    name = f"judge-{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"
    file = launch.cache_folder() / name

    def make():
        rngs = nnx.Rngs(rng.key(seed, "init"))
        return Judge(size, channels, len(shapes.CLASSES), rngs=rngs)

    graph, params, stats = state.split(nnx.eval_shape(make))
    if file.exists():
        with np.load(file, allow_pickle=False) as saved:
            leaves = [jnp.asarray(saved[path]) for path in state.paths(params)]
        report.say(f"judge: read from {file}")
        return state.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves), stats)
    params = _train(make, size, channels, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(f"{file}.part")
    with open(part, "wb") as out:
        np.savez(out, **{path: np.asarray(leaf) for path, leaf in state.paths(params).items()})
    part.replace(file)
    return state.merge(graph, params, stats)


def _train(make, size, channels, seed):
    optimizer = state.optimizer(STEPS, learning_rate=RATE, warmup=50, b2=0.99, weight_decay=1e-2)
    mesh = sharding.make_mesh()
    graph, network = state.create(make, optimizer, mesh=mesh, ema=0.995)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(network, batch):
        key = rng.key(seed, "train", network.step)
        image_BHW3 = _turned(reconstruction.from_uint8(batch["image"]), key)

        def loss(params):
            logits = state.merge(graph, params, network.stats)(image_BHW3)
            costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return costs.mean()

        gradients = jax.grad(loss)(network.params)
        return state.apply_gradients(network, gradients, optimizer, ema=0.995)[0]

    source = shapes.Source(size, channels, split="train", seed=seed, form="hard", count=40_000)
    with (
        stream.batches(
            source, images.fixed("center", size, channels), seed=seed, batch_size=BATCH
        ) as batches,
        report.bar(STEPS, what="judge") as bar,
    ):
        for _ in range(STEPS):
            network = step(network, sharding.global_batch(next(batches), mesh))
            bar.update()
    return jax.device_get(state.averaged(network))


def _turned(image_BHW3: jax.Array, key: jax.Array) -> jax.Array:
    """The whole batch flipped or not, and turned by quarters where the image is square."""
    flip, turns = jax.random.bernoulli(key), jax.random.randint(key, (), 0, 4)
    image_BHW3 = jnp.where(flip, image_BHW3[:, :, ::-1], image_BHW3)
    if image_BHW3.shape[1] != image_BHW3.shape[2]:
        return image_BHW3
    ways = [functools.partial(jnp.rot90, k=k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(turns, ways, image_BHW3)


@jax.jit
def _predict(judge, image_BHW3):
    return judge(reconstruction.from_uint8(image_BHW3)).argmax(-1)


def predictions(judge: Judge, image_NHW3: np.ndarray, *, batch: int = 100) -> np.ndarray:
    """[N] the class that the judge sees in each uint8 image."""
    found = []
    for start in range(0, len(image_NHW3), batch):
        part = image_NHW3[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        found.append(np.asarray(_predict(judge, jnp.asarray(padded)))[: len(part)])
    return np.concatenate(found)
