"""Configs: overrides are checked, problems told together, every config file builds as stated."""

import functools
import inspect
import json
import pathlib
import re

import jax
import ml_collections
import pytest
from flax import nnx

from tests import recipes
from tokgen import interfaces, parameters, report, rng
from tokgen.config import building, reading as configs
from tokgen.data import views
from tokgen.nn import precision
from tokgen.quantizers import fsq
from tokgen.training import fields

FOLDER = configs.programs() / "configs"
FILES = sorted(f"{file.parent.name}/{file.stem}" for file in FOLDER.glob("*/*.py"))

# Config and variant -> parameters, as the table says at the start of a run.
PARAMETERS = {
    **{reference: count for reference, (_, _, count) in recipes.GENERATORS.items()},
    "tokenizer/ablation": 794_680,
    "tokenizer/ablation:bsq": 791_098,
    "tokenizer/ablation:fsq": 777_268,
    "tokenizer/ablation:gaussian": 781_880,
    "tokenizer/ablation:ibq": 981_104,
    "tokenizer/ablation:lfq": 791_098,
    "tokenizer/ablation:multiscale_fsq": 777_860,
    "tokenizer/ablation:multiscale_vq": 797_016,
    "tokenizer/ablation:vq": 794_680,
    "tokenizer/ablation:vq_clustering": 794_680,
    "tokenizer/ablation:vq_ema": 786_488,
    "tokenizer/ablation:vq_entropy": 794_680,
    "tokenizer/ablation:vq_l2": 794_680,
    "tokenizer/cifar10_f4": 777_268,
    "tokenizer/cifar10_f4:ema": 786_488,
    "tokenizer/cifar10_f4:gan": 777_268,
    "tokenizer/cifar10_f4:pyramid": 815_440,
    "tokenizer/cifar10_f4:vq": 794_680,
    "tokenizer/ibq": 110_982_019,
    "tokenizer/ibq:1024": 107_049_859,
    "tokenizer/ibq:16384": 110_982_019,
    "tokenizer/ibq:262144": 173_896_579,
    "tokenizer/ibq:8192": 108_884_867,
    "tokenizer/llamagen_vq": 71_883_403,
    "tokenizer/llamagen_vq:vq16": 71_883_403,
    "tokenizer/llamagen_vq:vq8": 70_109_835,
    "tokenizer/maskbit": 54_489_489,
    "tokenizer/maskbit:lfq10": 54_469_005,
    "tokenizer/maskbit:lfq12": 54_479_247,
    "tokenizer/maskbit:lfq14": 54_489_489,
    "tokenizer/maskbit:lfq16": 54_499_731,
    "tokenizer/maskbit:lfq18": 54_509_973,
    "tokenizer/maskgit_vqgan": 54_515_587,
    "tokenizer/maskgit_vqgan:256": 54_515_587,
    "tokenizer/maskgit_vqgan:512": 54_515_587,
    "tokenizer/openmagvit2": 115_127_829,
    "tokenizer/openmagvit2:in128": 112_021_653,
    "tokenizer/openmagvit2:in256": 115_127_829,
    "tokenizer/openmagvit2:pretrain_16384": 115_094_033,
    "tokenizer/openmagvit2:pretrain_262144": 115_127_829,
    "tokenizer/photographs": 2_354_339,
    "tokenizer/photographs:ibq": 4_241_443,
    "tokenizer/photographs:llamagen": 3_983_147,
    "tokenizer/photographs:magvit2": 2_582_421,
    "tokenizer/photographs:maskbit": 1_874_545,
    "tokenizer/photographs:maskgit": 2_354_339,
    "tokenizer/photographs:taming": 4_241_443,
    "tokenizer/photographs:var": 3_517_955,
    "tokenizer/shapes": 132_019,
    "tokenizer/shapes:ema": 135_224,
    "tokenizer/shapes:hard": 132_019,
    "tokenizer/shapes:pyramid": 146_768,
    "tokenizer/shapes:vq": 137_272,
    "tokenizer/taming_vqgan": 72_141_699,
    "tokenizer/taming_vqgan:f16_1024": 72_141_699,
    "tokenizer/taming_vqgan:f16_16384": 76_073_859,
    "tokenizer/taming_vqgan:f8_16384": 67_717_295,
    "tokenizer/taming_vqgan:f8_256": 67_652_783,
    "tokenizer/tatitok": 390_882_452,
    "tokenizer/tatitok:bl128_vq": 391_046_292,
    "tokenizer/tatitok:bl32_vae": 390_202_484,
    "tokenizer/tatitok:bl32_vq": 390_800_532,
    "tokenizer/tatitok:bl64_vae": 390_284_404,
    "tokenizer/tatitok:bl64_vq": 390_882_452,
    "tokenizer/tatitok:sl128_vae": 330_275_188,
    "tokenizer/titok": 641_054_735,
    "tokenizer/titok:b64": 204_814_095,
    "tokenizer/titok:l32": 641_054_735,
    "tokenizer/titok:s128": 83_674_639,
    "tokenizer/titok_onestage": 390_016_148,
    "tokenizer/titok_onestage:bl128_vae_c16": 389_581_940,
    "tokenizer/titok_onestage:bl128_vq8k": 390_179_988,
    "tokenizer/titok_onestage:bl64_vae_c16": 389_418_100,
    "tokenizer/titok_onestage:bl64_vq8k": 390_016_148,
    "tokenizer/titok_onestage:ll32_vae_c16": 606_879_604,
    "tokenizer/titok_onestage:sl256_vq8k": 330_260_884,
    "tokenizer/var_vqvae": 108_948_355,
    "tokenizer/var_vqvae:1024": 108_948_355,
    "tokenizer/var_vqvae:256": 108_948_355,
    "tokenizer/var_vqvae:512": 108_948_355,
    "tokenizer/vqgan_plus": 55_990_915,
    "tokenizer/vqgan_plus:10bit": 55_990_915,
    "tokenizer/vqgan_plus:12bit": 55_007_683,
}


