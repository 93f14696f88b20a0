"""What is computed again in the backward pass changes memory, and no number beyond rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import family_steps, test_devices
from tokgen.interfaces import TokenBatch
from tokgen.nn import blocks, dropout, remat, transformer, variants
from tokgen.nn.precision import FLOAT32
from tokgen.tokenizers import conv

STACKS = transformer.Transformer, transformer.UShaped


def _running(module, policy, unroll):
    """A copy of a module whose stacks run so."""
    module = jax.tree.map(lambda leaf: leaf, module)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, STACKS):
            part.remat = remat.named(policy)
            part.unroll = unroll or part.depth
    return module


def _close(found, expected):
    leaves = jax.tree.leaves(expected)
    top = max(np.abs(leaf).max() for leaf in leaves)
    assert top > 0
    for a, b in zip(jax.tree.leaves(found), leaves, strict=True):
        scale = np.abs(b).max()
        # what cancels but for its rounding has no scale of its own
        scale = scale if scale > 1e-5 * top else top
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.long
@pytest.mark.parametrize("name", family_steps.GENERATORS)
def test_no_policy_and_no_loop_changes_a_number_of_a_familys_step(name):
    reference, vocab, changed = family_steps.GENERATORS[name]
    module, codec = test_devices.built(reference, vocab, **changed)
    draw = np.random.default_rng(0)
    layout = module.layout
    tokens_BLG = jnp.asarray(draw.integers(0, layout.vocab, (2, layout.length, layout.groups)))
    cond = jnp.arange(2)
    if module.cond == "text":
        cond = family_steps.train_generator.datasets.condition(
            {
                "text": draw.normal(size=(2, *module.text)).astype(np.float32),
                "mask": np.ones((2, module.text[0]), bool),
            }
        )

    @jax.jit
    def slope(module):
        def loss(module):
            batch = TokenBatch(tokens_BLG, cond)
            return module.loss(batch, codec, step=jnp.asarray(150_000), key=jax.random.key(1))[0]

        return jax.value_and_grad(loss)(module)

    expected = slope(_running(module, "none", 1))
    for policy, unroll in (("none", None), ("dots", 1), ("full", None), ("full", 1)):
        _close(slope(_running(module, policy, unroll)), expected)


@functools.cache
def _tokenizer(policy, variant="light", widths=(8, 8)):
    options = dict(widths=widths, variant=variant, remat=policy, precision=FLOAT32)
    sizes = dict(channels=3, latent=4)
    encoder = conv.Encoder(**sizes, rngs=nnx.Rngs(0), **options)
    return encoder, conv.Decoder(**sizes, grid=(4, 4), rngs=nnx.Rngs(1), **options)


def _error(networks, image_BHW3):
    encoder, decoder = networks
    return ((decoder(encoder(image_BHW3)) - image_BHW3) ** 2).sum()


@pytest.mark.parametrize(
    "variant",
    ["light", *(pytest.param(name, marks=pytest.mark.long) for name in ("taming", "magvit2"))],
)
def test_stages_of_a_tokenizer_give_the_same_gradient(variant):
    sizes = {} if variant == "light" else dict(widths=(32, 32))  # groups of a norm
    image_BHW3, slope = (
        jax.random.uniform(jax.random.key(0), (2, 8, 8, 3)),
        jax.jit(jax.grad(_error)),
    )
    expected, *found = (
        slope(_tokenizer(policy, variant, **sizes), image_BHW3) for policy in remat.KINDS
    )
    for each in found:
        _close(each, expected)


# ---------------------------------------------------------------- memory


def _stack(policy, make=transformer.Transformer, variant=variants.LLAMA_NARROW):
    config = blocks.Config(32, 8, 2, variant, remat=policy)
    return make(config, precision=FLOAT32, rngs=nnx.Rngs(0))


def _square(model, x_BlD):
    return (model(x_BlD)[0] ** 2).sum()


@pytest.mark.parametrize(
    "loss, make, shape",
    [(_square, _stack, (4, 48, 32)), (_error, _tokenizer, (16, 8, 8, 3))],
    ids=["transformer", "tokenizer"],
)
def test_less_is_kept_the_more_is_computed_again(loss, make, shape):
    def kept(policy):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        _, backward = jax.eval_shape(lambda x: jax.vjp(loss, make(policy), x), x)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    none, dots, full = map(kept, remat.KINDS)
    assert 0.8 * none > dots and 0.8 * dots > full


@pytest.mark.long
@pytest.mark.parametrize(
    "make, variant",
    [
        (transformer.Transformer, variants.LLAMA_NARROW),
        (transformer.UShaped, variants.UVIT),
    ],
)
def test_a_compiled_deep_stack_takes_less_the_more_is_computed_again(make, variant, optimized):
    def taken(policy):
        model = _stack(policy, make, variant)
        compiled = jax.jit(jax.grad(_square)).lower(model, jnp.ones((4, 48, 32))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = map(taken, remat.KINDS)
    assert 0.8 * none > dots and 0.8 * dots > full


# ---------------------------------------------------------------- names, loops


@pytest.mark.parametrize("name", ["ful", True])
def test_an_unknown_policy_is_refused_by_those_that_exist(name):
    with pytest.raises(ValueError, match="remat must be one of none, dots, full; found"):
        blocks_config = blocks.Config(16, 1, 2, variants.VIT, remat=name)
        transformer.Transformer(blocks_config, precision=FLOAT32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="remat must be"):
        _tokenizer(name)


def test_six_blocks_are_run_without_a_loop_and_seven_with_one():
    def program(depth, **options):
        config = blocks.Config(8, depth, 2, variants.VIT, rates=dropout.Rates(), **options)
        model = nnx.eval_shape(
            lambda: transformer.Transformer(config, precision=FLOAT32, rngs=nnx.Rngs(0))
        )
        x_BlD = jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)
        return jax.jit(lambda model, x_BlD: model(x_BlD)[0]).lower(model, x_BlD).as_text()

    assert "while" not in program(6) and "while" in program(7)
    assert all("while" in program(6, **scanned) for scanned in (dict(unroll=1), dict(remat="full")))
    assert "while" not in program(7, unroll=7)
    # what is compiled of a loop is one block, however many there are
    assert len(program(12).splitlines()) == len(program(48).splitlines())
