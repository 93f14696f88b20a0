"""The autoregressive generator against the numbers of LlamaGen's own code on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import state
from tokgen.generators import autoregressive
from tokgen.interfaces import TokenBatch, TokenLayout
from tokgen.nn.precision import FLOAT32
from tokgen.pretrained import reader
from tokgen.sampling import decode, filters


@pytest.fixture(scope="module")
def published(shared):
    folder = shared / "parity" / "llamagen_c2i"
    settings = json.loads((folder / "config.json").read_text())
    weights = reader.read(folder / "c2i.pt", "model")
    with np.load(folder / "case.npz") as arrays:
        case = {name: arrays[name] for name in arrays}
    layers, width, heads = settings["n_layer"], settings["dim"], settings["n_head"]
    side = round(settings["block_size"] ** 0.5)

    def make():
        return autoregressive.Generator(
            TokenLayout((settings["vocab_size"],), ((side, side),)),
            settings["num_classes"],
            width=width,
            depth=layers,
            heads=heads,
            parts="llama_narrow",  # multiple_of is 32 in this fixture
            window=5,
            precision=FLOAT32,
            rngs=nnx.Rngs(0),
        )

    def stack(name, shape=None, part=slice(None)):
        rows = [weights[f"layers.{i}.{name}.weight"][part].T for i in range(layers)]
        return np.stack([row if shape is None else row.reshape(shape) for row in rows])

    size = width // heads
    thirds = {
        name: {"kernel": stack("attention.wqkv", (width, heads, size), part)}
        for name, part in zip(
            ("query", "key", "value"),
            (slice(i * width, (i + 1) * width) for i in range(3)),
            strict=True,
        )
    }
    params = {
        "symbols": {"table": weights["tok_embeddings.weight"][None]},
        "labels": {"table": weights["cls_embedding.embedding_table.weight"]},
        "transformer": {
            "blocks": {
                "attention": thirds
                | {"out": {"kernel": stack("attention.wo", (heads, size, width))}},
                "attention_norm": {"scale": stack("attention_norm")},
                "mlp": {
                    "gate": {"kernel": stack("feed_forward.w1")},
                    "up": {"kernel": stack("feed_forward.w3")},
                    "down": {"kernel": stack("feed_forward.w2")},
                },
                "mlp_norm": {"scale": stack("ffn_norm")},
            }
        },
        "head": {
            "norm": {"scale": weights["norm.weight"]},
            "head": {"kernel": weights["output.weight"].T[:, None]},
        },
    }
    graph, ours, stats = state.split(make())
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, params)
    assert sum(w.size for w in weights.values()) == state.count(ours)
    return state.merge(graph, jax.tree.map(jnp.asarray, params), stats), case


def close(found, wanted, relative=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=relative * np.abs(wanted).max())


def test_teacher_forced_logits_and_loss(published):
    generator, case = published
    batch = TokenBatch(jnp.asarray(case["tokens"])[..., None], jnp.asarray(case["cond"]))
    close(generator.logits(batch)[:, :, 0], case["logits"])
    close(generator.nats(batch).mean(), case["loss"])


def test_gradient_norm_of_the_loss(published):
    generator, case = published
    batch = TokenBatch(jnp.asarray(case["tokens"])[..., None], jnp.asarray(case["cond"]))
    graph, params, stats = state.split(generator)
    gradients = jax.grad(lambda p: state.merge(graph, p, stats).nats(batch).mean())(params)
    squares = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(gradients))
    close(squares**0.5, case["grad_norm_all"], 1e-3)


@pytest.mark.parametrize(
    ("name", "weight", "guided"),
    [
        ("greedy_nocfg", 1.0, 16),
        ("greedy_cfg4", 4.0, 16),
        ("greedy_cfg7.5", 7.5, 16),
        # the prefill, then the decode steps i <= 5
        ("greedy_cfg4_interval5", 4.0, 7),
    ],
)
def test_greedy_decoding_token_for_token(published, name, weight, guided):
    generator, case = published
    weights = (weight,) * guided + (1.0,) * (16 - guided)
    sampler = filters.Sampler(temperature=0.0, guidance=weights)
    label_B = jnp.asarray(case["cond"])
    keys_B = jax.random.split(jax.random.key(0), len(label_B))
    found = decode.generate(generator, None, label_B, sampler, keys_B=keys_B)
    np.testing.assert_array_equal(found.tokens_BLG[..., 0], case[name])
