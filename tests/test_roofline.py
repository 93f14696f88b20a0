"""The roofline against figures computed by hand; a program's text against what it says."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from tokgen import chips, flops

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", params=["roofline"])
def roofline(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module(request.param)


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("compiled")


# Images a second on an H200 (790 TFLOP/s, 4.3 TB/s), guided, bfloat16: batch, adaptive norms in
# every step and beforehand; GFLOP an image
RATES = {
    "rar-b": ((1, 32, 46), (64, 623, 660), (256, 795, 781)),
    "rar-xxl": ((64, 161, 176), (256, 235, 232)),
    "llamagen-b": ((64, 1341, 1341), (256, 1634, 1634)),
    "var-d16": ((64, None, 1322), (256, None, 1324)),
    "var-d30": ((64, None, 210),),
    "maskbit": ((64, 38.0, 38.0),),
}
WORK = {"var-d16": 597, "var-d30": 3763, "maskbit": 20786}
CACHES = {"rar-b": 18.9, "rar-xxl": 57.9, "var-d30": 156.7, "maskbit": 0}  # MB a row


@pytest.mark.parametrize("name", RATES)
def test_rates_are_those_of_the_closed_forms(name, roofline):
    net, chip = roofline.network(roofline.published(name)[0]), chips.CHIPS["H200"]
    for batch, every, before in RATES[name]:
        for wanted, ahead in ((every, False), (before, True)):
            if wanted is not None:
                found = roofline.images_per_second(net, batch, chip, ahead=ahead)
                # of one image the tables have two digits, and the prefix counts here
                assert found == pytest.approx(wanted, rel=0.015 if batch > 1 else 0.03)
        best = roofline.images_per_second(net, batch, chip)
        assert best == max(
            roofline.images_per_second(net, batch, chip, ahead=way) for way in (False, True)
        )
    if name in WORK:
        work = sum(step.flops for step in roofline.steps(net, 1, ahead=True))
        assert work / 1e9 == pytest.approx(WORK[name], rel=2e-3)
    if name in CACHES:
        assert roofline.cache_per_row(net) / 1e6 == pytest.approx(CACHES[name], abs=0.05)


def test_less_guidance_is_less_work_and_pixels_cost(roofline):
    net, chip = roofline.network(roofline.published("rar-b")[0]), chips.CHIPS["A100"]
    rates = [roofline.images_per_second(net, 64, chip, guided=n) for n in (256, 128, 0)]
    assert rates == sorted(rates) and rates[2] > 1.5 * rates[0]
    slower = roofline.images_per_second(net, 64, chip, pixels=chip.flops / rates[0])
    assert slower == pytest.approx(rates[0] / 2, rel=1e-2)


def test_operations_are_counted_without_running_anything(roofline):
    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    assert flops.of(jnp.matmul, *shapes) == pytest.approx(2 * 8 * 16 * 4, rel=0.01)


def test_devices_are_known_by_what_jax_calls_them(roofline):
    assert chips.of("NVIDIA H200") == "H200" and chips.of("TPU v5 lite") == "v5e"
    assert chips.of("TPU v5p") == "v5p" and chips.of("cpu") == ""


def test_rates_of_this_cpu_are_measured(roofline):
    chip = roofline.this_cpu(side=64, repeats=1)
    assert chip.flops > 1e6 and chip.bandwidth > 1e6 and "this run" in chip.source


TEXT = """HloModule jit_f, is_scheduled=true

%updating (p0: bf16[4,128], p1: bf16[1,128], p2: s32[]) -> bf16[4,128] {
  %p0 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[4,128]{1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%slicing (p0.1: bf16[1024,128], p1.1: s32[]) -> bf16[16,128] {
  %p0.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1.1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %part = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-slice(%p0.1, %p1.1, %zero.1)
  ROOT %less = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice(%part), slice={[0:16], [0:128]}
}

%body (arg: (s32[], bf16[4,128], bf16[1024,128])) -> (s32[], bf16[4,128], bf16[1024,128]) {
  %arg = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %cache = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %weights = bf16[1024,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %near = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%weights, %i), kind=kLoop, calls=%slicing
  %row = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} slice(%near), slice={[0:1], [0:128]}
  %cache.1 = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%cache, %row, %i), kind=kLoop, calls=%updating
  %again = bf16[1024,128]{0,1:T(8,128)(2,1)} copy(%weights)
  %i.1 = s32[]{:T(128)S(6)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) tuple(%i.1, %cache.1, %again)
}

%condition (arg.1: (s32[], bf16[4,128], bf16[1024,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i.2, %bound), direction=LT
}

ENTRY %main (a: bf16[4,128], w: bf16[1024,128]) -> bf16[4,128] {
  %a = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[1024,128]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[]{:T(128)S(6)} constant(0)
  %t = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) tuple(%start, %a, %w)
  %loop = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[1024,128]{1,0:T(8,128)(2,1)}) while(%t), condition=%condition, body=%body
  ROOT %r = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501 - as a compiler writes it


def test_a_programs_bytes_are_those_that_leave_the_large_memory(compiled):
    program = compiled.Program(TEXT)
    (loop,) = program.loops(1000)
    # 16 rows of 128 are read of the weights; the cache gets one row, padded to a tile of 8; the
    # copy reads and writes all
    whole = 1024 * 128 * 2
    assert loop.turns == 5 and loop.bytes == 16 * 128 * 2 + 8 * 128 * 2 + 2 * whole
    assert program.bytes() == 5 * loop.bytes
    (move,) = loop.moves
    assert (move.name, move.size, move.bytes, move.times) == ("again", whole // 2, whole, 1)
    assert compiled.counted(loop.moves) == "1 of 0.3 MB" and compiled.counted([]) == "none"


def test_arrays_fill_their_tiles(compiled):
    found = compiled.array("bf16", "128,16,66,88", "0,3,1,2:T(8,128)(2,1)")
    assert found.bytes == 128 * 16 * 66 * 88 * 2 and found.far
    found = compiled.array("f32", "3,5", "1,0:T(8,128)S(1)")
    assert found.bytes == 8 * 128 * 4 and not found.far
    assert compiled.array("pred", "", "").bytes == 1
