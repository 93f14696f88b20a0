"""Plans against what the compiler says of the same step, and against sums by hand."""

import dataclasses
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests import command_line, recipes as known
from tokgen import chips, sharding
from tokgen.config import reading
from tokgen.interfaces import UserError
from tokgen.nn import fused
from tokgen.planning import description, devices, plan, program, recipes, temporaries, tiles
from tokgen.zoo import model as zoo

RASTER = "configs/generator/shapes.py"
SMALL = ("generator.width=64", "generator.depth=2", "batch_size=16")


@pytest.fixture(scope="module")
def raster():
    return recipes.read(RASTER, SMALL)


def real(sizes):
    """A mesh of this process's devices."""
    own = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(own, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(recipe, sizes):
    mesh, strategy = real(sizes), plan.strategy_of(sizes)
    with jax.set_mesh(mesh):
        step = recipe.dearest.step.compiled(strategy)
        return step.lower(*recipe.dearest.step.over(mesh, strategy)).compile()


@pytest.mark.parametrize("name, count, chip", [("v5e:16x16", 256, "v5e"), ("cpu:8", 8, "")])
def test_devices_are_read_by_their_names(name, count, chip):
    found = devices.read(name)
    assert found.count == count and found.kind == chip
    assert devices.read("H100:8x8").count == 64


@pytest.mark.parametrize("name", ["", "v5e", "v5e:16", "tpu:4x4", "cpu:2x2", "h200:0", "v5p:4x4x"])
def test_what_is_no_name_of_devices_is_refused_with_the_forms(name):
    with pytest.raises(UserError, match="v5e:16x16"):
        devices.read(name)


@pytest.mark.parametrize(
    "name, near",
    [
        ("v5e:3x5", "v5e:4x4"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("v5e:8x4", "v5e:4x8"),
        ("V6e:4x4x4", "v6e:8x8"),
        ("v6e:32x32", "v6e:16x16"),
        ("v5p:64x64x64", "v5p:16x16x24"),
    ],
)
def test_a_slice_that_there_is_not_is_refused_with_those_near(name, near):
    with pytest.raises(
        UserError, match=f"no slice '{name}'.*of about as many chips there are .*{near}"
    ) as said:
        devices.read(name)
    for other in re.findall(r"v\d\w:[\dx]+", str(said.value).partition("of about")[2]):
        assert devices.read(other).count


def test_more_gpus_than_a_host_has_are_several_hosts():
    for name in ("h100:16", "h100:1x16"):
        with pytest.raises(UserError, match="h100:2x8"):
            devices.read(name)


def test_what_stays_within_a_host_goes_over_its_links():
    recipe = recipes.read(RASTER, ("batch_size=64",))
    inside = plan.reckoned(recipe, (4, 8, 1)), plan.reckoned(recipe, (4, 4, 2))
    eights, fours = devices.read("h100:4x8"), devices.read("h100:8x4")
    for choice in inside:
        assert choice.parts(eights)["links"] < choice.parts(fours)["links"]


@pytest.mark.parametrize("mesh", ["-1,2,1", "4,2,1"])
def test_one_size_of_a_mesh_may_be_left_to_it(capsys, mesh):
    words = ("plan", RASTER, "--devices", "cpu:8", "--estimate", f"--mesh={mesh}")
    assert command_line.call(*words, "--set", "batch_size=16", "--set", "accumulate=2") == 0
    said = capsys.readouterr().out
    assert re.search(r"mesh +data 4, fsdp 2, tensor 1; strategy fsdp", said)
    assert re.search(r"images +16 a step in 2 parts, 1 on a device at once", said)
    assert "--config.mesh.data=4 --config.mesh.fsdp=2" in said


def test_each_part_of_a_batch_gathers_weights_and_sums_gradients():
    def exchanged(*overrides):
        recipe = recipes.read(RASTER, ("batch_size=32", *overrides))
        return plan.reckoned(recipe, (2, 4, 1)).estimate.exchanged

    once = exchanged()
    assert set(once) == {"gathered", "scattered", "summed over data"}
    for what, size in exchanged("accumulate=2").items():
        assert size == pytest.approx(2 * once[what], rel=1e-3), what
    assert exchanged("generator.remat=dots") == once


def test_every_recipe_says_what_tokens_it_is_made_for():
    built = {}
    for reference, (layout, classes, _) in known.GENERATORS.items():
        settings = known.load(reference)
        made_for = settings.made_for.to_json()
        if made_for not in built:
            built[made_for] = recipes.tokens(settings, reference)[0]
        assert built[made_for] == layout, reference
        assert settings.made_for.classes == classes


@pytest.mark.parametrize(
    "sizes", [pytest.param((8, 1, 1), marks=pytest.mark.long), (2, 4, 1), (2, 2, 2)]
)
def test_arguments_are_those_of_the_compiler_to_the_byte(raster, sizes):
    found = plan.reckoned(raster, sizes).estimate
    analysis = compiled(raster, sizes).memory_analysis()
    assert found.arguments == analysis.argument_size_in_bytes


def test_operations_are_those_of_the_compiler(raster):
    """Its layers stand one after the other: it counts the body of a loop once."""
    told = compiled(raster, (1, 1, 1)).cost_analysis()["flops"]
    assert raster.dearest.operations == pytest.approx(told, rel=0.05)


def test_what_is_computed_again_is_no_work():
    again = recipes.read(RASTER, (*SMALL, "generator.remat=full", "optimizer.name=adamw"))
    once = recipes.read(RASTER, (*SMALL, "optimizer.name=adamw"))
    assert again.dearest.work == once.dearest.work == once.dearest.operations
    # the blocks' forward pass, of three; not the head's
    assert 1.15 * again.dearest.work < again.dearest.operations < 4 / 3 * again.dearest.work


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_step_is_traced_for_the_planned_platform(platform):
    """A TPU's kernel takes 1,024 slots, a GPU's those of bfloat16: no scores are kept."""
    more = ("made_for.pixels=128", "precision.compute=bfloat16", "generator.remat=none")
    recipe = recipes.read(RASTER, (*SMALL, *more))
    other = recipe.on(platform)
    scores = 16 * 1024**2 * recipe.settings.generator.heads * 2
    deeper = other.again(["generator.depth=6"])
    most, more = (temporaries.of(r.dearest.step, 16, part=1.0) for r in (other, deeper))
    assert more - most < 4 * scores
    names = {name for name in fused.KERNELS if name in str(other.dearest.step.traced)}
    assert names == set(fused.KERNELS)
    # a CPU's own form computes scores again, and leaves out most of those that nobody sees
    work = other.dearest.work
    assert 0.7 * work < recipe.dearest.work < work
    assert other.on(platform) is other and deeper.dearest.step.platform == platform


def test_what_devices_exchange_is_what_the_compiler_lets_them():
    recipe = recipes.read(RASTER, (*SMALL, "optimizer.name=adamw"))
    choice = plan.reckoned(recipe, (8, 1, 1))
    found = program.Program(compiled(recipe, (8, 1, 1)).as_text()).collectives()
    summed = sum(each.total for each in found if each.kind == "all-reduce")
    assert choice.estimate.exchanged == {
        "summed over data": pytest.approx(summed, rel=0.02)  # and a few losses
    }


def test_a_step_computes_with_more_where_more_is_kept(raster):
    def most(images, *overrides):
        recipe = recipes.read(RASTER, (*SMALL, "generator.depth=12", *overrides))
        return temporaries.of(recipe.dearest.step, images, part=1.0)

    kept, again = most(16), most(16, "generator.remat=full")
    assert again < 0.6 * kept
    assert most(32) < 2 * kept  # gradients do not grow


@pytest.mark.parametrize(
    "shape, filled",  # as libtpu laid parameters of RAR-B over 16 chips
    [
        ((24, 48, 16, 48), (24, 48, 16, 128)),
        ((24, 48, 6, 768), (24, 48, 6, 768)),
        ((24, 6, 768), (24, 6, 768)),
        ((356, 48), (384, 48)),
        ((48, 2, 768), (48, 2, 768)),
        ((1, 1025, 48), (1, 1152, 48)),
        ((768,), (1024,)),
        ((), (128,)),
    ],
)
def test_arrays_of_a_tpu_are_filled_up(shape, filled):
    assert tiles.tiled(shape, np.dtype("f4")) == 4 * int(np.prod(filled))
    assert tiles.plain(shape, np.dtype("f4")) == 4 * int(np.prod(shape))


def test_what_lives_at_once_by_hand():
    """Of two products in a row the first result is kept; a sum of it costs nothing more."""

    def chain(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    shapes = [jax.ShapeDtypeStruct((n, 32), jnp.float32) for n in (8, 16)]
    weights = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    one, two = (jax.make_jaxpr(chain)(x, weights).jaxpr for x in shapes)
    assert temporaries.most(one, two, 1.0) == 2 * 8 * 32 * 4


def test_the_mesh_that_is_proposed_has_room_and_is_quickest():
    recipe = recipes.read(RASTER, ("batch_size=128",))
    v5e = devices.read("v5e:4x4")
    choice = plan.proposed(recipe, v5e)
    assert choice.estimate.peak < v5e.chip.memory
    for sizes in [(16, 1, 1), (4, 4, 1), (1, 16, 1)]:
        other = plan.reckoned(recipe, sizes)
        assert other.estimate.peak > plan.ROOM * v5e.chip.memory or (
            choice.seconds(v5e)[1] <= other.seconds(v5e)[1] + 1e-4
        )


def test_a_network_without_room_is_refused_with_remedies(raster, monkeypatch):
    monkeypatch.setattr(plan, "ROOM", 1e-5)
    said = "no mesh of v5e:2x2 has room.*in this order: more devices"
    with pytest.raises(UserError, match=said):
        plan.proposed(raster, devices.read("v5e:2x2"))


@pytest.mark.parametrize(
    "name",
    [
        "shapes.py:masked",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("llamagen.py:t2i_xl_256", "titok.py:s128")
        ),
    ],
)
def test_one_image_a_device_is_planned_too(name):
    recipe = recipes.read(f"configs/generator/{name}", ("batch_size=16",))
    found = plan.reckoned(recipe, (16, 1, 1), tiles.tiled).estimate
    more = recipes.read(f"configs/generator/{name}", ("batch_size=256",))
    assert (
        plan.reckoned(more, (16, 1, 1), tiles.tiled).estimate.temporaries >= found.temporaries > 0
    )


def test_a_batch_that_does_not_lie_evenly_is_told_with_sizes_that_do(capsys):
    words = ("plan", RASTER, "--devices", "v5e:4x4", "--estimate", "--set")
    few = ("generator.depth=1", "--set", "generator.width=64", "--set")
    assert command_line.call(*words, *few, "batch_size=20") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "data 4, fsdp 1, tensor 4" in said
    assert "20 images do not lie evenly over 16 devices" in said
    assert "--set batch_size=16 or --set batch_size=32" in said
    # one that was asked for tensor says nothing
    assert command_line.call(*words, *few, "batch_size=32", "--mesh=4,1,4") == 0
    assert "evenly" not in capsys.readouterr().out


def test_devices_over_which_no_batch_lies_are_refused_with_sizes_that_do(raster):
    said = r"evenly over 15 devices.*alone give --set batch_size=15 or --set batch_size=30$"
    with pytest.raises(UserError, match=said):
        plan.proposed(raster, devices.read("cpu:15"))


def test_the_batch_is_taken_in_the_fewest_parts_with_room():
    more = ("batch_size=96", "generator.depth=4", "made_for.pixels=64")
    recipe, v5e = recipes.read(RASTER, more, platform="tpu"), devices.read("v5e:2x2")
    sizes = (4, 1, 1)
    choices = {
        parts: plan.reckoned(recipe.again([f"accumulate={parts}"]), sizes, v5e.lies)
        for parts in (1, 3, 4)
    }
    between = (choices[3].largest.peak + choices[4].largest.peak) / 2
    room = dataclasses.replace(v5e.chip, memory=between / plan.ROOM)
    fake = types.SimpleNamespace(chip=room, lies=v5e.lies, platform="tpu")
    assert plan.in_parts(recipe, choices[1], fake) == 4
    assert "(--set accumulate=4)" in plan.lacking(recipe, choices[1], fake)
    fake.chip = dataclasses.replace(room, memory=1.01 * choices[1].largest.arguments / plan.ROOM)
    assert plan.in_parts(recipe, choices[1], fake) is None
    assert "accumulate" not in plan.lacking(recipe, choices[1], fake)


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("rar-b", "or give as CONFIG one .* configs/generator/rar.py:VARIANT"),
        ("titok-l32", "configs/generator/titok.py"),
        ("var-tokenizer", "recipe: give as CONFIG one .* configs/tokenizer/var_vqvae.py"),
    ],
)
def test_a_published_model_is_refused_with_its_recipe(capfd, name, recipe):
    said = command_line.refused(capfd, "plan", name, "--devices", "h100:1")
    assert re.search(recipe, said) and ("add --decode" in said) == (name != "var-tokenizer")


