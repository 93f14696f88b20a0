"""Published masked generators: fixtures array by array, files there and back, recipes' sizes."""

import functools

import numpy as np
import pytest
from flax import nnx

from tokgen import parameters, rng, sharding
from tokgen.config import building, reading as configs
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn import dropout, precision
from tokgen.pretrained import parity, transfer
from tokgen.sampling import presets
from tokgen.training import optimizer as optimizers

NAMES = (
    "maskgit_transformer",
    "maskbit_lfqbert",
    "maskbit_bert",
    "titok_imagebert",
    "titok_uvit",
)
INPUTS = ("tokens", "mask", "labels", "noise_", "train_u", "train_rand", "inpaint_input")


@functools.cache
def read(path):
    folder = parity.Folder(path)
    return folder, folder.weights()


def fitted(weights, name, published):
    return transfer.fit(dict(weights), name, published, source="here")


@pytest.mark.parametrize("name", NAMES)
def test_a_fixture(shared, name):
    folder = parity.Folder(shared / "parity" / name)
    lines, computed = parity.hold(folder)
    for line in lines:
        wanted = folder.arrays[line.name]
        if line.name not in computed:
            assert line.verdict == "given" and line.name.startswith(INPUTS), line
            continue
        found = computed[line.name]
        assert line.verdict == "pass" and found.shape == wanted.shape, line
        if wanted.dtype.kind in "iub":
            np.testing.assert_array_equal(found, wanted, line.name)
        else:
            limit = (1e-3 if "grad" in line.name else 1e-4) * np.abs(wanted).max()
            assert np.abs(found.astype(np.float64) - wanted).max() <= limit, line.name


@pytest.mark.parametrize("name", NAMES)
def test_a_file_comes_back_bit_for_bit_and_needs_no_configuration_but_heads(shared, name):
    folder, weights = read(shared / "parity" / name)
    imported = folder.imported()
    for model in (imported, dict):
        if model is dict:
            # all from the weights; the words of MaskGIT's table are told apart by a number alone
            sizes = {"heads": 4, "model": {"generator": {"num_attention_heads": 4}}}
            sizes |= {"codebook_size": 64} if name == "maskgit_transformer" else {}
            model = fitted(weights, name, sizes)
            assert (model.layout, model.classes) == (imported.layout, imported.classes)
            assert parameters.count(parameters.split(model.module)[1]) == transfer.parameters(
                imported.module
            )
        found = transfer.publish(model, name)
        assert set(found) == set(weights)
        for key, array in weights.items():
            assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
            assert found[key].tobytes() == array.tobytes(), key
    for path in parameters.paths(parameters.split(imported.module)[1]):
        sharding.letters(path)  # every parameter has a row
    presets.prepare(imported.module, presets.named(imported.config.presets.to_dict(), "default"))


def test_masks_classes_and_places_are_put_where_ours_are(shared):
    """Against the published tables, row by row."""
    folder, weights = read(shared / "parity" / "maskgit_transformer")
    words = weights["params.Embed_0.word_embeddings.embedding"]
    module = folder.module()
    np.testing.assert_array_equal(module.embeddings.table[0, :64], words[:64])
    np.testing.assert_array_equal(module.embeddings.table[0, 64], words[-1])
    np.testing.assert_array_equal(module.labels.table[...], words[64:74])

    folder, weights = read(shared / "parity" / "titok_uvit")
    module, words = folder.module(), weights["embeddings.weight"]
    np.testing.assert_array_equal(module.embeddings.table[0], words[:49])
    np.testing.assert_array_equal(module.labels.table[...], words[49:])

    folder, weights = read(shared / "parity" / "maskbit_lfqbert")
    module, places = folder.module(), weights["pos_emb"][0]
    np.testing.assert_array_equal(module.positions.table[0], places[-1])
    np.testing.assert_array_equal(module.positions.table[1:], places[:-1])


def test_older_files_are_read_as_well(shared):
    """MaskBit's first map under its older name; a constant buffer of BERT's."""
    folder, weights = read(shared / "parity" / "maskbit_lfqbert")
    older = {key.replace("input_proj", "token_emb"): array for key, array in weights.items()}
    with pytest.raises(UserError, match="needs the key 'input_proj.weight'"):
        fitted(older, "maskbit_lfqbert", folder.config)
    imported = fitted(older, "maskbit_lfqbert_older", folder.config)
    assert set(transfer.publish(imported, "maskbit_lfqbert_older")) == set(older)
    np.testing.assert_array_equal(
        imported.module.embeddings.embed.kernel[...], older["token_emb.weight"].T
    )

    folder, weights = read(shared / "parity" / "titok_imagebert")
    ids = {"model.embeddings.position_ids": np.arange(17)[None]}
    imported = fitted(weights | ids, "titok_imagebert", folder.config)
    assert set(imported.aside) == set(ids)
    assert set(transfer.publish(imported, "titok_imagebert")) == set(weights) | set(ids)


