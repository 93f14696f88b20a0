import ast
import collections
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import interfaces, losses, parameters, rng
from tokgen.discriminators import augment, feature_heads
from tokgen.evaluation import local_classifier
from tokgen.generators import autoregressive, masked, next_scale
from tokgen.nn import dropout
from tokgen.nn.precision import FLOAT32
from tokgen.quantizers import gaussian, multiscale, vq
from tokgen.sampling import decode, sampler as samplers
from tokgen.training import gan as gans, optimizer as optimizers, train_state

TABLE = {name for name in vars(rng) if name.isupper()} - {"STREAMS", "NUMBERS"}
FOLDER = pathlib.Path(rng.__file__).parent


def _crc32(text: str) -> int:
    """The checksum bit by bit, from its polynomial."""
    register = 0xFFFFFFFF
    for byte in text.encode():
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def _data(key):
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("stream", rng.STREAMS)
def test_a_key_is_recomputed_from_its_seed_stream_and_step(stream):
    folded = jax.random.fold_in(jax.random.key(7), _crc32(stream) % 2**31)
    np.testing.assert_array_equal(
        _data(rng.key(7, stream, 12)), _data(jax.random.fold_in(folded, 12))
    )


def test_keys_are_those_of_every_other_process_and_release():
    # noted once: a change means that no finished run can be resumed or repeated any more
    golden = {
        ("init", 0): [3447753273, 4156854448],
        ("train", 3): [3942000937, 4078489552],
        ("sample", 41): [3219386824, 3546523781],
    }
    for (stream, step), words in golden.items():
        assert _data(rng.key(0, stream, step)).tolist() == words


def test_no_two_of_seed_stream_step_and_use_share_a_key():
    uses = {name: value for name, value in vars(rng).items() if name in TABLE}
    assert len(uses) > 20 and len(set(uses.values())) == len(uses)
    # numbers of images, layers and symbols lie below
    assert [name for name, value in uses.items() if value <= rng.NUMBERS] == ["ORDER"]
    assert max(uses.values()) < 2**32
    keys = {
        tuple(_data(rng.key(seed, stream, step)).tolist())
        for seed, stream, step in itertools.product(range(3), rng.STREAMS, range(4))
    }
    assert len(keys) == 3 * len(rng.STREAMS) * 4


def test_streams_and_steps_are_not_correlated():
    def normals(stream, step):
        return np.asarray(jax.random.normal(rng.key(0, stream, step), (4000,)))

    draws = [normals(stream, step) for stream in ("train", "eval") for step in (0, 1)]
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 4 / 4000**0.5


def test_a_traced_step_gives_the_same_key():
    traced = jax.jit(lambda step: rng.key(3, "train", step))(jnp.asarray(9))
    np.testing.assert_array_equal(_data(traced), _data(rng.key(3, "train", 9)))


def test_a_key_per_image_depends_on_its_index_alone():
    keys_B = _data(rng.per_image(5, "sample", jnp.asarray([4, 0, 17])))
    for row, index in enumerate((4, 0, 17)):
        np.testing.assert_array_equal(keys_B[row], _data(rng.key(5, "sample", index)))
        alone = rng.per_image(5, "sample", jnp.asarray([index]))
        np.testing.assert_array_equal(keys_B[row], _data(alone)[0])


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, -3])
def test_keys_that_are_made_on_the_host_are_the_same(seed):
    index_B = np.array([0, 1, 17, 2**24, 2**31 - 1])
    keys_B = _data(rng.per_image(seed, "sample", jnp.asarray(index_B)))
    np.testing.assert_array_equal(rng.data_per_image(seed, "sample", index_B), keys_B)
    with jax.default_prng_impl("rbg"):
        keys_B = _data(rng.per_image(seed, "sample", jnp.asarray(index_B)))
        np.testing.assert_array_equal(rng.data_per_image(seed, "sample", index_B), keys_B)


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError, match="'training'"):
        rng.key(0, "training", 0)


def test_the_numbers_of_a_kind_are_what_a_split_gives():
    keys = jax.random.split(jax.random.key(4), 5)  # so that initial values and images stay
    np.testing.assert_array_equal(_data(rng.numbered(jax.random.key(4), 5)), _data(keys))
    np.testing.assert_array_equal(_data(rng.number(jax.random.key(4), 3)), _data(keys[3]))
    assert rng.numbered(None, 5) is rng.number(None, 1) is rng.use(None, rng.MASK) is None
    with pytest.raises(ValueError, match="at most"):
        rng.numbered(jax.random.key(4), rng.NUMBERS)


# ---------------------------------------------------------------- every draw of a step

DERIVES = ("split", "fold_in", "key", "key_data", "clone", "PRNGKey", "wrap_key_data", "key_impl")
SAMPLERS = [
    name
    for name, value in vars(jax.random).items()
    if callable(value) and not name.startswith("_") and name not in DERIVES
]
REPLAYS = {"maskgit_generator.py"}  # the splits of a published program, as it made them


