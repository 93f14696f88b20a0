"""The roofline against figures computed by hand."""

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