def test_a_bit_tokenizer_can_be_read_with_the_symbols_of_its_generator(shared):
    folder, weights = read(shared / "parity" / "maskbit_tokenizer")
    config = dict(folder.config, codebook_splits=2)
    halves = fitted(weights, "maskbit_tokenizer", config)
    generator = read(shared / "parity" / "maskbit_lfqbert")[0].imported()
    assert halves.layout.vocab == generator.layout.vocab == (8, 8)
    assert halves.module.quantizer.groups == (3, 3)


# ---------------------------------------------------------------- recipes


def linear(inputs, outputs, bias=True):
    return inputs * outputs + bias * outputs


def block(width, hidden, bias=True):
    """Attention with four maps, MLP, two norms."""
    attention = 3 * linear(width, width, bias) + linear(width, width)
    return attention + linear(width, hidden) + linear(hidden, width) + 4 * width


def maskgit(slots):
    words, width = 1024 + 1000 + 1, 768
    outside = words * width + slots * width + 2 * width + words
    return outside + linear(width, width) + 2 * width + 24 * block(width, 3072)


def maskbit(bits):
    width, columns = 1024, 2 * 2 ** (bits // 2)
    outside = linear(bits, width) + 1001 * width + 257 * width + 2 * width
    head = linear(width, width) + 2 * width + linear(width, columns)
    return outside + head + 24 * block(width, 4096)


def maskbit_tokens():
    width, values = 1024, 2**7
    outside = 2 * (values + 1) * width + 1001 * width + 257 * width + 2 * width
    head = linear(width, width) + 2 * width + 2 * 256 * values
    return outside + head + 24 * block(width, 4096)


def titok_bert(length):
    width = 768
    outside = 5098 * width + (length + 1) * width + 2 * width + 2 * width
    return outside + linear(width, 4096) + 24 * block(width, 3072)


def titok_uvit(length):
    width = 1024
    outside = 5098 * width + (length + 1) * width + 2 * width + linear(width, 4096)
    return outside + 21 * block(width, 4096, bias=False) + 10 * linear(2 * width, width)


SQUARE, LARGE = ((16, 16),), ((32, 32),)
# Reference -> layout, parameters by the published shapes, millions in the published tables
RECIPES = {
    "maskgit:256": (TokenLayout((1024,), SQUARE), maskgit(257), 172.46),
    "maskgit:512": (TokenLayout((1024,), LARGE), maskgit(1025), 173.05),
    "maskbit:10bit": (TokenLayout((32,) * 2, SQUARE), maskbit(10), 304.73),
    "maskbit:12bit": (TokenLayout((64,) * 2, SQUARE), maskbit(12), 304.80),
    "maskbit:14bit": (TokenLayout((128,) * 2, SQUARE), maskbit(14), 304.93),
    "maskbit:16bit": (TokenLayout((256,) * 2, SQUARE), maskbit(16), 305.19),
    "maskbit:18bit": (TokenLayout((512,) * 2, SQUARE), maskbit(18), 305.72),
    "maskbit:tokens": (TokenLayout((128,) * 2, SQUARE), maskbit_tokens(), None),
    "titok:l32": (TokenLayout((4096,), ((1, 32),)), titok_bert(32), 177.20),
    "titok:b64": (TokenLayout((4096,), ((1, 64),)), titok_bert(64), 177.23),
    "titok:s128": (TokenLayout((4096,), ((1, 128),)), titok_uvit(128), 294.99),
}


def load(reference):
    name, _, variant = reference.partition(":")
    config = configs.load(f"configs/generator/{name}.py:{variant}")
    building.check(
        config,
        precision=(precision.Precision, ()),
        generator__rates=(dropout.Rates, ()),
        optimizer=(optimizers.optimizer, ("steps",)),
        mesh=(sharding.make_mesh, ()),
    )
    return config


@pytest.mark.parametrize("reference", RECIPES)
def test_a_recipe_has_the_published_size_and_settings_that_fit(reference):
    layout, count, millions = RECIPES[reference]
    config = load(reference)
    generator = nnx.eval_shape(
        lambda: building.generator(config, layout, 1000, rngs=rng.rngs(0)),
    )
    params = parameters.split(generator)[1]
    assert parameters.count(params) == count
    assert millions is None or round(count / 1e6, 2) == millions
    name, _, variant = reference.partition(":")
    text = (configs.programs() / f"configs/generator/{name}.py").read_text().split('"""')[1]
    rows = [[c.strip() for c in line.split("|")] for line in text.splitlines() if "|" in line]
    cells = [cell for row in rows if row[1:2] == [variant] for cell in row]
    assert any(cell.startswith(f"{count:,}") for cell in cells)
    building.call(optimizers.optimizer, config.optimizer, "optimizer", steps=config.steps)
    known = config.presets.to_dict()
    assert known["default"] == known["paper"] and {"fast"} < set(known)
    for preset in known:
        copy, sampler = presets.prepare(generator, presets.named(known, preset))
        assert sampler.steps in (None, copy.steps)
    assert presets.prepare(generator, known["default"])[0].steps == generator.steps
    decays = parameters.paths(parameters.matching(params, config.optimizer.decayed))
    tables = {path for path in decays if "table" in path or path.endswith(("bias", "scale"))}
    assert {path for path, yes in decays.items() if not yes} == (
        tables if name == "titok" else set()
    )


def test_presets_are_the_published_settings():
    """Numbers of the fact sheets: guidance by step, noise, temperatures."""
    layout, *_ = RECIPES["titok:l32"]
    known = load("titok:l32").presets.to_dict()
    generator = nnx.eval_shape(
        lambda: building.generator(load("titok:l32"), layout, 1000, rngs=rng.rngs(0))
    )
    _, sampler = presets.prepare(generator, known["default"])
    scale = np.array([0.0, 0.5625, 1.125, 1.6875, 2.25, 2.8125, 3.375, 3.9375])
    np.testing.assert_allclose(sampler.guidance, 1 + scale)
    jitter = np.array([8.3125, 7.125, 5.9375, 4.75, 3.5625, 2.375, 1.1875, 0.0])
    softening = np.arange(12, 4, -1) / 10
    np.testing.assert_allclose(sampler.jitter, jitter)
    np.testing.assert_allclose(sampler.confidence_temperature, softening)
    np.testing.assert_allclose(sampler.temperature, jitter * softening)

    bits = nnx.eval_shape(
        lambda: building.generator(
            load("maskbit:14bit"), RECIPES["maskbit:14bit"][0], 1000, rngs=rng.rngs(0)
        )
    )
    known = load("maskbit:14bit").presets.to_dict()
    _, sampler = presets.prepare(bits, known["paper"])
    factors = np.array([0.0, 0.000602, 0.038060, 0.378510, 0.994755])
    found = np.array(sampler.guidance)[[0, 16, 32, 48, 63]]
    np.testing.assert_allclose(found, 1 + 7.1 * factors, atol=5e-6)
    assert (sampler.jitter[0], sampler.jitter[-1]) == (7.8 * 63 / 64, 0.0)
    longer = {"paper_128": (128, 9.0, 7.1), "paper_256": (256, 10.3, 5.8)}
    for name, (steps, noise, scale) in longer.items():
        copy, sampler = presets.prepare(bits, known[name])
        assert copy.steps == steps and len(sampler.guidance) == steps
        assert sampler.jitter[0] == pytest.approx(noise * (1 - 1 / steps))
        last = 1 + scale * (1 - np.cos(np.pi * (1 - 1 / steps) ** 3)) / 2
        assert sampler.guidance[-1] == pytest.approx(last, abs=1e-6)
    assert bits.steps == 64  # what a preset asks for is asked of a copy


def test_a_published_name_that_is_unknown_is_told():
    for name in ("maskgit", "maskbit", "titok"):
        with pytest.raises(UserError, match="variants are"):
            configs.load(f"configs/generator/{name}.py:huge")


def test_a_file_of_another_system_says_what_is_missing():
    weights = {"encoder.conv_in.weight": np.zeros((32, 3, 3, 3), np.float32)}
    for name in (*NAMES, "maskbit_lfqbert_older"):
        with pytest.raises(UserError, match="needs the key"):
            fitted(weights, name, {})


def test_sizes_that_contradict_each_other_are_told(shared):
    _, weights = read(shared / "parity" / "maskbit_lfqbert")
    with pytest.raises(UserError, match="codebook_splits=3"):
        fitted(weights, "maskbit_lfqbert", {"codebook_splits": 3})
    short = dict(weights, pos_emb=weights["pos_emb"][:, :-1])
    with pytest.raises(UserError, match="a square of tokens and the class; found 16"):
        fitted(short, "maskbit_lfqbert", {})
    _, weights = read(shared / "parity" / "maskgit_transformer")
    with pytest.raises(UserError, match="codebook_size and num_class"):
        fitted(weights, "maskgit_transformer", {})
    _, weights = read(shared / "parity" / "titok_uvit")
    with pytest.raises(UserError, match="no class; found 40 rows"):
        fitted(dict(weights, **{"embeddings.weight": np.zeros((40, 48))}), "titok_uvit", {})
