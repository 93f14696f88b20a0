import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, parameters, rng, sharding
from tokgen.config import building, reading as configs
from tokgen.generators import next_scale
from tokgen.nn import dropout
from tokgen.nn.precision import FLOAT32, Precision
from tokgen.quantizers import multiscale, vq
from tokgen.sampling import decode, presets, sampler as samplers
from tokgen.training import optimizer as optimizers

CLASSES, SIDES, L = 5, (1, 2, 3), 14
SCALE_L = np.repeat([0, 1, 2], [1, 4, 9])

generate = jax.jit(decode.generate, static_argnums=3)
teacher_forced = jax.jit(lambda generator, codec, batch: generator.logits(batch, codec))


def _codec(inner, **options):
    return multiscale.Quantizer(inner, SIDES, grid=(3, 3), rngs=nnx.Rngs(0), **options)


@functools.cache
def plain():
    """A codec of one symbol in 16 per position, with latents of size 1."""
    codec = _codec(dict(name="vq", codes=16, channels=6), phi=1)
    codebook = codec.inner.codebook
    codebook[...] = jax.random.normal(jax.random.key(9), codebook.shape)
    return codec


@functools.cache
def grouped():
    """A codec of two symbols per position, of 8 and of 4."""
    return _codec(dict(name="lfq", bits=5, groups=(3, 2)), phi=0)


def _abstract(codec, **options):
    """Its shapes alone: for what reads no number."""
    return nnx.eval_shape(lambda: _make(codec, **options))


def _make(codec, *, classes=CLASSES, depth=2, **options):
    sizes = dict(channels=codec.channels, width=16, depth=depth, heads=2, precision=FLOAT32)

    @jax.jit
    def make():
        rngs = nnx.Rngs(0)
        return next_scale.Generator(codec.layout, classes, **sizes, **options, rngs=rngs)

    return make()


def _lively(codec, **options):
    """One with open gates, and logits of standard deviation about 3."""
    generator = _make(codec, gates=1.0, **options)
    kernel = generator.head.head.kernel
    kernel[...] = 0.75 * jax.random.normal(jax.random.key(1), kernel.shape)
    return generator


def _batch(layout, B=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, layout.vocab, (B, layout.length, layout.groups))
    return interfaces.TokenBatch(jnp.asarray(tokens), jnp.asarray(rng.integers(0, CLASSES, B)))


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def test_a_scale_depends_on_all_coarser_tokens_and_on_no_others():
    codec, generator = plain(), _lively(plain(), depth=1)
    # the token of position p is p: row p of the codebook is seen through it, and no other way
    batch = interfaces.TokenBatch(jnp.arange(L).reshape(1, L, 1), jnp.asarray([2]))
    mix_LV = jax.random.normal(jax.random.key(4), (L, 16))
    graph, params, stats = parameters.split(codec)

    @jax.jit
    def slopes(params, generator):
        def mixed(params, generator):
            logits_BLGV = generator.logits(batch, parameters.merge(graph, params, stats))
            return jnp.sum(logits_BLGV[0, :, 0] * mix_LV, -1)

        by_code, by_own = jax.jacrev(mixed, (0, 1))(params, generator)
        return by_code["inner"]["codebook"], by_own.labels.table[...]

    by_token, by_label = (np.abs(np.asarray(slope)).max(-1) for slope in slopes(params, generator))
    coarser = SCALE_L[None, :] < SCALE_L[:, None]
    np.testing.assert_array_equal(by_token[:, :L] != 0, coarser)
    assert not by_token[:, L:].any()  # codes that stand nowhere
    # the label reaches every place, and no other class does
    np.testing.assert_array_equal(by_label != 0, np.tile(np.arange(CLASSES + 1) == 2, (L, 1)))


