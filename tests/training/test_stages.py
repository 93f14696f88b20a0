"""Stages of training: their arithmetic, what they freeze, and runs that cross their boundaries."""

import json
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

import train_tokenizer
from tokgen import interfaces, metrics_log, parameters, rng, sharding
from tokgen.checkpoints import checkpoint, run as runs
from tokgen.config import building, reading
from tokgen.nn import precision
from tokgen.quantizers import vq
from tokgen.tokenizers import conv, tokenizer, two_stage, vit
from tokgen.training import gan as gans, launch, stages, tokenizer_step, train_state

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = (
    *("data.size=(8, 8)", "data.count=40", "view.size=(8, 8)", "encoder.widths=(16,)"),
    *("decoder.widths=(16,)", "encoder.blocks=1", "decoder.blocks=1", "batch_size=8"),
    *("quantizer.codes=32", "held_out.images=4", "report.scalars=1", "report.save=1"),
    *("keep.latest=9", "optimizer.warmup=1", "safeguards.usage=0.0"),
    *("ema=0.9", "steps=6"),
)
# The second stage trains the decoder alone, on other losses, with another optimizer.
TWO = (
    dict(share=0.5),
    dict(
        share=0.5,
        train="decoder/.*",
        loss=dict(l1=1.0, l2=0.0),
        optimizer=dict(learning_rate=0.01, clip=0.0, weight_decay=0.0, warmup=2, decay="constant"),
    ),
)


def settings_of(*sections, **changes):
    settings = reading.load("configs/tokenizer/shapes.py:vq", SMALL)
    with settings.unlocked():
        settings.stages, settings.optimizer.weight_decay = sections, 0.1
        settings.update(changes)
    return settings


# ---------------------------------------------------------------- the plan


def test_without_stages_there_is_one():
    for settings in (settings_of(), reading.load("configs/tokenizer/shapes.py:vq", SMALL)):
        (stage,) = stages.plan(settings)
        assert (stage.begin, stage.end, stage.objective, stage.train) == (0, 6, "pixels", ".*")
        assert not stage.loss and not stage.optimizer


@pytest.mark.parametrize(
    ("steps", "shares", "ends"),
    [
        (10, (0.5, 0.5), (5, 10)),
        (1000, (0.6, 0.3, 0.1), (600, 900, 1000)),
        (7, (0.5, 0.5), (4, 7)),  # 3.5 to the even number
        (10, (0.33, 0.33, 0.34), (3, 7, 10)),
        (3, (1 / 3, 1 / 3, 1 / 3), (1, 2, 3)),  # shares that add up to 1 but for rounding
    ],
)
def test_shares_are_of_the_run(steps, shares, ends):
    plan = stages.plan(settings_of(*(dict(share=share) for share in shares), steps=steps))
    assert tuple(stage.end for stage in plan) == ends
    assert tuple(stage.begin for stage in plan) == (0, *ends[:-1])
    for step in range(steps):
        stage = stages.at(plan, step)
        assert stage.begin <= step < stage.end
    assert stages.at(plan, steps) is plan[-1]  # a run that is at its end


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ((dict(share=0.5), dict(share=0.4)), "add up to 1; found 0.5, 0.4"),
        ((dict(share=1.5), dict(share=-0.5)), "share must be .* above 0"),
        ((dict(share=0.99), dict(share=0.01)), "positive"),  # of 6 steps none
        ((dict(shares=1.0),), r"stages\[0\] has no argument 'shares'; did you mean 'share'"),
        ((dict(), dict(objective="pixel")), r"stages\[1\].objective must be one of pixels, codes"),
        # of a later stage too, before the first begins
        ((dict(share=0.5), dict(share=0.5, loss=dict(l3=1.0))), r"stages\[1\].loss .* found l3"),
        ((dict(share=0.5), dict(share=0.5, optimizer=dict(b3=0.9))), "no argument 'b3'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(sections, words):
    with pytest.raises(interfaces.UserError, match=words):
        stages.plan(settings_of(*sections))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(train="decodr/.*"), r"stages\[0\].train='decodr/.\*' matches no parameter"),
        (dict(train="decoder/(.*"), r"stages\[0\].train is no pattern"),
        (dict(objective="codes"), r"stages\[0\].objective='codes' needs a decoder"),
    ],
)
def test_a_stage_must_fit_the_tokenizer(section, words):
    settings = settings_of(section)
    shapes = nnx.eval_shape(lambda: building.tokenizer(settings, rngs=rng.rngs(0)))
    stages.check(stages.plan(settings_of(dict(train="decoder/.*"))), shapes)
    with pytest.raises(interfaces.UserError, match=words):
        stages.check(stages.plan(settings), shapes)


