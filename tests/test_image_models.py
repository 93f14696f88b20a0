"""What `tokgen.load` gives: the commands' own results, loaded once; likelihoods by hand."""

import base64
import io
import itertools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import tokgen
from tests import command_line, published, recipes
from tokgen import (
    image_generator,
    image_tokenizer,
    runtime,
    samples,
    tokens as arrays,
    traces,
)
from tokgen.checkpoints import loading
from tokgen.config import building
from tokgen.data import sources, token_shards
from tokgen.evaluation import validation
from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.sampling import decode, drawing


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    recipes.tiny(folder, "raster", "masked")
    return folder / "runs"


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)


@pytest.fixture(scope="module")
def model(place) -> image_generator.ImageGenerator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        return tokgen.load(place / "generator")


@pytest.fixture(scope="module")
def masked(place) -> image_generator.ImageGenerator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        return tokgen.load(place / "masked")


def test_of_many_images_the_first_of_each_class_are_traced_and_of_large_ones_fewer(monkeypatch):
    np.testing.assert_array_equal(traces.some(6, 3), [0, 3, 1, 4, 2, 5])
    shown = []
    monkeypatch.setattr(
        traces.tracing, "trace", lambda *_, index_N, **how: shown.append(index_N) or ([], [])
    )
    for side, count in ((32, 8), (256, 4), (2048, 1)):
        ready = types.SimpleNamespace(
            generator=None,
            sampler=None,
            tokenizer=types.SimpleNamespace(
                module=None,
                config=ml_collections.ConfigDict({"view": {"size": (side, side)}}),
            ),
            kinds=samples.Kinds(np.arange(10), None, []),
        )
        traces.traced(ready, samples.Settings("runs/generator", number=1))
        assert len(shown[-1]) == count


def test_a_trace_ends_with_the_samples_of_the_same_settings(model, masked, tmp_path):
    for each, steps in ((model, 64), (masked, 12)):
        trace = each.trace([1, 0], number=2, seed=4)
        samples_ = each.sample([1, 0], number=2, seed=4, progress=False)
        # of each class one, then the others
        np.testing.assert_array_equal(trace.image_NHW3, samples_.image_NHW3[[0, 2, 1, 3]])
        assert (trace.frame_SNHW3[0] == 160).all() and trace.after_S[-1] == steps
        assert f"of 4 images, 32 x 32 pixels, over {steps} steps" in repr(trace)
    trace.save_gif(tmp_path / "trace.gif")
    with Image.open(tmp_path / "trace.gif") as animation:
        assert animation.n_frames == len(trace.after_S) == 13 and animation.info["loop"] == 0
    shown = trace._repr_mimebundle_()
    assert base64.b64decode(shown["image/gif"]) == (tmp_path / "trace.gif").read_bytes()
    assert trace.strip().shape == (4 * 66 + 2, 12 * 66 + 2, 3)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(classes="ring,3", number=2, seed=4), ("--classes", "ring,3")),
        pytest.param(
            *(dict(classes=[1, 3], number=2, seed=4, preset="half"), ("--preset", "half")),
            marks=pytest.mark.long,
        ),
    ],
)
def test_all_ways_to_draw_give_the_same_bits(model, place, tmp_path, asked, words):
    found = model.sample(**asked)
    alone = tokgen.sample(place / "generator", **asked)
    words = {"--classes": "1,3", words[0]: words[1], "--number": 2, "--seed": 4}
    line = [str(part) for pair in words.items() for part in pair]
    out = tmp_path / "out"
    assert command_line.call("sample", place / "generator", *line, "--out", out) == 0
    with np.load(out / "samples.npz") as written:
        for other in (alone.image_NHW3, written["arr_0"]):
            np.testing.assert_array_equal(found.image_NHW3, other)
        np.testing.assert_array_equal(found.kind_N, written["arr_1"])
    np.testing.assert_array_equal(found.tokens_NLG, np.load(out / "tokens.npy"))
    assert found.settings == alone.settings
    record = json.loads((out / "samples.json").read_text())
    assert found.settings == record["settings"]