@pytest.mark.parametrize("variant", ["var", "var_shared"])
def test_decoding_with_a_cache_equals_teacher_forcing(variant):
    codec, generator = plain(), _lively(plain(), variant=variant)
    B, rng, weights = 3, np.random.default_rng(5), (2.0, 3.0, 1.0)  # the last one unguided
    label_B = jnp.asarray([0, 3, 4])
    mask = rng.uniform(size=(B, L, 1)) < 0.3
    mask[1] = False
    given = rng.integers(0, 16, (B, L, 1))
    state = generate(
        generator,
        codec,
        label_B,
        samplers.Sampler(temperature=0, guidance=weights),
        keys_B=jax.random.split(jax.random.key(6), B),
        given=(jnp.asarray(given), jnp.asarray(mask)),
    )
    tokens = np.asarray(state.tokens_BLG)
    np.testing.assert_array_equal(tokens[mask], given[mask])
    assert tokens.min() >= 0 and tokens.max() < 16 and not np.any(state.invalid_B)
    # what was absorbed are the tokens of the state, not those that were drawn
    np.testing.assert_allclose(state.latents_BPC, codec.decode(state.tokens_BLG), atol=1e-5)

    def logits(label_B):
        batch = interfaces.TokenBatch(state.tokens_BLG, label_B)
        return np.asarray(teacher_forced(generator, codec, batch), np.float64)[:, :, 0]

    cond, null = logits(label_B), logits(generator.null(label_B))
    merged = null + np.asarray(weights)[SCALE_L][:, None] * (cond - null)
    drawn, best = tokens[..., 0], merged.argmax(-1)
    # float32 may turn a tie over: what was drawn is the best to rounding, and nearly always itself
    regret = merged.max(-1) - np.take_along_axis(merged, drawn[..., None], -1)[..., 0]
    free = ~mask[..., 0]
    assert regret[free].max() < 1e-3 and (drawn == best)[free].mean() > 0.95
    assert len(np.unique(drawn[free])) > 3  # not one token everywhere
    assert np.any(cond.argmax(-1) != best)  # guidance makes a difference here


class _Recorder:
    """A sampler that keeps the logits it was shown."""

    steps, guidance = None, ()

    def __init__(self):
        self.sampler, self.seen = samplers.Sampler(), []

    def draw(self, logits_BlGV, **options):
        self.seen.append(logits_BlGV)
        return self.sampler.draw(logits_BlGV, **options)


@jax.jit
def sampled(generator, codec, label_B, keys_B):
    """(tokens, the logits they were drawn from, their nats)."""
    recorder = _Recorder()
    state = decode.generate(generator, codec, label_B, recorder, keys_B=keys_B)
    batch = interfaces.TokenBatch(state.tokens_BLG, label_B)
    return state.tokens_BLG, jnp.concatenate(recorder.seen, 1), generator.nats(batch, codec)