def load(reference="tokenizer/shapes", *overrides):
    return recipes.load(reference, overrides)


def refused(*overrides, reference="tokenizer/shapes"):
    with pytest.raises(interfaces.UserError) as caught:
        load(reference, *overrides)
    return str(caught.value)


# ---------------------------------------------------------------- the files in configs/


@functools.cache
def reconstructed(module, shape, text) -> set[str]:
    """Names of the losses, where an image comes out as large as it goes in."""
    image = jax.ShapeDtypeStruct(shape, "float32")
    text = text and jax.ShapeDtypeStruct((2, *text), "float32")
    reconstructed, quantized = jax.eval_shape(
        lambda m, x, t: m.reconstruct(x, cond=t), module, image, text
    )
    assert reconstructed.shape == image.shape
    return set(quantized.losses)


@pytest.mark.parametrize("reference", sorted(PARAMETERS))
def test_every_config_builds_with_its_number_of_parameters(reference):
    settings = load(reference)
    module = recipes.abstract(reference)
    if reference.startswith("tokenizer/"):
        rows, columns = settings.view.size
        if module.layout is not None:
            grid = module.layout.grids[-1]
            assert rows % grid[0] == columns % grid[1] == 0
        image = (2, rows, columns, settings.view.channels)
        assert reconstructed(module, image, settings.decoder.get("text")) <= set(settings.loss)
    else:
        layout, _, _ = recipes.GENERATORS[reference]
        assert module.layout == layout
        # one position, one scale or all of them at a step
        drawn = sum(phase.steps * phase.size for phase in module.plan())
        assert drawn == layout.length * (1 if module.exact else module.steps)
    params = parameters.split(module)[1]
    table = report.table(parameters.paths(params))
    assert parameters.count(params) == PARAMETERS[reference]
    assert table.splitlines()[-1].split() == ["total", f"{PARAMETERS[reference]:,}"]


@pytest.mark.parametrize("name", FILES)
def test_every_config_and_variant_is_in_the_table(name):
    """A config that does not know a variant names those it knows."""
    assert name in PARAMETERS, "count its parameters and write them down above"
    with pytest.raises(interfaces.UserError, match="nonsense") as caught:
        load(f"{name}:nonsense")
    listed = re.search(r"variants are ([\w, ]+)", str(caught.value))
    words = re.split(r", | and ", listed[1]) if listed else []
    here = {reference for reference in PARAMETERS if reference.partition(":")[0] == name}
    assert here == {name, *(f"{name}:{word}" for word in words)}