def test_networks_are_loaded_and_compiled_once(place, monkeypatch):
    loads, real = [], loading._loaded

    def counted(path, kind, compute, *more):
        loads.append((kind, compute))
        return real(path, kind, compute, *more)

    monkeypatch.setattr(loading, "_loaded", counted)
    model = tokgen.load(place / "generator")
    assert loads == [("generator", "float32"), ("tokenizer", "")]
    model.sample("ring", number=2)
    compiled = drawing.draw_tokens._cache_size(), drawing.decode_pixels._cache_size()
    first = model.sample("disc", number=2, seed=1)
    model.sample(["bar"], number=2)
    again = model.sample(0, number=2, seed=1, batch=2)
    assert (drawing.draw_tokens._cache_size(), drawing.decode_pixels._cache_size()) == compiled
    np.testing.assert_array_equal(first.image_NHW3, again.image_NHW3)
    model.sample("ring", number=2, preset="half")
    model.sample("disc", number=2, preset="half")
    laid = model._drawing["float32"].module  # nor is it laid out again for another draw
    leaves = map(jax.tree.leaves, (laid, decode.laid_out(laid)))
    assert all(one is other for one, other in zip(*leaves, strict=True))
    assert loads[2:] == [("generator", "bfloat16")]  # a preset's own precision, once


@pytest.mark.long
def test_one_precision_where_it_is_asked_for(place):
    model = tokgen.load(place / "generator", precision="bfloat16")
    assert model.config.precision.compute == "bfloat16" and "bfloat16" in repr(model)
    drawn = model.sample("ring", number=2, preset="default")
    asked = tokgen.sample(place / "generator", classes="ring", number=2, precision="bfloat16")
    np.testing.assert_array_equal(drawn.image_NHW3, asked.image_NHW3)
    assert list(model._drawing) == ["bfloat16"]


def test_samples_are_pictures_too(model):
    found = model.sample([3, 7], number=2)
    assert [image.size for image in found.images] == [(32, 32)] * 4
    np.testing.assert_array_equal(np.stack(found.images), found.image_NHW3)
    assert repr(found) == "4 samples of 32 x 32 pixels: frame, pair" and len(found) == 4
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (2 * 66 + 2, 2 * 66 + 2, 3)  # a row per class, enlarged
    twice = np.kron(found.image_NHW3[3], np.ones((2, 2, 1), np.uint8))
    np.testing.assert_array_equal(sheet[-66:-2, -66:-2], twice)


def test_what_a_notebook_shows_is_bounded():
    image_NHW3 = np.zeros((300, 256, 256, 3), np.uint8)
    kind_N = np.repeat(np.arange(30), 10)
    found = samples.Samples(image_NHW3[..., :1], image_NHW3, kind_N, ("a",) * 30, {})
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        assert np.prod(picture.size) < 1.1 * samples.NOTEBOOK
        assert picture.width == 10 * 258 + 2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(number=0), "--number and --batch must be at least 1"),
        (dict(number=2.5), "--number must be a whole number; found 2.5"),
        (dict(seed=-1), "--seed must lie in"),
        (dict(seed="1"), "--seed must be a whole number; found '1'"),
        (dict(batch=True), "--batch must be a whole number"),
        (dict(classes="teapot"), "unknown class 'teapot'"),
        (dict(classes=10), "labels are 0 to 9"),
        (dict(preset="papr"), "preset must be one of"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature="warm"), "temperature"),
        (dict(steps=4), "steps"),
        (dict(text="a.npz"), "--text needs a generator that reads text"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_device_works(model, monkeypatch, asked, said):
    monkeypatch.setattr(drawing, "draw_tokens", None)
    with pytest.raises(UserError, match=said):
        model.sample(**asked)


# ---------------------------------------------------------------- images and tokens


def test_tokens_are_those_of_token_sets(model, place, tmp_path):
    for number, image in enumerate(noise(4)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    given = dict(data=str(tmp_path / "images"), views=("center",), batch=4)
    tokgen.pretokenize(place / "tokenizer", tmp_path / "tokens", **given)
    found = {row.tobytes() for row in model.encode(noise(4))}
    count = 0
    for split in ("train", "held_out"):
        source = token_shards.Source(str(tmp_path / "tokens"), split=split)
        for record in source.__getitems__(range(len(source))):
            assert np.asarray(record["tokens"][0], np.int32).tobytes() in found
            count += 1
    assert count == 4


def test_a_generator_has_what_its_tokenizer_has(model, place):
    tokenizer = tokgen.load(place / "tokenizer")
    tokens_NLG = tokenizer.encode(noise(3))
    np.testing.assert_array_equal(model.encode(list(noise(3) / 255)), tokens_NLG)
    np.testing.assert_array_equal(model.decode(tokens_NLG), tokenizer.decode(tokens_NLG))
    np.testing.assert_array_equal(model.decode(tokens_NLG.tolist()), tokenizer.decode(tokens_NLG))
    again = tokenizer.reconstruct(noise(3))
    np.testing.assert_array_equal(model.reconstruct(noise(3)), again)
    assert np.abs(again.astype(int) - tokenizer.decode(tokens_NLG)).max() <= 1
    np.testing.assert_array_equal(model.fit(noise(3)), noise(3))
    assert model.size == tokenizer.size == (32, 32)
    assert model.layout == tokenizer.layout and model.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_photograph_is_reconstructed_as_the_command_does(model, place, tmp_path):
    photo = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    words = ("reconstruct", place / "tokenizer", tmp_path / "photo.png", "--out", tmp_path / "out")
    assert command_line.call(*words) == 0
    with Image.open(tmp_path / "out" / "pairs.png") as picture:
        sheet = np.asarray(picture)
    fitted = model.fit(tmp_path / "photo.png")
    for left, image in ((2, fitted[0]), (2 + 98, model.reconstruct(fitted)[0])):
        seen = sheet[2 : 2 + 96 : 3, left : left + 96 : 3]
        assert np.abs(seen.astype(int) - image).max() <= 1


@pytest.mark.parametrize("call", ["encode", "reconstruct", "log_likelihood"])
def test_other_images_never_reach_a_device(model, monkeypatch, call):
    monkeypatch.setattr(arrays, "encode", None)
    monkeypatch.setattr(arrays, "reconstruct", None)
    more = {"classes": "ring"} if call == "log_likelihood" else {}
    for wrong in (Image.new("RGB", (64, 64)), noise(2).astype(float), noise(2)[..., 0], [], None):
        if wrong is not None or not more:
            with pytest.raises(UserError, match="image"):
                getattr(model, call)(wrong, **more)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.zeros((1, 63, 1), int), "must be 64 positions"),
        (np.full((1, 64, 1), 240), "0 to 239"),
        (np.full((1, 64, 1), -1), "0 to 239"),
        (np.zeros((1, 64, 1)), "must be integers"),
        (np.zeros((64, 1), int), "images, positions, symbols"),
        (np.zeros((0, 64, 1), int), "found none"),
        ([[1], [1, 2]], "numpy cannot read"),
        (None, "integers|array"),
    ],
)
def test_other_tokens_are_refused(model, tokens, said):
    with pytest.raises(UserError, match=said):
        model.decode(tokens)
    if tokens is not None:
        with pytest.raises(UserError, match=said):
            model.log_likelihood(tokens=tokens, classes=0)


