"""Networks of random weights, in the form in which a checkpoint is loaded to draw or to decode."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import parameters, rng, runtime
from tokgen.config import building, reading
from tokgen.interfaces import TokenLayout
from tokgen.sampling import decode

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CLASSES = 1000
PYRAMID = TokenLayout((4096,), tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))


def square(vocab: int, groups: int = 1, side: int = 16) -> TokenLayout:
    """The layout of a square of tokens."""
    return TokenLayout((vocab,) * groups, ((side, side),))


def generator(
    config: str, fields: dict, layout: TokenLayout, classes: int, precision: str
) -> tuple[nnx.Module, nnx.Module]:
    """A generator of a config with some fields changed, as `load_to_draw` gives it; its shapes."""
    settings = settled(config, fields, precision)

    def make():
        return building.generator(settings, layout, classes, rngs=nnx.Rngs(rng.key(0, "init")))

    return filled(make, laid), nnx.eval_shape(make)


def tokenizer(config: str, fields: dict, precision: str) -> nnx.Module:
    """A tokenizer of a config with some fields changed, as `load_to_code` gives it."""
    settings = settled(config, fields, precision)

    def make():
        return building.tokenizer(settings, rngs=nnx.Rngs(rng.key(0, "init")))

    return filled(make, laid)


def laid(module: nnx.Module) -> nnx.Module:
    """A network as it is used: laid out, in the dtypes of its use."""
    return decode.laid_out(parameters.narrowed(module))


def settled(config: str, fields: dict, precision: str):
    """A shipped config, by its name in configs/, with fields of it changed."""
    settings = reading.load(str(CONFIGS / config))
    settings.precision.compute = precision
    for field, value in fields.items():
        *sections, name = field.split(".")
        section = settings
        for part in sections:
            section = section[part]
        with section.ignore_type():
            section[name] = value
    return settings


def filled(
    make: Callable[[], nnx.Module], form: Callable[[nnx.Module], nnx.Module] = lambda module: module
) -> nnx.Module:
    """The module that `form` makes of `make`'s, without ever holding another: small numbers, scales
    about 1."""
    shapes = nnx.eval_shape(make)
    on_cpu = jax.default_backend() == "cpu"
    graph, *trees = parameters.split(form(parameters.marked(shapes, on_cpu=on_cpu)))
    draw = np.random.default_rng(0)

    def array(mark: parameters.Mark | jnp.ndarray) -> jnp.ndarray:
        if not isinstance(mark, parameters.Mark):
            return mark
        if not jnp.issubdtype(mark.dtype, jnp.floating):
            return jnp.zeros(mark.shape, mark.dtype)
        noise = 0.02 * draw.standard_normal(mark.shape, np.float32)
        return jnp.asarray(noise + mark.path.endswith("scale"), mark.dtype)

    params, stats = (_mapped(array, tree) for tree in trees)
    runtime.release()  # as what loads a network does
    return parameters.merge(graph, params, stats)


def _mapped(array: Callable, tree):
    if isinstance(tree, dict):
        return {name: _mapped(array, branch) for name, branch in tree.items()}
    return array(tree)