def test_the_likelihood_of_a_sample_and_an_image_alone():
    codec, generator, B = grouped(), _lively(grouped()), 8
    label_B = jnp.arange(B) % CLASSES
    keys_B = jax.random.split(jax.random.key(7), B)
    tokens_BLG, logits_BLGV, nats_BL = map(np.asarray, sampled(generator, codec, label_B, keys_B))
    assert np.all(tokens_BLG < np.asarray(codec.layout.vocab))
    chosen = np.take_along_axis(_log_softmax(logits_BLGV), tokens_BLG[..., None], -1)
    np.testing.assert_allclose(nats_BL, -chosen[..., 0].sum(-1), rtol=1e-4, atol=1e-4)
    assert nats_BL.shape == (B, L) and np.ptp(nats_BL) > 1
    for i in range(B):
        alone = sampled(generator, codec, label_B[i : i + 1], keys_B[i : i + 1])
        np.testing.assert_array_equal(alone[0][0], tokens_BLG[i])
        np.testing.assert_allclose(alone[1][0], logits_BLGV[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_of_smoothed_nats(smoothing):
    codec = grouped()
    generator = _lively(codec, label_drop=0.0, smoothing=smoothing)
    batch = _batch(codec.layout)

    @jax.jit
    def both(generator, batch, key):
        return generator.loss(batch, codec, step=0, key=key), generator.logits(batch, codec)

    (loss, scalars), logits_BLGV = both(generator, batch, jax.random.key(0))
    total, nats, hits = 0.0, np.zeros(L), 0
    B = len(batch.cond)
    for b, place, (g, size) in itertools.product(range(B), range(L), enumerate((8, 4))):
        logs = _log_softmax(logits_BLGV[b, place, g, :size])
        token = int(batch.tokens_BLG[b, place, g])
        target = np.full(size, smoothing / size)
        target[token] += 1 - smoothing
        total -= target @ logs
        nats[place] -= logs[token] / B
        hits += int(logs.argmax() == token)
    np.testing.assert_allclose(loss, total / (B * L), rtol=1e-5)
    np.testing.assert_allclose(scalars["nats_per_token"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["token_accuracy"], hits / (B * L * 2), rtol=1e-5)
    for scale in range(3):
        expected = nats[SCALE_L == scale].mean()
        np.testing.assert_allclose(scalars[f"nats_scale_{scale}"], expected, rtol=1e-5)


def test_labels_are_dropped_at_their_rate_for_the_row_of_no_class():
    # every image has a class of its own: a row of the table without gradient was dropped
    classes, rate, codec = 500, 0.3, plain()
    generator = _lively(codec, classes=classes, depth=1, label_drop=rate)
    tokens = jnp.zeros((classes, L, 1), jnp.int32)
    batch = interfaces.TokenBatch(tokens, jnp.arange(classes))

    @jax.jit
    def dropped(key):
        slope = jax.grad(lambda g: g.loss(batch, codec, step=0, key=key)[0])(generator)
        return jnp.abs(slope.labels.table[...]).max(-1) == 0

    first, second = (np.asarray(dropped(jax.random.key(seed))) for seed in (0, 1))
    assert not first[classes] and not second[classes] and np.any(first != second)
    spread = (rate * (1 - rate) / (2 * classes)) ** 0.5
    share = np.concatenate([first[:classes], second[:classes]]).mean()
    assert abs(share - rate) <= 4 * spread


def test_the_plan_is_a_step_per_scale():
    generator = _abstract(plain())
    plan = generator.plan()
    assert [phase.steps for phase in plan] == [1, 1, 1] and decode.steps(generator) == 3
    assert [(phase.first, phase.start, phase.size) for phase in plan] == [
        (0, 0, 1),
        (1, 1, 4),
        (2, 5, 9),
    ]
    # a step reads its own slots and every one before
    assert [phase.slots for phase in plan] == [1, 5, 14]


def test_a_first_scale_of_several_cells():
    codec = multiscale.Quantizer(
        dict(name="vq", codes=4, channels=3), ((1, 2), (2, 2)), grid=(2, 2), rngs=nnx.Rngs(0)
    )
    generator = _abstract(codec)
    assert generator.token.shape == (2, 16)
    logits_BLGV = jax.eval_shape(teacher_forced, generator, codec, _batch(codec.layout))
    assert logits_BLGV.shape == (3, 6, 1, 4)


@pytest.mark.parametrize("variant", ["var", "var_shared"])
def test_initial_values(variant):
    layout = interfaces.TokenLayout((64,), ((1, 1), (4, 4), (8, 8)))
    width, depth, gates = 64, 3, 1e-3
    sizes = dict(channels=40, width=width, depth=depth, heads=2, gates=gates, variant=variant)
    precision = Precision("bfloat16", "float32")

    @jax.jit
    def make():
        return next_scale.Generator(layout, 100, **sizes, precision=precision, rngs=nnx.Rngs(0))

    generator = make()
    sigma, small = (1 / (3 * width)) ** 0.5, (2 * depth) ** -0.5
    blocks, head = generator.transformer.blocks, generator.head
    wanted = [
        *((getattr(generator, name).table, sigma) for name in ("labels", "positions", "levels")),
        *((getattr(blocks.attention, n).kernel, sigma) for n in ("query", "key", "value")),
        (generator.token, sigma),
        (generator.embed.kernel, sigma),
        (blocks.mlp.up.kernel, sigma),
        (blocks.attention.out.kernel, sigma * small),
        (blocks.mlp.down.kernel, sigma * small),
        (head.head.kernel, sigma * 0.02),
        (head.modulation.kernel, sigma * 0.5),
    ]
    if variant == "var":
        six, scale = blocks.modulation.kernel, sigma
    else:
        six, scale = blocks.table, width**-0.5
        wanted.append((generator.transformer.shared.modulation.kernel, sigma))
    wanted += [
        (np.asarray(six[...])[..., i, :], scale * (gates if i in (2, 5) else 0.5)) for i in range(6)
    ]
    for parameter, expected in wanted:
        value = np.asarray(parameter[...], np.float64)
        std, mean = value.std(), value.mean()
        rough = 5 * expected / parameter.size**0.5 + 0.01 * expected
        assert abs(std - expected) < rough and abs(mean) < rough
    _, params, _ = parameters.split(generator)
    for path, leaf in parameters.paths(params).items():
        assert leaf.dtype == jnp.bfloat16
        if path.endswith("/bias"):
            assert not np.any(leaf), path
    np.testing.assert_allclose(np.exp(blocks.attention.similarity.scale[...]), 4, rtol=1e-2)


def test_what_does_not_fit_is_refused():
    codec, one = plain(), vq.Quantizer(16, 6, grid=(3, 3), rngs=nnx.Rngs(0))
    generator, batch = _abstract(codec), _batch(codec.layout)
    flat = interfaces.TokenLayout((16,), ((3, 3),))
    options = dict(channels=6, width=16, depth=1, heads=2, precision=FLOAT32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs a pyramid.*multiscale"):
        next_scale.Generator(flat, CLASSES, **options)
    with pytest.raises(ValueError, match="found 'llama'"):
        next_scale.Generator(codec.layout, CLASSES, variant="llama", **options)
    with pytest.raises(ValueError, match="smoothing.*1.5"):
        next_scale.Generator(codec.layout, CLASSES, smoothing=1.5, **options)
    for wrong, found in ((one, "'vq'"), (None, "'none'")):
        with pytest.raises(interfaces.UserError, match=f"{found}.*multiscale"):
            generator.logits(batch, wrong)
    given = batch.tokens_BLG, jnp.zeros(batch.tokens_BLG.shape, bool)
    with pytest.raises(interfaces.UserError, match="6 channels.*of 5.*channels=5"):
        generator.start(batch.cond, grouped(), keys_B=None, given=given)


# ---------------------------------------------------------------- configs/generator/var.py

# Parameters in millions, grids and shared norms, as published.
PUBLISHED = {
    "d16": (310.28, multiscale.VAR_256, False),
    "d20": (600.92, multiscale.VAR_256, False),
    "d24": (1033.40, multiscale.VAR_256, False),
    "d30": (2010.02, multiscale.VAR_256, False),
    "d36s": (2353.89, multiscale.VAR_512, True),
}


def load(variant):
    settings = configs.load(f"configs/generator/var.py:{variant}")
    building.check(
        settings,
        precision=(Precision, ()),
        generator__rates=(dropout.Rates, ()),
        optimizer=(optimizers.optimizer, ("steps",)),
        mesh=(sharding.make_mesh, ()),
    )
    return settings


@pytest.mark.parametrize("variant", sorted(PUBLISHED))
def test_published_sizes(variant):
    millions, sides, shared = PUBLISHED[variant]
    settings = load(variant)
    layout = interfaces.TokenLayout((4096,), tuple((n, n) for n in sides))
    generator = nnx.eval_shape(lambda: building.generator(settings, layout, 1000, rngs=rng.rngs(0)))
    params = parameters.paths(parameters.split(generator)[1])
    count, depth = parameters.count(params), settings.generator.depth
    assert abs(count / 1e6 - millions) < 0.005
    C, H = 64 * depth, depth
    six = 6 * C if shared else 6 * C * C + 6 * C
    block = 3 * C * C + 2 * C + H + C * C + C + 4 * C * C + 4 * C + 4 * C * C + C + six
    ends = 1001 * C + C + layout.length * C + 10 * C + 33 * C + 2 * C * C + 2 * C + 4096 * (C + 1)
    assert count == depth * block + ends + shared * (6 * C * C + 6 * C)
    assert f"{count:,}" in (configs.programs() / "configs/generator/var.py").read_text()
    for path in params:
        sharding.letters(path)
    # which are decayed, by the published rule
    decayed = parameters.matching(params, settings.optimizer.decayed)
    matrices = {path for path in params if path.endswith("kernel")}
    assert {path for path, matches in decayed.items() if matches} == matrices | {"labels/table"}
    assert settings.generator.rates.path == 0.1 * depth / 24
    _, sampler = presets.prepare(generator, presets.named(settings.presets.to_dict(), "paper"))
    np.testing.assert_allclose(sampler.guidance, 1 + 1.5 * np.arange(10) / 9)
    assert (sampler.top_k, sampler.top_p) == (900, 0.96)


def test_the_published_schedule():
    settings = load("d24")
    optimizer = building.call(
        optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
    )
    peak, warmup = 2.4e-4, settings.optimizer.warmup
    assert settings.steps == 350 * 1_281_167 // 768 and warmup == 7 * settings.steps // 350
    left = settings.steps - 1 - warmup
    for share, factor in ((0.04, 1.0), (0.5, 0.531053), (1.0, 0.01)):
        rate = optimizer.rate(warmup + share * left)
        np.testing.assert_allclose(rate, peak * factor, rtol=1e-4)
    np.testing.assert_allclose(optimizer.rate(0), 0.005 * peak, rtol=1e-5)


def test_the_small_one_builds_for_its_tokenizer():
    settings = configs.load("configs/generator/cifar10.py:next_scale")
    made_by = configs.load("configs/tokenizer/cifar10_f4.py:pyramid")
    tokenizer = nnx.eval_shape(lambda: building.tokenizer(made_by, rngs=rng.rngs(0)))
    generator = nnx.eval_shape(
        lambda: building.generator(settings, tokenizer.layout, 10, rngs=rng.rngs(0))
    )
    tokens = jax.ShapeDtypeStruct((2, tokenizer.layout.length, 1), jnp.int32)
    label_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = interfaces.TokenBatch(tokens, label_B)
    nats_BL = jax.eval_shape(lambda g, c, b: g.nats(b, c), generator, tokenizer.quantizer, batch)
    assert nats_BL.shape == (2, 85)
