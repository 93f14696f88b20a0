"""Blocks and similarities of published systems against their equations, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import attention, blocks, dropout, transformer, variants
from tokgen.nn.precision import FLOAT32

B, L, D, N = 2, 5, 8, 2
K = D // N
RATES = dropout.Rates()


def lively(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The module with every parameter drawn, so that none is without effect."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape) * 0.5, p.dtype), module)


def made(variant: blocks.Variant, seed: int = 0):
    return lively(
        variant.block(blocks.Config(D, 1, N, variant, 12), precision=FLOAT32, rngs=nnx.Rngs(0)),
        seed,
    )


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(x) -> np.ndarray:
    return np.asarray(x[...], np.float64)


def normed(x, eps, norm=None):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x if norm is None else x * wide(norm.scale) + wide(norm.bias)


def attended(layer, x, similar):
    """softmax of `similar(queries, keys)`, written out."""

    def project(part):
        y = np.einsum("bld,dnk->bnlk", x, wide(part.kernel))
        return y if part.bias is None else y + wide(part.bias)[None, :, None]

    q, k, v = (project(part) for part in (layer.query, layer.key, layer.value))
    q, k = similar(q, k)
    scores = np.einsum("bnlk,bnsk->bnls", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnls,bnsk->blnk", weights, v)
    out = np.einsum("blnk,nkd->bld", mixed, wide(layer.out.kernel))
    return out if layer.out.bias is None else out + wide(layer.out.bias)


def mlp(layer, x, gelu):
    hidden = gelu(x @ wide(layer.up.kernel) + wide(layer.up.bias))
    return hidden @ wide(layer.down.kernel) + wide(layer.down.bias)


def exact(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def by_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def scaled(q, k):
    return q / np.sqrt(K), k


def test_bert_norms_after_the_sum():
    block, x = made(variants.BERT), numbers(B, L, D)
    y = x.astype(np.float64)
    y = normed(y + attended(block.attention, y, scaled), 1e-12, block.attention_norm)
    y = normed(y + mlp(block.mlp, y, exact), 1e-12, block.mlp_norm)
    found, cache = block(jnp.asarray(x), drop=blocks.Drop(RATES))
    assert cache is None
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["rar", "var", "var_shared"])
def test_adaptive_blocks_shift_scale_and_gate(form):
    variant = variants.named(form)
    block, x, cond = made(variant), numbers(B, L, D), numbers(B, 1, D, seed=2)
    if form == "var_shared":
        shared = numbers(B, 1, 6, D, seed=3)
        six = wide(block.table)[None, None] + shared
        modulation = block.modulate(jnp.asarray(shared))
    else:
        silu = cond / (1 + np.exp(-cond.astype(np.float64)))
        kernel, bias = wide(block.modulation.kernel), wide(block.modulation.bias)
        six = np.einsum("bld,dse->blse", silu, kernel) + bias
        modulation = block.modulate(jnp.asarray(cond))
    shift, scale, gate, shift2, scale2, gate2 = (six[..., i, :] for i in range(6))

    def cosine(q, k):
        q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
        each = np.exp(np.minimum(wide(block.attention.similarity.scale), np.log(100)))
        return q * each[None, :, None, None], k

    def head_norm(q, k):
        norms = block.attention.similarity
        return normed(q, 1e-6, norms.query_norm) / np.sqrt(K), normed(k, 1e-6, norms.key_norm)

    affine = form == "rar"
    y = x.astype(np.float64)
    first = normed(y, 1e-6, block.attention_norm if affine else None) * (1 + scale) + shift
    y = y + gate * attended(block.attention, first, head_norm if affine else cosine)
    second = normed(y, 1e-6, block.mlp_norm if affine else None) * (1 + scale2) + shift2
    y = y + gate2 * mlp(block.mlp, second, exact if affine else by_tanh)
    found, _ = block(jnp.asarray(x), drop=blocks.Drop(RATES), modulation=modulation)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
    # VAR's keys have no bias, all of RAR's maps do
    assert (block.attention.key.bias is None) == (not affine)


def test_the_scale_of_cosine_attention_is_at_most_100():
    layer = attention.Cosine(N, K, precision=FLOAT32, rngs=nnx.Rngs(0))
    q, k = jnp.asarray(numbers(B, N, L, K)), jnp.asarray(numbers(B, N, L, K, seed=2))
    np.testing.assert_allclose(jnp.linalg.norm(layer(q, k)[0], axis=-1), 4, rtol=1e-5)
    layer.scale[...] = jnp.full(N, 9.0)
    np.testing.assert_allclose(jnp.linalg.norm(layer(q, k)[0], axis=-1), 100, rtol=1e-5)
    zero = jnp.zeros_like(q)
    slope = jax.grad(lambda q: layer(q, k)[0].sum())(zero)
    assert np.isfinite(slope).all() and np.isfinite(layer(zero, k)[0]).all()


def test_quartered_scores_are_a_quarter():
    q, k = jnp.asarray(numbers(B, N, L, K)), jnp.asarray(numbers(B, N, L, K, seed=2))
    options = dict(precision=FLOAT32, rngs=nnx.Rngs(0))
    quarter, whole = attention.Quartered(N, K, **options), attention.Scaled(N, K, **options)
    np.testing.assert_allclose(4 * quarter(q, k)[0], whole(q, k)[0], rtol=1e-6)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_a_u_joins_the_last_in_first(depth):
    u = lively(
        transformer.UShaped(
            blocks.Config(D, depth, N, variants.UVIT, hidden=12),
            precision=FLOAT32,
            rngs=nnx.Rngs(0),
        )
    )
    half = depth // 2
    assert u.depth == 2 * half + 1 and u.skips.kernel.shape == (half, 2 * D, D)
    x = jnp.asarray(numbers(B, L, D))
    found, cache = u(x)

    def layer(tree, i):
        return jax.tree.map(lambda leaf: leaf[i], tree)

    entered = []
    for i in range(half):
        x, _ = layer(u.blocks, i)(x, drop=blocks.Drop(RATES))
        entered.append(x)
    x, _ = layer(u.blocks, half)(x, drop=blocks.Drop(RATES))
    for i in range(half):
        x = layer(u.skips, i)(jnp.concatenate([x, entered.pop()], -1))
        x, _ = layer(u.blocks, half + 1 + i)(x, drop=blocks.Drop(RATES))
    assert cache is None
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_a_modulation_computed_beforehand_is_the_blocks_own():
    for form in ("var", "var_shared"):
        whole = lively(
            transformer.Transformer(
                blocks.Config(D, 2, N, variants.named(form), hidden=12),
                precision=FLOAT32,
                rngs=nnx.Rngs(0),
            )
        )
        x, cond = jnp.asarray(numbers(B, L, D)), jnp.asarray(numbers(B, 1, D, seed=2))
        wanted, _ = whole(x, cond=cond)
        for one in (whole, whole.unstacked()):
            found, _ = one(x, modulation=one.modulation(cond))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_dropped_paths_rise_with_depth_and_keep_the_mean():
    x_BlD = jnp.ones((20_000, 1, 1))
    kept = np.asarray(dropout.drop_path(x_BlD, jnp.asarray(0.2), jax.random.key(0)))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.8)}
    assert abs(kept.mean() - 1) < 4 * np.sqrt(0.2 / 0.8 / len(kept))
    np.testing.assert_array_equal(dropout.drop_path(x_BlD, 0.2, None), x_BlD)
    deep = transformer.Transformer(
        blocks.Config(D, 3, N, variants.VIT, rates=dropout.Rates(path=0.999)),
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(numbers(64, L, D))
    first, _ = jax.tree.map(lambda leaf: leaf[0], deep.blocks)(x, drop=blocks.Drop(RATES))
    found, _ = deep(x, key=jax.random.key(1))
    # the first block is never left out, the last nearly always
    last_left = np.isclose(found, _two(deep, x, jax.random.key(1)), atol=1e-5).all((1, 2)).mean()
    assert not np.allclose(found, x) and first.shape == found.shape and last_left > 0.9


def _two(deep, x, key):
    """Through the first two blocks alone, with the keys and rates that three have."""
    keys = jax.random.split(key, 3)
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], deep.blocks)
        x, _ = block(x, drop=blocks.Drop(deep.rates, 0.999 * i / 2, keys[i]))
    return x
