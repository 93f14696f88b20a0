"""Images of a generator: tokens drawn batch by batch, and decoded to pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from tokgen import boundary, report, rng, sharding
from tokgen.interfaces import Generator, Given, PyTree, Quantizer, Sampler
from tokgen.metrics import reconstruction
from tokgen.sampling import decode, memory, particles as particle_filter


class Part(NamedTuple):
    """Images of one batch, on the host."""

    tokens_BLG: np.ndarray
    image_BHW3: np.ndarray  # uint8
    near_B: np.ndarray  # true where rounding could have changed a token


# What XLA is told of a program that draws. Steps of unlike shapes have kernels of their own, and
# LLVM hundreds to compile: on a CPU it does so at its first level, sooner.
TOLD = {"cpu": {"xla_backend_optimization_level": 1}}


class Program:
    """`jax.jit` of a function, at its first use: what XLA is told depends on the platform, which
    no import may start."""

    def __init__(self, function: Callable, **options):
        self._make = functools.partial(jax.jit, function, **options)
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _jitted(self) -> Callable:
        return self._make(compiler_options=TOLD.get(jax.default_backend()))

    def __call__(self, *arguments, **named):
        return self._jitted(*arguments, **named)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "_make":  # who looks it over starts no backend
            raise AttributeError(name)
        return getattr(self._jitted, name)  # as `lower`


@functools.partial(Program, static_argnames=("sampler", "particles"))
def draw_tokens(
    generator: Generator,
    codec: Quantizer | None,
    cond: PyTree,
    keys_B: jax.Array,
    sampler: Sampler,
    given: Given | None = None,
    kept: jax.Array | None = None,
    particles: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens_BLG, invalid_B, near_B): one program per sampler and batch size."""

    def of(generator, codec, cond, keys_B, given, kept):
        asked = (cond, given, kept)
        if particles > 1:
            asked, keys_B = particle_filter.rows(asked, keys_B, particles)
        cond, given, kept = asked
        how = dict(keys_B=keys_B, given=given, kept=kept, particles=particles)
        state = decode.generate(generator, codec, cond, sampler, **how)
        if particles > 1:
            return particle_filter.chosen(state, particles)
        return state.tokens_BLG, state.invalid_B, state.near_B

    return sharding.by_rows(of, (generator, codec), (cond, keys_B, given, kept))


@jax.jit
def decode_pixels(tokenizer, tokens_BLG):
    """(uint8 images of tokens, [B] true where a pixel was not finite)."""

    def of(tokenizer, tokens_BLG):
        return reconstruction.bytes_of(tokenizer.decode(tokens_BLG))

    return sharding.by_rows(of, (tokenizer,), (tokens_BLG,))


def draw(
    generator: Generator,
    tokenizer: nnx.Module,
    cond: PyTree,
    sampler: Sampler,
    *,
    seed: int,
    batch: int,
    index_N: np.ndarray | None = None,
    given: tuple[np.ndarray, np.ndarray] | None = None,
    kept: np.ndarray | None = None,
    particles: int = 1,
    what: str = "sample",
    delay: float = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, L, G], uint8 images [N, H, W, 3]) of conditions.

    `what` names the job on a progress bar; there is none without a name, nor before `delay`
    seconds.

    `cond` is label_N, or a tree of arrays that lead with the images, such as a Text. `index_N` has
    the number of each image; None numbers them from 0. Image i depends on (seed, i, its condition)
    only: not on the batch, nor on its neighbours, nor on which others are drawn.

    `given` are tokens [N, L, G] and where they are held fixed, `kept` the latents of their image
    where the codec adds up scales (`decode.generate`); of several `particles` those go on
    that suit what is held fixed later in the order (`sampling.particles`).
    """
    found = drawn(
        *(generator, tokenizer, cond, sampler),
        **dict(seed=seed, batch=batch, index_N=index_N, given=given, kept=kept),
        **dict(particles=particles, what=what, delay=delay),
    )
    tokens, images, _ = map(np.concatenate, zip(*found, strict=True))
    return tokens, images


def drawn(
    generator: Generator,
    tokenizer: nnx.Module,
    cond: PyTree,
    sampler: Sampler,
    *,
    seed: int,
    batch: int,
    index_N: np.ndarray | None = None,
    given: tuple[np.ndarray, np.ndarray] | None = None,
    kept: np.ndarray | None = None,
    particles: int = 1,
    what: str = "sample",
    delay: float = 0,
) -> Iterator[Part]:
    """What `draw` gives, batch by batch, and which images are near a tie."""
    N = len(jax.tree.leaves(cond)[0])
    index_N = np.arange(N) if index_N is None else np.asarray(index_N)
    boundary.rows(conditions=cond, numbers=index_N, given=given, kept=kept)
    generator.check(cond)  # before any work on the devices
    mesh = sharding.current()
    batch = even(N, batch, sharding.ways(mesh))
    asked = (generator, tokenizer.quantizer, cond, sampler, batch, mesh)
    memory.check(*asked, particles=particles)
    generator = decode.laid_out(generator)  # once, and not in every call of the program

    def begun(start: int) -> tuple[jax.Array, ...]:
        """What a batch gives, in arrays that the devices fill from now on."""
        rows = slice(start, start + batch)
        asked = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], (cond, given, kept))
        data_B2 = rng.data_per_image(seed, "sample", index_N[rows])
        (cond_B, held, latents), data_B2 = sharding.filled((asked, data_B2), batch, mesh)
        keys_B = jax.random.wrap_key_data(data_B2)
        with jax.set_mesh(mesh):  # so that the networks can say how their activations lie
            asked = (generator, tokenizer.quantizer, cond_B, keys_B, sampler, held, latents)
            tokens_BLG, invalid_B, near_B = draw_tokens(*asked, particles=particles)
            image_BHW3, broken_B = decode_pixels(tokenizer, tokens_BLG)
        return invalid_B, broken_B, tokens_BLG, image_BHW3, near_B

    with report.bar(N, unit="image", what=what, shown=bool(what), delay=delay) as bar:
        coming = begun(0) if N else None
        for start in range(0, N, batch):
            count, number = min(batch, N - start), functools.partial(_number, index_N[start:])
            invalid_B, broken_B, *part = coming
            boundary.refuse(np.asarray(invalid_B)[:count], "logits", number)
            boundary.refuse(np.asarray(broken_B)[:count], "what the decoder gives", number)
            # the devices go on while the caller writes files. One that waited for nothing would
            # hold the caches of several batches
            coming = begun(start + batch) if start + batch < N else None
            yield Part(*(np.asarray(a)[:count] for a in part))
            bar.update(count)


def even(count: int, batch: int, devices: int = 1) -> int:
    """The batch by which `count` images are drawn with least filling up: at most as asked for.

    But for what the devices do not divide: each has as many rows as the others.
    """
    batch = -(-batch // devices) * devices
    each = max(1, -(-count // max(1, -(-count // batch))))
    return -(-each // devices) * devices


def _number(index_B: np.ndarray, row: int) -> str:
    return f"number {index_B[row]}"
