"""Figures of held-out images: what is not finite is said, and one value has no error."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tqdm
from flax import nnx
from PIL import Image

from tokgen import interfaces, sharding
from tokgen.data import (
    classes,
    datasets,
    online_tokens,
    pretokenization,
    sources,
    token_header,
    views,
)
from tokgen.evaluation import validation
from tokgen.generators import autoregressive
from tokgen.nn.precision import FLOAT32
from tokgen.quantizers import vq
from tokgen.sampling import drawing, sampler as samplers
from tokgen.tokenizers import tokenizer

VIEW = views.fixed("center", (2, 4), 3)
CLASSES = ("cat", "dog")
ONE = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)


class Patches(nnx.Module):
    """Pixels as latents, times a weight: two by two of them are a place."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, image_BHW3):
        return image_BHW3.reshape(len(image_BHW3), 2, 12) * self.weight[...]


class Painted(nnx.Module):
    """The way back."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, latents_BPC):
        return latents_BPC.reshape(-1, 2, 4, 3) * self.weight[...]


def made(**weights):
    quantizer = vq.Quantizer(8, 12, grid=(1, 2), rngs=nnx.Rngs(0))
    found = tokenizer.Tokenizer(Patches(), quantizer, Painted(), size=(2, 4, 3))
    for name, weight in weights.items():
        getattr(found, name).weight[...] = jnp.asarray(weight)
    return found


class Source(sources.RandomAccess):
    """A few pictures in memory, with names."""

    holds, classes, fingerprint = "pixels", CLASSES, "none"

    def __init__(self, count=5):
        self.image_NHW3 = np.random.default_rng(0).integers(0, 256, (count, 2, 4, 3), np.uint8)

    def __len__(self):
        return len(self.image_NHW3)

    def __getitem__(self, index):
        return {"image": self.image_NHW3[index], "label": index % 2}

    def name(self, index):
        return f"{index}.png"


def test_reconstructions_that_are_not_finite_are_named():
    options = dict(count=5, batch=2)
    figures, _ = validation.reconstruction(made(), Source(), VIEW, **options)
    assert figures["images"] == 5 and figures["psnr_db_error"] > 0
    for weights in (dict(encoder=np.nan), dict(decoder=np.nan), dict(decoder=np.inf)):
        with pytest.raises(interfaces.UserError, match=r"must be finite.* 2 of 2 images: \d.png, "):
            validation.reconstruction(made(**weights), Source(), VIEW, **options)
    broken = made()
    broken.quantizer.codebook[...] = broken.quantizer.codebook[...].at[0, 0].set(jnp.nan)
    with pytest.raises(interfaces.UserError, match="must be finite"):
        validation.reconstruction(broken, Source(), VIEW, **options)


def test_one_value_has_no_standard_error():
    figures, _ = validation.reconstruction(made(), Source(1), VIEW, count=1)
    assert figures["images"] == 1 and figures["psnr_db_error"] is None
    assert validation.standard_error(np.array([2.0])) is None
    assert validation.standard_error(np.zeros(0)) is None
    assert validation.draw_error(np.ones((3, 1))) is None
    np.testing.assert_allclose(validation.standard_error(np.array([1.0, 3.0])), 1.0)


def test_what_is_marked_as_no_token_is_not_written():
    found, source = made(encoder=np.nan), Source()
    assert (np.asarray(online_tokens.encode(found, source.image_NHW3)) == -1).all()
    shard = token_header.Shard("train", "none", 1, 4)
    with pytest.raises(interfaces.UserError, match="encoder sees .* 3 of 3 images: 1.png, 2.png"):
        pretokenization._shard(found, source, shard, [VIEW], 3, ONE, tqdm.tqdm())


def generator(**options):
    return autoregressive.Generator(
        made().layout,
        len(CLASSES),
        **dict(width=8, depth=1, heads=1, variant="llama_narrow", precision=FLOAT32),
        rngs=nnx.Rngs(0),
        **options,
    )


class Shards(sources.RandomAccess):
    """Tokens in memory."""

    holds, classes, fingerprint, layout = "tokens", CLASSES, "none", {}

    def __init__(self, largest=7, label=1):
        self.tokens_NLG = np.full((3, 2, 1), largest, np.int32)
        self.label = label

    def __len__(self):
        return 3

    def __getitems__(self, indices):
        return [{"tokens": self.tokens_NLG[i][None], "label": self.label} for i in indices]


def likelihood(network, shards):
    return validation.likelihood(network, None, shards, count=3, batch=3)


def test_a_likelihood_is_of_tokens_and_labels_of_the_generator():
    network = generator()
    with pytest.raises(interfaces.UserError, match="0 to 7, the alphabet"):
        likelihood(network, Shards(largest=8))
    with pytest.raises(interfaces.UserError, match="labels must be 0 to 1; found 5 to 5"):
        likelihood(network, Shards(label=5))
    broken = generator()
    broken.head.head.kernel[...] = broken.head.head.kernel[...].at[0].set(jnp.nan)
    with pytest.raises(interfaces.UserError, match="nats of an image must be finite.*image 2"):
        likelihood(broken, Shards())


def test_samples_are_of_known_classes_and_of_finite_pixels():
    network, sampler = generator(), samplers.Sampler()
    options = dict(seed=0, batch=2, what="")

    def drawn(label_N, painter):
        return drawing.draw(network, painter, np.asarray(label_N), sampler, **options)

    for label in (5, 999, -1):
        with pytest.raises(interfaces.UserError, match=f"labels must be 0 to 1; found .*{label}"):
            drawn([0, label], made())
    _, image_NHW3 = drawn([0, 1, 1], made())
    assert image_NHW3.dtype == np.uint8 and image_NHW3.shape == (3, 2, 4, 3)
    with pytest.raises(
        interfaces.UserError, match="decoder gives .*: number 0, number 1, number 2;"
    ):
        drawn([0, 1, 1], made(decoder=np.nan))


def test_a_traced_label_that_is_none_is_flagged():
    """It must not read the row of no class, which the last row of the table is."""
    network = generator()
    network.head.head.kernel[...] = jnp.ones_like(network.head.head.kernel[...])
    keys_B = jax.random.split(jax.random.key(0), 4)
    _, invalid_B, _ = drawing.draw_tokens(
        network, None, jnp.array([0, 3, -1, 2]), keys_B, samplers.Sampler()
    )
    assert invalid_B.tolist() == [False, True, True, False]  # 2 is no class, as `null` gives it


def test_batches_of_another_form_are_refused():
    network = generator()
    tokens_BLG = jnp.zeros((2, 2, 1), jnp.int32)
    good = interfaces.TokenBatch(tokens_BLG, jnp.array([0, 1]), None)
    wrong = {
        "found 3 of 1": good.replace(tokens_BLG=jnp.zeros((2, 3, 1), jnp.int32)),
        "integers": good.replace(tokens_BLG=jnp.zeros((2, 2, 1))),
        "labels must be": good.replace(cond=jnp.array([0, 7])),
        "tokens of 2, conditions of 1": good.replace(cond=jnp.array([0])),
        "permutations": good.replace(order_BL=jnp.zeros((2, 2), jnp.int32)),
    }
    step = types.MappingProxyType(dict(step=0, key=jax.random.key(0)))
    for words, batch in wrong.items():
        for ask in (network.logits, network.nats, lambda b: network.loss(b, **step)):
            with pytest.raises(interfaces.UserError, match=words):
                ask(batch)


def test_a_folder_of_its_own_means_what_the_tokenizers_data_mean(tmp_path):
    """Also which order its classes have, and what is told before anything is done."""
    for n in (2, 10):
        (tmp_path / "set" / str(n) / "deep").mkdir(parents=True)
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / "set" / str(n) / "deep" / "1.png")
    path = str(tmp_path / "set")
    settings = ml_collections.ConfigDict({"data": {"name": "folder", "path": ""}})
    with pytest.raises(interfaces.UserError, match="understood as the classes 2, 10"):
        datasets.image_source(settings, path, "all")
    settings.data.labels = "outer"
    source = datasets.image_source(settings, path, "all", order=("10", "2"), doubtful="drop")
    assert source.classes == ("10", "2") and source[0]["label"] == 0
    assert datasets.image_source(settings, path, "all", labels="none").classes == ()
    told = classes.told(datasets.called(settings.data, path), {"all": source})
    assert told.startswith(f"{path}: 2 classes (10 1, 2 1); all 2\nclasses keep their recorded")
    with pytest.raises(interfaces.UserError, match="nothing was held out"):
        datasets.check_filled((), "held_out")


def test_images_that_a_generator_encodes_have_the_labels_that_its_config_says(tmp_path):
    """With an imported tokenizer, which has no data set of its own."""
    for name in ("cats/tabby", "cats/tiger", "dogs/boxer"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    settings = ml_collections.ConfigDict({"view": {"size": (8, 8), "channels": 3}})
    layout = interfaces.TokenLayout((9,), ((2, 2),))
    tokenizer = types.SimpleNamespace(
        layout=layout, config=settings, fingerprint="a", module=None, step=tmp_path
    )
    data = {"images": str(tmp_path), "views": "center"}  # as it was written before
    for more in ({}, {"labels": ""}):
        with pytest.raises(interfaces.UserError, match="--config.data.labels=outer in training"):
            datasets.generator_source(data | more, "train", tokenizer)
    for labels, names in (("outer", ("cats", "dogs")), ("none", ())):
        source = datasets.generator_source(data | {"labels": labels}, "train", tokenizer)
        assert source.classes == names
    source = datasets.generator_source(data | {"labels": "outer"}, "all", tokenizer, labels="none")
    assert source.classes == () and len(source) == 3
