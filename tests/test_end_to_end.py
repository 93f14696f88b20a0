"""The two programs and the commands on a folder of small pictures, from images to images.

Runs that are killed have processes of their own, as a user starts them. All else runs in this
process, where starting costs nothing.
"""

import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, Mesh
from PIL import Image

from tests import references, shared_steps
from tokgen import cli, image_grid, metrics_log, parameters, runtime, sharding
from tokgen.checkpoints import checkpoint, loading
from tokgen.data import token_shards
from tokgen.evaluation import evaluators
from tokgen.sampling import memory
from tokgen.training import fields, launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, EVERY = 5, 2
# What one process has compiled the next ones need not; and the user's own cache is left alone.
CACHE = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir())) / "tokgen"

TOKENIZER = """
from ml_collections import ConfigDict
def get_config(variant=""):
    config = ConfigDict()
    config.seed, config.steps, config.batch_size = 0, 5, 4
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.2)
    config.view = dict(size=(32, 48), channels=3, crop="random", zoom=1.2, flip=True)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(name="conv", widths=(16,), blocks=1, stem=8, variant="local")
    config.quantizer = dict(name="vq", codes=32, channels=4)
    config.decoder = dict(name="conv", widths=(16,), blocks=1, stem=8, variant="light")
    config.loss = dict(l1=0.0, l2=1.0, lpips=0.0, codebook=1.0, commitment=0.25)
    config.perceptual = dict(lpips="")
    # the published width compiles for a minute
    network = dict(name="patchgan", width=8, layers=3, norm="batch")
    discriminator = dict(weight=0.0, start=0.0, warmup=0.0, network=network)
    config.discriminator = dict(discriminator, optimizer=dict(learning_rate=1e-3))
    config.optimizer = dict(name="adamw", learning_rate=1e-3, warmup=2, weight_decay=0.01)
    config.ema = 0.9
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.safeguards = dict(usage=0.01, grace=0.5, worse=50.0)
    config.held_out = dict(images=4)
    config.report = dict(scalars=2, save=2)
    config.keep = dict(latest=9, best=1)
    config.init_from = ""
    if variant == "gan":
        config.discriminator.weight = 0.5
    if variant == "gray":
        config.view = dict(size=(16, 16), channels=1, crop="center", flip=False)
        config.encoder.stem = config.decoder.stem = 4
        config.steps = 2
    return config
"""

GENERATOR = """
from ml_collections import ConfigDict
def get_config():
    config = ConfigDict()
    config.seed, config.steps, config.batch_size = 0, 5, 4
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(tokens="", tokenizer="", images="", views="center,flip", text="")
    config.generator = dict(
        name="autoregressive", variant="llama_narrow", width=16, depth=2, heads=2, label_drop=0.2,
        rates=dict(residual=0.1),
    )
    config.optimizer = dict(name="adamw", learning_rate=1e-3, warmup=2, weight_decay=0.01)
    config.ema = 0.9
    config.presets = dict(default=dict(temperature=0.9, guidance="constant", weight=1.5))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.held_out = dict(images=4, samples=0)
    config.report = dict(scalars=2, save=2)
    config.keep = dict(latest=9, best=1)
    config.init_from = ""
    return config
"""


def mesh(data=-1, fsdp=1, tensor=1):
    """Two devices, as many as the processes have."""
    return jax.make_mesh(
        (2, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2]
    )


