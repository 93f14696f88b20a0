"""Tokenizers: shapes of every geometry, pixels, and encode, decode and reconstruct that agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, parameters
from tokgen.config import building, reading as configs
from tokgen.nn import conv as variants, precision
from tokgen.quantizers import fsq, vq
from tokgen.tokenizers import conv, tokenizer


def build(size=(16, 16), channels=3, *, widths=(16, 16), stem=2, pixels=(-1.0, 1.0), **options):
    rngs = nnx.Rngs(0)
    grid = conv.Encoder.grid(size, widths=widths, stem=stem)
    quantizer = options.pop("quantizer", None) or fsq.Quantizer((8, 6, 5), grid=grid)
    shape = dict(widths=widths, stem=stem, blocks=1, channels=channels, latent=quantizer.channels)
    shape |= dict(variant="light", precision=precision.FLOAT32, rngs=rngs) | options
    return tokenizer.Tokenizer(
        conv.Encoder(**shape), quantizer, conv.Decoder(**shape, grid=grid), pixels=pixels
    )


def images(key, size=(16, 16), channels=3, batch=2):
    return jax.random.uniform(key, (batch, *size, channels))


GEOMETRIES = [
    dict(size=(16, 16), channels=3),
    dict(size=(32, 48), channels=3),
    dict(size=(16, 16), channels=1),
    dict(size=(16, 24), channels=1, stem=1, widths=(16, 16, 16)),
    dict(size=(16, 16), channels=3, stem=8, widths=(16,), variant="local"),
    dict(size=(16, 16), channels=3, stem=1, widths=(32, 32), variant="vqgan"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shapes(geometry, key):
    made = nnx.eval_shape(lambda: build(**geometry))  # shapes need no numbers
    size, channels = geometry["size"], geometry["channels"]
    stride = geometry.get("stem", 2) * 2 ** (len(geometry.get("widths", (1, 2))) - 1)
    grid = size[0] // stride, size[1] // stride

    def check(made, image_BHWC):
        tokens_BLG = made.encode(image_BHWC)
        painted, quantized = made.reconstruct(image_BHWC)
        return made.latents(image_BHWC), tokens_BLG, made.decode(tokens_BLG), painted, quantized

    latents, tokens, decoded, painted, quantized = jax.eval_shape(
        check, made, jnp.zeros((2, *size, channels))
    )
    assert made.layout.grids == (grid,) and made.layout.length == grid[0] * grid[1]
    assert latents.shape == (2, grid[0] * grid[1], 3)
    assert tokens.shape == quantized.tokens_BLG.shape == (2, grid[0] * grid[1], 1)
    assert decoded.shape == painted.shape == (2, *size, channels)
    assert decoded.dtype == painted.dtype == jnp.float32


def filled(make):
    """The module with random numbers of the usual size, without compiling its constructors."""
    graph, params, stats = parameters.split(nnx.eval_shape(make))
    generator = np.random.default_rng(0)

    def of(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype)

    params, stats = jax.tree_util.tree_map_with_path(of, (params, stats))
    return parameters.merge(graph, params, stats)


@pytest.fixture(scope="module", params=["stem", "strided"])
def made(request):
    def strided():
        quantizer = vq.Quantizer(64, 4, grid=(4, 4), rngs=nnx.Rngs(1))
        return build(stem=1, widths=(16, 16, 16), quantizer=quantizer)

    return filled(strided if request.param == "strided" else lambda: build(stem=4, widths=(16,)))


@jax.jit
def encode(made, image_BHW3):
    return made.encode(image_BHW3)


@jax.jit
def decode(made, tokens_BLG):
    return made.decode(tokens_BLG)


def test_encode_gives_the_tokens_of_reconstruct(made, key):
    image_BHW3 = images(key)
    painted, quantized = jax.jit(lambda t, x: t.reconstruct(x))(made, image_BHW3)
    tokens_BLG = encode(made, image_BHW3)
    np.testing.assert_array_equal(tokens_BLG, quantized.tokens_BLG)
    assert len(np.unique(tokens_BLG)) > 2
    # and decoding them gives what reconstruct painted, clipped
    np.testing.assert_allclose(decode(made, tokens_BLG), jnp.clip(painted, 0, 1), atol=1e-5)


def test_decode_is_deterministic_and_every_token_counts(made, key):
    tokens_BLG = jax.random.randint(key, (1, 16, 1), 0, 60)
    once = decode(made, tokens_BLG)
    np.testing.assert_array_equal(once, decode(made, tokens_BLG))
    for place in (0, 7, 15):
        other = decode(made, tokens_BLG.at[0, place, 0].add(1))
        differs = np.abs(other - once)[0].max(-1)
        row, column = divmod(place, 4)
        block = differs[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert (block > 0).mean() > 0.8  # some pixels are clipped


def test_pixels_are_those_of_one_range(key):
    """The networks see [low, high]; what comes out is in [0, 1] again."""
    seen = []

    class Mirror(nnx.Module):
        def __call__(self, x):
            seen.append((float(x.min()), float(x.max())))
            return x

    image_BHW3 = images(key).at[0, 0, 0, 0].set(0.0).at[0, 0, 0, 1].set(1.0)
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)):
        quantizer = vq.Quantizer(4, 3, grid=(4, 4), rngs=nnx.Rngs(0))
        made = tokenizer.Tokenizer(Mirror(), quantizer, Mirror(), pixels=(low, high))
        latents = made.latents(image_BHW3)
        assert seen[-1] == (low, high)
        np.testing.assert_allclose(made.decode_unclipped(latents), image_BHW3, atol=1e-6)
        # a loss needs the gradient beyond white, a picture ends there
        beyond = latents + (high - low)
        np.testing.assert_allclose(made.decode_unclipped(beyond), image_BHW3 + 1, atol=1e-5)
        np.testing.assert_array_equal(made.decode_latents(beyond), 1.0)


def test_a_decoded_picture_is_inside_the_range(key):
    made = filled(build)
    made.decoder.conv_out.bias[...] = jnp.where(jnp.arange(12) % 2, 5.0, -5.0)
    picture = decode(made, jax.random.randint(key, (1, 16, 1), 0, 240))
    assert picture.min() == 0 and picture.max() == 1


def test_gradients_reach_the_encoder_through_the_tokens(made, key):
    image_BHW3 = images(key)

    def loss(made):
        painted, _ = made.reconstruct(image_BHW3)
        return jnp.mean((painted - image_BHW3) ** 2)

    gradient = jax.jit(jax.grad(loss, allow_int=True))(made)
    for part in (gradient.encoder.conv_in, gradient.encoder.conv_out, gradient.decoder.conv_in):
        assert np.abs(part.kernel[...]).max() > 0


def test_an_image_does_not_depend_on_its_batch(made, key):
    image_BHW3 = images(key, batch=4)
    np.testing.assert_array_equal(encode(made, image_BHW3)[:2], encode(made, image_BHW3[:2]))


# ---------------------------------------------------------------- every variant

VARIANTS = sorted(
    name.lower() for name in vars(variants) if isinstance(getattr(variants, name), variants.Variant)
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_on_rectangles(variant):
    """Shapes only: 3 levels, a stem, other widths at both ends, a projection before the latents."""
    sizes = dict(size=(16, 24), widths=(32, 32, 64), stem=2, start=64, hidden=10, variant=variant)
    made = nnx.eval_shape(lambda: apart(**sizes))
    image = jax.ShapeDtypeStruct((2, 16, 24, 3), "float32")
    latents, painted = jax.eval_shape(
        lambda made, x: (made.latents(x), made.reconstruct(x)[0]), made, image
    )
    assert made.layout.grids == ((2, 3),) and latents.shape == (2, 6, 3)
    assert painted.shape == (2, 16, 24, 3)
    kind = variants.named(variant)
    assert (made.encoder.conv_in.bias is not None) == kind.first_bias
    assert made.encoder.conv_out.kernel.shape[0] == kind.last
    assert made.encoder.conv_in.kernel.shape == (kind.first, kind.first, 12, 64)
    blocks = [stage for stage in made.decoder.stages if hasattr(stage, "conv1")]
    middle = {variants.no_middle: 0, variants.plain_middle: 1, variants.attentive_middle: 2}[
        kind.middle
    ]
    assert len(blocks) == 3 * (1 + kind.more) + middle
    assert sum(isinstance(s, variants.AdaptiveNorm) for s in made.decoder.stages) == (
        3 if kind.adapt else 0
    )


def apart(size, *, stem, widths, start, hidden, variant, attend=None):
    """A tokenizer whose two sides take the arguments that only one of them has."""
    quantizer = fsq.Quantizer((8, 6, 5), grid=conv.Encoder.grid(size, widths=widths, stem=stem))
    shape = dict(channels=3, widths=widths, stem=stem, blocks=1, hidden=hidden, variant=variant)
    shape |= dict(attend=attend, precision=precision.FLOAT32, rngs=nnx.Rngs(0))
    (grid,) = quantizer.layout.grids
    return tokenizer.Tokenizer(
        conv.Encoder(latent=quantizer.inputs, start=start, **shape),
        quantizer,
        conv.Decoder(latent=quantizer.channels, grid=grid, **shape),
    )


@pytest.mark.parametrize(
    ("attend", "expected"), [(None, (2,)), ((), ()), ((0, 2), (0, 2)), ((1,), (1,))]
)
def test_attention_follows_every_block_of_its_levels(attend, expected):
    """Level 0 is the finest; the middle has attention whatever the levels have."""
    made = nnx.eval_shape(
        lambda: apart((8, 8), stem=1, widths=(32, 64, 96), start=0, hidden=8, variant="taming",
                      attend=attend)
    )  # fmt: skip
    widths, levels = (32, 64, 96), {}
    for side, network, more in (("encoder", made.encoder, 0), ("decoder", made.decoder, 1)):
        found = [s.norm.scale.shape[0] for s in network.stages if isinstance(s, variants.Attention)]
        levels[side] = sorted(found)
        assert sorted(found) == sorted([widths[i] for i in expected] * (1 + more) + [96])
        for before, stage in zip(network.stages[:-1], network.stages[1:], strict=True):
            assert not isinstance(stage, variants.Attention) or hasattr(before, "conv1"), side


# ---------------------------------------------------------------- precision


QUANTIZERS = {
    "vq": dict(name="vq", codes=256, channels=4),
    "distances": dict(name="vq", codes=256, channels=4, normalize=False, init="normal"),
    "ibq": dict(name="ibq", codes=256, channels=4, temperature=0.01),
    "fsq": dict(name="fsq", levels=(8, 6, 5, 5)),
    "lfq": dict(name="lfq", bits=10, temperature=0.01),
    "bsq": dict(name="bsq", bits=10),
    "scales": dict(
        name="multiscale",
        quantizer=dict(name="vq", codes=64, channels=4, normalize=False, init="normal"),
        scales=(1, 2, 4),
    ),
}


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_same_latents_have_the_same_tokens_in_a_tokenizer_of_any_precision(name, key):
    """bfloat16 networks, products of low precision by default: not one index differs."""
    settings = configs.load("configs/tokenizer/shapes.py", ("view.size=(16, 16)",))
    found, codes = {}, {}
    for compute in ("float32", "bfloat16"):
        with settings.unlocked():
            settings.quantizer, settings.precision.compute = QUANTIZERS[name], compute
        made = filled(lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)))
        assert made.decoder.conv_in.precision.compute == compute
        latents_BPC = 2 * jax.random.normal(key, (8, 16, made.quantizer.inputs))
        with jax.default_matmul_precision("highest" if compute == "float32" else "bfloat16"):
            through = jax.jit(lambda made, x: (made.quantizer.encode(x), made.quantizer(x)))
            tokens_BLG, quantized = through(made, latents_BPC)
        np.testing.assert_array_equal(tokens_BLG, quantized.tokens_BLG)
        found[compute], codes[compute] = tokens_BLG, quantized.latents_BPC
        assert quantized.latents_BPC.dtype == jnp.float32
    np.testing.assert_array_equal(found["float32"], found["bfloat16"])
    np.testing.assert_array_equal(codes["float32"], codes["bfloat16"])
    assert len(np.unique(found["float32"])) > 15


@pytest.mark.parametrize(
    ("size", "stem", "widths", "stride"),
    [((30, 32), 4, (16, 16), 8), ((32, 36), 1, (16, 16, 16, 16), 8), ((32, 42), 4, (16,), 4)],
)
def test_an_indivisible_size_names_the_stride(size, stem, widths, stride):
    with pytest.raises(ValueError, match=f"stride={stride}") as caught:
        conv.Encoder.grid(size, widths=widths, stem=stem)
    assert str(size) in str(caught.value)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low < high"):
        nnx.eval_shape(lambda: build(pixels=(1.0, 1.0)))


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def small():
    """A tokenizer of 8 x 8 pixels that knows its size; called without compiling."""
    made = filled(lambda: build((8, 8), widths=(8,), blocks=0, stem=4))
    made.size = (8, 8, 3)
    return made


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "found uint8.*from_uint8"),
        (np.zeros((8, 8, 3), np.float32), r"found the shape \(8, 8, 3\)"),
        (np.zeros((1, 8, 16, 3), np.float32), "8 x 8 x 3 .*found 8 x 16 x 3"),
        (np.zeros((1, 8, 8, 1), np.float32), "found 8 x 8 x 1"),
        (np.full((1, 8, 8, 3), 200, np.float32), "found 200 to 200"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "encoded", "latents", "reconstruct"])
def test_images_of_another_form_are_refused(small, method, image, words):
    with pytest.raises(interfaces.UserError, match=words):
        getattr(small, method)(image)


def test_a_layout_is_not_left_where_the_size_is_not_known():
    made = nnx.eval_shape(lambda: build((8, 8), widths=(8,), blocks=0, stem=4))
    with pytest.raises(interfaces.UserError, match=r"images \(8, 16, 3\) must have 4 positions"):
        jax.eval_shape(lambda made, image: made.encode(image), made, jnp.zeros((1, 8, 16, 3)))


def test_tokens_of_another_form_are_refused(small):
    for tokens, words in (
        (np.zeros((1, 4), np.int32), "found the shape"),
        (np.zeros((1, 5, 1), np.int32), "found 5 of 1"),
        (np.zeros((1, 4, 1), np.float32), "integers; found float32"),
        (np.full((1, 4, 1), 240), "0 to 239"),
        (np.full((1, 4, 1), -1), "found -1"),
    ):
        with pytest.raises(interfaces.UserError, match=words):
            small.decode(tokens)
    # arithmetic on 8 bits would wrap around
    tokens = np.full((1, 4, 1), 200)
    np.testing.assert_array_equal(small.decode(tokens.astype(np.uint8)), small.decode(tokens))


def replaced(made, path, index, value):
    """A copy with one number of one array in its place."""
    graph, params, stats = parameters.split(made)
    owner = params
    for name in path[:-1]:
        owner = owner[name]
    owner[path[-1]] = owner[path[-1]].at[index].set(value)
    made = parameters.merge(graph, params, stats)
    made.size = (8, 8, 3)
    return made


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_neither_token_nor_pixel(small, value, key):
    image = images(key, (8, 8))
    tokens = small.encode(image)
    by_image = image.at[1, 2, 3, 0].set(np.nan)
    with pytest.raises(interfaces.UserError, match="encoder sees .* 1 of 2 images: 1;"):
        small.encode(by_image)
    found, invalid_B = jax.jit(lambda made, image: made.encoded(image))(small, by_image)
    assert invalid_B.tolist() == [False, True]
    np.testing.assert_array_equal(found[0], tokens[0])
    # a mark that is no token is carried out of programs that keep no flag
    marked = jax.jit(lambda made, image: made.encode(image))(small, by_image)
    assert (marked[1] == -1).all() and (marked[0] >= 0).all()
    broken = replaced(small, ("encoder", "conv_out", "bias"), 0, value)
    with pytest.raises(interfaces.UserError, match="2 of 2 images: 0, 1;"):
        broken.encode(image)
    # one sample of a pixel is infinite: it is not white
    broken = replaced(small, ("decoder", "conv_out", "bias"), 0, value)
    with pytest.raises(interfaces.UserError, match="decoder gives must be finite"):
        broken.decode(tokens)
    painted, invalid_B = jax.jit(lambda made, tokens: made.decoded(tokens))(broken, tokens)
    assert invalid_B.all() and np.isnan(painted).any()


def test_a_codebook_that_is_not_finite_writes_no_tokens(key):
    options = dict(widths=(8,), blocks=0, stem=4)
    codes = vq.Quantizer(8, 3, grid=(2, 2), rngs=nnx.Rngs(0))
    codes.codebook[...] = codes.codebook[...].at[5, 0].set(np.nan)
    made = build((8, 8), quantizer=codes, **options)
    with pytest.raises(interfaces.UserError, match="2 of 2 images"):
        made.encode(images(key, (8, 8)))
