"""Whatever a config says is refused in one message, or can be traced: mutants of all that ship."""

import collections
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from tests import mutants, recipes
from tests.config import test_config
from tokgen import interfaces, rng, sharding
from tokgen.config import building, reading as configs
from tokgen.training import (
    dry_run,
    fields,
    gan as gans,
    generator_step,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

MEMORY = 2**50  # bytes of a large pod: the largest recipes fit, and no slip of the keyboard does

# Small networks have most of the mutants; of the large ones, which take seconds to trace, a few
SMALL = (
    "tokenizer/shapes",
    "tokenizer/cifar10_f4",
    "tokenizer/ablation",
    "generator/shapes",
    "generator/cifar10",
)
# Fields that only the loops read: a trace of the others serves them all
OF_LOOPS = ("seed", "report", "keep", "init_from", "max_bad", "perceptual", "teacher")
# What is refused more often than not: a trace of these takes seconds
LARGE_KINDS = ("drop", "rename", "retype", "negative", "huge", "infinite", "empty", "section")


@pytest.fixture(scope="module")
def mesh():
    """One device, whose mesh is left behind by none of the tests."""
    mesh = jax.make_mesh(
        (1, 1, 1),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    with jax.set_mesh(mesh):
        yield mesh


def given(settings, weights) -> None:
    """What a user adds to a recipe: weight files, a teacher, a folder of text features."""
    with settings.unlocked():
        distances = settings.get("perceptual", {})
        for name in distances if hasattr(distances, "items") else ():  # a mutant's may be anything
            if settings.perceptual[name] == "":
                settings.perceptual[name] = str(weights)
        if settings.get("teacher") == "":
            settings.teacher = str(weights)
        section = settings.get("generator", {})
        if hasattr(section, "get") and section.get("conditioning") == "captions":
            settings.data.text = str(weights)


@functools.cache
def codec(layout, channels: int):
    """The quantizer of a pyramid, as shapes."""
    inner = dict(name="vq", codes=layout.vocab[0], channels=channels)
    section = dict(name="multiscale", scales=layout.grids, phi=4, quantizer=inner)
    make = functools.partial(building.build, section, "quantizer", grid=layout.grids[-1])
    return nnx.eval_shape(lambda: make(rngs=rng.rngs(0)))


def rehearsed(reference: str, settings, mesh) -> None:
    """The whole rehearsal of a config, as its program has it."""
    if reference.startswith("tokenizer/"):
        if settings.data.name == "shapes":  # others need a folder, which is another's to check
            building.build(settings.data, "data", split="train")
        frozen = {"perceptual": {}}
        if settings.get("stages"):
            frozen["teacher"] = recipes.abstract("tokenizer/maskgit_vqgan")
        text = settings.decoder.get("text") if settings.data.get("features") is not None else None
        dry_run.tokenizer(settings, mesh, frozen, text=text, memory=MEMORY)
        return
    layout, classes, _ = recipes.GENERATORS[reference]
    scales = codec(layout, 32) if len(layout.grids) > 1 else None
    if scales is not None and recipes.load(reference).generator.channels != 32:
        scales = codec(layout, recipes.load(reference).generator.channels)
    dry_run.generator(*(settings, layout, classes, mesh, scales), memory=MEMORY)


def tried(mutant: mutants.Mutant, mesh, weights, traced: set[str]) -> str:
    """The message of a mutant that is refused; nothing of one that was traced."""
    settings = mutant.config()
    try:
        check = "tokenizer" if mutant.reference.startswith("tokenizer/") else "generator"
        given(settings, weights)
        getattr(fields, f"check_{check}")(settings)
        stated = {k: v for k, v in building.plain(settings).items() if k not in OF_LOOPS}
        own = recipes.GENERATORS.get(mutant.reference, ())[:2]
        key = json.dumps([stated, repr(own)], sort_keys=True, default=repr)
        if key not in traced:
            rehearsed(mutant.reference, settings, mesh)
            traced.add(key)
    except interfaces.UserError as error:
        return str(error)
    return ""


def chosen() -> list[mutants.Mutant]:
    """Of every file that ships, and of every variant of the small ones."""
    small = [r for r in test_config.PARAMETERS if r.partition(":")[0] in SMALL]
    large = sorted({r.partition(":")[0] for r in test_config.PARAMETERS} - set(SMALL))
    assert {f"{name}" for name in test_config.FILES} == {*large, *(r for r in SMALL)}
    return [
        *(mutant for reference in small for mutant in mutants.of(reference, 9)),
        *(mutant for reference in large for mutant in mutants.of(reference, 3, LARGE_KINDS)),
    ]


@pytest.fixture
def weights(tmp_path):
    """A file in the place of weights that are never read here."""
    (tmp_path / "weights").touch()
    return tmp_path / "weights"


@pytest.mark.parametrize("reference", test_config.FILES)
def test_every_file_that_ships_is_accepted(reference, weights):
    """As it is, once it is told where weights lie: no field of it is unknown to its program."""
    settings = recipes.load(reference)
    given(settings, weights)
    getattr(fields, f"check_{reference.partition('/')[0]}")(settings)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 6])