def story(name, *words):
    """A training program in this process, on two devices: its exit code."""
    module = importlib.import_module(f"train_{name}")
    # a run sets its mesh for good: what it leaves must not meet the next one
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(Mesh(np.empty((), object), ())):
        patch.setattr(sys, "argv", [f"train_{name}.py", *map(str, words)])
        patch.setattr(sharding, "make_mesh", mesh)
        # signals stay those of the tests
        patch.setattr(launch.signal, "signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as caught:
            launch.run(module.main, getattr(fields, f"check_{name}"), module.__doc__)
    return caught.value.code


def program(name, *words):
    """A training program that runs to its end."""
    assert not story(name, *words)


def started(name, *words):
    """A training program in a process of its own, on two devices."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"train_{name}.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2", "TOKGEN_CACHE": str(CACHE)},
    )


def killed(name, *words, workdir):
    """The program, killed at a random moment after it has saved for the first time."""
    process = started(name, *words)
    try:
        first = workdir / checkpoint.FOLDER / str(EVERY)
        until = time.monotonic() + 250
        while not first.is_dir() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(random.Random(name).uniform(0, 0.02))
    finally:
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL and first.is_dir(), said
    assert not (workdir / checkpoint.FOLDER / str(STEPS)).is_dir()  # it had not come to its end


def command(*words):
    """A command of tokgen in this process."""
    assert cli.main([str(word) for word in words]) == 0


def manifest(workdir, step=STEPS):
    return checkpoint.read_meta(workdir / checkpoint.FOLDER / str(step))["manifest"]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """jax is set up already, by conftest; a command must not set it up once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "devices", lambda batch_size=0: None)
        shared_steps.share(patch)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs, a folder of pictures in two classes, and one of gray pictures without classes."""
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "tokenizer.py").write_text(TOKENIZER)
    (folder / "generator.py").write_text(GENERATOR)
    generator = np.random.default_rng(0)
    for name, shape in (("pictures/bird", (36, 50, 3)), ("pictures/cat", (32, 48, 3))):
        (folder / name).mkdir(parents=True)
        for i in range(9):
            coarse = generator.integers(0, 255, (4, 6, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((shape[1], shape[0]))
            image.save(folder / name / f"{i}.png")
    (folder / "gray").mkdir()
    for i in range(8):
        gray = generator.integers(0, 255, (16, 16), dtype=np.uint8)
        Image.fromarray(gray).save(folder / "gray" / f"{i}.png")
    return folder


def tokenizer_words(place, workdir, variant="gan", data="pictures"):
    config = f"{place}/tokenizer.py:{variant}"
    return "--config", config, "--workdir", workdir, f"--config.data.path={place / data}"


def generator_words(place, workdir, data="tokens"):
    config = f"{place}/generator.py"
    return "--config", config, "--workdir", workdir, f"--config.data.tokens={place / data}"


@pytest.fixture(scope="module")
def tokenizer(place):
    """A tokenizer that trained against a discriminator, without interruption."""
    program("tokenizer", *tokenizer_words(place, place / "tokenizer"))
    return place / "tokenizer"


@pytest.fixture(scope="module")
def shards(place, tokenizer):
    command("pretokenize", "--tokenizer", tokenizer, "--data", place / "pictures",
            "--out", place / "tokens", "--batch", 8)  # fmt: skip
    return place / "tokens"


@pytest.fixture(scope="module")
def generator(place, shards):
    """A generator that trained without interruption."""
    program("generator", *generator_words(place, place / "generator"))
    return place / "generator"


# ---------------------------------------------------------------- training


@pytest.mark.long
def test_perceptual_loss_from_weight_files(place):
    """On a mesh of two devices, from two files: a trunk, and the heads of LPIPS."""
    generator = np.random.default_rng(0)
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    trunk, heads = {}, {}
    for level, (number, (after, before, size)) in enumerate(shapes.items()):
        kernel = generator.normal(size=(after, before, size, size)) * (before * size**2) ** -0.5
        trunk[f"features.{number}.weight"] = kernel.astype(np.float32)
        trunk[f"features.{number}.bias"] = np.zeros(after, np.float32)
        heads[f"lin{level}.model.1.weight"] = np.full((1, after, 1, 1), 0.1, np.float32)
    for name, weights in (("trunk", trunk), ("heads", heads)):
        safetensors.numpy.save_file(weights, place / f"{name}.safetensors")
    words = tokenizer_words(place, place / "perceptual", variant="")
    files = f"{place}/trunk.safetensors,{place}/heads.safetensors"
    program("tokenizer", *words, "--config.steps=2", "--config.loss.lpips=1.0",
            f"--config.perceptual.lpips={files}")  # fmt: skip
    lines = (place / "perceptual" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["lpips"] > 0.01


def test_both_networks_of_the_gan_move(tokenizer):
    """Also the statistics; and everything is finite."""
    first, last = manifest(tokenizer, EVERY), manifest(tokenizer)
    for part in ("model/params/encoder/", "model/params/decoder/", "model/params/quantizer/",
                 "model/stats/quantizer/counts", "model/ema/",
                 "discriminator/params/"):  # fmt: skip
        paths = [path for path in last if path.startswith(part)]
        assert paths
        moved = [path for path in paths if first[path]["checksum"] != last[path]["checksum"]]
        assert len(moved) > 0.8 * len(paths), part
    lines = [json.loads(line) for line in (tokenizer / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 5]
    for line in train:
        assert (
            line["adversarial_weight"] > 0
            and line["discriminator_loss"] > 0
            and line["skipped"] == 0
        )
    held_out = [line for line in lines if line["split"] == "held_out"]
    assert [line["step"] for line in held_out] == [2, 4, 5] and held_out[-1]["psnr_db"] > 3
    with Image.open(tokenizer / "images" / "reconstructions-0000005.png") as image:
        assert image.size[0] > 2 * 48
    assert (tokenizer / "curves.png").stat().st_size > 1000


def test_the_average_of_a_run_is_none_of_its_parameters(tokenizer, generator):
    """A decay that is lost would make it their copy."""
    for workdir in (tokenizer, generator):
        found = manifest(workdir)
        paths = [path for path in found if path.startswith("model/ema/")]
        pairs = [(found[p], found[p.replace("/ema/", "/params/", 1)]) for p in paths]
        apart = [a for a, b in pairs if a["checksum"] != b["checksum"]]
        assert len(apart) > 0.8 * len(paths) > 0


@pytest.mark.long
def test_a_killed_tokenizer_run_goes_on_to_the_same_bits(place, tokenizer, capfd):
    workdir = place / "killed_tokenizer"
    words = tokenizer_words(place, workdir)
    killed("tokenizer", *words, workdir=workdir)
    program("tokenizer", *words)
    assert "resumed step" in capfd.readouterr().err
    assert manifest(workdir) == manifest(tokenizer)
    seen = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in seen if line["split"] == "train"] == [2, 4, 5]


def test_a_killed_generator_run_goes_on_to_the_same_bits(place, generator, capfd):
    workdir = place / "killed_generator"
    words = generator_words(place, workdir)
    killed("generator", *words, workdir=workdir)
    program("generator", *words)
    assert "resumed step" in capfd.readouterr().err
    assert manifest(workdir) == manifest(generator)
    first, last = manifest(generator, EVERY), manifest(generator)
    paths = [path for path in last if path.startswith("model/params/")]
    assert sum(first[p]["checksum"] != last[p]["checksum"] for p in paths) > 0.8 * len(paths)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_evaluators_log_each_step_once_wherever_the_run_is_cut_off(
    kind, place, shards, monkeypatch, capfd
):
    """Ended in the second of two, at a step that is saved: the first one's line stays."""
    file = place / "local.npz"
    references.of_noise(file, (32, 48), ("bird", "cat"))
    own = f"--config.evaluators.{{}}.{'images' if kind == 'tokenizer' else 'samples'}=30"
    words = [*{"tokenizer": tokenizer_words, "generator": generator_words}[kind](place, "{}")]
    words[3] = place / f"cut_off_{kind}"
    for name, every in (("first", 2), ("other", 4)):
        given = dict(kind="score", every=every, reference=file, metrics="('sfid','precision')")
        words += [f"--config.evaluators.{name}.{key}={value}" for key, value in given.items()]
        words += [own.format(name), f"--config.evaluators.{name}.accept=('few',)"]
    if kind == "generator":
        words += ["--config.evaluators.other.preset=no_guidance"]
        words += [f"--config.evaluators.nats.{x}" for x in ("kind=likelihood", "every=3")]
        words += ["--config.evaluators.nats.images=3", "--config.evaluators.nats.split=train"]
        words += [f"--config.evaluators.look.{x}" for x in ("kind=grid", "every=3", "columns=2")]
    real = evaluators.Evaluator

    class Cut(real):
        def __init__(self, name, every, measure, *more):
            def cut(network):
                if name == "other":
                    raise KeyboardInterrupt
                return measure(network)

            super().__init__(name, every, cut, *more)

    monkeypatch.setattr(evaluators, "Evaluator", Cut)
    assert story(kind, *words) == 130
    monkeypatch.setattr(evaluators, "Evaluator", real)
    program(kind, *words)
    assert "resumed step 4" in capfd.readouterr().err
    lines = [(r["split"], r["step"]) for r in metrics_log.read(words[3])]
    asked = {"first": [2, 4, 5], "other": [4, 5], "held_out": [2, 4, 5], "train": [2, 4, 5]}
    if kind == "generator":
        asked |= {"nats": [3, 5], "look": [3, 5]}
    assert {name: [s for n, s in lines if n == name] for name in asked} == asked
    assert len(lines) == sum(map(len, asked.values()))
    program(kind, *words)  # the end is no reason to measure again
    assert len(metrics_log.read(words[3])) == len(lines)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_what_ends_an_evaluator_costs_no_step(kind, place, shards, monkeypatch, capfd):
    """Also between the steps that are saved: without it the run goes on from there."""
    words = [*{"tokenizer": tokenizer_words, "generator": generator_words}[kind](place, "{}")]
    words[3] = place / f"exhausted_{kind}"
    how = ("kind=reconstruction", "shown=2") if kind == "tokenizer" else ("kind=likelihood",)
    words += [f"--config.evaluators.own.{x}" for x in (*how, "images=4", "every=3")]
    real = evaluators.Evaluator

    def ended(name, every, measure, *more):
        def measured(network):
            if kind == "generator":
                raise KeyboardInterrupt
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB.")

        return real(name, every, measured, *more)

    monkeypatch.setattr(evaluators, "Evaluator", ended)
    assert story(kind, *words, "--config.report.save=5") == (2 if kind == "tokenizer" else 130)
    if kind == "tokenizer":
        said = capfd.readouterr().err
        assert "without it with --config.evaluators.own.every=0; step 3 is saved in" in said
    program(kind, *words, "--config.report.save=5", "--config.evaluators.own.every=0")
    assert "resumed step 3" in capfd.readouterr().err


