import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import attention, bands, positions
from tokgen.nn.precision import FLOAT32

B, N, L, S, K = 2, 2, 3, 5, 4


def _numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _loop(q, k, v, mask):
    """softmax(q k^T) v in float64, one query and one key at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if mask[b, n, i, j]]
                scores = [np.exp(sum(q[b, n, i] * k[b, n, j])) for j in seen]
                for score, j in zip(scores, seen, strict=True):
                    out[b, n, i] += score / sum(scores) * v[b, n, j]
    return out


def test_attention_against_a_loop():
    q, k, v = _numbers(0, B, N, L, K), _numbers(1, B, N, S, K), _numbers(2, B, N, S, K)
    mask = np.random.default_rng(3).uniform(size=(B, N, L, S)) < 0.6
    mask[..., 0] = True  # everybody sees something
    args = [jnp.asarray(x) for x in (q, k, v)]
    out = attention.attend(*args, jnp.asarray(mask))
    np.testing.assert_allclose(out, _loop(q, k, v, mask), rtol=1e-4, atol=1e-6)
    everything = attention.attend(*args, None)
    np.testing.assert_allclose(everything, _loop(q, k, v, mask | True), rtol=1e-4, atol=1e-6)
    # one mask for all images and heads
    shared = attention.attend(*args, jnp.asarray(mask[:1, :1]))
    expected = _loop(q, k, v, np.broadcast_to(mask[:1, :1], mask.shape))
    np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-6)


def test_what_is_masked_has_no_gradient():
    q, k, v = (jnp.asarray(_numbers(i, 1, 1, 4, K)) for i in range(3))
    mask = jnp.tril(jnp.ones((4, 4), bool))[None, None]

    def one(k, v):
        return attention.attend(q, k, v, mask)[0, 0, 1].sum()

    for slope in jax.jit(jax.grad(one, (0, 1)))(k, v):
        assert np.all(np.asarray(slope[0, 0, 2:]) == 0) and np.all(np.asarray(slope[0, 0, :2]) != 0)


def test_scores_and_softmax_are_float32():
    # 300 equal keys: in bfloat16 the sum of their weights stops at 256
    q, k = jnp.zeros((1, 1, 1, K), jnp.bfloat16), jnp.zeros((1, 1, 300, K), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda q, k: attention.attend(q, k, k, None))(q, k))
    (exponential,) = [line for line in program.splitlines() if " exp " in line]
    assert "f32[1,1,1,300]" in exponential and "bf16[1,1,1,300] = exp" not in exponential
    out = attention.attend(q, k, jnp.ones_like(k), None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 1, rtol=2**-7)


def _layer(width=8, heads=2, biased=()):
    return attention.Attention(
        width, heads, biased=biased, std=lambda fan_in: 0.7, precision=FLOAT32, rngs=nnx.Rngs(0)
    )


def test_a_layer_against_its_equation():
    layer, x = _layer(biased=attention.ALL), _numbers(4, B, L, 8)
    for i, part in enumerate((layer.query, layer.key, layer.value, layer.out)):
        part.bias[...] = jnp.asarray(_numbers(10 + i, *part.bias.shape))
    angles = np.random.default_rng(5).normal(size=(B, 1, L, K // 2))
    mask = np.tril(np.ones((L, L), bool))[None, None]

    def project(part):
        kernel, bias = (np.asarray(p[...], np.float64) for p in (part.kernel, part.bias))
        y = np.einsum("bld,dnk->bnlk", x.astype(np.float64), kernel)
        return y + bias[None, :, None]

    def turned(y):
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(y.shape)

    q, k, v = (project(part) for part in (layer.query, layer.key, layer.value))
    mixed = _loop(turned(q) / K**0.5, turned(k), v, np.broadcast_to(mask, (B, N, L, L)))
    expected = np.einsum("bnlk,nkd->bld", mixed, np.asarray(layer.out.kernel[...], np.float64))
    expected += np.asarray(layer.out.bias[...])
    rotary = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    call = jax.jit(lambda x: layer(x, rotary=rotary, mask=jnp.asarray(mask)))
    out, cache = call(jnp.asarray(x))
    assert cache is None
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_slots_of_a_prefix_are_seen_with_equal_weight():
    # zero rotary rows make queries and keys zero: LlamaGen's class token
    layer, x = _layer(), jnp.asarray(_numbers(6, 1, 3, 8))
    rows = jnp.zeros((1, 1, 3, K // 2))
    out, _ = layer(x, rotary=(rows, rows))
    values = np.einsum("bld,dnk->bnlk", x, layer.value.kernel[...]).mean(2)
    expected = np.einsum("bnk,nkd->bd", values, layer.out.kernel[...])
    np.testing.assert_allclose(out, np.tile(expected[:, None], (1, 3, 1)), rtol=1e-4, atol=1e-5)


def test_a_cache_is_written_where_it_is_told():
    cache = attention.KVCache.empty(B, N, K, jnp.bfloat16)
    assert cache.keys_BNSK.shape == (B, N, 0, K) and cache.keys_BNSK.dtype == jnp.bfloat16
    cache = attention.KVCache.empty(B, N, K, jnp.float32).grow(6)
    keys, values = _numbers(7, B, N, 2, K), _numbers(8, B, N, 2, K)
    at = jnp.asarray(3)  # traced in a loop
    written = jax.jit(attention.KVCache.write)(cache, jnp.asarray(keys), jnp.asarray(values), at)
    for new, part in ((keys, written.keys_BNSK), (values, written.values_BNSK)):
        expected = np.zeros((B, N, 6, K), np.float32)
        expected[:, :, 3:5] = new
        np.testing.assert_array_equal(part, expected)
    assert not np.any(cache.keys_BNSK)  # the old one is as it was


def test_a_cache_grows_at_its_end_and_never_shrinks():
    cache = attention.KVCache(jnp.asarray(_numbers(9, B, N, 3, K)), jnp.ones((B, N, 3, K)))
    for slots, expected in ((5, 5), (3, 3), (1, 3)):
        grown = cache.grow(slots)
        for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(grown), strict=True):
            assert new.shape == (B, N, expected, K)
            np.testing.assert_array_equal(new[:, :, :3], old)
            np.testing.assert_array_equal(new[:, :, 3:], 0)


def test_cached_steps_equal_one_pass():
    layer, x = _layer(), jnp.asarray(_numbers(11, B, 6, 8))
    angles = jnp.asarray(positions.rotary_angles((2, 3), K), jnp.float32)[None, None]
    rotary = jnp.cos(angles), jnp.sin(angles)
    causal = jnp.tril(jnp.ones((6, 6), bool))[None, None]
    whole, _ = layer(x, rotary=rotary, mask=causal)
    cache, parts = attention.KVCache.empty(B, N, K, jnp.float32), []
    for start, size in ((0, 2), (2, 1), (3, 3)):
        cache = cache.grow(start + size + 1)  # and one slot that nobody has written yet
        mask = jnp.arange(start + size + 1)[None] <= start + jnp.arange(size)[:, None]
        part, cache = layer(
            x[:, start : start + size],
            rotary=tuple(rows[:, :, start : start + size] for rows in rotary),
            mask=mask[None, None],
            cache=cache,
            at=start,
        )
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)


def test_attention_weights_are_dropped_and_not_values():
    q, k = jnp.zeros((1, 1, 1, K)), jnp.zeros((1, 1, 1000, K))
    values = jnp.broadcast_to(jnp.eye(K)[None, None, :1], (1, 1, 1000, K))
    out = attention.attend(q, k, values, None, rate=0.5, key=jax.random.key(3))
    share = np.asarray(out)[0, 0, 0, 0] / 2  # of the weights that were kept
    assert share != 0.5 and abs(share - 0.5) < 4 * (0.25 / 1000) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_after_head_is_all_heads_together(dtype, monkeypatch):
    queries, keys, values = (
        2 * jax.random.normal(key, (2, 3, length, 8), dtype)
        for key, length in zip(jax.random.split(jax.random.key(0), 3), (5, 7, 7), strict=True)
    )

    def program(mask=None, key=None, rate=0.0):
        attend = functools.partial(attention.attend, mask=mask, key=key, rate=rate)
        return str(jax.make_jaxpr(attend)(queries, keys, values))

    together = attention.attend(queries, keys, values, None)
    assert "scan" not in program()
    monkeypatch.setattr(attention, "TOGETHER", 0)
    assert "scan" in program()
    found = attention.attend(queries, keys, values, None)
    assert found.dtype == together.dtype == queries.dtype
    close = dict(atol=1e-6) if dtype == "float32" else dict(atol=0.02)
    np.testing.assert_allclose(np.float32(found), np.float32(together), **close)
    # a mask of each row's own, or weights that are dropped, take all together
    assert "scan" not in program(mask=jnp.ones((2, 1, 5, 7), bool))
    assert "length=6" in program() and "length=6" not in program(key=jax.random.key(1), rate=0.5)


@pytest.mark.parametrize("masked", [False, True])
def test_slopes_head_after_head_are_those_of_all_heads_together(masked, monkeypatch):
    """In training scores are computed again, a head at a time, where they would fill the memory."""
    q, k, v, weight = (jnp.asarray(_numbers(seed, B, N, L, K)) for seed in range(4))
    mask = jnp.tril(jnp.ones((1, 1, L, L), bool)) if masked else None

    def total(attend, q, k, v):
        return jnp.sum(weight * attend(q, k, v, mask))

    def plain(q, k, v, mask):
        return attention._together(q, k, v, mask=mask)

    def trained(q, k, v, mask):  # a key, as in training, by which nothing is dropped
        return attention.attend(q, k, v, mask, key=jax.random.key(0))

    monkeypatch.setattr(attention, "TOGETHER", 1)
    calls = []
    heads = bands._heads
    monkeypatch.setattr(bands, "_heads", lambda *a: calls.append(len(a)) or heads(*a))
    value, found = jax.value_and_grad(functools.partial(total, trained), (0, 1, 2))(q, k, v)
    assert calls == [3, 5]
    expected_value, expected = jax.value_and_grad(functools.partial(total, plain), (0, 1, 2))(
        q, k, v
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for slope, own in zip(found, expected, strict=True):
        np.testing.assert_allclose(slope, own, rtol=1e-5, atol=1e-6)
