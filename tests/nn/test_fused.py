"""Fused attention computes what the plain one does, and is taken where it can be."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tokgen import flops, sharding
from tokgen.nn import attention, fused, masks
from tokgen.planning import temporaries

B, N, K = 2, 2, 16
SCALES = (1, 4, 9, 16, 100, 131)


def _rule(kind, length):
    """A rule for so many slots; left padding of two numbers of slots."""
    valid_BL = jnp.arange(length)[None] >= jnp.array([[0], [length // 3]])
    return {
        "full": None,
        "causal": masks.causal(length),
        "blocks": masks.Blocks(
            (*SCALES, length - sum(SCALES)) if length > 261 else (2, length - 2)
        ),
        "padded": masks.causal(length, valid_BL),
    }[kind]


def _operands(length, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [1.5 * jax.random.normal(key, (B, N, length, K)).astype(dtype) for key in keys]


def _slopes(attend, mask, operands):
    """[output, gradients of queries, keys and values], in float32."""

    @jax.jit
    def run(mask, *operands):
        *given, weight = operands
        out, back = jax.vjp(lambda *given: attend(*given, mask), *given)
        return out, *back(weight)

    return [np.asarray(each, np.float32) for each in run(mask, *operands)]


def _check(found, expected, close):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=close, atol=close * np.abs(b).max())


def _plain(*operands):
    *operands, mask = operands
    return attention._together(*operands, mask=None if mask is None else mask.written())


@pytest.mark.parametrize("kind", ["full", "causal", "blocks", "padded"])
@pytest.mark.parametrize(
    "length, dtype",
    [
        (131, "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [(128, "bfloat16"), (577, "float32"), (680, "bfloat16"), (300, "float32")]
        ),
    ],
)
def test_splash_is_plain_attention(kind, length, dtype):
    mask, operands = _rule(kind, length), _operands(length, dtype)
    found = _slopes(functools.partial(fused.splash, interpret=True), mask, operands)
    close = 2e-5 if dtype == "float32" else 0.02
    _check(found, _slopes(_plain, mask, operands), close)


@pytest.mark.parametrize("kind", ["full", "padded"])
def test_what_is_counted_is_plain_attention(kind):
    mask, operands = _rule(kind, 131), _operands(131, "float32")
    found = _slopes(fused.on_paper, mask, operands)
    _check(found, _slopes(_plain, mask, operands), 2e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_kernel_is_counted_as_plain_attention(platform):
    """Two products forwards, four backwards; scores are computed again, which is no model's work.

    None of its programs here has a kernel, not even where there is none of cuDNN.
    """
    B, N, L, K = SHAPE
    operand = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)

    def loss(*operands):
        return attention.attend(*operands, masks.causal(L)).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(sharding.on_paper(platform)):
        assert sharding.platform() == platform
        step = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*[operand] * 3).jaxpr
    product = 2 * B * N * L * L * K
    assert flops.products(step, flops.BESIDE) == 6 * product
    assert flops.products(step) == 7 * product
    # operands and what is returned, none of all pairs of slots
    assert temporaries.most(step, step, 1.0) < 8 * 2 * B * N * L * K < 2 * B * N * L * L


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", ["full", "causal", "blocks", "padded"])
@pytest.mark.parametrize("length", [577, 680])
def test_the_kernel_of_this_device_is_plain_attention(kind, length):
    mask, operands = _rule(kind, length), _operands(length, "bfloat16")
    taken = fused.fitting(*operands[:2], mask, platform=sharding.platform())
    assert taken is not None
    _check(_slopes(attention.attend, mask, operands), _slopes(_plain, mask, operands), 0.03)


@pytest.mark.parametrize("kind", ["causal", pytest.param("padded", marks=pytest.mark.long)])
def test_devices_take_their_own_rows_and_heads(kind):
    length = 131
    valid_BL = jnp.arange(length)[None] >= 10 * jnp.arange(4)[:, None]
    mask = masks.causal(length, valid_BL if kind == "padded" else None)
    operands = [
        jax.random.normal(key, (4, 2, length, K)) for key in jax.random.split(jax.random.key(0), 3)
    ]
    run = functools.partial(fused.splash, interpret=True)
    expected = jax.jit(run)(*operands, mask)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        place = jax.NamedSharding(
            jax.sharding.get_mesh(), sharding.activation("BNLK", (4, 2, 1, 1))
        )
        placed = jax.device_put(operands, place)
        compiled = jax.jit(run).lower(*placed, mask).compile()
        found = compiled(*placed, mask)
    assert found.sharding.shard_shape(found.shape) == (1, 1, length, K)
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [513, 512, 768, 680, 577, 640, 2240, 4096])
def test_blocks_are_whole_and_need_little_filling(length):
    block, filled = fused._blocks(length)
    assert block % 128 == 0 and filled % block == 0 and block >= 256
    assert length <= filled <= 1.25 * (-(-length // 128) * 128)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("valid", [False, True])
def test_a_rule_is_written_out_as_it_is_told(valid):
    valid_BL = jnp.asarray([[True] * 4, [False, False, True, True]]) if valid else None
    rule = masks.Blocks((1, 2, 1), valid_BL)
    block = [0, 1, 1, 2]
    assert rule.length == 4 and not rule.causal and masks.causal(3).causal
    written = np.broadcast_to(rule.written(), (2, 1, 4, 4))
    for b, i, j in np.ndindex(2, 4, 4):
        seen = block[j] <= block[i] and (not valid or bool(valid_BL[b, j]) or i == j)
        assert written[b, 0, i, j] == seen


# ---------------------------------------------------------------- which is taken


def _program(platform, shape, dtype, mask, monkeypatch, *, slots=None, rate=0.0):
    """The text of an attention and its gradient, lowered for a platform."""
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    queries = jax.ShapeDtypeStruct(shape, dtype)
    others = jax.ShapeDtypeStruct((*shape[:2], slots or shape[2], shape[3]), dtype)

    def loss(queries, keys, values, key):
        mixed = attention.attend(queries, keys, values, mask, rate=rate, key=key)
        return mixed.astype(jnp.float32).sum()

    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(queries, others, others, key)
    names = {"gpu": "cuda"}
    return traced.lower(lowering_platforms=(names.get(platform, platform),)).as_text()


SHAPE = (2, 2, 680, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_takes_splash_attention_and_keeps_no_scores(dtype, monkeypatch):
    program = _program("tpu", SHAPE, dtype, masks.Blocks((1, 679)), monkeypatch)
    assert program.count("tpu_custom_call") == 3  # forward, queries, keys and values
    assert "680x680" not in program


@pytest.mark.parametrize("kind", ["full", "causal", "blocks", "padded"])
def test_a_gpu_takes_cudnn(kind, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    length = 257
    program = _program("gpu", (2, 2, length, 64), "bfloat16", _rule(kind, length), monkeypatch)
    assert program.count("__cudnn$fmha") == 2  # forward and backward
    assert not re.search(r"2x2x25[78]x25[78]x", program)
    assert ("CAUSAL" in program) == (kind == "causal")
    assert ("PADDING" in program) == (kind == "full")  # an odd length is filled up


@pytest.mark.parametrize(
    "platform, shape, dtype, options",
    [
        ("cpu", SHAPE, "bfloat16", {}),
        ("tpu", (2, 2, 256, 64), "bfloat16", {}),  # few scores
        ("gpu", SHAPE, "float32", {}),
        ("gpu", (2, 2, 680, 160), "bfloat16", {}),  # a large head
        ("tpu", SHAPE, "bfloat16", dict(rate=0.1)),  # of its weights some are dropped
        ("tpu", (2, 2, 600, 64), "bfloat16", dict(slots=680)),  # a cache
    ],
)
def test_what_no_kernel_takes_is_plain(platform, shape, dtype, options, monkeypatch):
    program = _program(platform, shape, dtype, None, monkeypatch, **options)
    assert "tpu_custom_call" not in program and "cudnn" not in program


def test_the_platform_is_that_of_the_mesh():
    assert sharding.platform() == "cpu"
    with jax.set_mesh(sharding.make_mesh()):
        assert sharding.platform() == "cpu"


@pytest.mark.parametrize(
    "told, has", [("9.0", True), ("8.0", True), ("7.5", False), ("gfx90a", False), (None, False)]
)
def test_a_gpu_without_the_kernel_computes_plainly(told, has, monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=told)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    queries = jnp.zeros((1, 2, 256, 64), jnp.bfloat16)
    assert (fused.fitting(queries, queries, None, platform="gpu") is not None) == has
