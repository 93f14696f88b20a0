"""Likelihoods: exact ones against sums over all images, bounds against their draws written out."""

import functools
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tokgen import cli, interfaces, rng, runtime
from tokgen.checkpoints import checkpoint, loading
from tokgen.data import datasets, folder, sources
from tokgen.evaluation import references, validation
from tokgen.generators import autoregressive
from tokgen.nn import precision

LAYOUT = interfaces.TokenLayout((3, 2), ((2, 2),))


class Tokens(sources.RandomAccess):
    """Images of tokens in memory, as `tokens.Source` gives them."""

    holds = "tokens"

    def __init__(self, tokens_NLG, label_N, layout=LAYOUT):
        self.tokens_NLG, self.label_N, self.layout = tokens_NLG, label_N, layout.to_json()

    def __len__(self):
        return len(self.label_N)

    def __getitems__(self, indices):
        return [{"tokens": self.tokens_NLG[i][None], "label": self.label_N[i]} for i in indices]


def every_image(layout):
    """[N, L, G] of all images that there are."""
    sizes = layout.vocab * layout.length
    images_NU = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=-1)
    return images_NU.reshape(-1, layout.length, layout.groups).astype(np.int32)


@functools.cache
def generator():
    """Two symbols at each of four places; its weights are drawn large."""
    made = autoregressive.Generator(
        *(LAYOUT, 2),
        width=16,
        depth=1,
        heads=2,
        positions="target_aware",
        variant="llama_narrow",
        precision=precision.FLOAT32,
        rngs=nnx.Rngs(0),
    )
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(draw(size=leaf.shape)), made)


@pytest.mark.parametrize("order", ["", "columns"])
def test_the_chances_of_all_images_add_up_to_one(order):
    """Of each class, symbols summed, under the generator's own order and another."""
    tokens_NLG = every_image(LAYOUT)
    assert len(tokens_NLG) == 6**4
    nats = {}
    for label in (0, 1):
        batch = {"tokens": tokens_NLG, "label": np.full(len(tokens_NLG), label, np.int32)}
        keys_B = jax.random.split(jax.random.key(0), len(tokens_NLG))
        order_of = validation._order(generator(), order) if order else None
        nats_B = np.asarray(validation._exact(generator(), None, batch, keys_B, order=order_of))
        np.testing.assert_allclose(np.exp(-nats_B.astype(np.float64)).sum(), 1, rtol=1e-4)
        nats[label] = nats_B
    assert np.abs(nats[0] - nats[1]).max() > 0.1
    chosen = np.arange(3, 1296, 97)
    source = Tokens(tokens_NLG[chosen], np.ones(len(chosen), np.int32))
    found = validation.likelihood(generator(), None, source, count=50, batch=6, order=order)
    per_token = nats[1][chosen].astype(np.float64) / 4
    np.testing.assert_allclose(found["nats_per_token"], per_token.mean(), rtol=1e-5)
    error = per_token.std(ddof=1) / math.sqrt(len(chosen))
    np.testing.assert_allclose(found["nats_error"], error, rtol=1e-4)
    np.testing.assert_allclose(found["bits_per_token"], per_token.mean() / math.log(2), rtol=1e-5)
    assert "orders" not in found and "nats_orders_error" not in found


def test_random_orders_are_those_of_the_images():
    """Each draw is an exact likelihood, under an order that neither batch nor neighbours move."""
    tokens_NLG = every_image(LAYOUT)[5:1296:120]
    count = len(tokens_NLG)
    source = Tokens(tokens_NLG, np.zeros(count, np.int32))
    options = dict(count=50, order="random", draws=2)
    found = validation.likelihood(generator(), None, source, batch=6, **options)
    again = validation.likelihood(generator(), None, source, batch=count, **options)
    for name in ("nats_per_token", "nats_error", "nats_orders_error"):
        np.testing.assert_allclose(found[name], again[name], rtol=1e-4)
    assert found["orders"] == 2 and found["nats_orders_error"] > 0
    score, nats_RN = jax.jit(lambda model, batch: model.nats(batch)), []
    for draw in range(2):
        keys = [jax.random.fold_in(rng.key(0, "eval", index), draw) for index in range(count)]
        order_NL = jnp.stack([jax.random.permutation(key, 4) for key in keys])
        batch = interfaces.TokenBatch(tokens_NLG, jnp.zeros(count, jnp.int32), order_NL)
        nats_RN.append(np.asarray(score(generator(), batch), np.float64).sum(1) / 4)
    np.testing.assert_allclose(found["nats_per_token"], np.mean(nats_RN), rtol=1e-4)
    error = np.std(np.mean(nats_RN, 0), ddof=1) / count**0.5
    np.testing.assert_allclose(found["nats_error"], error, rtol=1e-3)