@pytest.mark.long
def test_a_collapse_heard_where_an_evaluator_is_due_is_saved_as_it_says(place, capfd):
    workdir = place / "collapsed"
    words = [*tokenizer_words(place, workdir, variant=""), "--config.safeguards.usage=1.0"]
    words += ["--config.report.save=5", "--config.report.scalars=1"]
    for given in ("kind=reconstruction", "every=3", "images=4", "shown=2"):
        words += [f"--config.evaluators.own.{given}"]
    assert story("tokenizer", *words) == 2
    assert "step 3 is saved" in capfd.readouterr().err
    assert manifest(workdir, 3)
    assert "own" not in [line["split"] for line in metrics_log.read(workdir)]


def test_tokens_made_while_training_lead_to_the_same_bits(place, tokenizer, generator, capfd):
    """Images in the place of shards: the same batches, the same held-out figures."""
    workdir = place / "on_the_fly"
    words = ("--config", f"{place}/generator.py", "--workdir", workdir,
             f"--config.data.tokenizer={tokenizer}",
             f"--config.data.images={place / 'pictures'}")  # fmt: skip
    program("generator", *words)
    assert "step 5 of 5 (20 images seen) is saved" in capfd.readouterr().err
    assert manifest(workdir) == manifest(generator)
    logs = []
    for folder in (workdir, generator):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append(
            [{k: v for k, v in line.items() if k not in metrics_log.PACE} for line in lines]
        )
    assert logs[0] == logs[1]
    assert [line["images_seen"] for line in logs[0] if line["split"] == "train"] == [8, 16, 20]