def test_a_tokenizer_says_what_it_has(place):
    tokenizer = tokgen.load(place / "tokenizer")
    assert not hasattr(tokenizer, "sample") and hasattr(tokenizer, "encode")
    with pytest.raises(AttributeError, match="a tokenizer has no sample.*it has encode, decode"):
        tokenizer.sample("ring")
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        tokenizer.smaple  # noqa: B018
    with pytest.raises(UserError, match="a tokenizer itself"):
        tokgen.load(place / "tokenizer", tokenizer=str(place / "tokenizer"))


def test_what_cannot_be_loaded_is_one_message(place, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        tokgen.load(tmp_path / "nothing")
    for wrong in (3, None, ""):
        with pytest.raises(UserError, match="path of a checkpoint, or the name"):
            tokgen.load(wrong)
    with pytest.raises(UserError, match="precision must be one of"):
        tokgen.load(place / "generator", precision="half")


# ---------------------------------------------------------------- likelihood


def tiny(layout: TokenLayout, family: str, classes: int = 3) -> image_generator.ImageGenerator:
    """A generator of random numbers over tokens that nobody decodes."""
    settings = recipes.load(
        f"generator/shapes:{family}", ["generator.width=16", "generator.depth=1"]
    )
    module = recipes.scattered(building.generator(settings, layout, classes, rngs=nnx.Rngs(1)))
    names = tuple("abc"[:classes])
    loaded = loading.Loaded(module, settings, layout, names, pathlib.Path("runs"), {}, "f")
    codec = types.SimpleNamespace(module=types.SimpleNamespace(quantizer=None))
    return image_generator.ImageGenerator(loaded, types.SimpleNamespace(decoder=codec))


@pytest.mark.parametrize(
    ("family", "vocab"),
    [pytest.param("raster", (2, 3), marks=pytest.mark.long), ("random", (3,))],
)
def test_probabilities_of_all_images_add_up_to_one(family, vocab):
    layout = TokenLayout(vocab, ((1, 3),))
    model = tiny(layout, family)
    rows = list(itertools.product(*(range(size) for _ in range(3) for size in vocab)))
    tokens_NLG = np.array(rows).reshape(len(rows), 3, len(vocab))
    for label in ("a", 2):
        found = model.log_likelihood(tokens=tokens_NLG, classes=label, batch=10)
        assert found.dtype == np.float64 and found.shape == (len(rows),) and (found <= 0).all()
        np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-5)
        assert np.exp(found).std() > 1e-4
    np.testing.assert_allclose(  # a class each
        model.log_likelihood(tokens=tokens_NLG[:2], classes=["a", 2]),
        [
            model.log_likelihood(tokens=tokens_NLG[n : n + 1], classes=c)[0]
            for n, c in [(0, 0), (1, 2)]
        ],
        rtol=1e-6,
    )


