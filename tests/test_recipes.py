"""Published recipes: sizes as published to the unit; every file, shrunk, trains two steps."""

import math
import re

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import parameters, sharding
from tokgen.config import building, reading as configs
from tokgen.data import captioned, loader, shapes, views
from tokgen.nn import precision
from tokgen.training import (
    gan as gans,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

FOLDER = configs.programs() / "configs" / "tokenizer"
# LDM's stride-8 form: LlamaGen's networks of the same widths end at 4 channels in the place of 256
F8_NETWORKS = 28_559_232 + 41_415_171 - 252 * (9 * 512 + 1) - 252 * 9 * 512 + 2 * (4 * 4 + 4)
PLACE = 2 * 768 + 1024  # what a token more adds to a TiTok with base encoder and large decoder
BIT = (512 + 1) + 9 * 512  # what a bit more adds to MaskBit's networks
PHI, MSVQ = 9 * 32 * 32 + 32, 4096 * 32

# Reference -> parameters, tokens of an image (0: continuous), alphabet. Counts are the published
# ones or, where only those of parts or siblings are, sums of these.
PUBLISHED = {
    "maskgit_vqgan:256": (54_515_587, 256, 1024),
    "maskgit_vqgan:512": (54_515_587, 1024, 1024),
    "taming_vqgan:f16_1024": (72_141_699, 256, 1024),
    "taming_vqgan:f16_16384": (76_073_859, 256, 16384),
    "taming_vqgan:f8_16384": (F8_NETWORKS + 16384 * 4, 1024, 16384),
    "taming_vqgan:f8_256": (F8_NETWORKS + 256 * 4, 1024, 256),
    "llamagen_vq:vq16": (71_883_403, 256, 16384),
    "llamagen_vq:vq8": (70_109_835, 1024, 16384),
    "maskbit:lfq10": (54_469_005, 256, 2**10),
    "maskbit:lfq12": (54_489_489 - 2 * BIT, 256, 2**12),
    "maskbit:lfq14": (54_489_489, 256, 2**14),
    "maskbit:lfq16": (54_489_489 + 2 * BIT, 256, 2**16),
    "maskbit:lfq18": (54_509_973, 256, 2**18),
    "vqgan_plus:10bit": (55_990_915, 256, 1024),
    "vqgan_plus:12bit": (55_007_683, 256, 4096),
    "titok:l32": (641_054_735, 32, 4096),
    "titok:b64": (204_814_095, 64, 4096),
    "titok:s128": (83_674_639, 128, 4096),
    "titok_onestage:bl64_vq8k": (390_016_148, 64, 8192),
    "titok_onestage:bl128_vq8k": (390_179_988, 128, 8192),
    "titok_onestage:sl256_vq8k": (330_260_884, 256, 8192),
    "titok_onestage:ll32_vae_c16": (606_879_604, 0, 0),
    "titok_onestage:bl64_vae_c16": (389_418_100, 0, 0),
    "titok_onestage:bl128_vae_c16": (389_581_940, 0, 0),
    "tatitok:bl32_vq": (390_800_532, 32, 8192),
    "tatitok:bl64_vq": (390_882_452, 64, 8192),
    "tatitok:bl128_vq": (391_046_292, 128, 8192),
    "tatitok:bl32_vae": (390_202_484, 0, 0),
    "tatitok:bl64_vae": (390_202_484 + 32 * PLACE, 0, 0),
    "tatitok:sl128_vae": (330_275_188, 0, 0),
    "var_vqvae:256": (108_948_355, 680, 4096),
    "var_vqvae:512": (108_948_355, 2240, 4096),
    "var_vqvae:1024": (108_948_355, 9451, 4096),
    "openmagvit2:in256": (115_127_829, 256, 2**18),
    "openmagvit2:in128": (112_021_653, 256, 2**18),
    "openmagvit2:pretrain_262144": (115_127_829, 256, 2**18),
    "openmagvit2:pretrain_16384": (115_094_033, 256, 2**14),
    "ibq:1024": (107_049_859, 256, 1024),
    "ibq:8192": (108_884_867, 256, 8192),
    "ibq:16384": (110_982_019, 256, 16384),
    "ibq:262144": (173_896_579, 256, 262144),
}

# Parts of a tokenizer, as published.
PARTS = {
    "maskgit_vqgan:256": dict(encoder=23_775_104, decoder=30_478_339, quantizer=262_144),
    "taming_vqgan:f16_1024": dict(encoder=29_298_176 + 65_792, decoder=42_449_795 + 65_792),
    "llamagen_vq:vq16": dict(encoder=29_298_176 + 2_056, decoder=42_449_795 + 2_304),
    "maskbit:lfq14": dict(encoder=25_126_286, decoder=29_363_203),
    "titok:l32": dict(encoder=303_410_188 + 32 * 1024),
    "titok:b64": dict(encoder=85_904_652 + 64 * 768, quantizer=4096 * 12),
    "tatitok:bl64_vq": dict(decoder=304_364_372),
    "var_vqvae:256": dict(
        encoder=44_107_872 + PHI, decoder=64_653_923 + PHI, quantizer=MSVQ + 4 * PHI
    ),
    "openmagvit2:in256": dict(encoder=49_751_442, decoder=65_376_387),
}

# Step at which the published discriminator begins, and the step at which the published run ends.
DISCRIMINATOR = {
    "maskgit_vqgan": (0, 1_000_000),
    "taming_vqgan": (250_000, 500_000),
    "llamagen_vq": (20_000, 400_360),
    "maskbit": (20_000, 1_350_000),
    "vqgan_plus": (20_000, 1_350_000),
    "titok": (1_020_000, 1_500_000),
    "titok_onestage": (200_000, 650_000),
    "tatitok": (200_000, 650_000),
    "var_vqvae": (83_400, 417_000),
    "openmagvit2": (0, 1_351_080),
    "ibq": (0, 1_651_320),
}


def load(reference: str) -> ml_collections.ConfigDict:
    """The config of "file" or "file:variant", checked as the trainer checks it."""
    return checked(recipes.load(f"tokenizer/{reference}"))


def checked(settings: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    rival = {"discriminator__optimizer": (optimizers.optimizer, ("steps", "begin"))}
    building.check(
        settings,
        precision=(precision.Precision, ()),
        view=(views.View, ()),
        optimizer=(optimizers.optimizer, ("steps", "begin")),
        discriminator=(gans.GAN, ()),
        **(rival if settings.discriminator.weight > 0 else {}),
        safeguards=(safeguards.Limits, ()),
        mesh=(sharding.make_mesh, ()),
    )
    return settings


# ---------------------------------------------------------------- at full size


@pytest.mark.parametrize("reference", PUBLISHED)
def test_sizes_are_the_published_ones(reference):
    count, length, codes = PUBLISHED[reference]
    tokenizer = recipes.abstract(f"tokenizer/{reference}")
    params = parameters.split(tokenizer)[1]
    assert parameters.count(params) == count
    for part, size in PARTS.get(reference, {}).items():
        assert parameters.count(params[part]) == size
    if length == 0:
        assert tokenizer.layout is None
    else:
        # bits may be written as several symbols
        assert tokenizer.layout.length == length and math.prod(tokenizer.layout.vocab) == codes
    # the docstring's table says the same
    row = next(r for r in document(reference) if r[0] == reference.partition(":")[2])
    assert f"{count:,}" in " ".join(row)


def document(reference: str) -> list[list[str]]:
    """The rows of the table in a recipe's docstring."""
    text = (FOLDER / f"{reference.partition(':')[0]}.py").read_text().split('"""')[1]
    return [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


@pytest.mark.parametrize("name", DISCRIMINATOR)
def test_stages_and_discriminator_begin_when_published(name):
    settings = load(name)
    plan = stages.plan(settings)
    spans = [(stage.begin, stage.end, stage.objective) for stage in plan]
    if name == "titok":
        assert spans == [(0, 1_000_000, "codes"), (1_000_000, 1_500_000, "pixels")]
    else:
        assert spans == [(0, settings.steps, "pixels")]
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    begin, play = gan.steps(settings.steps)
    assert (begin, settings.steps) == DISCRIMINATOR[name] and play == begin
    # a distance that is asked for can be given its weights
    assert set(settings.perceptual) <= {n for n, weight in settings.loss.items() if weight}
    for stage in plan:
        stages.optimizer(settings, stage)


def test_every_file_and_variant_is_tested():
    named = {reference.partition(":")[0] for reference in PUBLISHED}
    other = {"ablation", "cifar10_f4", "photographs", "shapes"}
    assert {file.stem for file in FOLDER.glob("*.py")} == named | other
    assert named == set(DISCRIMINATOR) and named | {"ablation", "photographs"} == {
        r.partition(":")[0] for r in SHRUNK
    }
    for name in named:
        variants = {r.partition(":")[2] for r in PUBLISHED if r.partition(":")[0] == name}
        rows = {row[0] for row in document(name)} - {"variant", "---"}
        assert rows == variants


@pytest.mark.parametrize("name", ["titok", "titok_onestage", "tatitok"])
def test_decay_leaves_out_what_titok_leaves_out(name):
    """Everything of less than two axes, and whatever its published name calls an embedding."""
    settings = load(name)
    params = parameters.split(recipes.abstract(f"tokenizer/{name}"))[1]
    chosen = parameters.paths(parameters.matching(params, settings.optimizer.decayed))
    spared = r".*(/(bias|scale|table|codebook|token)|/?embed/kernel|conv_patch/kernel)"
    for path, decays in chosen.items():
        embeds = re.fullmatch(spared, path) and "text/embed/kernel" not in path
        assert decays == (not embeds), path


# ---------------------------------------------------------------- shrunk

SIZE = 16
NARROW = dict(widths=(32,), blocks=1)  # 32: the groups of a norm
CONV = dict(encoder=NARROW, decoder=NARROW)
HIDDEN = dict(encoder=dict(NARROW, hidden=4), decoder=dict(NARROW, hidden=4))
VIT = dict(tokens=4, width=32, depth=1, heads=2, patch=8)
FEW = dict(quantizer=dict(codes=8, channels=4))
BITS = dict(quantizer=dict(bits=4, groups=(1, 3)))
HALF = dict(start=0.5)  # the second of two steps is played
EARLY = dict(start=0.0, ramp=0.0)
PATCHES, BLURS = dict(width=8, layers=1), dict(width=8, stages=1)
STUDENT = dict(  # what decodes the teacher's codes
    codebook=(8, 4),
    codes=dict(VIT, patch=1, channels=8),
    pixels=dict(NARROW, latent=4, grid=(16, 16)),
)

# Recipe -> what makes it small. Two of those whose discriminator comes late see it come.
SHRUNK = {
    "ablation": dict(CONV, quantizer=dict(codes=8)),
    "ibq": dict(HIDDEN, **FEW, discriminator=dict(network=PATCHES)),
    "llamagen_vq": dict(HIDDEN, **FEW, discriminator=dict(EARLY, network=PATCHES)),
    "maskbit": dict(CONV, **BITS, discriminator=dict(HALF, network=BLURS)),
    "maskgit_vqgan": dict(CONV, **FEW, discriminator=dict(network=dict(widths=(8, 8, 8)))),
    "openmagvit2": dict(CONV, **BITS, discriminator=dict(network=PATCHES)),
    "photographs": dict(CONV, **FEW),
    "taming_vqgan": dict(HIDDEN, **FEW, discriminator=dict(EARLY, network=PATCHES)),
    "tatitok": dict(
        encoder=VIT, decoder=dict(VIT, text=(2, 3)), **FEW, discriminator=dict(EARLY, network=BLURS)
    ),
    "titok": dict(encoder=VIT, decoder=STUDENT, **FEW, discriminator=dict(network=BLURS), steps=3),
    "titok_onestage:bl64_vae_c16": dict(
        encoder=VIT,
        decoder=VIT,
        quantizer=dict(channels=4),
        discriminator=dict(HALF, network=BLURS),
    ),
    # the PatchGAN in the place of the missing DINO needs 24 pixels
    "var_vqvae": dict(
        HIDDEN,
        quantizer=dict(scales=(1, 3, 32), phi=2, **FEW),
        discriminator=dict(EARLY, optimizer=dict(warmup=0)),
        optimizer=dict(warmup=0),
        view=dict(size=(32, 32)),
    ),
    "vqgan_plus": dict(CONV, **FEW, discriminator=dict(EARLY, network=BLURS)),
}


def shrunk(reference: str) -> ml_collections.ConfigDict:
    settings = load(reference)
    rate = 10.0 if settings.optimizer.get("warmup", 0) >= 5000 else 1e-2
    settings.view.size = (SIZE, SIZE)
    settings.update(dict(steps=2, batch_size=2) | SHRUNK[reference])
    settings.optimizer.learning_rate = rate
    if settings.discriminator.weight:
        settings.discriminator.optimizer.learning_rate = rate
    return checked(settings)


def source_of(settings, folder):
    """Shapes, with text where the decoder reads it."""
    drawn = shapes.Source(settings.view.size, count=8)
    if settings.data.name != "captioned":
        return drawn
    text_NTE = np.random.default_rng(0).normal(size=(8, *settings.decoder.text))
    np.save(folder / "train.npy", text_NTE.astype(np.float16))
    return captioned.Source(drawn, folder)


def copied(networks) -> dict[str, np.ndarray]:
    """Parameters by path: copies, since a step donates its arrays."""
    states_of = {name: networks[name] for name in ("model", "discriminator") if name in networks}
    return {
        f"{name}/{path}": np.array(leaf)
        for name, state in states_of.items()
        for path, leaf in parameters.paths(state.params).items()
    }


def steps_of(settings, folder, teacher=None):
    """Of every step: stage, whether it was played, parameters before and after, scalars."""
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=axes, devices=jax.devices()[:1])
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    begin, _ = gan.steps(settings.steps)
    view = building.call(views.View, settings.view, "view")
    batches = loader.batches(
        source_of(settings, folder), view, seed=0, batch_size=settings.batch_size, threads=0
    )
    with jax.set_mesh(mesh), batches:
        networks, graphs, rival = tokenizer_step.create(settings, plan[0], gan, mesh)
        frozen = {"perceptual": {}}
        if teacher is not None:
            frozen["teacher"] = teacher
            networks["model"] = tokenizer_step.adopt(networks["model"], teacher)
        step_of = tokenizer_step.Steps(settings, gan, safeguards.Limits(), graphs, rival, 0)
        for step in range(settings.steps):
            stage = stages.at(plan, step)
            if step == stage.begin and step > 0:
                optimizer = stages.optimizer(settings, stage)
                networks["model"] = train_state.restarted(networks["model"], optimizer, mesh=mesh)
            before = copied(networks)
            batch = sharding.global_batch(next(batches), mesh)
            networks, scalars, _ = step_of(stage, step >= begin)(networks, batch, frozen)
            yield stage, step >= begin, before, copied(networks), jax.device_get(scalars)


def moved(before, after) -> set[str]:
    return {path for path in before if (before[path] != after[path]).any()}


# No gradient reaches them: the softmax does not see what all keys have in common, and a hinge with
# all logits inside pulls the last bias both ways.
BLIND = re.compile(r"model/.*attention/key/bias|discriminator/last/bias")


# VQ and LFQ, discriminators of two kinds, stages with a teacher: trained every time. The others
# are alike; tests/training/test_dry_run.py checks and traces them.
QUICK = {"maskbit", "maskgit_vqgan", "titok"}


@pytest.mark.parametrize(
    "reference",
    [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in SHRUNK],
)
def test_a_file_trains_two_steps(reference, tmp_path):
    settings = shrunk(reference)
    teacher = None
    if "teacher" in settings:
        small = shrunk("maskgit_vqgan")
        teacher = jax.jit(lambda: building.tokenizer(small, rngs=nnx.Rngs(1)))()
    played = []
    for stage, playing, before, after, scalars in steps_of(settings, tmp_path, teacher):
        assert all(np.isfinite(value).all() for value in scalars.values()), scalars
        assert scalars["skipped"] == 0
        played.append(playing)
        learning = {
            path
            for path in before
            if (re.fullmatch(stage.train, path.removeprefix("model/")) or "discriminator/" in path)
            and (playing or path.startswith("model/"))
        }
        found = moved(before, after)
        assert found <= learning
        assert {path for path in learning - found if not BLIND.fullmatch(path)} == set()
        assert ("adversarial_weight" in scalars) == playing
        if playing:
            assert scalars["adversarial_weight"] > 0
    assert played[-1] == (settings.discriminator.weight > 0)


def test_annealed_terms_begin_stronger_and_fall_in_a_straight_line():
    """MaskBit: 0.02 + max(0, 1 - step / 2000) * 2 * 0.02 of each entropy."""
    settings = load("maskbit:lfq14")
    terms = {"l2": 5.0, "sample_entropy": 3.0, "batch_entropy": 2.0}
    for step in (0, 500, 1999, 2000, 900_000):
        wanted = 5.0 + (0.02 + max(0.0, 1 - step / 2000) * 2 * 0.02) * (3.0 - 2.0)
        found = tokenizer_step.weighted(settings, terms, settings.loss, step)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