def test_a_run_that_starts_from_a_model_shows_what_that_could_do(place, generator, capfd):
    words = (*generator_words(place, place / "tuned"), f"--config.init_from={generator}",
             "--config.held_out.samples=2")  # fmt: skip
    program("generator", *words)
    assert "started from the parameters of" in capfd.readouterr().err
    sheets = []
    for name in ("imported-0000000", "samples-0000005"):
        with Image.open(place / "tuned" / "images" / f"{name}.png") as image:
            sheets.append(np.asarray(image))
    assert sheets[0].shape == sheets[1].shape == (2 * 2 * 32 + 6, 2 * 2 * 48 + 6, 3)
    # its averaged weights, its two classes, its preset, the seed of the run
    command("sample", generator, "--out", place / "tuned" / "again", "--number", 2, "--batch", 4)
    with np.load(place / "tuned" / "again" / "samples.npz") as arrays:
        again = image_grid.grid(arrays["arr_0"], 2, scale=2)
    np.testing.assert_array_equal(sheets[0], again)


@pytest.mark.long
def test_runs_of_which_nothing_is_held_out(place, capfd):
    """Two at a time of the latest steps stay, the last is the best; both programs go on."""
    data = ("--config.data.held_out=0", "--config.report.save=1", "--config.keep.latest=1")
    words = (*tokenizer_words(place, place / "all", variant="gray"), data[0])
    program("tokenizer", *words)
    said = capfd.readouterr().err
    assert "pictures: 2 classes (bird 9, cat 9); train 18, held out 0" in said
    assert "nothing is held out" in said and "step 2: held out" not in said
    command("pretokenize", "--tokenizer", place / "all", "--out", place / "all_tokens")
    assert "2 classes (bird 9, cat 9); train 18, held out 0" in capfd.readouterr().err
    words = (*generator_words(place, place / "all_generator", data="all_tokens"), *data[1:])
    for steps in (2, 3):
        program("generator", *words, f"--config.steps={steps}", "--config.held_out.samples=1")
    step = checkpoint.find(place / "all_generator")
    assert step.name == "3" and checkpoint.read_meta(step)["metrics"] == {}
    assert (place / "all_generator" / "images" / "samples-0000003.png").exists()
    code = cli.main(["evaluate", str(place / "all_generator")])
    assert code == 2 and "nothing was held out" in capfd.readouterr().err