def test_mutants_of_every_config_are_refused_or_traced(every, mesh, weights, capsys):
    traced, found, tries = set(), collections.Counter(), chosen()[::every]
    for mutant in tries:
        message = None
        try:
            message = tried(mutant, mesh, weights, traced)
        finally:
            if message is None:
                print(f"{mutant}: neither refused nor traced")
        found["refused" if message else "accepted"] += 1
        assert len(message) < 20_000, mutant
    with capsys.disabled():
        print(f" {len(tries)} mutants: {dict(found)}, {len(traced)} traces ", end="")
    least = [300 // every, 54 // every, 150 // every]
    assert np.all(np.array([len(tries), found["accepted"], found["refused"]]) >= least)


# ---------------------------------------------------------------- one step of those accepted

TINY = {
    "tokenizer": (
        *("batch_size=2", "view.size=(16, 16)", "encoder.widths=(16,)", "decoder.widths=(16,)"),
        *(
            "encoder.blocks=1",
            "decoder.blocks=1",
            "discriminator.network.width=4",
            "held_out.images=2",
        ),
        *("discriminator.network.layers=1", "data.size=(16, 16)", "quantizer.scales=(1, 2, 4)"),
    ),
    "generator": (
        *("batch_size=2", "generator.width=32", "generator.depth=1", "generator.heads=2"),
        "held_out.samples=0",
    ),
}


def shrunk(mutant: mutants.Mutant):
    """The config of a mutant with tiny networks; what was mutated stays as it is."""
    fields = configs.flat(recipes.load(mutant.reference))
    tiny = [(text, text.partition("=")[0]) for text in TINY[mutant.reference.partition("/")[0]]]
    return mutant.config(*(t for t, name in tiny if name in fields and not mutant.touches(name)))


def one_step(reference: str, settings, mesh) -> dict:
    """Scalars of the first step of a config, compiled and run on noise."""
    draw = np.random.default_rng(0)
    B = settings.batch_size
    if reference.startswith("generator/"):
        layout, classes, _ = recipes.GENERATORS[reference]
        grids = tuple(grid for grid in layout.grids if max(grid) <= 4) or ((4, 4),)
        layout = interfaces.TokenLayout(layout.vocab, grids)
        make = functools.partial(building.generator, settings, layout, classes)
        optimizer = building.call(
            optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
        )
        graph, network = train_state.create(
            lambda: make(rngs=nnx.Rngs(0)), optimizer, mesh=mesh, ema=settings.ema
        )
        scales = None
        if len(grids) > 1:
            inner = dict(name="vq", codes=layout.vocab[0], channels=settings.generator.channels)
            section = dict(name="multiscale", scales=grids, phi=1, quantizer=inner)
            scales = building.build(section, "quantizer", grid=grids[-1], rngs=nnx.Rngs(0))
        shape = (B, layout.length, layout.groups)
        batch = {"tokens": draw.integers(0, min(layout.vocab), shape, np.int32)}
        batch["label"] = draw.integers(0, classes, B, np.int32)
        step = generator_step.step(settings, graph, optimizer)
        return jax.device_get(step(network, batch, scales)[1])
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    limits = building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    networks, graphs, optimizer = tokenizer_step.create(settings, plan[0], gan, mesh)
    steps = tokenizer_step.Steps(settings, gan, limits, graphs, optimizer, 0)
    shape = (B, *settings.view.size, settings.view.channels)
    batch = {"image": draw.integers(0, 256, shape, np.uint8)}
    step = steps(plan[0], gan.weight > 0)
    return jax.device_get(step(networks, batch, {"perceptual": {}})[1])


@pytest.mark.long
def test_mutants_that_are_accepted_run(mesh, weights, capsys):
    ran, refused = [], 0
    for mutant in chosen():
        if mutant.reference.partition(":")[0] not in SMALL or len(ran) >= 48:
            continue
        try:
            if tried(mutant, mesh, weights, set()):
                continue
            settings = shrunk(mutant)
            given(settings, weights)
            scalars = one_step(mutant.reference, settings, mesh)
        except interfaces.UserError:
            refused += 1  # what is left of the sizes does not go with the mutated one
            continue
        assert all(np.all(np.isfinite(value)) for value in scalars.values()), mutant
        ran.append(str(mutant))
    with capsys.disabled():
        print(f" {len(ran)} ran, {refused} did not fit tiny sizes ", end="")
    assert len(ran) >= 40
