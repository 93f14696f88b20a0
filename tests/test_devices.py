"""Several devices: each does its share of what is drawn or measured, and waits for no other."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import parameters, rng, runtime, sharding, tokens
from tokgen.config import building
from tokgen.data import online_tokens
from tokgen.errors import UserError
from tokgen.evaluation import feature_extractors, local_classifier, validation
from tokgen.sampling import decode, drawing, sampler as samplers

COLLECTIVE = r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
# Every family, and what their loops differ by: recipe, alphabet of a position
FAMILIES = {
    "raster": ("generator/llamagen", (16,)),
    "adaptive": ("generator/rar", (16,)),
    "random": ("generator/shapes:random", (16,)),
    "masked": ("generator/maskgit", (16,)),
    "bits": ("generator/maskbit", (4, 4)),
    "next_scale": ("generator/var", (16,)),
    "symbols": ("generator/openmagvit2", (8, 16)),
}


def network(name, **sizes):
    """(generator of random numbers, codec of its tokens) of a family."""
    return built(*FAMILIES[name], **sizes)


def built(reference, vocab, **sizes):
    """`network`, of a recipe and the alphabet of a position."""
    config = recipes.load(reference)
    config.precision.compute = "float32"
    config.generator.update(dict(width=32, depth=2, heads=4, label_drop=0.1) | sizes)
    if "hidden" in config.generator:
        config.generator.hidden = 80
    codec, layout = None, recipes.square(4, *vocab)
    if config.generator.name == "next_scale":
        config.generator.channels = 8
        section = recipes.load("tokenizer/var_vqvae").quantizer
        section.scales = (1, 2, 4)
        section.quantizer.update(codes=16, channels=8)
        codec = building.build(section, "quantizer", grid=(4, 4), rngs=nnx.Rngs(0))
        layout = codec.layout
    module = building.generator(config, layout, 10, rngs=nnx.Rngs(0))
    graph, params, stats = parameters.split(module)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape, scale=0.3), leaf.dtype), params
    )
    return parameters.merge(graph, params, stats), codec


def laid(module, strategy, mesh):
    """A module with its parameters where a strategy wants them."""
    graph, params, stats = parameters.split(module)
    placed = [
        jax.device_put(leaf, sharding.of_parameter(path, leaf.shape, strategy, mesh))
        for path, leaf in parameters.paths(params).items()
    ]
    params = jax.tree.unflatten(jax.tree.structure(params), placed)
    return parameters.merge(graph, params, jax.device_put(stats, sharding.replicated(mesh)))


def drawn(module, codec, mesh, guided):
    """(tokens of 16 images, work of a device, the program) on a mesh."""
    steps = decode.steps(module)
    sampler = samplers.Sampler(guidance=(2.0,) * steps if guided else ())
    given = np.arange(16, dtype=np.int32) % 10, np.arange(16)
    with jax.set_mesh(mesh):
        label_B, index_B = sharding.filled(given, 16, mesh)
        keys_B = rng.per_image(1, "sample", index_B)
        codec = jax.device_put(codec, sharding.replicated(mesh))
        compiled = drawing.draw_tokens.lower(module, codec, label_B, keys_B, sampler).compile()
        tokens_BLG, invalid_B, _ = compiled(module, codec, label_B, keys_B)
    assert not np.any(invalid_B)
    return np.asarray(tokens_BLG), compiled.cost_analysis()["flops"], compiled.as_text()


@pytest.mark.parametrize(
    "name, guided",
    [
        pytest.param(name, guided, marks=() if (name, guided) == first else pytest.mark.long)
        for first in [("raster", True)]
        for name in FAMILIES
        for guided in (True, False)
    ],
)
def test_eight_devices_draw_an_eighth_each_and_wait_for_none(name, guided):
    module, codec = network(name)
    alone, work, _ = drawn(
        laid(module, "data", sharding.single()), codec, sharding.single(), guided
    )
    mesh = sharding.make_mesh()
    shared, share, program = drawn(laid(module, "data", mesh), codec, mesh, guided)
    np.testing.assert_array_equal(shared, alone)
    assert len(np.unique(alone)) > 3
    assert share < 0.17 * work
    assert re.findall(COLLECTIVE, program) == []


@pytest.mark.long
@pytest.mark.parametrize(
    "name, strategy, sizes",
    [
        ("raster", "fsdp", (2, 4, 1)),
        ("raster", "tensor", (1, 2, 4)),
        ("masked", "fsdp", (1, 8, 1)),
        ("masked", "tensor", (2, 1, 4)),
        ("next_scale", "fsdp", (2, 4, 1)),
        ("next_scale", "tensor", (2, 2, 2)),
        ("adaptive", "tensor", (2, 2, 2)),
    ],
)
def test_a_network_over_several_devices_is_whole_on_none(name, strategy, sizes):
    """What is gathered of its weights, if it is, is gathered within a step and not before all."""
    module, codec = network(name, width=48)
    # traced, as what is read into shards is: in panels is only what is whole on a device
    module = jax.jit(lambda module: module.unstacked())(module)
    alone, work, _ = drawn(laid(module, "data", sharding.single()), codec, sharding.single(), True)
    mesh = sharding.make_mesh(*sizes)
    shared, share, program = drawn(laid(module, strategy, mesh), codec, mesh, True)
    np.testing.assert_array_equal(shared, alone)
    assert share < 0.25 * work
    # but for maps of the condition: what blocks are told is computed once, before the steps
    weights = [leaf.shape for leaf in jax.tree.leaves(module) if leaf.shape[1:] != (6, 48)]
    large = [sorted(shape) for shape in weights if np.prod(shape) > 2000]
    entry = program[program.index("\nENTRY") :]
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", entry)
    if len(module.plan()) < decode.steps(module):  # what is one loop has no step outside of it
        assert large and not [s for s in gathered if sorted(map(int, s.split(","))) in large]


def test_a_command_is_told_how_devices_share_the_work():
    with runtime.over("2,-1,2"):
        assert dict(sharding.current().shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.ways(sharding.current()) == 8
    for text, words in (
        ("8", "three numbers"),
        ("1,2,x", "three numbers"),
        ("3,1,1", "devices = 8"),
    ):
        with pytest.raises(UserError, match=words), runtime.over(text):
            raise AssertionError("it was taken")


class Seer(nnx.Module):
    """Something that looks at images of 8 x 8 pixels: a network of features, a classifier."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.kernel = nnx.Param(jnp.asarray(random.normal(size=(192, 16)), jnp.float32))

    def __call__(self, image_BHW3):
        flat_BD = image_BHW3.astype(jnp.float32).reshape(len(image_BHW3), -1)
        return {"seen": flat_BD @ self.kernel[...]}

    def classes(self, image_BHW3):
        return self(image_BHW3)["seen"].argmax(-1)