class Noisy(nnx.Module):
    """A bound: the nats of a token are its number and a draw; one symbol."""

    exact = any_order = False
    layout = interfaces.TokenLayout((9,), ((1, 3),))

    def check(self, cond):
        """Whatever is told."""

    def nats(self, batch, codec=None, *, key=None):
        noise_BL = jax.random.normal(key, batch.tokens_BLG.shape[:2])
        return batch.tokens_BLG[..., 0] + batch.cond[:, None] + noise_BL


def test_a_bound_is_the_mean_of_its_draws_with_both_errors():
    tokens_NLG = np.random.default_rng(0).integers(0, 9, (20, 3, 1)).astype(np.int32)
    label_N = np.arange(20, dtype=np.int32) % 2
    source = Tokens(tokens_NLG, label_N, Noisy.layout)
    found = validation.likelihood(Noisy(), None, source, count=20, batch=6, draws=5, seed=3)
    other = validation.likelihood(Noisy(), None, source, count=20, batch=11, draws=5, seed=3)
    np.testing.assert_allclose(found["nats_per_token"], other["nats_per_token"], rtol=1e-5)
    nats_NR = np.empty((20, 5))
    for index, draw in np.ndindex(20, 5):
        key = jax.random.fold_in(rng.key(3, "eval", index), draw)
        noise_L = np.asarray(jax.random.normal(key, (1, 3)), np.float64)
        nats_NR[index, draw] = (tokens_NLG[index, :, 0] + label_N[index] + noise_L).sum() / 3
    mean_N = nats_NR.mean(1)
    np.testing.assert_allclose(found["nats_per_token"], mean_N.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["nats_error"], mean_N.std(ddof=1) / 20**0.5, rtol=1e-5)
    # a draw has a standard deviation of sqrt(3) / 3, there are 100 of them
    np.testing.assert_allclose(found["nats_orders_error"], 3**-0.5 / 10, rtol=0.25)
    expected = np.sqrt((nats_NR.var(1, ddof=1) / 5).sum()) / 20
    np.testing.assert_allclose(found["nats_orders_error"], expected, rtol=1e-4)
    assert found["orders"] == 5
    one = validation.likelihood(Noisy(), None, source, count=20, batch=6, draws=1, seed=3)
    assert one["nats_orders_error"] is None and one["orders"] == 1


class Reader(nnx.Module):
    """Its nats are the sum of the valid features of its text."""

    exact, any_order, cond = True, False, "text"
    layout = interfaces.TokenLayout((9,), ((1, 3),))

    def check(self, cond):
        """Whatever is told."""

    def nats(self, batch, codec=None, *, key=None):
        valid_BTE = jnp.where(batch.cond.mask_BT[..., None], batch.cond.features_BTE, 0)
        return valid_BTE.sum((1, 2))[:, None] * jnp.ones((1, 3))


@pytest.mark.parametrize("masked", [True, False])
def test_the_condition_is_the_text_where_there_is_one(masked):
    draw = np.random.default_rng(1)
    text_NTE = draw.normal(size=(11, 4, 2)).astype(np.float32)
    mask_NT = draw.random((11, 4)) < 0.5

    class Texts(Tokens):
        def __getitems__(self, indices):
            more = [{"text": text_NTE[i]} | ({"mask": mask_NT[i]} if masked else {})
                    for i in indices]  # fmt: skip
            return [a | b for a, b in zip(super().__getitems__(indices), more, strict=True)]

    source = Texts(np.zeros((11, 3, 1), np.int32), np.zeros(11, np.int32), Reader.layout)
    found = validation.likelihood(Reader(), None, source, count=11, batch=4)
    valid_NT = mask_NT if masked else np.ones_like(mask_NT)
    expected = (text_NTE.astype(np.float64) * valid_NT[..., None]).sum((1, 2)).mean()
    np.testing.assert_allclose(found["nats_per_token"], expected, rtol=1e-4)