def test_gray_pictures_without_classes(place, capfd):
    """One channel from the folder to the sampled picture; an unconditional generator."""
    program("tokenizer", *tokenizer_words(place, place / "g_tokenizer", "gray", "gray"))
    said = capfd.readouterr().err
    loaded = loading.load_tokenizer(place / "g_tokenizer")
    total = f"{parameters.count(parameters.split(loaded.module)[1]):,}"
    assert said.split("total")[1].split()[0] == total  # the table at the start
    assert loaded.classes == () and loaded.layout.grids == ((4, 4),)
    command("reconstruct", place / "g_tokenizer", place / "gray", "--out", place / "g_pairs")
    figures = json.loads((place / "g_pairs" / "figures.json").read_text())
    assert 3 < figures["psnr_db"] < 40
    with Image.open(place / "g_pairs" / "pairs.png") as image:
        assert image.mode == "L"


# ---------------------------------------------------------------- tokens and samples


def test_pretokenized_tokens_are_those_of_the_tokenizer(place, tokenizer, shards):
    source = token_shards.Source(shards)
    held_out = token_shards.Source(shards, split="held_out")
    assert source.classes == ("bird", "cat") and len(source) + len(held_out) == 18
    loaded = loading.load_tokenizer(tokenizer)
    assert source.header["tokenizer"]["fingerprint"] == loaded.fingerprint
    assert source.header["tokenizer"]["precision"] == "float32"
    assert source.views == ("center", "flip")
    # the pictures of cats have the right size already: nothing but PIL and the encoder
    files = sorted((place / "pictures" / "cat").iterdir())
    image_BHW3 = np.stack([np.asarray(Image.open(file), np.float32) / 255 for file in files])
    encode = jax.jit(lambda tokenizer, image_BHW3: tokenizer.encode(image_BHW3))
    stored = [(r["label"], r["tokens"]) for s in (source, held_out) for r in map(s.__getitem__,
              range(len(s)))]  # fmt: skip
    assert all(tokens_XLG.shape == (2, 4 * 6, 1) for _, tokens_XLG in stored)
    for view, flipped_BHW3 in enumerate((image_BHW3, image_BHW3[:, :, ::-1])):
        expected = np.asarray(encode(loaded.module, flipped_BHW3))
        found = [tokens_XLG[view] for label, tokens_XLG in stored if label == 1]
        assert sorted(t.tobytes() for t in found) == sorted(
            t.tobytes() for t in expected.astype(found[0].dtype)
        )