def test_a_stage_knows_which_parts_learn():
    for train, part, learns in (
        (".*", "quantizer", True),
        ("decoder/.*", "decoder", True),
        ("decoder/.*", "quantizer", False),
        ("(encoder|quantizer)/.*", "quantizer", True),
        ("quant", "quantizer", False),
    ):
        assert stages.learns(stages.Stage(train=train), part) == learns


def test_the_schedule_of_a_stage_counts_from_its_begin():
    settings = settings_of(dict(share=0.4), TWO[1] | dict(share=0.6), steps=100)
    first, second = stages.plan(settings)
    rate = stages.optimizer(settings, second).rate
    np.testing.assert_allclose([rate(40), rate(41), rate(99)], [0.005, 0.01, 0.01], rtol=1e-6)
    rate = stages.optimizer(settings, first).rate
    peak = settings.optimizer.learning_rate
    cosine = [0.5 * (1 + math.cos(math.pi * (step - 1) / 39)) for step in (1, 20, 40)]
    np.testing.assert_allclose([rate(1), rate(20), rate(40)], np.multiply(peak, cosine), atol=1e-9)
    with pytest.raises(interfaces.UserError, match="optimizer has no argument 'lr'"):
        stages.optimizer(settings, stages.Stage(optimizer=dict(lr=1.0), end=3))


# ---------------------------------------------------------------- runs that cross a boundary


def train(workdir, settings):
    with runs.lock(workdir):
        train_tokenizer.main(launch.Request(settings, workdir))


def manifest(workdir, step):
    meta = checkpoint.read_meta(workdir / checkpoint.FOLDER / str(step))
    return {path: entry["checksum"] for path, entry in meta["manifest"].items()}


@pytest.fixture(scope="module")
def whole(one_device, tmp_path_factory):
    """Two stages of three steps, every step saved, without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir, settings_of(*TWO))
    return workdir


def test_what_a_stage_does_not_train_stays_bit_by_bit(whole):
    first, boundary, last = (manifest(whole, step) for step in (1, 3, 6))
    for part, frozen in (("encoder", True), ("quantizer", True), ("decoder", False)):
        paths = [path for path in boundary if path.startswith(f"model/params/{part}/")]
        assert len(paths) > 0
        before = [path for path in paths if first[path] != boundary[path]]
        after = [path for path in paths if boundary[path] != last[path]]
        assert len(before) > 0.8 * len(paths), part  # in the first stage all learn
        # a stage goes on from the averages of the one before
        kept = [p for p in paths if last[p] == boundary[p.replace("/params/", "/ema/", 1)]]
        assert (len(kept) == len(paths)) if frozen else (len(after) == len(paths)), part
    counts = "model/stats/quantizer/counts"
    assert first[counts] != boundary[counts] == last[counts]


def test_losses_and_rates_are_those_of_the_stage(whole):
    records = {r["step"]: r for r in metrics_log.read(whole) if r["split"] == "train"}
    rates = [records[step]["learning_rate"] for step in range(1, 7)]
    peak = 0.003
    cosine = [peak, peak, peak / 2]  # steps 0, 1, 2: the warm-up is one step, three in all
    np.testing.assert_allclose(rates, [*cosine, 0.005, 0.01, 0.01], atol=1e-6)
    assert all({"l1", "l2", "commitment", "codebook"} <= set(r) for r in records.values())


def state_of(workdir, step, *names):
    """Arrays of a step by path."""
    folder = workdir / checkpoint.FOLDER / str(step)
    meta = checkpoint.read_meta(folder)
    whole = sharding.replicated(sharding.make_mesh())
    wanted = {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
        for path, entry in meta["manifest"].items()
        if any(name in path for name in names)
    }
    return jax.device_get(checkpoint.restore(folder, wanted, meta))


def test_the_optimizer_restarts_at_a_boundary(whole):
    """After its first step Adam's moment is a tenth of the gradient; nothing is left of before."""
    for step, count in ((1, 1), (3, 3), (4, 1), (6, 3)):
        found = state_of(whole, step, "opt_state")
        (counted,) = [leaf for path, leaf in found.items() if path.endswith("/count")]
        assert counted == count, step
    second = state_of(whole, 4, "opt_state")
    for path, leaf in second.items():
        if "/mu/" in path:
            assert np.any(leaf) == ("/decoder/" in path), path
    # b1 = 0.9, b2 = 0.99 after one step: mu^2 = 0.1^2 g^2, nu = 0.01 g^2
    for path, leaf in second.items():
        if "/mu/decoder" in path:
            other = second[path.replace("/mu/", "/nu/")]
            np.testing.assert_allclose(leaf**2, other, rtol=1e-4, atol=1e-20)


