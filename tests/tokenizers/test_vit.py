"""The vision transformers that write an image into a line of tokens, and the decoder of two."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import losses
from tokgen.interfaces import UserError
from tokgen.nn import blocks, transformer, variants
from tokgen.nn.precision import FLOAT32, Precision
from tokgen.quantizers import gaussian, vq
from tokgen.tokenizers import conv, tokenizer, two_stage, vit

SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}  # width, depth, heads
PROXY = (1024, 256)  # MaskGIT's codebook


def sizes(name):
    return dict(zip(("width", "depth", "heads"), SIZES[name], strict=True))


def counted(make):
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def encoder(size, tokens, latent, **options):
    common = dict(channels=3, size=(256, 256), precision=FLOAT32, rngs=nnx.Rngs(0))
    return vit.Encoder(latent=latent, tokens=tokens, **sizes(size), **common, **options)


def decoder(size, tokens, latent, **options):
    common = dict(channels=3, size=(256, 256), precision=FLOAT32, rngs=nnx.Rngs(0))
    return vit.Decoder(latent=latent, tokens=tokens, **sizes(size), **(common | options))


@pytest.mark.parametrize(
    ("size", "tokens", "encoding", "decoding", "total"),
    [
        ("l", 32, 303_410_188, 306_822_144, 641_054_735),
        ("b", 64, 85_904_652, 88_070_656, 204_814_095),
        ("s", 128, 25_818_636, 27_000_832, 83_674_639),
    ],
)
def test_parameters_of_the_published_two_stage_forms(size, tokens, encoding, decoding, total):
    def make():
        options = dict(precision=FLOAT32, rngs=nnx.Rngs(0))
        codes = decoder(size, tokens, 12, channels=PROXY[0], head="codes")
        pixels = conv.Decoder(
            channels=3,
            latent=PROXY[1],
            grid=(16, 16),
            widths=(128, 128, 256, 256, 512),
            blocks=2,
            variant="maskgit",
            **options,
        )
        return two_stage.Decoder(codes=codes, pixels=pixels, codebook=PROXY, **options)

    # the published encoder's count is without the latent tokens, which belong to the whole there
    found = counted(lambda: encoder(size, tokens, 12, readout="reinterpreted"))
    assert found == encoding + tokens * SIZES[size][0]
    assert counted(lambda: make().codes) == decoding
    codebook = counted(lambda: vq.Quantizer(4096, 12, grid=(1, tokens), rngs=nnx.Rngs(0)))
    assert found + codebook + counted(make) == total


@pytest.mark.parametrize(
    ("sizes", "tokens", "quantizer", "text", "total"),
    [
        ("bl", 64, "vq", None, 390_016_148),
        ("bl", 128, "vq", None, 390_179_988),
        ("sl", 256, "vq", None, 330_260_884),
        ("ll", 32, "gaussian", None, 606_879_604),
        ("bl", 64, "gaussian", None, 389_418_100),
        ("bl", 128, "gaussian", None, 389_581_940),
        ("bl", 32, "vq", (77, 768), 390_800_532),
        ("bl", 64, "vq", (77, 768), 390_882_452),
        ("bl", 128, "vq", (77, 768), 391_046_292),
        ("bl", 32, "gaussian", (77, 768), 390_202_484),
        ("sl", 128, "gaussian", (77, 768), 330_275_188),
    ],
)
def test_parameters_of_the_published_one_stage_forms(sizes, tokens, quantizer, text, total):
    def make():
        options = dict(grid=(1, tokens), rngs=nnx.Rngs(0))
        kinds = {
            "vq": lambda: vq.Quantizer(8192, 64, normalize=False, **options),
            "gaussian": lambda: gaussian.Quantizer(16, **options),
        }
        bottleneck = kinds[quantizer]()
        return nnx.List(
            [
                encoder(sizes[0], tokens, bottleneck.inputs),
                bottleneck,
                decoder(sizes[1], tokens, bottleneck.channels, text=text),
            ]
        )

    assert counted(make) == total


def narrow(kind, *, precision=FLOAT32, **options):
    common = dict(channels=3, latent=4, size=(8, 12), tokens=5, patch=4)
    common |= dict(width=16, depth=1, heads=2, precision=precision, rngs=nnx.Rngs(0))
    return kind(**(common | options))


def filled(make, seed=0):
    """The module with random numbers in every parameter, without compiling its constructors."""
    rng = np.random.default_rng(seed)

    def of(leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(of, nnx.eval_shape(make))


call = jax.jit(lambda made, *inputs: made(*inputs))


def test_reinterpreted_is_the_memory_order():
    B, P, D = 2, 3, 4
    flat = np.arange(B * P * D, dtype=np.float32).reshape(B, P * D)
    found = vit.reinterpreted(jnp.asarray(flat.reshape(B, P, D)))
    for b in range(B):
        for n in range(P):
            for c in range(D):
                assert found[b, n, c] == flat[b, c * P + n]


def test_the_readouts_differ_by_that_order_alone(key):
    image_BHW3 = jax.random.uniform(key, (2, 8, 12, 3))
    seen = {}
    for name in vit.READOUTS:
        made = filled(lambda name=name: narrow(vit.Encoder, latent=16, readout=name))
        made.readout.kernel[...], made.readout.bias[...] = jnp.eye(16), jnp.zeros(16)
        seen[name] = np.asarray(call(made, image_BHW3))
    assert np.abs(seen["in_order"] - seen["reinterpreted"]).max() > 0.1
    memory = seen["reinterpreted"].swapaxes(1, 2).reshape(2, 5, 16)
    np.testing.assert_allclose(seen["in_order"], memory, atol=1e-5)


def test_a_block_against_its_equations(key):
    """x + out(softmax(q k / sqrt(K)) v), then x + down(gelu(up(x))), biases everywhere; float64."""
    N, K = 2, 4
    made = transformer.Transformer(
        blocks.Config(N * K, 1, N, variants.VIT), precision=FLOAT32, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), made)
    x = rng.normal(size=(3, N * K))
    found, _ = made(jnp.asarray(x[None], jnp.float32))

    block = jax.tree.map(lambda a: np.asarray(a[0], np.float64), made.blocks)

    def norm(layer, x):
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / spread * layer.scale[...] + layer.bias[...]

    y, mixed = norm(block.attention_norm, x), np.zeros((3, N, K))
    parts_of = block.attention
    q, k, v = (
        np.einsum("lD,DNK->lNK", y, part.kernel[...]) + part.bias[...]
        for part in (parts_of.query, parts_of.key, parts_of.value)
    )
    for head in range(N):
        for place in range(3):
            scores = np.array([q[place, head] @ k[other, head] for other in range(3)]) / K**0.5
            weights = np.exp(scores - scores.max())
            mixed[place, head] = weights @ v[:, head] / weights.sum()
    out = parts_of.out
    x = x + np.einsum("lNK,NKD->lD", mixed, out.kernel[...]) + out.bias[...]
    hidden = norm(block.mlp_norm, x) @ block.mlp.up.kernel[...] + block.mlp.up.bias[...]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
    x = x + hidden @ block.mlp.down.kernel[...] + block.mlp.down.bias[...]
    np.testing.assert_allclose(found[0], x, rtol=2e-5, atol=2e-5)


def test_a_patch_is_laid_out_by_row_column_colour():
    grid, patch, width = (2, 3), 4, 5
    made = vit.Pixels(
        width, 3, grid, patch, std=lambda size: 1.0, precision=FLOAT32, rngs=nnx.Rngs(0)
    )
    # the convolution passes every colour through
    made.conv_out.kernel[...] = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    x_BPD = np.random.default_rng(0).normal(size=(2, 6, width)).astype(np.float32)
    found = np.asarray(made(jnp.asarray(x_BPD)))
    numbers = x_BPD @ np.asarray(made.patches.kernel[...])
    for row in range(8):
        for column in range(12):
            place = (row // patch) * grid[1] + column // patch
            first = ((row % patch) * patch + column % patch) * 3
            expected = numbers[:, place, first : first + 3]
            np.testing.assert_allclose(found[:, row, column], expected, atol=1e-5)


def test_code_logits_against_their_equation():
    made = vit.Codes(6, 10, (2, 2), 4, std=lambda size: 1.0, precision=FLOAT32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), made)
    x = rng.normal(size=(2, 4, 6))
    hidden, logits = made.hidden, made.logits
    expected = np.tanh(x @ np.float64(hidden.kernel[...]) + np.float64(hidden.bias[...]))
    expected = expected @ np.float64(logits.kernel[...]) + np.float64(logits.bias[...])
    assert hidden.kernel.shape == (6, 12)
    np.testing.assert_allclose(made(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)


def test_every_input_reaches_every_output(key):
    """No mask: each latent depends on every patch, each patch on every latent and every word."""
    image_BHW3 = jax.random.uniform(key, (1, 8, 12, 3))
    made = filled(lambda: narrow(vit.Encoder))
    slopes = jax.jit(jax.jacrev(lambda image: made(image)[0, :, 0]))(image_BHW3)
    patches = np.abs(slopes.reshape(5, 2, 4, 3, 4, 3)).sum((2, 4, 5))
    assert patches.shape == (5, 2, 3) and patches.min() > 0

    made = filled(lambda: narrow(vit.Decoder, text=(3, 7)))
    latents_BPC, cond = jax.random.normal(key, (1, 5, 4)), jax.random.normal(key, (1, 3, 7))
    slopes = jax.jit(jax.jacrev(lambda *inputs: made(*inputs)[0, ::4, ::4, 0], (0, 1)))(
        latents_BPC, cond
    )
    for slope in slopes:
        assert np.abs(slope).sum((2, -1)).min() > 0


@pytest.mark.parametrize("head", vit.HEADS)
def test_shapes_and_precision(head):
    half = Precision("float32", "bfloat16")
    made = nnx.eval_shape(lambda: narrow(vit.Decoder, head=head, precision=half))
    found = jax.eval_shape(call, made, jnp.zeros((2, 5, 4)))
    shape, dtype = {
        "pixels": ((2, 8, 12, 3), jnp.bfloat16),
        "codes": ((2, 6, 3), jnp.float32),  # logits
    }[head]
    assert found.shape == shape and found.dtype == dtype
    made = nnx.eval_shape(lambda: narrow(vit.Encoder, precision=half))
    assert jax.eval_shape(call, made, jnp.zeros((2, 8, 12, 3))).shape == (2, 5, 4)


def test_first_spreads_are_the_published_ones():
    made = narrow(vit.Encoder, size=(64, 64), patch=16, width=256, tokens=64, heads=4)
    blocks = made.transformer.blocks
    for kernel in (made.conv_patch.kernel, blocks.mlp.up.kernel, blocks.attention.out.kernel):
        assert np.std(kernel[...]) == pytest.approx(0.02, rel=0.02)
    for rows in (made.positions, made.latents, made.latent_positions):
        assert np.std(rows.table[...]) == pytest.approx(1 / 16, rel=0.1)
    for bias in (made.conv_patch.bias, made.readout.bias, blocks.attention.query.bias):
        assert not np.any(bias[...])


def test_the_grid_is_one_row_of_the_tokens():
    section = dict(name="vit", tokens=32, patch=16, width=512, depth=8, heads=8)
    assert vit.Encoder.grid((256, 128), **section) == (1, 32)
    with pytest.raises(ValueError, match=r"size=\(256, 100\), patch=16"):
        vit.Encoder.grid((256, 100), **section)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="readout must be one of.*found 'transposed'"):
        nnx.eval_shape(lambda: narrow(vit.Encoder, readout="transposed"))
    with pytest.raises(ValueError, match="head must be one of.*found 'colours'"):
        nnx.eval_shape(lambda: narrow(vit.Decoder, head="colours"))


def test_text_is_asked_for_and_refused():
    latents_BPC = jnp.zeros((2, 5, 4))
    made = nnx.eval_shape(lambda: narrow(vit.Decoder, text=(3, 7)))
    with pytest.raises(UserError, match=r"text features of shape \(2, 3, 7\).*found none"):
        jax.eval_shape(call, made, latents_BPC)
    with pytest.raises(UserError, match=r"found \(2, 4, 7\)"):
        jax.eval_shape(call, made, latents_BPC, jnp.zeros((2, 4, 7)))
    with pytest.raises(UserError, match="takes no text"):
        made = nnx.eval_shape(lambda: narrow(vit.Decoder))
        jax.eval_shape(call, made, latents_BPC, jnp.zeros((2, 3, 7)))


@pytest.fixture(scope="module")
def two():
    def make():
        codes = narrow(vit.Decoder, head="codes", channels=9)
        pixels = narrow(vit.Decoder, tokens=6, latent=7)
        options = dict(precision=FLOAT32, rngs=nnx.Rngs(1))
        return two_stage.Decoder(codes=codes, pixels=pixels, codebook=(9, 7), **options)

    return filled(make)


def test_the_mixture_is_the_mean_of_rows(two):
    rng = np.random.default_rng(0)
    logits, rows_VC = 3 * rng.normal(size=(2, 6, 9)), np.float64(two.codebook[...])
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = two.mixture(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, weights @ rows_VC, atol=1e-6)
    # certain of one code, it is that code's row
    tokens = rng.integers(0, 9, (2, 6))
    certain = two.mixture(200.0 * jax.nn.one_hot(tokens, 9))
    np.testing.assert_allclose(certain, rows_VC[tokens], atol=1e-6)
    assert two.mixture(jnp.asarray(logits, jnp.bfloat16)).dtype == jnp.float32


def test_the_image_is_painted_from_the_mixture(two, key):
    latents_BPC = jax.random.normal(key, (2, 5, 4))
    logits_BPV = jax.jit(lambda two, latents: two.logits(latents))(two, latents_BPC)
    assert logits_BPV.shape == (2, 6, 9)
    painted = call(two.pixels, two.mixture(logits_BPV))
    np.testing.assert_allclose(call(two, latents_BPC), painted, atol=1e-5)


def test_logits_must_fit_the_codebook(two):
    options = dict(precision=FLOAT32, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"codebook=\(8, 7\), codes.channels=9"):
        two_stage.Decoder(codes=two.codes, pixels=two.pixels, codebook=(8, 7), **options)


def test_code_cross_entropy_against_its_sum():
    rng = np.random.default_rng(0)
    logits, tokens = 5 * rng.normal(size=(2, 3, 4)), rng.integers(0, 4, (2, 3))
    total = 0.0
    for b in range(2):
        for place in range(3):
            row = logits[b, place]
            total += np.log(np.sum(np.exp(row))) - row[tokens[b, place]]
    found = losses.code_cross_entropy(jnp.asarray(logits, jnp.float32), tokens[..., None])
    np.testing.assert_allclose(found, total / 6, rtol=1e-6)


def test_layers_apart_encode_and_decode_the_same(two, key):
    quantizer = vq.Quantizer(16, 4, grid=(1, 5), rngs=nnx.Rngs(2))
    whole = tokenizer.Tokenizer(filled(lambda: narrow(vit.Encoder)), quantizer, two)
    apart = whole.unstacked()
    stacks = apart.encoder.transformer, apart.decoder.codes.transformer
    assert all(isinstance(stack.blocks, nnx.List) for stack in stacks)
    assert not isinstance(whole.decoder.codes.transformer.blocks, nnx.List)
    image_BHW3 = jax.random.uniform(key, (2, 8, 12, 3))
    latents = [call(each.encoder, image_BHW3) for each in (whole, apart)]
    np.testing.assert_allclose(*latents, atol=1e-5)
    images = [call(each.decoder, latents[0]) for each in (whole, apart)]
    np.testing.assert_allclose(*images, atol=1e-5)