@pytest.mark.parametrize("name", FILES)
def test_every_config_says_how_to_run_it(name):
    text = (FOLDER / f"{name}.py").read_text()
    kind = name.partition("/")[0]
    docstring = text.split('"""')[1]
    # a recipe of several sizes names one of them; a long line is broken
    command = rf"python train_{kind}\.py --config configs/{name}\.py(:\w+)? (\\\\\s+)?--workdir"
    assert re.search(command, docstring)
    config = load(name)
    for field in ("seed", "steps", "batch_size", "precision", "optimizer", "ema", "keep", "report"):
        assert field in config


def test_an_unknown_file_is_answered_with_those_that_are_there():
    with pytest.raises(interfaces.UserError, match=r"tokenizer/shapes\.py"):
        configs.load("configs/tokenizer/shape.py")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1", ("needs a function get_config",)),
        ("def get_config(:", ("cannot be run", "SyntaxError", "line")),
        ("import no_such_package", ("cannot be run", "ModuleNotFoundError: No module")),
        ("\n\nx = 1 / 0", ("cannot be run", "ZeroDivisionError", "(line 3)")),
        ("def get_config(): return None", ("must return a ml_collections.ConfigDict", "NoneType")),
        ("def get_config(): return dict(seed=0)", ("must return", "found dict")),
        ("def get_config():\n    return undefined", ("failed: NameError", "(line 2)")),
        ("def get_config(a, b): return a", ("failed: TypeError",)),
        (
            "from ml_collections import ConfigDict, config_dict\n"
            "def get_config():\n"
            "    return ConfigDict(dict(a=dict(b=config_dict.placeholder(int, required=True))))",
            ("leaves a.b without a value",),
        ),
        ("\0", ("cannot be run",)),
    ],
)
def test_a_file_that_is_no_config_ends_in_one_message(tmp_path, text, parts):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(interfaces.UserError) as caught:
        configs.load(str(file))
    for part in (str(file), *parts):
        assert part in str(caught.value)


def test_a_config_may_refer_to_its_own_fields_and_hold_numbers_of_numpy(tmp_path):
    file = tmp_path / "config"  # whatever its ending
    file.write_text(
        "import numpy as np\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict(dict(a=3, c=np.float64(0.5), d=dict(e=(np.int32(1),))))\n"
        "    config.b = config.get_ref('a') * 2\n"
        "    return config"
    )
    stated = building.plain(configs.load(str(file), ["a=5"]))
    assert stated["a"] == 5 and stated["b"] in (6, 10)
    assert json.loads(json.dumps(stated)) == stated | {"d": {"e": [1]}}


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("stepz=1", "'stepz'; did you mean steps"),
        ("optimizer.learning_rat=1", "'optimizer.learning_rat'; did you mean optimizer.learning_"),
        ("optimiser.learning_rate=1", "'optimiser'; did you mean optimizer"),
        ("learning_rate=1e-3", "'learning_rate'; did you mean optimizer.learning_rate"),
        ("zzz=3", "'zzz'; it has batch_size, data"),
        ("seed.deeper=1", "'seed.deeper'; it has batch_size, data"),
    ],
)
def test_a_typo_is_named_and_the_nearest_field_suggested(override, suggestion):
    assert f"unknown config key {suggestion}" in refused(override)


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("critic.weight=0.5", "discriminator.weight"),
        ("critic.painter=hinge", "discriminator.generator_loss"),
        ("guard.usage=0.1", "safeguards.usage"),
    ],
)
def test_an_earlier_name_is_refused_with_the_one_of_today(override, now):
    then = override.partition("=")[0]
    assert f"unknown config key {then!r}; it is called {now} now" in refused(override)


def test_a_config_file_in_earlier_words_is_refused_with_those_of_today():
    config = load("tokenizer/shapes")
    with config.unlocked():
        config.critic = dict(weight=0.0)
    with pytest.raises(interfaces.UserError, match="'critic'; it is called discriminator now"):
        fields.check_tokenizer(config)


def test_all_problems_come_in_one_error():
    message = refused("stepz=1", "seed=x", "batch_size=2.5", "report=3", "novalue", "ema=true")
    for part in ("6 problems", "stepz", "seed=x", "batch_size=2.5", "report.scalars", "novalue"):
        assert part in message
    assert "ema=true: needs float" in message