def test_eight_devices_measure_an_eighth_each(monkeypatch):
    """Encoding, decoding, reconstruction, likelihoods, features, classes."""
    settings = recipes.load("tokenizer/shapes:vq")
    settings.encoder.widths = settings.decoder.widths = (16,)
    settings.encoder.blocks = settings.decoder.blocks = 1
    settings.view.size, settings.quantizer.codes = (8, 8), 16
    module = building.tokenizer(settings, rngs=nnx.Rngs(0))
    loaded = types.SimpleNamespace(module=module, layout=module.layout, config=settings)
    networks = {name: network(name)[0] for name in ("raster", "masked")}
    image_NHW3 = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    seer = types.SimpleNamespace(network=Seer(), layers=("seen",))
    work, programs = {}, {
        *((drawing, "decode_pixels"), (online_tokens, "encode"), (tokens, "_reconstructed")),
        *((validation, name) for name in ("_reconstruct", "_exact", "_bound")),
        *((feature_extractors, "_seen"), (local_classifier, "_predict")),
    }  # fmt: skip
    for room, name in programs:
        program = getattr(room, name)

        def measured(*given, name=name, program=program, **static):
            compiled = program.lower(*given, **static).compile()
            flops = work.setdefault(name, {})
            flops[sharding.current().size] = compiled.cost_analysis()["flops"]
            return compiled(*(each for each in given if each is not seer.layers))

        monkeypatch.setattr(room, name, measured)

    def made():
        tokens_NLG = tokens.encode(loaded, image_NHW3)
        yield from (tokens_NLG, tokens.decode(loaded, tokens_NLG))
        yield tokens.reconstruct(loaded, image_NHW3)
        part = {"image": image_NHW3}
        yield validation.reconstruct(module, part, batch=16)[2]["psnr_db"]
        random = np.random.default_rng(0).integers(0, 16, (16, 16, 1))
        for each in networks.values():
            yield validation.nats(each, None, random, np.arange(16) % 10, batch=16)
        yield feature_extractors.features(seer, image_NHW3)["seen"]
        yield local_classifier.predictions(seer.network, image_NHW3, batch=16)

    found = []
    for mesh in (sharding.single(), sharding.make_mesh()):
        with jax.set_mesh(mesh):
            found.append(list(made()))
    for alone, shared in zip(*found, strict=True):
        np.testing.assert_allclose(shared, alone, rtol=1e-5, atol=1e-5)
    assert len(work) == len(programs)
    assert work["_seen"][8] == work.pop("_seen")[1]  # of eight times as many images in a batch
    for name, flops in work.items():
        assert flops[8] < 0.2 * flops[1], name