class Killed(BaseException):
    """As if the process ended."""


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_killed_near_a_boundary_ends_with_the_same_bits(
    whole, step, tmp_path, monkeypatch, capfd
):
    """Before it, at it, and after it, where a checkpoint has another optimizer's state."""
    calls, begun, laid = [], [], sharding.global_batch
    start = runs.start

    def batch(*arguments):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return laid(*arguments)

    def started(*arguments, **options):
        begun.append(start(*arguments, **options))
        return begun[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "global_batch", batch)
        patch.setattr(runs, "start", started)
        with pytest.raises(Killed):
            train(tmp_path, settings_of(*TWO))
    begun[-1].manager.wait_until_finished()
    begun[-1].manager.close()
    assert manifest(tmp_path, step) == manifest(whole, step)
    train(tmp_path, settings_of(*TWO))
    assert f"resumed step {step}" in capfd.readouterr().err
    assert manifest(tmp_path, 6) == manifest(whole, 6)


def test_other_stages_are_another_run(whole):
    """A stage that changes under a run would change what was trained."""
    other = (TWO[0], TWO[1] | dict(train="(decoder|quantizer)/.*"))
    with pytest.raises(interfaces.UserError, match="stages: .*there.*here"):
        train(whole, settings_of(*other))
    train(whole, settings_of(*TWO))  # the same, at its end: nothing is done
    assert metrics_log.read(whole)[-1]["step"] == 6


# ---------------------------------------------------------------- terms, teachers, giving up


def test_every_term_needs_a_weight():
    def total(terms, weights, step=0, **anneal):
        return float(
            tokenizer_step.weighted(
                ml_collections.ConfigDict(dict(steps=100, anneal=anneal)), terms, weights, step
            )
        )

    terms, weights = {"l1": 2.0, "l2": 3.0}, {"l1": 0.5, "l2": 2.0, "lpips": 9.0}
    assert total(terms, weights) == 7.0
    # l1 begins at three times its weight and has it after a fifth of the run
    for step, factor in ((0, 3.0), (10, 2.0), (20, 1.0), (90, 1.0)):
        np.testing.assert_allclose(total(terms, weights, step, l1=(3.0, 0.2)), factor + 6, 1e-6)
    with pytest.raises(interfaces.UserError, match="config.loss needs a weight for kl, mass; 0 "):
        total({"kl": 1.0, "mass": 1.0, "l1": 1.0}, {"l1": 1.0})