def test_values_take_the_type_of_their_field():
    config = load(
        "tokenizer/shapes",
        *("steps=7", "ema=1", "optimizer.learning_rate=1e-4", "view.flip=true", "data.form=hard"),
        *("view.size=(32, 48)", "pixels=[0, 1]", "encoder.widths=(16,32)"),
        "perceptual.lpips=12",
    )
    assert config.steps == 7 and config.ema == 1.0 and isinstance(config.ema, float)
    assert config.optimizer.learning_rate == 1e-4 and config.view.flip is True
    assert config.data.form == "hard" and config.perceptual.lpips == "12"
    assert config.view.size == (32, 48) and config.encoder.widths == (16, 32)
    assert config.pixels == (0.0, 1.0) and isinstance(config.pixels[0], float)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("steps=1e3", "float"),
        ("steps=True", "bool"),
        ("steps=many", "str"),
        ("view.flip=1", "int"),
        ("view.size=32", "int"),
        ("ema=high", "str"),
    ],
)
def test_a_value_of_another_type_is_refused(override, found):
    message = refused(override)
    assert override in message and f"found {found}" in message


def test_an_override_changes_only_its_field():
    before, after = configs.flat(load()), configs.flat(load("tokenizer/shapes", "keep.best=3"))
    assert {name for name in before if before[name] != after[name]} == {"keep.best"}


# ---------------------------------------------------------------- another name of a section


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("reference", "section", "overrides", "expected"),
    [
        (
            "tokenizer/cifar10_f4",
            "data",
            ("name=tfds", "dataset=cifar10", "splits=('train[:90%]', 'test')"),
            dict(name="tfds", dataset="cifar10", splits=("train[:90%]", "test"), data_dir="")
            | dict(label="", count=0, labels="feature"),
        ),
        (
            "tokenizer/shapes",
            "data",
            ("name=folder", "path=123", "held_out=0"),
            dict(name="folder", path="123", held_out=0.0, labels="folders"),
        ),
        (
            "tokenizer/shapes",
            "quantizer",
            ("name=bsq", "bits=12", "groups=[6, 6]"),
            dict(name="bsq", bits=12, groups=(6, 6), order="little", temperature=0.0),
        ),
        (
            "tokenizer/ablation:vq",
            "quantizer",
            ("name=ibq", "temperature=1"),  # codes and channels stay: ibq has no default for them
            dict(name="ibq", codes=1024, channels=8, temperature=1.0, entropy="shifted"),
        ),
        (
            "tokenizer/cifar10_f4:gan",
            "discriminator.network",
            ("name=blur", "stages=2"),
            dict(name="blur", width=128, stages=2, down="blur4", activation="leaky_relu"),
        ),
    ],
)
def test_another_name_brings_the_arguments_of_its_constructor(
    reference, section, overrides, expected, turned
):
    """In any order of the overrides; those of the constructor before are gone."""
    overrides = [f"{section}.{text}" for text in overrides]
    config = load(reference, *(reversed(overrides) if turned else overrides))
    found = building.plain(config)
    for name in section.split("."):
        found = found[name]
    assert found.items() >= expected.items()
    assert all(type(found[name]) is type(value) for name, value in expected.items())
    taken = inspect.signature(building.named(found, section).__init__).parameters
    assert set(found) <= {"name", *taken}


def test_another_name_keeps_sizes_and_builds():
    config = load("generator/shapes", "generator.name=masked", "generator.head=bare")
    before = load("generator/shapes").generator
    for name in ("width", "depth", "heads"):
        assert config.generator[name] == before[name]
    assert config.generator.rates == before.rates
    layout = interfaces.TokenLayout((240,), ((8, 8),))
    module = nnx.eval_shape(lambda: building.generator(config, layout, 10, rngs=rng.rngs(0)))
    assert module.knobs