def test_keys_are_derived_in_one_file_alone():
    found = set()
    for file in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("split", "fold_in"):
                if ast.unparse(node.value).endswith("random"):
                    found.add(file.name)
    assert found == {"rng.py"} | REPLAYS


class Recorder:
    """Every key that a sampler eats, how often, and every key from which others are derived."""

    def __init__(self, monkeypatch):
        self.eaten, self.parents = collections.Counter(), set()
        for name in SAMPLERS:
            monkeypatch.setattr(jax.random, name, self._told(getattr(jax.random, name), self._eat))
        # on a CPU dropout draws its words itself
        monkeypatch.setattr(dropout, "_words", self._told(dropout._words, self._eat))
        for name in ("split", "fold_in"):
            told = self._told(getattr(jax.random, name), self._derive)
            monkeypatch.setattr(jax.random, name, told)

    def _told(self, function, note):
        @functools.wraps(function)
        def told(key, *args, **options):
            # as a callback: also under vmap, scan and grad every single key is seen
            jax.debug.callback(note, jax.random.key_data(key))
            return function(key, *args, **options)

        return told

    def _eat(self, data):
        self.eaten.update(tuple(words) for words in np.reshape(data, (-1, 2)).tolist())

    def _derive(self, data):
        self.parents.update(tuple(words) for words in np.reshape(data, (-1, 2)).tolist())

    def watch(self, function, *args):
        """What is eaten while the function runs; its result isn't kept, so that little compiles."""

        def run(args):
            function(*args)

        self.eaten.clear(), self.parents.clear()
        jax.jit(run)(args)
        jax.effects_barrier()
        assert not set(self.eaten) & self.parents

    def shared(self):
        """The keys that more than one draw ate."""
        return [key for key, times in self.eaten.items() if times > 1]


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


RATES = dropout.Rates(token=0.1, attention=0.1, residual=0.1, hidden=0.1, path=0.1)
UNBRANCHED = dropout.Rates(token=0.1, attention=0.1, residual=0.1, hidden=0.1)
SIZES = dict(width=8, depth=2, heads=2, hidden=8, precision=FLOAT32)
SINGLE = interfaces.TokenLayout((4,), ((2, 2),))
PAIRS = interfaces.TokenLayout((4, 4), ((2, 2),))
B = 2
# Per block: attention, two residual branches and the MLP; but for the first, two whole branches
BLOCK, DROPPED = 4, 2


def _pyramid():
    return multiscale.Quantizer(
        dict(name="vq", codes=4, channels=4), (1, 2), grid=(2, 2), rngs=nnx.Rngs(1), phi=1
    )


def _raster():
    return autoregressive.Generator(
        SINGLE, 3, variant="llama_narrow", rates=RATES, rngs=nnx.Rngs(0), **SIZES
    )


def _factors():
    options = dict(order="random", head="factor", factor=2, shuffle=(0, 100))
    return autoregressive.Generator(
        PAIRS, 3, variant="llama_narrow", rates=RATES, rngs=nnx.Rngs(0), **options, **SIZES
    )


def _told():
    options = dict(
        variant="rar", conditioning="cls_label", positions="target_aware", head="adaptive"
    )
    return autoregressive.Generator(
        SINGLE, 3, order="random", rates=RATES, rngs=nnx.Rngs(0), **options, **SIZES
    )


def _masked():
    return masked.Generator(PAIRS, 3, rates=RATES, rngs=nnx.Rngs(0), **SIZES)


def _u_shaped():
    options = dict(variant="uvit", stack="u_shaped", head="biased", rates=UNBRANCHED)
    return masked.Generator(SINGLE, 3, rngs=nnx.Rngs(0), **options, **SIZES)


def _scales():
    codec = _pyramid()
    return next_scale.Generator(codec.layout, 3, channels=4, rates=RATES, rngs=nnx.Rngs(0), **SIZES)