def test_a_second_pretokenize_finds_everything_there(place, tokenizer, shards, capfd):
    before = {file.name: file.stat().st_mtime_ns for file in shards.iterdir()}
    command("pretokenize", "--tokenizer", tokenizer, "--data", place / "pictures",
            "--out", shards, "--batch", 8)  # fmt: skip
    assert "is there already" in capfd.readouterr().err
    after = {file.name: file.stat().st_mtime_ns for file in shards.iterdir()}
    records = {name for name in before if name.endswith(".array_record")}
    assert records and {n: before[n] for n in records} == {n: after[n] for n in records}


def test_samples_depend_on_the_seed_and_not_on_the_batch(place, generator):
    out = {}
    for name, options in (
        ("first", ("--batch", 4)),
        ("again", ("--batch", 4)),
        ("seven", ("--batch", 7)),
        ("other", ("--batch", 4, "--seed", 2)),
    ):
        out[name] = place / "samples" / name
        seed = () if "--seed" in options else ("--seed", 1)
        command("sample", generator, "--out", out[name], "--number", 3, *options, *seed)
    files = sorted(file.name for file in out["first"].iterdir())
    assert len([name for name in files if name.endswith(".png")]) == 6 + 1
    for name in files:
        assert (out["first"] / name).read_bytes() == (out["again"] / name).read_bytes(), name
    first, seven, other = (np.load(out[n] / "tokens.npy") for n in ("first", "seven", "other"))
    np.testing.assert_array_equal(first, seven)
    assert first.shape == (6, 24, 1) and (first != other).mean() > 0.3
    with np.load(out["first"] / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 32, 48, 3) and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_1"], [0, 0, 0, 1, 1, 1])
        with Image.open(out["first"] / "seed1-00004-class1-cat.png") as image:
            np.testing.assert_array_equal(np.asarray(image), arrays["arr_0"][4])


def test_one_class_by_name(place, generator):
    out = place / "samples" / "cats"
    command("sample", generator, "--out", out, "--classes", "cat", "--number", 2, "--no-png",
            "--guidance", 1, "--batch", 4)  # fmt: skip
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], [1, 1])
    assert {file.suffix for file in out.iterdir()} == {".png", ".npz", ".npy", ".json", ".sha256"}