def test_a_section_inside_another_may_be_named_anew():
    config = load(
        "tokenizer/cifar10_f4",
        *("quantizer.quantizer.codes=64", "quantizer.quantizer.channels=4"),
        *("quantizer.quantizer.name=vq", "quantizer.scales=(1, 2, 8)", "quantizer.name=multiscale"),
    )
    assert config.quantizer.scales == (1, 2, 8) and config.quantizer.quantizer.codes == 64
    module = nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    assert module.layout.vocab == (64,) and len(module.layout.grids) == 3


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("quantizer.name=vq", "quantizer.codes=8"), ("quantizer.channels", "=VALUE")),
        (("quantizer.name=vqq",), ("quantizer.name must be one of", "did you mean 'vq'")),
        (("data.name=folder", "data.count=3"), ("unknown config key 'data.count'", "data.path")),
        (
            ("data.name=folder", "data.path=x", "data.held_out=no"),
            ("data.held_out=no", "needs float"),
        ),
        (("encoder.inner.name=conv",), ("unknown config key",)),
        (("optimizer.inner.name=conv",), ("unknown config key 'optimizer.inner'",)),
    ],
)
def test_another_name_that_does_not_fit_is_told(overrides, parts):
    message = refused(*overrides)
    for part in parts:
        assert part in message


# ---------------------------------------------------------------- building what is named


def test_names_are_files_and_a_typo_is_answered():
    for kind, section, near in (
        ("quantizer", {"name": "vqq"}, "vq"),
        ("encoder", {"name": "convv"}, "conv"),
        ("generator", {"name": "autoregresive"}, "autoregressive"),
        ("data", {"name": "shape"}, "shapes"),
    ):
        with pytest.raises(interfaces.UserError, match=f"{kind}.name.*did you mean '{near}'"):
            building.named(section, kind)
    # a file of the package that is no quantizer, encoder, ...; and a name that is no file's
    for kind, name in (("encoder", "tokenizer"), ("data", "stream"), ("quantizer", "__init__")):
        with pytest.raises(interfaces.UserError, match="must be one of"):
            building.named({"name": name}, kind)
    with pytest.raises(interfaces.UserError, match="must be one of"):
        building.named({}, "quantizer")


def test_unknown_and_missing_arguments_of_a_section_come_together():
    section = {"name": "vq", "code": 12, "channels": 3}
    with pytest.raises(interfaces.UserError) as caught:
        building.build(section, "quantizer", grid=(1, 1), rngs=nnx.Rngs(0))
    message = str(caught.value)
    assert "has no argument 'code'; did you mean 'codes'" in message
    assert "needs 'codes'" in message and message.startswith("2 problems")


def nested():
    """A config whose decoder and quantizer hold sections of their own."""
    config = load("tokenizer/shapes", "view.size=(8, 8)")
    pixels = dict(name="conv", latent=6, widths=(16,), blocks=1, stem=4, variant="light")
    sizes = dict(tokens=5, width=8, depth=1, heads=2, patch=4)
    codes = dict(name="vit", channels=24, head="codes", **sizes)
    with config.unlocked():
        config.encoder = dict(name="vit", **sizes)
        config.quantizer = dict(
            name="multiscale",
            quantizer=dict(name="vq", codes=16, channels=4),
            scales=((1, 2), (1, 5)),
            phi=1,
        )
        config.decoder = dict(name="two_stage", codes=codes, pixels=pixels, codebook=(24, 6))
    return config


def test_sections_within_sections_are_built_with_what_they_state_themselves():
    """The pixel decoder reads rows of its own codebook; the rest it has from the whole."""
    config = nested()
    with config.unlocked():
        config.decoder.pixels.grid = (2, 2)
    building.check(config)
    module = nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    assert module.layout.grids == ((1, 2), (1, 5)) and module.layout.vocab == (16,)
    assert module.decoder.pixels.conv_in.kernel.shape == (3, 3, 6, 16)
    assert module.decoder.codes.embed.kernel.shape == (4, 8)  # the quantizer's channels
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
    reconstructed, quantized = jax.eval_shape(lambda m, x: m.reconstruct(x), module, image)
    assert reconstructed.shape == image.shape and quantized.tokens_BLG.shape == (2, 7, 1)


def test_problems_of_sections_within_sections_are_told_too():
    config = nested()
    with config.unlocked():
        config.decoder.codes.dept = 3
        config.decoder.pixels.name = "convv"
        config.quantizer.quantizer.code = 12
        config.encoder.token = 4
    with pytest.raises(interfaces.UserError) as caught:
        building.check(config)
    message = str(caught.value)
    for part in (
        "no argument 'dept'; did you mean 'depth'",
        "'convv'; did you mean 'conv'",
        "no argument 'code'; did you mean 'codes'",
        "no argument 'token'; did you mean 'tokens'",
    ):
        assert part in message, message


