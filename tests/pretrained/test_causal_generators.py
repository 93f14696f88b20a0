"""RAR, LlamaGen, Open-MAGVIT2 and IBQ: published arithmetic, files both ways, published sizes."""

import json
import math
import pathlib

import numpy as np
import pytest
from flax import nnx

from tokgen import parameters, sharding
from tokgen.config import building, reading as configs
from tokgen.interfaces import TokenLayout, UserError
from tokgen.pretrained import parity, system, transfer
from tokgen.pretrained.families import causal
from tokgen.pretrained.systems import rar_generator
from tokgen.sampling import guidance, presets
from tokgen.training import optimizer as optimizers

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
SHARED = ("rar", "llamagen_c2i", "llamagen_t2i")
OWN = ("openmagvit2_generator", "ibq_generator")
INPUTS = {
    *("tokens", "tokens_pre", "tokens_post", "labels", "orders"),
    *("cond", "emb_masks", "train_valid", "margin"),
}


def folder(request, name):
    """A fixture, of here or beside the repository."""
    if name in OWN:
        return HERE / name
    return request.getfixturevalue("shared") / "parity" / name


@pytest.mark.parametrize("name", SHARED + OWN)
def test_every_array_of_the_original_code(request, name):
    """Logits, losses, gradients; greedy decodes with and without a cache, token for token."""
    fixture = parity.Folder(folder(request, name))
    lines, computed = parity.hold(fixture)
    verdicts = {line.name: line.verdict for line in lines}
    given = {array for array, verdict in verdicts.items() if verdict == "given"}
    assert given <= INPUTS and given | set(computed) == set(fixture.arrays)
    assert {verdicts[array] for array in computed} == {"pass"}
    for array, found in computed.items():
        wanted = fixture.arrays[array].astype(np.float64)
        limit = 1e-3 if "grad" in array else 1e-4
        limit *= np.abs(wanted).max() * (fixture.arrays[array].dtype.kind == "f")
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=limit)
    decodes = [array for array in computed if array.startswith("greedy")]
    assert len(decodes) >= 3
    assert len({computed[array].tobytes() for array in decodes}) == len(decodes)


@pytest.mark.parametrize("name", SHARED + OWN)
def test_a_file_comes_back_bit_for_bit(request, name):
    fixture = parity.Folder(folder(request, name))
    weights = fixture.weights()
    imported = transfer.fit(weights, name, fixture.config, source=name)
    back = transfer.publish(imported, name)
    assert set(back) == set(weights)
    for key, array in weights.items():
        assert (back[key].shape, back[key].dtype) == (array.shape, array.dtype), key
        np.testing.assert_array_equal(back[key], array)
    # every parameter lies somewhere on a mesh, and the preset that it brings can be used
    for path in parameters.paths(parameters.split(imported.module)[1]):
        assert sharding.letters(path)
    default = presets.named(imported.config.presets.to_dict(), "default")
    _, sampler = presets.prepare(imported.module, default)
    assert len(sampler.guidance) == imported.layout.length
    assert (imported.layout.length, imported.kind) == (16, "generator")


def _renamed(request, name, **changes):
    """The weights of a fixture, some left out (None) or added."""
    weights = parity.Folder(folder(request, name)).weights() | changes
    return {key: array for key, array in weights.items() if array is not None}


def test_sizes_without_a_configuration_are_the_weights_own(request):
    found = system.named("llamagen_c2i")
    for width, heads in ((768, 12), (1024, 16), (2048, 32), (3200, 32), (4096, 32)):
        weights = {
            "output.weight": np.zeros((64, width)),
            "layers.0.feed_forward.w1.weight": np.zeros((7, 1)),
            "layers.1.feed_forward.w1.weight": np.zeros((7, 1)),
            "cls_embedding.embedding_table.weight": np.zeros((11, 1)),
        }
        section = found.settings({}, weights).generator
        assert (section.width, section.heads, section.depth, section.hidden) == (
            *(width, heads, 2, 7),
        )
        assert found.tokens({}, weights) == (TokenLayout((64,), ((16, 16),)), 10)
        assert found.tokens({"block_size": 576}, weights)[0].grids == ((24, 24),)
        stale = weights | {"freqs_cis": np.zeros((1 + 1024, 2, 2))}
        assert found.tokens({}, stale)[0].grids == ((32, 32),)
    weights = _renamed(request, "rar")
    section = system.named("rar").settings({}, weights).generator
    assert (section.width, section.heads, section.hidden) == (32, 16, 64)
    assert system.named("rar").tokens({}, weights) == (TokenLayout((64,), ((4, 4),)), 10)


def test_an_old_table_of_angles_is_set_aside_and_given_back(request):
    stale = np.random.default_rng(0).normal(size=(17, 4, 2)).astype(np.float32)
    weights = _renamed(request, "llamagen_c2i", freqs_cis=stale)
    imported = transfer.fit(weights, "llamagen_c2i", {"n_head": 4}, source="here")
    assert imported.layout.grids == ((4, 4),) and set(imported.aside) == {"freqs_cis"}
    np.testing.assert_array_equal(transfer.publish(imported, "llamagen_c2i")["freqs_cis"], stale)


def test_what_no_published_model_has_is_refused(request):
    weights = _renamed(request, "llamagen_c2i")
    published = parity.Folder(folder(request, "llamagen_c2i")).config
    for name, value in (("n_kv_head", 2), ("rope_base", 500), ("block_size", 15)):
        with pytest.raises(UserError, match=str(value)):
            transfer.fit(weights, "llamagen_c2i", published | {name: value}, source="here")
    cut = _renamed(request, "llamagen_c2i", **{"norm.weight": None})
    with pytest.raises(UserError, match=r"1 missing: norm\.weight"):
        transfer.fit(cut, "llamagen_c2i", published, source="here")