def test_evaluate_both_kinds(place, tokenizer, generator, capsys):
    command("evaluate", tokenizer, "--reconstruction", "--out", place / "figures.jsonl")
    command("evaluate", generator, "--out", place / "figures.jsonl")
    lines = (place / "figures.jsonl").read_text().splitlines()
    pixels, nats = (json.loads(line) for line in lines)
    assert 3 < pixels["psnr_db"] < 40 and -1 < pixels["ssim"] < 1
    assert 0 < pixels["codebook_usage"] <= 1
    # the figures that training measured of this step, and of no other weights
    for found, workdir, name in ((pixels, tokenizer, "l2"), (nats, generator, "nats_per_token")):
        best = checkpoint.find(workdir)
        trained = {step: checkpoint.read_meta(best.with_name(step))["metrics"] for step in "245"}
        assert all(trained[best.name][name] <= each[name] for each in trained.values())
        for step, figures in trained.items():
            near = abs(figures[name] - found[name]) < 1e-5 * abs(found[name])
            assert near == (step == best.name), (workdir, step)
    # five steps from uniform predictions over 32 codes: a little has been learned
    learned = [trained[step]["nats_per_token"] for step in "25"]
    assert learned[1] < learned[0] - 1e-4 and learned[1] < np.log(32) + 0.7
    np.testing.assert_allclose(nats["bits_per_token"], nats["nats_per_token"] / np.log(2))
    assert 0 < nats["unigram_nats"] < 1.2 * np.log(32)
    assert f"{nats['nats_per_token']:.4f}" in capsys.readouterr().out
    command("evaluate", generator, "--order", "random", "--orders", 3, "--images", 4)
    said = capsys.readouterr().out
    assert "nats_per_token (order random, 3 orders)" in said and "nats_orders_error" in said


# ---------------------------------------------------------------- what a user gets wrong


def contents(folder):
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file()
    }


def told(capfd, run):
    """The one message of a usage error."""
    capfd.readouterr()
    code = run()
    said = capfd.readouterr()
    assert code == 2 and "Traceback" not in said.err + said.out
    assert said.err.count("error:") == 1, said.err
    return said.err


def test_usage_errors_of_training(place, tokenizer, generator, shards, capfd):
    before = contents(place)

    def tokenizer_error(*words):
        return told(capfd, lambda: story("tokenizer", *words))

    def generator_error(*words):
        return told(capfd, lambda: story("generator", *words))

    words = tokenizer_words(place, tokenizer)
    said = tokenizer_error(*words, "--config.optimizer.learning_rat=1")
    assert "unknown config key 'optimizer.learning_rat'; did you mean" in said
    new = tokenizer_words(place, place / "tokenizer", data="no_such_folder")
    assert str(place / "no_such_folder") in tokenizer_error(*new)
    said = tokenizer_error(*tokenizer_words(place, place / "new"), "--config.batch_size=5")
    assert "config.batch_size=5: give 4 or 6" in said and "2 devices" in said
    assert "stepz" in tokenizer_error(*words, "--config.stepz", "3")
    assert "no config file" in tokenizer_error("--config", "nowhere.py", "--workdir", tokenizer)
    words = generator_words(place, generator, "no_such_tokens")
    assert str(place / "no_such_tokens") in generator_error(*words)
    words = generator_words(place, generator)
    said = generator_error(*words[:-1])
    assert "--config.data.tokens=DIR" in said and "--config.data.images=DIR" in said
    said = generator_error(*words, f"--config.data.text={place}")
    assert f"{place}/train.npy" in said and "found no file" in said
    said = generator_error(*words[:-1], f"--config.data.tokenizer={tokenizer}",
                           "--config.data.views=middle,ten")  # fmt: skip
    assert "views must be different ones" in said
    after = contents(place)
    assert {n: v for n, v in after.items() if not n.endswith("/lock")} == {
        n: v for n, v in before.items() if not n.endswith("/lock")
    }