@pytest.mark.parametrize("whose", ["skipped", "discriminator_skipped"])
def test_a_run_gives_up_when_nothing_is_finite_any_more(whose):
    train_state.give_up({"skipped": np.int32(0), whose: np.int32(train_state.PATIENCE - 1)}, 40)
    with pytest.raises(
        interfaces.UserError, match="10 steps in a row up to step 40.*learning_rate.*--from"
    ):
        train_state.give_up({"skipped": np.int32(0), whose: np.int32(train_state.PATIENCE)}, 40)


def test_a_distance_without_its_weights_is_refused(tmp_path):
    """A recipe without its perceptual loss is another one: left out on request only."""
    settings = settings_of()
    plan = stages.plan(settings)
    assert tokenizer_step.load_frozen(settings, plan) == {"perceptual": {}}
    settings.loss.lpips = 1.0
    need = "--config.perceptual.lpips=FILE .*--config.loss.lpips=0"
    with pytest.raises(interfaces.UserError, match=need):
        tokenizer_step.load_frozen(settings, plan)
    with settings.unlocked():
        settings.perceptual = dict(lpips=f"{tmp_path / 'lost'},{tmp_path}")
    with pytest.raises(interfaces.UserError, match="lost; nothing is there"):
        tokenizer_step.check_frozen(settings, plan)
    with settings.unlocked():
        del settings.perceptual
    with pytest.raises(interfaces.UserError, match=need):
        tokenizer_step.check_frozen(settings, plan)
    # also where one stage alone asks for it
    staged = settings_of(TWO[0], TWO[1] | dict(loss=dict(lpips=1.0)))
    with pytest.raises(interfaces.UserError, match=need):
        tokenizer_step.check_frozen(staged, stages.plan(staged))


def test_a_stage_on_codes_needs_a_teacher(tmp_path):
    settings = settings_of(dict(objective="codes"))
    with pytest.raises(interfaces.UserError, match="config.teacher must name its checkpoint"):
        tokenizer_step.load_frozen(settings, stages.plan(settings))
    with settings.unlocked():
        settings.teacher = str(tmp_path / "nowhere")
    with pytest.raises(interfaces.UserError, match="no checkpoint at"):
        tokenizer_step.load_frozen(settings, stages.plan(settings))


def filled(make):
    """A module with numbers in it, without compiling its constructors."""
    graph, params, stats = parameters.split(nnx.eval_shape(make))
    draw = np.random.default_rng(0).normal
    return parameters.merge(
        graph, *jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw(size=leaf.shape), leaf.dtype),
                             (params, stats))
    )  # fmt: skip


def student_and_teacher(width=16):
    """(graph, state) of a tokenizer in two parts, and the tokenizer whose codes it predicts."""
    sizes = dict(channels=3, widths=(width,), blocks=1, stem=4, variant="light")
    part = dict(size=(8, 8), tokens=3, width=8, depth=1, heads=2, patch=4)

    def teacher():
        options = dict(precision=precision.FLOAT32, rngs=nnx.Rngs(0))
        return tokenizer.Tokenizer(
            conv.Encoder(latent=6, **sizes, **options),
            vq.Quantizer(24, 6, grid=(2, 2), rngs=nnx.Rngs(0)),
            conv.Decoder(latent=6, grid=(2, 2), **sizes, **options),
        )

    def student():
        options = dict(precision=precision.FLOAT32, rngs=nnx.Rngs(0))
        codes = vit.Decoder(channels=24, latent=5, head="codes", **part, **options)
        pixels = conv.Decoder(latent=6, grid=(2, 2), **{**sizes, "widths": (16,)}, **options)
        return tokenizer.Tokenizer(
            vit.Encoder(channels=3, latent=5, **part, **options),
            vq.Quantizer(20, 5, grid=(1, 3), rngs=nnx.Rngs(0)),
            two_stage.Decoder(codes=codes, pixels=pixels, codebook=(24, 6), **options),
        )

    graph, params, stats = parameters.split(filled(student))
    zero = np.zeros((), np.int32)
    return graph, train_state.TrainState(zero, zero, params, stats, (), params), filled(teacher)


