"""Recipes of generators: tables that say what is built; every file, shrunk, trains and samples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import parameters, rng, sharding
from tokgen.config import building, reading as configs
from tokgen.interfaces import TokenBatch
from tokgen.nn import dropout, precision
from tokgen.sampling import decode, presets
from tokgen.training import optimizer as optimizers, train_state

FOLDER = configs.programs() / "configs" / "generator"
SMALL = ("cifar10", "shapes")  # their figures are in the README
PUBLISHED = [
    r for r in recipes.GENERATORS if ":" in r and r.split("/")[1].split(":")[0] not in SMALL
]


def table(name: str) -> dict[str, str]:
    """The rows of the table in a recipe's docstring, by their first word."""
    rows = {}
    for line in (FOLDER / f"{name}.py").read_text().split('"""')[1].splitlines():
        if line.startswith("| variant | devices |"):  # its meshes
            break
        if line.startswith("| ") and not line.startswith("| variant "):
            first, _, rest = line[2:].partition(" |")
            rows[first] = rest
    return rows


@pytest.mark.parametrize("reference", PUBLISHED)
def test_a_docstring_says_what_is_built(reference):
    """Its variants with their parameters, its presets, and settings that every section takes."""
    name, _, variant = reference.removeprefix("generator/").partition(":")
    layout, _, count = recipes.GENERATORS[reference]
    settings, generator = recipes.load(reference), recipes.abstract(reference)
    building.check(
        settings,
        precision=(precision.Precision, ()),
        generator__rates=(dropout.Rates, ()),
        optimizer=(optimizers.optimizer, ("steps",)),
        mesh=(sharding.make_mesh, ()),
    )
    # rows of our tables that a smaller alphabet never reads, of inputs and outputs
    count -= 2 * settings.generator.width * sum(layout.absent - size for size in layout.vocab)
    row = table(name)[variant]
    twin = re.search(r"\| as (\w+) \|", row)
    assert f" {count:,} " in (table(name)[twin[1]] if twin else row)
    sides = re.search(r"(\d+) x (\d+)", row)
    if sides and name != "var":
        assert layout.grids == ((int(sides[1]), int(sides[2])),)
    known = settings.presets.to_dict()
    assert known["default"] == known["paper"]
    for preset in (*known, "no_guidance"):
        copy, sampler = presets.prepare(generator, presets.named(known, preset))
        guided = sampler.guidance and np.any(np.asarray(sampler.guidance) != 1)
        assert bool(guided) == (preset != "no_guidance" and name != "maskgit")
        assert sampler.steps in (None, decode.steps(copy))


def test_every_variant_has_its_row():
    for name in {r.removeprefix("generator/").partition(":")[0] for r in PUBLISHED}:
        variants = {r.partition(":")[2] for r in PUBLISHED if r.startswith(f"generator/{name}:")}
        assert {row.partition(",")[0] for row in table(name)} - {"---"} == variants


# ---------------------------------------------------------------- shrunk

# Recomputing in the backward pass changes no number, and takes longer to compile.
TINY = dict(width=8, depth=1, heads=2, hidden=8, remat="none")
# Recipe -> (tokens, what makes it small)
SHRUNK = {
    "ibq:xxl": (recipes.square(2, 5), TINY),
    "llamagen:b": (recipes.square(2, 5), TINY),
    "maskbit:14bit": (recipes.square(2, 4, 4), TINY),
    "maskgit:256": (recipes.square(2, 5), TINY),
    "npp:b": (recipes.square(2, 5), TINY | dict(groups=((2, 1),))),
    "openmagvit2:b": (recipes.square(2, 3, 5), TINY | dict(factor=1)),
    "rar:b": (recipes.square(2, 5), TINY | dict(shuffle=(1, 2))),
    "titok:s128": (recipes.line(4, 5), TINY | dict(depth=3)),
    "var:d16": (recipes.pyramid((1, 2), 5), TINY | dict(channels=3)),
}
# As many steps of decoding as there are slots: a schedule of 64 leaves most of them idle.
FEW = dict.fromkeys(("maskbit:14bit", "maskgit:256", "titok:s128"), dict(steps=3))
B, STEPS = 2, 2
# No gradient reaches it but by rounding: the softmax does not see what all keys have in common.
BLIND = re.compile(r".*attention/key/bias")