def test_tokens_of_another_tokenizer(place, tokenizer, shards, generator, capfd):
    """Refused before training, before sampling, and before they are mixed with others."""
    other = place / "other"
    shutil.copytree(tokenizer / "checkpoints" / str(EVERY), other / "checkpoints" / str(EVERY))
    before = contents(place)
    words = (*generator_words(place, place / "generator"), f"--config.data.tokenizer={other}")
    said = told(capfd, lambda: story("generator", *words))
    assert "another tokenizer" in said and "pretokenize" in said
    words = ["pretokenize", "--tokenizer", other, "--data", place / "pictures", "--out", shards]
    said = told(capfd, lambda: cli.main([*map(str, words), "--batch", "8"]))
    assert "fingerprint" in said and str(shards) in said
    words = ["sample", generator, "--tokenizer", other, "--out", place / "nothing"]
    assert "another tokenizer" in told(capfd, lambda: cli.main([*map(str, words)]))
    after = contents(place)
    assert {n: v for n, v in after.items() if not n.endswith("/lock")} == {
        n: v for n, v in before.items() if not n.endswith("/lock")
    }


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--classes", "7"), ("class ids are 0 to 1 (bird, cat)", "7")),
        (("--classes", "0-2"), ("class ids are 0 to 1", "0-2")),
        (("--classes", "dog"), ("unknown class 'dog'", "bird, cat")),
        (("--number", "0"), ("--number",)),
        (("--seed", "-1"), ("--seed",)),
        (("--preset", "papr"), ("preset", "default", "papr")),
        (("--top-k", "33"), ("32", "33")),
        (("--tokenizer", "nowhere"), ("nowhere", "--tokenizer")),
    ],
)
def test_usage_errors_of_sample(place, generator, capfd, words, parts):
    out = place / "nothing"
    said = told(capfd, lambda: cli.main(["sample", str(generator), "--out", str(out), *words]))
    assert all(part in said for part in parts), said
    assert not out.exists()


@pytest.mark.parametrize("words", [("--number", "2048"), ("--total", "4096")])
def test_a_batch_that_no_device_holds_is_refused(place, generator, capfd, monkeypatch, words):
    """As on an accelerator, which says what it has; nothing is drawn.

    A folder of very many images may be begun: the same command with a smaller batch goes on.
    """
    monkeypatch.setattr(memory, "room", lambda mesh: 200_000)
    out = place / f"too_many{words[0]}"
    words = ("sample", str(generator), "--out", str(out), *words, "--batch", "4096")
    said = told(capfd, lambda: cli.main([*words]))
    for part in (
        "a batch of 4096 images needs",
        "keys and values",
        "the largest --batch that fits",
    ):
        assert part in said, said
    assert not list(out.rglob("*.png")) and not list(out.rglob("*.npz"))


def test_damaged_and_missing_checkpoints(place, tokenizer, generator, capfd):
    damaged = shutil.copytree(generator, place / "damaged")
    step = checkpoint.find(damaged)
    for file in (step / "state").rglob("d/*"):  # where the arrays lie
        os.truncate(file, file.stat().st_size // 2)
    out = str(place / "nothing")
    said = told(capfd, lambda: cli.main(["sample", str(damaged), "--out", out]))
    assert f"{step} is damaged" in said and "use an earlier step" in said
    said = told(capfd, lambda: cli.main(["evaluate", str(damaged)]))
    assert "damaged" in said
    said = told(capfd, lambda: cli.main(["sample", str(place / "nowhere"), "--out", out]))
    assert "no checkpoint at" in said and "nowhere" in said
    said = told(capfd, lambda: cli.main(["sample", str(tokenizer), "--out", out]))
    assert "holds a tokenizer; need the checkpoint of a generator" in said
    said = told(capfd, lambda: cli.main(["evaluate", str(generator), "--reconstruction"]))
    assert "needs a tokenizer" in said
    assert "found 'smaple'; did you mean 'sample'?" in told(
        capfd, lambda: cli.main(["smaple", out])
    )
    assert not (place / "nothing").exists()
