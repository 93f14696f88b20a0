"""What devices compute in: float32 without bfloat16 units, unless the other is asked for."""

import types

import pytest

import tokgen
from tests import command_line, recipes
from tokgen.checkpoints import loading
from tokgen.nn import precision

KINDS = {  # a device as jax tells it -> whether it has bfloat16 units
    ("gpu", "Tesla T4", "7.5"): False,
    ("gpu", "Tesla V100-SXM2-16GB", "7.0"): False,
    ("gpu", "NVIDIA A100-SXM4-40GB", "8.0"): True,
    ("gpu", "NVIDIA RTX PRO 6000", "12.0"): True,
    ("gpu", "AMD Instinct MI250X", "gfx90a"): True,
    ("cpu", "cpu", None): True,
    ("tpu", "TPU v5 lite", None): True,
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_devices_have_bfloat16_units(kind):
    platform, name, capability = kind
    told = {} if capability is None else dict(compute_capability=capability)
    device = types.SimpleNamespace(platform=platform, device_kind=name, **told)
    assert precision.has_bfloat16(device) == KINDS[kind]


@pytest.fixture
def without(monkeypatch, tmp_path):
    """A generator in `runs/generator`, whose preset `half` is in bfloat16, on a device without."""
    recipes.tiny(tmp_path, "raster")
    monkeypatch.chdir(tmp_path)
    precision._say.cache_clear()
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    return tmp_path


WORDS = "has no bfloat16 units"


def test_a_preset_in_bfloat16_is_drawn_in_float32_and_that_is_said_once(without, capsys):
    model = tokgen.load("runs/generator")
    assert model.config.precision.compute == "float32" and WORDS not in capsys.readouterr().err
    samples = model.sample("ring", number=1, preset="half")
    assert [*model._drawing] == ["float32"]  # and not loaded a second time
    assert capsys.readouterr().err.count(f"{WORDS}: networks compute in float32") == 1
    assert (samples.image_NHW3 == model.sample("ring", number=1).image_NHW3).all()


def test_what_is_asked_for_stands(without, capsys):
    model = tokgen.load("runs/generator", precision="bfloat16")
    assert model.config.precision.compute == "bfloat16"
    assert f"{WORDS}: bfloat16, as it is asked for" in capsys.readouterr().err
    assert loading.load_generator("runs/generator", compute="bfloat16").config.precision.compute


def test_the_command_says_what_it_draws_in(without, capfd):
    words = ("sample", "runs/generator", "--classes", "ring", "--number", "1", "--preset", "half")
    assert command_line.call(*words, "--out", "one") == 0
    assert WORDS in capfd.readouterr().err
    assert '"precision": "float32"' in (without / "one" / "samples.json").read_text()


def test_a_tokenizer_trained_in_bfloat16_decodes_in_float32(monkeypatch, tmp_path, capsys):
    precision._say.cache_clear()
    names = tuple("0123456789")
    recipes.tiny_tokenizer(tmp_path, "", names, compute="bfloat16")
    assert loading.load_decoder(tmp_path).config.precision.compute == "bfloat16"
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    assert loading.load_decoder(tmp_path).config.precision.compute == "float32"
    # what is trained on, exported or measured as it was trained is as its config says
    assert loading.load_tokenizer(tmp_path).config.precision.compute == "bfloat16"