def test_the_bound_of_a_masked_generator_is_the_mean_over_its_orders():
    """Of two slots: n = 1 or 2 are masked, alike often; by hand from the logits."""
    layout = TokenLayout((3,), ((1, 2),))
    model = tiny(layout, "masked")
    tokens_NLG = np.array(list(itertools.product(range(3), repeat=2)))[..., None]
    many_NLG = np.tile(tokens_NLG, (1000, 1, 1))  # an image's draws are those of its place
    found = model.log_likelihood_bound(tokens=many_NLG, classes="b", draws=2, batch=9000)
    found = found.reshape(1000, 9).mean(0)
    module, seen = model.loaded.module, {}
    for masked in ((0,), (1,), (0, 1)):
        shown = tokens_NLG.copy()
        shown[:, list(masked)] = layout.absent
        batch = TokenBatch(jnp.asarray(shown), jnp.full(9, 1))
        logp = np.asarray(jax.nn.log_softmax(module.logits(batch)[..., :3], axis=-1))
        each = np.take_along_axis(logp, tokens_NLG[..., None], axis=-1)[..., 0, 0]
        seen[masked] = each[:, list(masked)].sum(1) * 2 / len(masked)
    wanted = 0.5 * seen[(0, 1)] + 0.25 * (seen[(0,)] + seen[(1,)])
    np.testing.assert_allclose(found, wanted, atol=0.1)
    assert np.corrcoef(found, wanted)[0, 1] > 0.99


class Shards(sources.RandomAccess):
    """Tokens with labels, as token shards give them."""

    holds, fingerprint, layout = "tokens", "none", {}

    def __init__(self, tokens_NLG, label_N, classes):
        self.tokens_NLG, self.label_N, self.classes = tokens_NLG, label_N, classes

    def __len__(self):
        return len(self.label_N)

    def __getitems__(self, indices):
        return [{"tokens": self.tokens_NLG[i][None], "label": self.label_N[i]} for i in indices]


def test_likelihoods_of_images_are_those_of_their_tokens_and_of_tokgen_evaluate(model):
    image_NHW3 = noise(5)
    label_N = [0, 3, 3, 1, 9]
    found = model.log_likelihood(image_NHW3, classes=label_N, batch=2)
    tokens_NLG = model.encode(image_NHW3)
    names = [model.classes[label] for label in label_N]
    again = model.log_likelihood(tokens=tokens_NLG, classes=names)
    np.testing.assert_allclose(found, again, rtol=1e-6)

    shards = Shards(tokens_NLG, label_N, model.classes)
    codec = model.tokenizer.decoder.module.quantizer
    metrics = validation.likelihood(model.loaded.module, codec, shards, count=5, batch=5)
    np.testing.assert_allclose(-found.mean() / 64, metrics["nats_per_token"], rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(images=noise(2)), "the class of each image is needed.*disc, ring"),
        (dict(images=noise(10), classes=""), "the class of each image is needed.*found none"),
        (dict(classes=0), "one of them; found neither"),
        (dict(images=noise(2), tokens=np.zeros((2, 64, 1), int), classes=0), "found both"),
        (dict(images=noise(3), classes=[0, 1]), "one for each of 3; found 2"),
        (dict(images=noise(2), classes="teapot"), "unknown class"),
        (dict(images=noise(2), classes=0, text="a.npz"), "text= needs a generator that reads"),
        (dict(images=noise(2), classes=0, batch=2.5), "batch must be a whole number.*found 2.5"),
    ],
)
def test_likelihoods_that_cannot_be_told_are_refused(model, masked, monkeypatch, asked, said):
    monkeypatch.setattr(arrays, "encode", None)
    for call in (model.log_likelihood, masked.log_likelihood_bound):
        with pytest.raises(UserError, match=said):
            call(**asked)