def test_guidance_of_rar_is_the_published_one():
    for scale, power, known in (
        (16.0, 2.75, (1, 1.000399, 1.018065, 1.803080, 7.404397, 15.995759)),
        (15.5, 2.5, (1, 1.001092, 1.034911, 2.089599, 7.957157, 15.496608)),
        (6.9, 1.5, (1, 1.028387, 1.224555, 2.640153, 5.285299, 6.899501)),
        (8.0, 1.2, (1, 1.116813, 1.601913, 3.793209, 6.628329, 7.999621)),
    ):
        weights = np.asarray(rar_generator.weights_of(scale, power, 256))
        np.testing.assert_allclose(weights[[0, 32, 64, 128, 192, 255]], known, atol=6e-7)
    assert set(rar_generator.weights_of(4.0, 0.0, 256)) == {4.0} and set(
        rar_generator.weights_of(0.0, 2.0, 8)
    ) == {1.0}
    assert dict(causal.decodes(["greedy_cfg4.0_3", "greedy_nocfg", "logits"], 2)) == {
        "greedy_cfg4.0_3": ((4.0, 3.0),) * 2,
        "greedy_nocfg": guidance.constant(1.0, 2),
    }


CODES, BITS = TokenLayout((16384,), ((16, 16),)), TokenLayout((64, 4096), ((16, 16),))
TEN_BITS = TokenLayout((1024,), ((16, 16),))
# Recipe -> layout, parameters: the sheets' calculated millions, where there are any
SIZES = {
    "llamagen:b": (CODES, 110.89),
    "llamagen:l": (CODES, 342.91),
    "llamagen:xl384": (CODES, 774.70),
    "llamagen:xxl": (CODES, 1410.97),
    "llamagen:3b": (CODES, 3096.66),
    "npp:xxl": (CODES, 1410.97),
    "rar:b": (TEN_BITS, 260.92),
    "rar:l": (TEN_BITS, 461.67),
    "rar:xl": (TEN_BITS, 955.43),
    "rar:xxl": (TEN_BITS, 1498.52),
}
# Recipe -> layout, published count, its last digit
ROUNDED = {
    "openmagvit2:b": (BITS, 343e6, 1e6),
    "openmagvit2:l": (BITS, 804e6, 1e6),
    "openmagvit2:xl": (BITS, 1.5e9, 1e8),
    "ibq:b": (CODES, 342e6, 1e6),
    "ibq:l": (CODES, 649e6, 1e6),
    "ibq:xl": (CODES, 1.1e9, 1e8),
    "ibq:xxl": (CODES, 2.1e9, 1e8),
}


def _count(reference, layout):
    """(parameters without rows of no symbol, the file's docstring, its config)."""
    name, _, variant = reference.partition(":")
    config = configs.load(f"configs/generator/{name}.py:{variant}")
    building.check(config, optimizer=(optimizers.optimizer, ("steps",)))
    make = lambda: building.generator(config, layout, 1000, rngs=nnx.Rngs(0))  # noqa: E731
    params = parameters.paths(parameters.split(nnx.eval_shape(make))[1])
    unread = 2 * sum(layout.absent - size for size in layout.vocab) * config.generator.width
    document = (configs.programs() / "configs" / "generator" / f"{name}.py").read_text()
    return sum(math.prod(leaf.shape) for leaf in params.values()) - unread, document, params


@pytest.mark.parametrize("reference", sorted(SIZES | ROUNDED))
def test_a_recipe_has_the_published_size(reference):
    layout, *_ = (SIZES | ROUNDED)[reference]
    count, document, params = _count(reference, layout)
    if reference in SIZES:
        assert abs(count / 1e6 - SIZES[reference][1]) <= 0.0051
    else:
        _, published, digit = ROUNDED[reference]
        assert abs(count - published) < digit
    assert f"{count:,}" in document
    for path in params:
        assert sharding.letters(path)


def test_rar_decays_what_its_published_rule_of_names_decays():
    """Two axes or more, and none of these in the name."""
    words = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
    config = configs.load("configs/generator/rar.py:b")
    make = lambda: building.generator(config, TEN_BITS, 1000, rngs=nnx.Rngs(0))  # noqa: E731
    generator = nnx.eval_shape(make)
    params = parameters.split(generator)[1]
    decayed = parameters.paths(parameters.matching(params, config.optimizer.decayed))
    assert set(decayed.values()) == {True, False}
    for row in rar_generator.rows(generator):
        matrix = row.key.endswith("weight") or row.key.endswith(("pos_embed", "cls_token"))
        matrix |= row.key == "timesteps_embeddings"
        vector = row.key.endswith("bias") or ".norm" in row.key or "_norm." in row.key
        rule = matrix and not vector and not any(word in row.key for word in words)
        for place in row.places:
            path = place if isinstance(place, str) else place[0]
            assert decayed[path] == rule, (row.key, path)


def test_nothing_but_names_and_shapes_is_kept_of_the_fixtures_made_here():
    for name in OWN:
        config = json.loads((HERE / name / "config.json").read_text())
        assert set(config) == {"model", "salt", "keys"}
        assert sum(file.stat().st_size for file in (HERE / name).iterdir()) < 60_000