# Draws of a step: labels and inputs; blocks; and what is of the family
FAMILIES = {
    "raster": (_raster, 2 + 2 * (BLOCK + DROPPED)),
    # each image has an order, another one and a chance; the head's stack drops as the trunk does
    "factors": (_factors, 2 + 2 * 2 * (BLOCK + DROPPED) + 3 * B),
    "told": (_told, 2 + 2 * (BLOCK + DROPPED) + B),
    "masked": (_masked, 2 + 2 * (BLOCK + DROPPED) + 2 * B),  # when, and which slots
    "u_shaped": (_u_shaped, 2 + 3 * BLOCK + 2 * B),
    "next_scale": (_scales, 2 + 2 * (BLOCK + DROPPED)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_draws_of_a_generators_step_share_a_key(family, recorder):
    make, draws = FAMILIES[family]
    generator = make()
    layout = generator.layout
    tokens_BLG = jnp.zeros((B, layout.length, layout.groups), jnp.int32)
    batch = interfaces.TokenBatch(tokens_BLG, jnp.zeros(B, jnp.int32))
    codec = _pyramid() if family == "next_scale" else None

    def step(generator, batch, key):
        generator.loss(batch, codec, step=jnp.asarray(50), key=key)

    recorder.watch(step, generator, batch, rng.key(0, "train", 50))
    assert recorder.shared() == [] and len(recorder.eaten) == draws


@pytest.mark.parametrize("family", ["factors", "masked"])
def test_no_two_draws_of_a_decode_share_a_key(family, recorder):
    generator = FAMILIES[family][0]()
    steps = decode.steps(generator)
    sampler = samplers.Sampler(jitter=1.0 if family == "masked" else 0.0)
    keys_B = rng.per_image(0, "sample", jnp.arange(B))

    def drawn(generator, keys_B):
        decode.generate(generator, None, jnp.zeros(B, jnp.int32), sampler, keys_B=keys_B)

    recorder.watch(drawn, generator, keys_B)
    assert recorder.shared() == []
    # a number per image, step and symbol; its noise, or the order of the image
    each = 2 * steps * 2 if family == "masked" else steps * 2 + 1
    assert len(recorder.eaten) == B * each


def _discriminator():
    """(graph, state, optimizer) of a discriminator that crops at random, filled with numbers."""
    tiny = dict(size=8, patch=4, width=4, depth=1, heads=1, levels=(0,), kernel=3)
    graph, params, stats = parameters.split(feature_heads.Discriminator(rngs=nnx.Rngs(0), **tiny))
    plain = optimizers.Optimizer(optax.identity(), lambda step: jnp.float32(0.1))
    zero = jnp.zeros((), jnp.int32)
    return graph, train_state.TrainState(zero, zero, params, stats, (), None), plain


def test_no_two_draws_of_a_gan_share_a_key(recorder):
    graph, discriminator, optimizer = _discriminator()
    gan = gans.GAN(
        weight=1.0, augmented=augment.KINDS, consistency=1.0, network=dict(name="feature_heads")
    )
    image_BHW3 = jnp.asarray(np.random.default_rng(0).uniform(size=(B, 12, 12, 3)), jnp.float32)
    moves = rng.use(rng.key(0, "train", 5), rng.DISCRIMINATOR)
    step = gans.discriminator_step(gan, graph, optimizer)

    def stepped(discriminator, moves):
        step(discriminator, losses.averages(), image_BHW3, 1 - image_BHW3, moves)
        network = parameters.merge(graph, discriminator.params, discriminator.stats)
        _, look = gans.views(network, gan, rng.use(moves, rng.TOKENIZER))
        losses.adversarial(look, image_BHW3, loss="hinge")

    recorder.watch(stepped, discriminator, moves)
    crop, change = 3, 1 + 2 + 2
    # real and painted, each twice; the tokenizer's; upkeep crops only
    assert len(recorder.eaten) == 5 * (crop + change) + 2 * crop
    assert recorder.shared() == []


def test_no_two_draws_of_a_tokenizers_step_share_a_key(recorder):
    key = rng.key(0, "train", 3)
    continuous = gaussian.Quantizer(channels=2, grid=(2, 2), rngs=nnx.Rngs(0))
    latents_BPC = jnp.asarray(np.random.default_rng(0).normal(size=(B, 4, 4)), jnp.float32)
    image_BHW3 = jnp.ones((B, 12, 12, 3))

    def step(key):
        continuous(latents_BPC, key=rng.use(key, rng.QUANTIZER))
        codes = vq.Quantizer(codes=4, channels=4, grid=(2, 2), rngs=nnx.Rngs(0))
        codes.maintain(latents_BPC, key=rng.use(key, rng.MAINTAIN))
        local_classifier._turned(image_BHW3, key)
        local_classifier._shifted(image_BHW3, rng.number(key, 1))

    recorder.watch(step, key)
    # noise, the codebook and its revival; two of each classifier
    assert recorder.shared() == [] and len(recorder.eaten) == 3 + 2 + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_initial_draws_share_a_key(family, recorder):
    recorder.watch(lambda: (FAMILIES[family][0](), None)[1])
    assert recorder.shared() == [] and len(recorder.eaten) > 5


# ---------------------------------------------------------------- for the making of modules


def _made(rngs):
    """Two layers of flax, one of them with a stream of its own, and the keys that come after."""
    module = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    return nnx.state(module), [_data(rngs.params()), _data(rngs()), _data(rngs.other())]


def test_modules_are_made_with_the_keys_of_nnx():
    for key in (7, rng.key(3, "init")):
        jax.tree.map(
            np.testing.assert_array_equal,
            *jax.tree.map(
                lambda leaf: (
                    _data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
                ),
                (_made(rng.rngs(key)), _made(nnx.Rngs(key))),
            ),
        )


def test_shapes_are_traced_without_the_wording_of_errors(monkeypatch):
    said = []
    tracer = type(jax.make_jaxpr(lambda x: said.append(x) or x)(0.0) and said.pop())
    monkeypatch.setattr(tracer, "_origin_msg", lambda self: said.append(self) or "")
    nnx.eval_shape(lambda: vq.Quantizer(4, 2, rngs=rng.rngs(0), grid=(2, 2)))
    assert not said
    nnx.eval_shape(lambda: vq.Quantizer(4, 2, rngs=nnx.Rngs(0), grid=(2, 2)))
    assert said, "nnx words none now: rng.rngs may go"
