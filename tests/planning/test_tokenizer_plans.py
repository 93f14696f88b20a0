"""Plans of tokenizers: their kinds of steps, frozen networks as shapes, bytes and operations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from tests import command_line
from tokgen import sharding
from tokgen.backbones import lpips, perceptual, vgg
from tokgen.interfaces import UserError
from tokgen.planning import devices, plan, recipes, steps, temporaries, tiles

SMALL = (
    *("encoder.widths=(32,32)", "encoder.blocks=1", "encoder.hidden=32"),
    *("decoder.widths=(32,32)", "decoder.blocks=1", "decoder.hidden=32"),
    *("view.size=(32,32)", "quantizer.codes=64", "precision.compute=float32", "batch_size=16"),
    *("discriminator.network.width=16", "discriminator.network.layers=2"),
)
GAN = ("configs/tokenizer/llamagen_vq.py", (*SMALL, "loss.lpips=0.0"))


TITOK = ("decoder.pixels.widths=(32,32,32,32,32)", "decoder.pixels.blocks=1")


def compiled(kind, sizes):
    own = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(own, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    strategy = plan.strategy_of(sizes)
    with jax.set_mesh(mesh):
        step = kind.step.compiled(strategy)
        return step.lower(*kind.step.over(mesh, strategy)).compile()


@pytest.fixture(scope="module")
def gan():
    return recipes.read(*GAN)


def test_the_kinds_of_steps_add_up_to_the_run(gan):
    counts = {kind.name: kind.count for kind in gan.kinds}
    assert counts == {
        "with the discriminator": gan.settings.steps - 20_000,
        "without discriminator": 20_000,
    }
    assert gan.dearest.name == "with the discriminator"
    assert gan.kinds[0].operations > gan.kinds[1].operations
    assert "discriminator" in gan.kinds[1].step.state  # it is there before it learns


def test_the_time_of_a_run_is_that_of_all_its_kinds(gan):
    chips = devices.read("v5e:2x2")
    choice = plan.reckoned(gan, (4, 1, 1), chips.lies)
    one, other = (choice.seconds(chips, found) for found in choice.estimates)
    assert choice.run(chips, gan) == pytest.approx(
        [n * gan.kinds[0].count + m * 20_000 for n, m in zip(one, other, strict=True)]
    )


@pytest.mark.parametrize(
    "number, sizes", [(0, (2, 2, 1)), pytest.param(1, (4, 1, 1), marks=pytest.mark.long)]
)
def test_arguments_and_operations_are_those_of_the_compiler(gan, number, sizes):
    """Of both networks; the compiler counts what stands between products, too."""
    made = compiled(gan.kinds[number], sizes)
    found = plan.reckoned(gan, sizes).estimates[number]
    assert found.arguments == made.memory_analysis().argument_size_in_bytes
    assert found.operations == pytest.approx(made.cost_analysis()["flops"], rel=0.05)
    if number == 0:
        assert found.kept["discriminator parameters"] > 0 and found.kept["averages"] > 0


def test_maps_lie_as_a_tpu_convolves_them():
    """Channels in lanes, images in rows; of 2 to 7 images twice, but for maps that are small."""

    def reckoned(images, side, channels, platform):
        image = {"image": jax.ShapeDtypeStruct((8, side, side, channels), np.float32)}
        kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), np.float32)

        def loss(kernel_hwIO, batch, frozen):
            x_BHWC = batch["image"]
            for _ in range(2):
                x_BHWC = jax.lax.conv_general_dilated(
                    *(x_BHWC, kernel_hwIO, (1, 1), "SAME"),
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
            return (x_BHWC**2).sum()

        step = steps.Step(kernel, image, (), lambda strategy: jax.jit(jax.grad(loss)), platform)
        return temporaries.of(step, images, part=0.0, lies=tiles.tiled)

    for images, side, channels, more in (
        (1, 64, 128, 1),
        (3, 64, 128, temporaries.FOLDED),
        (3, 128, 160, temporaries.FOLDED * 256 / 160),
        (3, 16, 128, 1),
        (3, 64, 4, 1),
        (8, 64, 128, 1),
        (12, 128, 128, 16 / 12),
    ):
        plain, laid = (reckoned(images, side, channels, platform) for platform in ("cpu", "tpu"))
        assert laid == pytest.approx(more * plain) and plain > 0, (images, side, channels)


def test_a_call_of_what_is_computed_where_it_is_read_is_computed_there():
    """But for strips of a few images on a TPU: what they convolve is made first."""

    def reckoned(images, platform):
        image = {"image": jax.ShapeDtypeStruct((8, 64, 64, 128), np.float32)}
        kernel = jax.ShapeDtypeStruct((3, 3, 128, 128), np.float32)

        def loss(kernel_hwIO, batch, frozen):
            x_BHWC = jax.jit(lambda x: jnp.tanh(2 * x))(batch["image"])
            x_BHWC = jax.lax.conv_general_dilated(
                *(x_BHWC, kernel_hwIO, (1, 1), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return (x_BHWC**2).sum()

        step = steps.Step(kernel, image, (), lambda strategy: jax.jit(jax.grad(loss)), platform)
        return temporaries.of(step, images, part=0.0, lies=tiles.tiled)

    one = 64 * 64 * 128 * 4
    assert reckoned(8, "tpu") == pytest.approx(8 * one)
    assert reckoned(1, "tpu") == pytest.approx(2 * one)


def test_a_distance_has_the_shapes_of_its_published_files():
    trunk = nnx.eval_shape(lambda: vgg.VGG16(rngs=nnx.Rngs(0)))
    weights = {key: np.zeros(slot.needed(), np.float32) for key, slot in trunk.slots().items()}
    for level, width in enumerate(trunk.widths):
        weights[f"lin{level}.model.1.weight"] = np.zeros((1, width, 1, 1), np.float32)
    made = perceptual.Sum([lpips.from_weights(weights)], [1.0])
    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), perceptual.shapes("lpips"))
    assert jax.tree.leaves(found) == jax.tree.leaves(wanted)


@pytest.mark.parametrize("name", perceptual.known())
def test_every_distance_is_planned_without_its_files(name):
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    told = jax.eval_shape(lambda d, a, b: d(a, b), perceptual.shapes(name), image, image)
    assert told.shape == (2,)


def test_a_stage_on_codes_is_planned_with_its_teacher(capsys):
    titok = "configs/tokenizer/titok.py"
    with pytest.raises(UserError, match="--tokenizer configs/tokenizer/maskgit_vqgan.py"):
        recipes.read(titok)
    recipe = recipes.read(
        *(titok, ("batch_size=8", "encoder.depth=1", "decoder.codes.depth=1", *TITOK)),
        tokenizer="configs/tokenizer/photographs.py:maskgit",  # as many codes, fewer layers
    )
    names = {kind.name: kind.count for kind in recipe.kinds}
    assert set(names) == {
        "of stage 0 without discriminator",
        "of stage 1 without discriminator",
        "of stage 1 with the discriminator",
    }
    assert sum(names.values()) == recipe.settings.steps
    assert names["of stage 1 without discriminator"] == 20_000
    codes = next(kind for kind in recipe.kinds if "stage 0" in kind.name)
    assert "teacher" in codes.step.frozen


def test_a_mesh_without_room_is_refused_after_what_is_known_of_it(gan, capsys, monkeypatch):
    monkeypatch.setattr(plan, "ROOM", 2e-3)
    path, overrides = GAN
    told = {"tokenizer": "", "classes": None, "platform": "tpu"}
    known = {repr((path, list(overrides), told)): gan}  # read anew, it is traced anew
    monkeypatch.setattr(recipes, "read", lambda *given, **how: known[repr((*given, how))])
    words = [word for each in overrides for word in ("--set", each)]
    code = command_line.call(
        "plan", path, "--devices", "v5e:2x2", "--mesh=4,1,1", "--estimate", *words
    )
    out, err = capsys.readouterr()
    assert re.search(r"steps +\S+ with the discriminator, 20,000 without discriminator", out)
    assert "discriminator optimizer moments" in out and "discriminator/" in out
    assert all(len(line) <= 100 for line in out.splitlines())
    assert code and re.search(r"IT\s+DOES\s+NOT\s+FIT", out)
    assert "encoder.remat=full" in err and "decoder.remat=full" in err