def test_a_likelihood_is_exact_or_called_a_bound(model, masked):
    with pytest.raises(UserError, match="log_likelihood_bound estimates a lower bound"):
        masked.log_likelihood(noise(1), classes=0)
    with pytest.raises(UserError, match="this one has it: log_likelihood"):
        model.log_likelihood_bound(noise(1), classes=0)
    with pytest.raises(UserError, match="draws must be a whole number from 1"):
        masked.log_likelihood_bound(noise(1), classes=0, draws=0)
    one = masked.log_likelihood_bound(noise(3), classes=0, draws=2, seed=1)
    np.testing.assert_allclose(
        one, masked.log_likelihood_bound(noise(3), classes=0, draws=2, seed=1, batch=2), rtol=1e-6
    )
    assert (one != masked.log_likelihood_bound(noise(3), classes=0, draws=2, seed=2)).all()


def test_a_generator_that_reads_text_is_asked_with_texts(tmp_path):
    features = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    np.savez(tmp_path / "text.npz", features=features, mask=np.ones((2, 5)))
    module = types.SimpleNamespace(cond="text")
    loaded = types.SimpleNamespace(module=module, classes=())
    model = image_generator.ImageGenerator(loaded, None)
    cond = model._cond(None, str(tmp_path / "text.npz"), 2)
    np.testing.assert_array_equal(cond.features_BTE, features)
    for classes, text, said in [(None, "", "found none"), (0, "a.npz", "found classes")]:
        with pytest.raises(UserError, match=f"needs text=.*{said}"):
            model._cond(classes, text, 2)
    with pytest.raises(UserError, match="one for each of 3; found 2"):
        model._cond(None, str(tmp_path / "text.npz"), 3)


# ---------------------------------------------------------------- by name


@pytest.mark.long
@pytest.mark.parametrize("name", ["llamagen-b", "rar-b", "var-d16", "maskbit-14bit"])
def test_ten_lines_from_a_published_name(name, tmp_path, monkeypatch):
    rows, files = published.rows(tmp_path, name)
    with published.served(rows, files, tmp_path, monkeypatch) as hub:
        with pytest.raises(UserError, match="yes=True"):
            tokgen.load(name)
        assert hub.requests == []
        model = tokgen.load(name, yes=True)
        hub.requests.clear()
        assert repr(tokgen.load(name)) == repr(model) and hub.requests == []
    assert repr(model).startswith(f"ImageGenerator of {name}: ") and "tench, goldfish" in repr(
        model
    )
    samples = model.sample("golden retriever", number=3, seed=1)
    assert samples.images[0].size == model.size and samples.kind_N.tolist() == [207] * 3
    np.testing.assert_array_equal(model.decode(samples.tokens_NLG), samples.image_NHW3)
    tokens_NLG = model.encode(samples.images)
    assert tokens_NLG.shape == samples.tokens_NLG.shape
    likely = model.log_likelihood if model.exact else model.log_likelihood_bound
    log_p_N = likely(samples.images, classes=207)
    assert log_p_N.shape == (3,) and np.isfinite(log_p_N).all() and (log_p_N < 0).all()
    again_N = likely(tokens=tokens_NLG, classes="golden retriever")
    np.testing.assert_allclose(log_p_N, again_N, rtol=1e-6)


# ---------------------------------------------------------------- what it says of itself


def test_a_model_says_what_it_is(model, place):
    first, second = repr(model).splitlines()
    assert first.startswith("ImageGenerator of autoregressive: 12,000 parameters, float32, step 0")
    assert first.endswith(f"in {place / 'generator'}")
    assert second == (
        "8 x 8 tokens of 240; 10 classes (disc, ring, square ... (7 more)); "
        "images of 32 x 32 pixels"
    )
    assert str(place / "tokenizer") in repr(model.tokenizer)
    assert "conv and fsq" in repr(model.tokenizer) and ".." not in repr(model.tokenizer)
    assert model.presets[:1] == ("default",) and {"half", "no_guidance"} <= set(model.presets)
    assert isinstance(model.config, ml_collections.ConfigDict)
    assert model.step.name == "0" and len(model.fingerprint) == 64


def test_layouts_in_words():
    assert image_tokenizer.told_of(TokenLayout((4, 5), ((2, 3),))) == "2 x 3 tokens of 4 and 5"
    told = image_tokenizer.told_of(TokenLayout((9,), ((1, 1), (2, 2))))
    assert told == "5 tokens of 9 on 2 grids, 1 x 1 to 2 x 2"