def test_every_published_model_has_a_recipe(capfd):
    for name in zoo.known():
        said = command_line.refused(capfd, "plan", name, "--devices", "h100:1")
        assert reading.load(re.search(r"(configs/\w+/\w+\.py):VARIANT", said)[1])


def test_a_checkpoint_is_refused_without_decode(capfd, tmp_path):
    said = command_line.refused(capfd, "plan", tmp_path, "--devices", "h100:1")
    assert "is a folder" in said and "add --decode" in said


def test_a_mesh_of_other_devices_is_refused(capfd):
    words = ("plan", RASTER, "--devices", "v5e:4x4", "--estimate", "--mesh", "8,1,1")
    assert "devices = 16" in command_line.refused(capfd, *words)


def test_a_step_that_the_compiler_finds_no_room_for_is_refused(capfd, monkeypatch):
    def none(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nmore")

    monkeypatch.setattr(plan, "compiled", none)
    words = ("plan", RASTER, "--devices", "v5e:2x2", "--set", "batch_size=60")
    said = command_line.refused(capfd, *words)
    assert "no room on v5e:2x2: RESOURCE_EXHAUSTED" in said and "--batch" not in said
    # 15 images a device lie in three parts; the blocks may be computed again
    assert "order: the batch in parts (--set accumulate=3), --set generator.remat=full" in said


@pytest.mark.parametrize(
    "number, told",
    [(0.0000580, "0.000058"), (0.0104, "0.0104"), (12.345, "12.3"), (1234.5, "1,234"), (0, "0")],
)
def test_numbers_have_as_many_digits_as_they_deserve(number, told):
    assert description.digits(number) == told


def test_a_plan_in_words(capsys):
    words = ("plan", RASTER, "--devices", "h200:1", "--estimate", "--price", "2")
    assert command_line.call(*words) == 0
    said = capsys.readouterr().out
    chip = chips.CHIPS["H200"]
    assert re.search(r"mesh +data 1, fsdp 1, tensor 1; strategy data", said)
    assert re.search(r"images +32 a step, 32 on a device", said)
    assert f"of {chip.memory / 1e9:.0f} GB in a step" in said and ", fits" in said
    assert re.search(r"MFU at most +\d+%", said) and re.search(r"3,000 steps +at least", said)
    assert "at 2 for a device hour" in said
    assert all(len(line) <= 100 for line in said.splitlines())


def test_without_its_compiler_a_tpu_is_refused_with_the_command(capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ("plan", RASTER, "--devices", "v5e:2x2", "--set", "batch_size=16")
    assert 'pip install "tokgen[tpu]"' in command_line.refused(capfd, *words)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("sizes", [(16, 1, 1), (1, 16, 1), (4, 4, 1)])
def test_an_estimate_is_near_what_a_tpus_compiler_says(sizes):
    recipe = recipes.read("configs/generator/rar.py:b", ("batch_size=128",))
    choice, chips_ = plan.reckoned(recipe, sizes, tiles.tiled), devices.read("v5e:4x4")
    made = plan.compiled(recipe.dearest.step, choice, chips_)
    memory = made.memory_analysis()
    assert choice.estimate.arguments == memory.argument_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert choice.estimate.peak == pytest.approx(peak, rel=0.15)
    exchanged = sum(each.total for each in program.Program(made.as_text()).collectives())
    assert sum(choice.estimate.exchanged.values()) == pytest.approx(exchanged, rel=0.15)
