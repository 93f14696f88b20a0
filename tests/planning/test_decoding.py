"""Plans of drawing against the driver's own state and program, the compiler, and sums by hand."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import command_line, recipes as known
from tokgen import flops
from tokgen.checkpoints import checkpoint
from tokgen.interfaces import UserError
from tokgen.planning import (
    decoding,
    decoding_description,
    devices,
    draws,
    networks,
    plan,
    reads,
    temporaries,
    tiles,
)
from tokgen.sampling import decode, drawing, presets

SHAPES = "configs/generator/shapes.py"
FAMILIES = ("raster", "random", "masked", "next_scale")
SMALL = ("generator.depth=2", "generator.unroll=1")
FEW = presets.Choice(steps=3)


def read(reference, overrides=(), choice=presets.Choice(), **how):  # noqa: B008 - frozen
    return networks.read(reference, overrides, choice=choice, on_cpu=False, **how)


def family(name):
    """Its network with few steps: a pyramid has four, a grid of 8 x 8 pixels four tokens."""
    few = () if name == "next_scale" else ("made_for.pixels=8",)
    return read(f"{SHAPES}:{name}", (*SMALL, *few), FEW if name == "masked" else presets.Choice())


def reckoned(found, batch=4, sizes=(1, 1, 1), **how):
    return decoding.reckoned(found, batch, plan.mesh_of(sizes), **dict(platform="gpu") | how)


def asked(found, batch=4):
    given = draws.condition(found, batch), draws.keys(batch)
    return found.generator, found.tokenizer.quantizer, *given


def drawn(found, **how):
    """The driver, as a function of what `asked` gives."""
    return lambda generator, codec, cond, keys_B: decode.generate(
        generator, codec, cond, found.sampler, keys_B=keys_B, **how
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values_are_those_that_a_decode_ends_with(name):
    found = family(name)
    plan_, last = reckoned(found), jax.eval_shape(drawn(found), *asked(found))
    # nulls are dropped at the end, after as many steps as are guided
    ended = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(last.cache))
    assert plan_.cache == ended and plan_.cache_of_image == ended / 8
    assert bool(plan_.cache) == (name != "masked")


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_are_those_of_the_driver(name):
    found = family(name)
    parts = reckoned(found).parts
    whole = flops.of(lambda *a: drawn(found)(*a).tokens_BLG, *asked(found))
    assert sum(part.operations for part in parts[:-1]) == whole
    assert sum(part.phase.steps for part in parts[:-1]) == decode.steps(found.generator)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "raster" else pytest.mark.long) for n in FAMILIES]
)
def test_operations_are_those_of_the_compiler(name):
    """Of a program without loops, whose bodies it counts once."""
    found = family(name)
    alone = lambda *a: drawn(found, observe=lambda *_: None)(*a).tokens_BLG  # noqa: E731
    told = jax.jit(alone).lower(*asked(found)).compile().cost_analysis()["flops"]
    parts = reckoned(found).parts
    assert sum(part.operations for part in parts[:-1]) == pytest.approx(told, rel=0.05)


@pytest.mark.long
def test_operations_of_pixels_are_those_of_the_compiler():
    """As lowered for a GPU: a CPU has a form of convolutions with fewer products."""
    found = read("configs/generator/cifar10.py", (*SMALL, "made_for.pixels=128"))
    tokens_BLG = jax.ShapeDtypeStruct((4, found.generator.layout.length, 1), jnp.int32)
    made = drawing.decode_pixels.trace(found.tokenizer, tokens_BLG)
    told = made.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]
    (work,) = reckoned(found).parts[-1].works
    assert work.operations == pytest.approx(told, rel=0.1)


def test_a_step_reads_its_weights_and_the_slots_in_use():
    """LlamaGen-B: all but its tables, of which few rows; of a slot 2 layers width values."""
    small = ("made_for.pixels=128", "generator.window=32")
    found = read("configs/generator/llamagen.py:b", small, presets.Choice("fast"))
    parts = reckoned(found, 64).parts[:-1]
    tables = (16384 + 1001) * 768
    matrices = known.GENERATORS["generator/llamagen:b"][2] - tables
    for part in parts[1:]:
        assert 2 * matrices < part.read["weights"] < 2.02 * matrices
        assert part.read["keys and values"] == 128 * 2 * 12 * 768 * 2 * part.phase.slots
    assert [part.phase.slots for part in parts] == [1, 33, 64]


def test_what_is_told_ahead_counts_as_often_as_it_is_computed():
    """RAR-B: 24 maps of its norms [768, 6 x 768], for 65 rows at the 17 slots of a turn."""
    one = ("generator.window=255",)
    found = read("configs/generator/rar.py:b", one, presets.Choice("fast"))
    part = reckoned(found, 64).parts[1]
    steps, ahead = part.works
    assert (steps.times, ahead.times) == (255, 15)
    assert ahead.operations == 2 * 65 * 17 * 24 * 768 * 6 * 768
    assert part.guided and part.phase.steps == 255


def test_what_is_too_much_to_be_told_ahead_is_computed_in_a_step():
    """Of two steps there was room; the driver asks for as many as a turn has, and gets nothing."""
    few = ("generator.depth=2", "generator.width=64", "generator.heads=2", "generator.hidden=128")
    found = read("configs/generator/rar.py:b", (*few, "made_for.pixels=128"))
    found.generator.budget = 2 * 2 * 6 * 64 * 2 * 5  # bytes, of two slots of two layers, five rows
    parts = reckoned(found).parts[:-1]
    whole = flops.of(lambda *a: drawn(found)(*a).tokens_BLG, *asked(found))
    assert sum(part.operations for part in parts) == whole
    (step,) = parts[1].works  # nothing ahead
    assert step.operations > 2 * 8 * 2 * 64 * 6 * 64  # the maps of two layers for eight rows


def test_what_a_mesh_shares():
    found = read(SHAPES, SMALL)
    alone, many, split = (reckoned(found, 8, s) for s in ((1, 1, 1), (8, 1, 1), (1, 2, 4)))
    assert many.images == 1 and many.cache == alone.cache / 8
    assert many.weights == alone.weights and many.parts[1].works[0].received == 0
    # four rows each, their heads over four
    assert split.cache == alone.cache / 8
    assert split.weights["generator"] < 0.15 * alone.weights["generator"]
    assert split.parts[1].operations == pytest.approx(many.parts[1].operations)
    # a half of what a device uses of the weights is its neighbour's; two sums in each of two layers
    sums = 2 * 8 * 128 * 2 * 2 * 4 * 3 / 4
    received = split.parts[1].works[0].received
    assert received == pytest.approx(sums + split.weights["generator"], rel=0.05)


def test_the_largest_batch_is_the_largest_that_has_room():
    found = read(SHAPES)
    some, more = reckoned(found, 64), reckoned(found, 128)
    most = some.most(more.peak)
    assert most == pytest.approx(128, rel=0.02)
    many, h100 = reckoned(found, 10**7), devices.read("h100:1")
    refuse = lambda f: decoding_description.refuse(f, 10**7, many, h100)  # noqa: E731
    with pytest.raises(UserError, match=r"in this order: a smaller batch \(--batch \d+\), --prec"):
        refuse(found)
    with pytest.raises(UserError, match=r"batch \(--batch \d+\), more devices$"):
        refuse(dataclasses.replace(found, precision="bfloat16"))
    # a tokenizer's pixels are what they are
    *tokens, last = many.parts
    large = dataclasses.replace(last, temporaries=2 * many.peak)
    many = dataclasses.replace(many, parts=(*tokens, large))
    with pytest.raises(UserError, match=r"batch \(--batch \d+\), more devices$"):
        refuse(found)


def test_a_network_without_room_is_to_be_split(monkeypatch):
    monkeypatch.setattr(plan, "ROOM", 1e-5)
    found = dataclasses.replace(read(SHAPES), precision="bfloat16")
    h100 = devices.read("h100:4")
    with pytest.raises(UserError, match=r"order: the network over the devices \(--mesh 1,1,4\)"):
        decoding_description.refuse(found, 4, reckoned(found, 4, (4, 1, 1)), h100)


def test_a_checkpoint_is_planned_without_its_arrays(tmp_path, capsys, monkeypatch):
    known.tiny(tmp_path, "raster")
    monkeypatch.setattr(checkpoint, "in_pieces", lambda *_: iter(()))  # what is read
    words = ("plan", tmp_path / "runs" / "generator", "--decode", "--batch", "16")
    assert command_line.call(*words, "--devices", "h100:1", "--preset", "half") == 0
    said = capsys.readouterr().out
    # 64 tokens, keys and values of one layer of width 16, bfloat16
    assert re.search(r"keys and values +4\.096 kB of an image, 8\.192 kB with", said)
    assert re.search(r"drawn in +bfloat16, pixels in float32: temperature", said)
    assert re.search(r"^step 1 to 63 +63 +1 +64 +32 ", said, re.MULTILINE)
    assert re.search(r"^pixels +1 +16 ", said, re.MULTILINE)
    assert re.search(r"largest batch +about [\d,]+ images would fit", said)
    assert "images a second" in said and all(len(line) <= 100 for line in said.splitlines())


def test_what_is_not_of_a_plan_is_refused(capfd, tmp_path):
    told = command_line.refused(capfd, "plan", SHAPES, "--devices", "cpu:1", "--batch", "4")
    assert "--batch (it is for drawing images, --decode)" in told
    drawing_ = ("plan", "--decode", "--devices", "cpu:1")
    assert "at least 1" in command_line.refused(capfd, *drawing_, SHAPES, "--batch", "0")
    tokenizer = "configs/tokenizer/shapes.py"
    assert "with a generator" in command_line.refused(capfd, *drawing_, tokenizer)
    assert "no checkpoint at" in command_line.refused(capfd, *drawing_, tmp_path / "none")


def test_a_batch_that_is_filled_up_is_told(capsys):
    words = ("plan", SHAPES, "--decode", "--devices", "cpu:16", "--estimate", "--batch")
    assert command_line.call(*words, "10") == 0
    said = capsys.readouterr().out
    assert re.search(r"warning +10 images do not lie evenly over the mesh: .* are 16$", said, re.M)
    assert re.search(r"images +16 a batch, 1 on a device", said)
    assert command_line.call(*words, "16") == 0
    assert "evenly" not in capsys.readouterr().out


def test_without_its_compiler_a_tpu_is_refused_after_the_estimate(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command_line.call("plan", SHAPES, "--decode", "--devices", "v5e:2x2") == 2
    said = capsys.readouterr()
    assert "a batch at least" in said.out and 'pip install "tokgen[tpu]"' in said.err


@pytest.mark.long
def test_cpus_that_are_here_are_compiled_for(capsys):
    words = ("plan", SHAPES, "--decode", "--batch", "4", "--devices", "cpu:2")
    assert command_line.call(*words, "--set", "made_for.pixels=8") == 0
    said = capsys.readouterr().out
    for name in ("tokens", "pixels"):
        assert re.search(rf"{name} compiled +in [\d.]+ s on this machine", said)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["raster", "next_scale", "masked"])
def test_the_programs_of_a_tpu_are_compiled(name, capsys):
    words = ("plan", f"{SHAPES}:{name}", "--decode", "--batch", "64", "--devices", "v5e:2x2")
    assert command_line.call(*words) == 0
    said = capsys.readouterr().out
    assert re.search(r"memory per chip: +[\d.]+ MB of 16 GB as compiled, fits", said)


def test_what_is_read_by_hand():
    """Layers in their turns, of a cache the slots that are seen, of a table the rows."""

    def layer(carry, weights_DD):
        x_BD, cache_SBD = carry
        cache_SBD = jax.lax.dynamic_update_slice(cache_SBD, x_BD[None], (0, 0, 0))
        seen_SBD = cache_SBD[:5]
        return (x_BD @ weights_DD + jnp.sum(jnp.tanh(seen_SBD), axis=0), cache_SBD), None

    def run(weights_YDD, cache_SBD, table_VD, tokens_B):
        start = table_VD.astype(jnp.float32)[tokens_B], cache_SBD
        return jax.lax.scan(layer, start, weights_YDD)[0]

    shapes = ((3, 8, 8), jnp.float32), ((16, 2, 8), jnp.float32), ((100, 8), jnp.bfloat16)
    given = [jax.ShapeDtypeStruct(*s) for s in (*shapes, ((2,), jnp.int32))]
    jaxpr = jax.make_jaxpr(run)(*given).jaxpr
    found = reads.read(jaxpr, {0: "weights", 1: "cache", 2: "table"})
    # of the cache three layers ask for five slots each, of which there are sixteen
    assert found == {"weights": 3 * 8 * 8 * 4, "cache": 3 * 5 * 2 * 8 * 4, "table": 2 * 8 * 2}
    assert temporaries.most(jaxpr, jaxpr, 1.0) < 16 * 2 * 8 * 4  # updated where it lies


def test_a_form_for_cpus_is_no_form_of_others():
    def run(x):
        wide = lambda x: jnp.einsum("ij,jk,kl->ijl", x, x, x).sum(1)  # noqa: E731
        return jax.lax.platform_dependent(x, cpu=wide, default=lambda x: x @ x)

    jaxpr = jax.make_jaxpr(run)(jax.ShapeDtypeStruct((64, 64), jnp.float32)).jaxpr
    assert temporaries.most(jaxpr, jaxpr, 1.0) == 64 * 64 * 4


@pytest.mark.long
def test_a_roofline_of_published_figures():
    """VAR-d16, 64 at a time on an H200: 1,322 images a second (tests/test_roofline.py)."""
    found = read("configs/generator/var.py:d16", choice=presets.Choice("fast"))
    *tokens, _ = reckoned(found, 64).parts
    seconds = sum(part.seconds(devices.read("h200:1").chip) for part in tokens)
    assert 64 / seconds == pytest.approx(1322, rel=0.01)


def test_tiles_are_those_of_a_tpu():
    found = read(SHAPES, SMALL)
    assert reckoned(found, lies=tiles.tiled).cache >= reckoned(found).cache
    assert decoding.size(draws.keys(4)) == 4 * 2 * 4
    assert np.isfinite(reckoned(found, lies=tiles.tiled).peak)