def shrunk(reference: str):
    """A recipe's config, made small."""
    settings = recipes.load(f"generator/{reference}")
    settings.steps, settings.precision.compute = STEPS, "float32"
    with settings.unlocked():
        settings.generator.update(SHRUNK[reference][1])
        settings.optimizer.update(dict(learning_rate=1e-2, warmup=0, weight_decay=0.0))
    return settings


def codec_of(settings, layout):
    """What next-scale reads tokens with; nothing for the others."""
    if settings.generator.name != "next_scale":
        return None
    inner = dict(name="vq", codes=layout.absent, channels=settings.generator.channels)
    section = dict(name="multiscale", quantizer=inner, scales=layout.grids, phi=0)
    return building.build(section, "quantizer", grid=layout.grids[-1], rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnames=("graph", "optimizer", "sampler"))
def trained_and_sampled(network, batch, codec, graph, optimizer, sampler):
    """(state after two steps, their losses, tokens that it draws)."""

    def step(network, number):
        def loss(params):
            generator = parameters.merge(graph, params, network.stats)
            key = jax.random.fold_in(jax.random.key(1), number)
            return generator.loss(batch, codec, step=network.step, key=key)

        gradients, terms = jax.grad(loss, has_aux=True)(network.params)
        network, scalars = train_state.apply_gradients(network, gradients, optimizer)
        return network, terms | scalars

    network, scalars = jax.lax.scan(step, network, jnp.arange(STEPS))
    generator = parameters.merge(graph, network.params, network.stats)
    keys_B = jax.random.split(jax.random.key(2), B)
    drawn = decode.generate(generator, codec, batch.cond, sampler, keys_B=keys_B)
    return network, scalars, drawn.tokens_BLG, drawn.invalid_B


# Alike in kind to others that are trained every time, or trained by tests of their own
LONG = {"ibq:xxl", "llamagen:b", "npp:b", "openmagvit2:b", "maskgit:256"}


@pytest.mark.parametrize(
    "reference",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SHRUNK],
)
def test_a_file_trains_two_steps_and_samples(reference):
    """Its own objective, optimizer and preset, at a width of 8."""
    settings, (layout, _) = shrunk(reference), SHRUNK[reference]
    optimizer = building.call(optimizers.optimizer, settings.optimizer, "optimizer", steps=STEPS)
    graph, *variables = parameters.split(
        nnx.eval_shape(lambda: building.generator(settings, layout, 3, rngs=rng.rngs(0)))
    )
    random = np.random.default_rng(0)
    # away from zeros, behind which nothing moves at first
    params, stats = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype), variables
    )
    zero = jnp.zeros((), jnp.int32)
    network = train_state.TrainState(zero, zero, params, stats, optimizer.chain.init(params), None)
    preset = presets.named(settings.presets.to_dict(), "default") | FEW.get(reference, {})
    generator, sampler = presets.prepare(parameters.merge(graph, params, stats), preset)
    tokens_BLG = random.integers(0, layout.vocab, (B, layout.length, layout.groups))
    batch = TokenBatch(jnp.asarray(tokens_BLG, jnp.int32), jnp.arange(B, dtype=jnp.int32))
    after, scalars, drawn_BLG, invalid_B = jax.device_get(
        trained_and_sampled(
            *(network, batch, codec_of(settings, layout)),
            *(parameters.split(generator)[0], optimizer, sampler),
        )
    )
    assert np.isfinite(scalars["nats_per_token"]).all() and not scalars["skipped"].any()
    before, after = parameters.paths(jax.device_get(params)), parameters.paths(after.params)
    still = {path for path in before if (before[path] == after[path]).all()}
    assert {path for path in still if not BLIND.fullmatch(path)} == set()
    assert not invalid_B.any() and (drawn_BLG >= 0).all()
    assert (drawn_BLG < np.asarray(layout.vocab)).all()