def test_a_student_adopts_the_pixels_and_the_codebook_of_its_teacher():
    graph, model, teacher = student_and_teacher()
    found = tokenizer_step.adopt(model, teacher)
    _, theirs, _ = parameters.split(teacher)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    for params in (found.params, found.ema):
        equal(params["decoder"]["pixels"], theirs["decoder"])
        equal(params["decoder"]["codebook"], theirs["quantizer"]["codebook"])
        equal(params["encoder"], model.params["encoder"])
        equal(params["decoder"]["codes"], model.params["decoder"]["codes"])
    # copies: a step donates them
    ours, other = (
        tree["conv_out"]["kernel"]
        for tree in (found.params["decoder"]["pixels"], theirs["decoder"])
    )
    assert ours.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
    # and where the student's own lie
    place = sharding.of_batch(sharding.make_mesh())
    codebook = jax.device_put(model.params["decoder"]["codebook"], place)
    decoder = model.params["decoder"] | {"codebook": codebook}
    found = tokenizer_step.adopt(model.replace(params=model.params | {"decoder": decoder}), teacher)
    assert found.params["decoder"]["codebook"].sharding == place
    equal(found.params["decoder"]["codebook"], theirs["quantizer"]["codebook"])
    graph, model, teacher = student_and_teacher(width=24)
    with pytest.raises(
        interfaces.UserError, match="config.decoder.pixels and the teacher's differ"
    ):
        tokenizer_step.adopt(model, teacher)


def test_the_objective_on_codes_is_the_cross_entropy_of_the_teacher(key):
    graph, model, teacher = student_and_teacher()
    image_BHW3 = np.asarray(jax.random.randint(key, (2, 8, 8, 3), 0, 256), np.uint8)
    made = parameters.merge(graph, model.params, model.stats)
    weights = {"codes": 2.0, "codebook": 0.0, "commitment": 0.0}
    settings = ml_collections.ConfigDict(dict(seed=0, steps=9))
    batch = {"image": image_BHW3}
    objective = jax.jit(
        lambda made, teacher: tokenizer_step.codes(
            settings, weights, made, batch, {"teacher": teacher}, 3, key
        )
    )
    total, (_, _, terms, tokens) = objective(made, teacher)
    image_BHW3 = image_BHW3.astype(np.float32) / 255
    target, logits = jax.jit(
        lambda made, teacher: (
            teacher.quantizer.encode(teacher.latents(image_BHW3))[..., 0],
            made.decoder.codes(made.quantizer.decode(made.encode(image_BHW3))),
        )
    )(made, teacher)
    target, logits = np.asarray(target), np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([logs[b, p, target[b, p]] for b in range(2) for p in range(4)])
    np.testing.assert_allclose(terms["codes"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, 2 * expected, rtol=1e-5)
    assert tokens.shape == (2, 3, 1)
    # what the teacher cannot encode it marks -1, which as an index would be the last code
    nowhere, (_, _, terms, _) = objective(made, jax.tree.map(lambda leaf: leaf * np.inf, teacher))
    assert np.isnan(nowhere) and np.isnan(terms["codes"])


def test_the_last_layer_is_where_the_pixels_are_reconstructed():
    leaf = {"kernel": "it", "bias": "not"}
    for decoder in (
        {"conv_out": leaf, "conv_in": {}},  # convolutional
        {"head": {"conv_out": leaf, "patches": {}}, "conv": {}},  # a transformer
        {"pixels": {"conv_out": leaf}, "codes": {"head": {"logits": {}}}},  # in two parts
    ):
        assert gans.last_layer({"decoder": decoder}) == "it"


def test_stages_survive_the_record_of_a_checkpoint(whole):
    """JSON has lists in the place of tuples."""
    meta = checkpoint.read_meta(checkpoint.find(whole))
    again = json.loads(json.dumps(meta["config"]))["stages"]
    settings = settings_of(*again)
    assert stages.plan(settings) == stages.plan(settings_of(*TWO))