@pytest.mark.parametrize("error", [TypeError("ours"), ZeroDivisionError("ours"), ValueError()])
def test_only_errors_raised_on_purpose_are_mistakes_of_the_config(monkeypatch, error):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(fsq, "TokenLayout", broken)
    with pytest.raises(type(error)) as caught:
        building.build({"name": "fsq", "levels": (4, 4)}, "quantizer", grid=(1, 1))
    assert caught.value is error
    with pytest.raises(interfaces.UserError, match="config section 'quantizer': levels must"):
        building.build({"name": "fsq", "levels": (4096, 4097)}, "quantizer", grid=(1, 1))


def test_an_empty_network_is_that_of_no_discriminator():
    config = load()
    with config.unlocked():
        config.discriminator = dict(weight=0.0, network=dict(), optimizer=dict())
    building.check(config)
    with config.unlocked():
        config.discriminator.network = dict(name="patchgan", widht=4)
    with pytest.raises(interfaces.UserError, match="discriminator.network has no argument 'widht'"):
        building.check(config)


def test_a_value_that_the_constructor_refuses_names_its_section():
    with pytest.raises(interfaces.UserError, match="section 'quantizer'.*update"):
        section = {"name": "vq", "codes": 4, "channels": 2, "update": "magic"}
        building.build(section, "quantizer", grid=(1, 1), rngs=nnx.Rngs(0))
    config = load("tokenizer/shapes", "view.size=(30, 32)")
    with pytest.raises(interfaces.UserError, match="section 'encoder'.*stride"):
        nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    config = load("tokenizer/shapes", "precision.compute=float16")
    with pytest.raises(interfaces.UserError, match="section 'precision'.*float16"):
        nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))


def test_check_tells_the_problems_of_all_sections_together():
    config = load()
    with config.unlocked():
        config.encoder.with_ = (64,)
        config.decoder.name = "convv"
        config.quantizer.levls = (8, 8)
        config.view.sise = (32, 32)
        config.precision.compote = "bfloat16"
    with pytest.raises(interfaces.UserError) as caught:
        building.check(config, view=(views.View, ()), precision=(precision.Precision, ()))
    message = str(caught.value)
    for part in ("with_", "'convv'", "'levls'; did you mean 'levels'", "sise", "compote"):
        assert part in message
    building.check(load(), view=(views.View, ()), precision=(precision.Precision, ()))


def test_a_config_from_a_checkpoint_builds_the_same():
    """JSON has lists in the place of tuples."""
    import json

    config = load("tokenizer/shapes")
    again = ml_collections.ConfigDict(json.loads(json.dumps(building.plain(config))))
    first, second = (
        nnx.eval_shape(lambda c=c: building.tokenizer(c, rngs=rng.rngs(0))) for c in (config, again)
    )
    assert jax.tree.structure(first) == jax.tree.structure(second)


def test_programs_are_the_checkout():
    root = pathlib.Path(__file__).resolve().parents[2]
    assert configs.programs() == root and (root / "train_tokenizer.py").is_file()


def test_arguments_that_a_section_leaves_to_their_defaults_can_be_set():
    config = load("tokenizer/cifar10_f4", "data.labels=none")
    assert config.data.labels == "none"
    for name in ("data.order=a", "data.doubtful=drop", "data.lables=none"):
        with pytest.raises(interfaces.UserError, match="unknown config key"):
            load("tokenizer/cifar10_f4", name)


@pytest.mark.parametrize("name", ["generator/cifar10", "tokenizer/cifar10_f4"])
def test_a_config_that_builds_on_another_takes_the_shipped_one(tmp_path, monkeypatch, name):
    """A copy may lie anywhere, and a file of that name in the present folder is not meant."""
    wanted = building.plain(configs.load(f"configs/{name}.py"))
    file = configs.programs() / "configs" / f"{name}.py"
    copy = tmp_path / "mine.py"
    copy.write_text(file.read_text())
    other = tmp_path / "configs" / name.partition("/")[0] / "shapes.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise ValueError('another')")
    monkeypatch.chdir(tmp_path)
    assert building.plain(configs.load(str(copy))) == wanted
