import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import blocks, dropout, positions, remat, transformer, variants
from tokgen.nn.precision import FLOAT32, Precision

WIDTH, DEPTH, HEADS, L = 16, 2, 2, 6
RATES = dropout.Rates(attention=0.2, residual=0.1)


@functools.cache
def _make(rates=RATES, precision=FLOAT32, **options):
    return transformer.Transformer(
        blocks.Config(WIDTH, DEPTH, HEADS, variants.LLAMA_NARROW, rates=rates, **options),
        precision=precision,
        rngs=nnx.Rngs(0),
    )


def _inputs():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, L, WIDTH)), jnp.float32)
    angles = positions.rotary_angles((2, 3), WIDTH // HEADS)
    rotary = tuple(jnp.asarray(f(angles)[None, None], jnp.float32) for f in (np.cos, np.sin))
    return x, dict(rotary=rotary, mask=jnp.tril(jnp.ones((L, L), bool))[None, None])


def _reference(model, x, context):
    """The blocks written out in float64: x + attention(norm(x)), then x + mlp(norm(x))."""
    weights = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model.blocks))
    )
    cos, sin = (np.asarray(part, np.float64) for part in context["rotary"])
    x = np.asarray(x, np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(y):
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * (cos + 1j * sin)
        return np.stack([z.real, z.imag], -1).reshape(y.shape)

    for y in range(DEPTH):
        layer = jax.tree.map(lambda leaf: leaf[y], weights)  # noqa: B023
        h = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (
            np.einsum("bld,dnk->bnlk", h, layer["attention"][name]["kernel"])
            for name in ("query", "key", "value")
        )
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) / (WIDTH // HEADS) ** 0.5
        scores = np.where(np.asarray(context["mask"]), np.exp(scores), 0)
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + np.einsum("bnlk,nkd->bld", mixed, layer["attention"]["out"]["kernel"])
        h = norm(x, layer["mlp_norm"]["scale"])
        gate, up = h @ layer["mlp"]["gate"]["kernel"], h @ layer["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
    return x


def test_the_llama_form_against_its_equations():
    x, context = _inputs()
    model = jax.tree.map(lambda leaf: leaf, _make())
    for norm in (model.blocks.attention_norm, model.blocks.mlp_norm):
        norm.scale[...] = 1 + 0.3 * jax.random.normal(jax.random.key(1), norm.scale.shape)
    out, cache = jax.jit(lambda m, x, c: m(x, **c))(model, x, context)
    assert cache is None
    np.testing.assert_allclose(out, _reference(model, x, context), rtol=1e-4, atol=1e-5)


def test_layers_differ_and_lead_with_their_number():
    blocks = _make().blocks
    kernel = np.asarray(blocks.attention.query.kernel[...])
    assert kernel.shape == (DEPTH, WIDTH, HEADS, WIDTH // HEADS)
    assert np.all(kernel[0] != kernel[1])


@functools.cache
def _scanned():
    """(output, gradient) of a loop over the stack under a key: what the other forms must give."""
    return _slope(_make(unroll=1), lambda model: model)


def _slope(model, form):
    x, context = _inputs()

    def loss(model):
        out, _ = form(model)(x, key=jax.random.key(4), **context)
        return (out**2).sum(), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(model)
    return np.asarray(out), jax.tree.leaves(slope)


@pytest.mark.parametrize("form", ["unstacked", "unrolled", "dots", "full"])
def test_every_form_of_the_stack_computes_the_same(form):
    options = dict(remat=form) if form in remat.KINDS else {}
    take = transformer.Transformer.unstacked if form == "unstacked" else lambda model: model
    out, slope = _slope(_make(**options), take)
    expected_out, expected_slope = _scanned()
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    for found, expected in zip(slope, expected_slope, strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_recomputation_is_in_the_gradient_of_its_policies_only():
    x, context = _inputs()

    def program(model):
        return str(jax.make_jaxpr(jax.grad(lambda m: m(x, **context)[0].sum()))(model))

    assert "remat" not in program(_make())
    assert all("remat" in program(_make(remat=policy)) for policy in ("dots", "full"))


def test_unstacked_leaves_the_original_alone():
    model = _make()
    apart = model.unstacked()
    assert isinstance(apart.blocks, nnx.List) and len(apart.blocks) == DEPTH
    assert not isinstance(model.blocks, nnx.List)
    assert "scan" not in str(jax.make_jaxpr(lambda m, x: m(x)[0])(apart, _inputs()[0]))


def test_dropout_is_a_pure_function_of_the_key():
    model, (x, context) = _make(), _inputs()
    call = jax.jit(lambda model, key: model(x, key=key, **context)[0])
    one, again, other = (call(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.all(np.abs(one - other).max((1, 2)) > 1e-2)
    none = call(model, None)
    still = _make(rates=dropout.Rates())
    np.testing.assert_array_equal(none, call(still, None))
    np.testing.assert_array_equal(none, call(still, jax.random.key(0)))
    assert np.abs(none - one).max() > 1e-2


def test_layers_do_not_share_their_dropout():
    x, context = _inputs()
    model, keys = _make(), jax.random.split(jax.random.key(0), DEPTH)
    # all layers alike: only their keys can make them drop different things
    alike = jax.tree.map(lambda leaf: leaf, model)
    alike.blocks = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), model.blocks)
    layer = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    call = jax.jit(lambda x, key: layer(x, drop=blocks.Drop(RATES, key=key), **context)[0])
    assert np.abs(call(x, keys[0]) - call(x, keys[1])).max() > 1e-2
    stacked = jax.jit(lambda x, key: alike(x, key=key, **context)[0])(x, jax.random.key(0))
    np.testing.assert_allclose(stacked, call(call(x, keys[0]), keys[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", ["attention", "residual"])
def test_each_rate_drops_something(rate):
    x, context = _inputs()
    model = _make()
    layer = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    rates = dropout.Rates(**{rate: 0.5})
    call = jax.jit(lambda key: layer(x, drop=blocks.Drop(rates, key=key), **context)[0])
    assert np.abs(call(jax.random.key(0)) - call(jax.random.key(1))).max() > 1e-2


@pytest.mark.parametrize("stacked", [True, False])
def test_a_cache_gives_the_same_as_one_pass(stacked):
    model, (x, context) = _make(), _inputs()
    whole = jax.jit(lambda model: model(x, **context)[0])(model)
    model = model if stacked else model.unstacked()
    cache = tuple(layer.grow(L) for layer in model.cache(2))
    assert len(cache) == (1 if stacked else DEPTH)
    assert all(len(leaf) == 2 for leaf in jax.tree.leaves(cache))  # rows lead

    @jax.jit
    def step(model, x_B1D, cache, at):
        rotary = tuple(
            jax.lax.dynamic_slice_in_dim(rows, at, 1, axis=2) for rows in context["rotary"]
        )
        mask = (jnp.arange(L) <= at)[None, None, None]
        return model(x_B1D, rotary=rotary, mask=mask, cache=cache, at=at)

    for at in range(L):
        out, cache = step(model, x[:, at : at + 1], cache, jnp.asarray(at))
        np.testing.assert_allclose(out[:, 0], whole[:, at], rtol=1e-4, atol=1e-5)
    assert isinstance(cache, tuple) and len(cache) == (1 if stacked else DEPTH)


def test_compute_and_cache_are_in_the_compute_dtype():
    model = _make(precision=Precision("float32", "bfloat16"))
    x, context = _inputs()
    call = jax.jit(lambda model: model(x, **context)[0])
    out = call(model)
    assert (
        out.dtype == jnp.bfloat16 and model.unstacked().cache(1)[0].keys_BNSK.dtype == jnp.bfloat16
    )
    assert model.cache(1)[0].keys_BYNSK.dtype == jnp.bfloat16
    wide = call(_make())
    np.testing.assert_allclose(np.float32(out), wide, atol=0.1 * np.abs(wide).max())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="width=16, heads=3"):
        transformer.Transformer(
            blocks.Config(16, 1, 3, variants.LLAMA), precision=FLOAT32, rngs=nnx.Rngs(0)
        )
    for name in ("token", "attention", "residual"):
        with pytest.raises(ValueError, match=f"{name} must be .* below 1; found 1.0"):
            dataclasses.replace(dropout.Rates(), **{name: 1.0})