def test_what_a_model_pays_without_context_sums_its_symbols():
    draw = np.random.default_rng(0)
    train, held = (np.stack([draw.integers(0, 3, (40, 4)), draw.integers(0, 2, (40, 4))], -1)
                   for _ in range(2))  # fmt: skip
    zeros = np.zeros(40, np.int32)
    found = validation.unigram(Tokens(train, zeros), Tokens(held, zeros), LAYOUT)
    expected = np.zeros(40)
    for symbol, size in enumerate(LAYOUT.vocab):
        count = np.bincount(train[..., symbol].ravel(), minlength=size) + 0.5
        expected -= np.log(count / count.sum())[held[..., symbol]].mean(1)
    np.testing.assert_allclose(found["unigram_nats"], expected.mean(), rtol=1e-6)


class Pyramid(nnx.Module):
    """Two scales: there are no columns to go by."""

    layout = interfaces.TokenLayout((3, 2), ((1, 1), (2, 2)))


def test_orders_that_do_not_fit_are_said():
    for model, order, message in (
        (Noisy(), "random", "one by one"),
        (generator(), "spiral", "order must be one of"),
        (Pyramid(), "columns", "no order of"),
    ):
        with pytest.raises(interfaces.UserError, match=message):
            validation._order(model, order)


class Asked(Exception):
    """What was asked for."""


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """Two classes, each in folders of its own; and the commands with nothing that computes."""
    monkeypatch.setattr(runtime, "devices", lambda *_: None)
    monkeypatch.setattr(checkpoint, "find", pathlib.Path)
    for name in ("cats/tabby", "cats/tiger", "dogs/boxer"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "0.png")
    return tmp_path / "set"


@pytest.mark.parametrize("score", [(), ("--protocol", "local", "--reference", "r", "--out", "s")])
def test_a_tokenizer_is_measured_on_folders_of_class_folders(nested, monkeypatch, capfd, score):
    """One without a data set of its own, as imported ones are."""
    monkeypatch.chdir(nested.parent)
    monkeypatch.setattr(checkpoint, "read_meta", lambda step: {"kind": "tokenizer"})
    made = types.SimpleNamespace(config=ml_collections.ConfigDict({"decoder": {}}))
    for name in ("load_tokenizer", "load_to_code"):
        monkeypatch.setattr(loading, name, lambda *_, **__: made)
    monkeypatch.setattr(references, "read", lambda *_: None)

    def told(what, **sources):
        raise Asked(*sources.values())

    monkeypatch.setattr(datasets, "tell", told)
    words = ["evaluate", "ckpt", *score, "--data", str(nested), "--split", "all"]
    assert cli.main(words) == 2 and "--labels outer in commands" in capfd.readouterr().err
    for labels, names in (("outer", ("cats", "dogs")), ("none", ())):
        with pytest.raises(Asked) as asked:
            cli.main([*words, "--labels", labels])
        assert asked.value.args[0].classes == names


def test_an_unconditional_generator_reads_no_classes_of_folders(nested, monkeypatch, capfd):
    monkeypatch.setattr(checkpoint, "read_meta", lambda step: {"kind": "generator"})
    config = ml_collections.ConfigDict({"data": {"images": ""}})
    module = types.SimpleNamespace(quantizer=None, exact=True, cond="label")
    loaded = types.SimpleNamespace(
        module=module,
        classes=(),
        config=config,
        meta={"tokens": None},
        step=nested,
        fingerprint="f" * 64,
    )
    for name in ("load_generator", "load_tokenizer_of", "load_tokenizer"):
        monkeypatch.setattr(loading, name, lambda *_, **__: loaded)
    source = folder.Source(nested, split="all", labels="outer")
    monkeypatch.setattr(datasets, "generator_source", lambda *_, **__: source)

    def likelihood(*_, label_C, **__):
        raise Asked(label_C)

    monkeypatch.setattr(validation, "likelihood", likelihood)
    with pytest.raises(Asked) as asked:
        cli.main(["evaluate", "ckpt", "--data", str(nested)])
    assert asked.value.args[0].tolist() == [0, 0]
    assert "the generator has no classes" in capfd.readouterr().err
