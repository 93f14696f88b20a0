"""Measuring as a job of several processes: what one process of as many devices prints and writes.

Each process sees its share on its own devices; programs are of the same size, so figures are equal
to the bit. The pictures that training draws are of all devices together.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import recipes, test_processes
from tests.test_processes import Job, done
from tokgen import archives
from tokgen.checkpoints import checkpoint, loading
from tokgen.config import building
from tokgen.data import token_shards

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # some start six programs
IMAGES = 600  # three runs of a reference
TOKGEN = ("-m", "tokgen.cli")
JOBS = [(2, 4), (4, 2)]  # processes, devices of each


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Tiny networks in `runs`, a folder of images of which two cannot be read, and a reference."""
    folder = tmp_path_factory.mktemp("measured")
    recipes.tiny(folder, "raster", "masked")
    draw = np.random.default_rng(0)
    for index in range(IMAGES):
        name = recipes.shapes.CLASSES[index % 10]
        file = folder / "images" / name / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        patch_HW3 = draw.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(np.kron(patch_HW3, np.ones((4, 4, 1), np.uint8))).save(file)
    for index in (30, 590):
        name = recipes.shapes.CLASSES[index % 10]
        (folder / "images" / name / f"{index:03d}.png").write_bytes(b"no picture")
    done([*referred(folder), "--out", folder / "reference.npz"])
    words = [*TOKGEN, "pretokenize", "--tokenizer", folder / "runs/tokenizer", "--views", "center"]
    done([*words, "--data", folder / "images", "--out", folder / "tokens"])
    return folder


def referred(place):
    words = (*TOKGEN, "reference", place / "images", "--split", "all")
    return [*words, "--steps", 3, "--images", IMAGES]


def drawn(place, out):
    words = [*TOKGEN, "evaluate", place / "runs/generator", "--protocol", "local", "--samples", 150]
    return [*words, "--reference", place / "reference.npz", "--accept", "few", "--out", out]


def results(folder):
    """What a score wrote, without its clock and its own places."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def same_folders(left, right):
    """Every file but those that say when, and where."""
    ours, theirs = (
        {str(f.relative_to(folder)): f for folder in [root] for f in root.rglob("*") if f.is_file()}
        for root in (left, right)
    )
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"results.jsonl", "index.html"}:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    assert results(left) == results(right)


def told(text):
    """What a process printed for the user: the rows of metrics."""
    return [line for line in text.splitlines() if "psnr" in line or "nats" in line or "FID" in line]


@pytest.mark.parametrize("processes, devices", JOBS)
def test_a_reference_of_many_processes_is_that_of_one(processes, devices, place, tmp_path):
    words = [*referred(place), "--out", tmp_path / "many.npz"]
    texts = done(words, processes=processes, devices=devices)
    one, many = (dict(archives.arrays(p)) for p in (place / "reference.npz", tmp_path / "many.npz"))
    records = [json.loads(str(found.pop("record"))) for found in (one, many)]
    assert one.keys() == many.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(many[name], array, err_msg=name)
    for record in records:
        assert record.pop("time") and record.pop("digest")
    assert records[0] == records[1] and records[0]["count"] == IMAGES - 2
    assert list(records[1]["unreadable"]["files"].values()) and "598 images" in texts[0]
    assert not [text for text in texts[1:] if "images of" in text]  # one speaks
    assert [file.name for file in tmp_path.iterdir()] == ["many.npz"]


@pytest.mark.parametrize(
    "kind, data, processes, devices",
    [
        ("tokenizer", "images", 2, 4),
        ("tokenizer", "images", 4, 2),
        ("generator", "images", 2, 4),
        ("generator", "tokens", 2, 4),
        ("masked", "tokens", 4, 2),
    ],
)
def test_held_out_figures_of_many_processes_are_those_of_one(
    kind, data, processes, devices, place, tmp_path
):
    words = [*TOKGEN, "evaluate", place / "runs" / kind, "--data", place / data, "--batch", 24]
    words += ["--split", "train" if data == "tokens" else "all"]
    words += ["--images", IMAGES if kind == "tokenizer" else 200]
    texts = done([*words, "--out", tmp_path / "one.jsonl"])
    many = done([*words, "--out", tmp_path / "many.jsonl"], processes=processes, devices=devices)
    one, job = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    for line in (*one, *job):
        assert line.pop("time")
    assert one == job and len(one) == 1
    assert told(many[0]) == told(texts[0]) and told(many[0])
    assert not [text for text in many[1:] if told(text)]


@pytest.mark.parametrize("processes, devices", JOBS)
def test_a_score_of_a_generator_by_many_processes_is_that_of_one(
    processes, devices, place, tmp_path
):
    """Whole, and going on with what one process began."""
    texts = done(drawn(place, tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "begun")
    many = done(drawn(place, tmp_path / "many"), processes=processes, devices=devices)
    same_folders(tmp_path / "many", tmp_path / "one")
    assert told(many[0]) == told(texts[0]) and told(many[0])
    assert not [text for text in many[1:] if told(text)]
    for name in ("results.jsonl", "index.html", "samples.npz"):
        (tmp_path / "begun" / name).unlink()
    for part in sorted((tmp_path / "begun" / "parts").iterdir())[1:]:
        part.unlink()
    done(drawn(place, tmp_path / "begun"), processes=processes, devices=devices)
    same_folders(tmp_path / "begun", tmp_path / "one")


def test_a_mesh_is_of_the_devices_of_each_process(place, tmp_path):
    """Half of a network on each of two devices, where they read images and where they draw."""
    words = [*TOKGEN, "evaluate", place / "runs/generator", "--data", place / "tokens"]
    words += ["--split", "train", "--images", 100, "--mesh=-1,2,1"]
    found = []
    for name, how in (("one", {}), ("many", dict(processes=2, devices=4))):
        done([*words, "--out", tmp_path / f"{name}.jsonl"], **how)
        found.append(json.loads((tmp_path / f"{name}.jsonl").read_text()))
    assert found[1]["nats_per_token"] == pytest.approx(found[0]["nats_per_token"], rel=1e-6)
    assert found[1]["images"] == 100
    done([*drawn(place, tmp_path / "score"), "--mesh=-1,2,1"], processes=2, devices=4)
    assert results(tmp_path / "score")[0]["samples"] == 150


def test_a_generator_of_texts_is_measured_by_many_as_by_one(place, tmp_path):
    settings = recipes.load("generator/shapes:raster", ["generator.width=16", "generator.depth=1"])
    settings.generator.update(texts=(3, 8), conditioning="captions")
    tokenizer = loading.load_tokenizer(place / "runs/tokenizer")
    recipes.save(
        tmp_path / "captions",
        settings,
        lambda: recipes.scattered(
            building.generator(settings, tokenizer.layout, 0, rngs=nnx.Rngs(0))
        ),
        kind="generator",
        layout=tokenizer.layout,
        best="nats_per_token",
        classes=(),
        tokenizer=checkpoint.reference(tokenizer.step, tmp_path / "captions")
        | {"fingerprint": tokenizer.fingerprint},
    )
    count, draw = len(token_shards.Source(str(place / "tokens"))), np.random.default_rng(3)
    (tmp_path / "texts").mkdir()
    np.save(tmp_path / "texts/train.npy", draw.normal(size=(count, 3, 8)).astype(np.float32))
    asked = draw.normal(size=(5, 3, 8)).astype(np.float32)
    np.savez(tmp_path / "asked.npz", features=asked, mask=np.ones((5, 3), bool))
    words = [*TOKGEN, "evaluate", tmp_path / "captions", "--data", place / "tokens"]
    words += ["--split", "train", "--images", 100, "--text", tmp_path / "texts"]
    score = [*TOKGEN, "evaluate", tmp_path / "captions", "--protocol", "local", "--samples", 150]
    score += ["--reference", place / "reference.npz", "--accept", "few", "duplicates"]
    score += ["--text", tmp_path / "asked.npz"]
    found = []
    for name, how in (("one", {}), ("many", dict(processes=2, devices=4))):
        done([*words, "--out", tmp_path / f"{name}.jsonl"], **how)
        found.append(json.loads((tmp_path / f"{name}.jsonl").read_text()))
        assert found[-1].pop("time")
        done([*score, "--out", tmp_path / name], **how)
    assert found[0] == found[1] and found[0]["images"] == 100
    same_folders(tmp_path / "many", tmp_path / "one")


def test_a_score_of_reconstructions_by_many_processes_is_that_of_one(place, tmp_path):
    words = [*TOKGEN, "evaluate", place / "runs/tokenizer", "--reconstruction", "--split", "all"]
    words += ["--data", place / "images", "--protocol", "local", "--accept", "few", "duplicates"]
    words += ["--reference", place / "reference.npz"]
    done([*words, "--out", tmp_path / "one"])
    done([*words, "--out", tmp_path / "many"], processes=2, devices=4)
    same_folders(tmp_path / "many", tmp_path / "one")
    assert results(tmp_path / "many")[0]["unreadable"]["count"] == 2


def samples(folder, *, odd=()):
    """A folder of PNGs, one of another size where it is asked for."""
    draw = np.random.default_rng(1)
    folder.mkdir()
    for index in range(200):
        side = 16 if index in odd else 32
        image_HW3 = draw.integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(image_HW3).save(folder / f"{index:03d}.png")
    return folder


def test_given_samples_are_scored_by_many_as_by_one(place, tmp_path):
    """A folder of images, an archive, and a folder that is being filled."""
    samples(tmp_path / "folder")
    image_NHW3 = np.random.default_rng(2).integers(0, 255, (200, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "archive.npz", arr_0=image_NHW3, arr_1=np.arange(200) % 10)
    sampled = [*TOKGEN, "sample", place / "runs/generator", "--total", 300, "--part", "1/2"]
    done([*sampled, "--out", tmp_path / "growing"])
    for given in ("folder", "archive.npz", "growing"):
        words = [*TOKGEN, "evaluate", tmp_path / given, "--protocol", "local", "--accept", "few"]
        words += ["--reference", place / "reference.npz", "--out"]
        done([*words, tmp_path / "one" / given])
        done([*words, tmp_path / "many" / given], processes=2, devices=4)
        same_folders(tmp_path / "many" / given, tmp_path / "one" / given)


def test_what_one_process_meets_all_refuse_in_one_message(place, tmp_path):
    bad = samples(tmp_path / "bad", odd=[190])
    words = [*TOKGEN, "evaluate", bad, "--protocol", "local", "--out", tmp_path / "refused"]
    words += ["--reference", place / "reference.npz", "--accept", "few"]
    with Job(words, processes=2, devices=4) as job:
        codes, texts = job.end(200)
    errors = [[line for line in text.splitlines() if "error:" in line] for text in texts]
    assert codes == [2, 2] and errors[0] == errors[1], "\n".join(texts)
    assert len(errors[0]) == 1 and "190.png is 16 x 16" in errors[0][0]
    assert not [text for text in texts if "Traceback" in text]


def test_a_sweep_by_many_processes_is_that_of_one(place, tmp_path):
    words = [*TOKGEN, "sweep", place / "runs/generator", "--protocol", "local", "--accept", "few"]
    words += ["--reference", place / "reference.npz", "--samples", 70, "--seeds", 1]
    words += ["--temperature", 0.5, 1]
    done([*words, "--out", tmp_path / "one"])
    texts = done([*words, "--out", tmp_path / "many"], processes=2, devices=4)
    one, many = (json.loads((tmp_path / n / "sweep.json").read_text()) for n in ("one", "many"))
    assert one == many and len(one["settings"]) == 2
    for name in ("t0.5-seed0", "t1-seed0"):
        same_folders(tmp_path / "many" / name, tmp_path / "one" / name)
    done([*words, "--out", tmp_path / "many"], processes=2, devices=4)  # all is there
    assert "best" in texts[0] and "best" not in texts[1]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: work directory} of a tokenizer for each kind of generator."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for kind in ("shapes.py", "shapes.py:pyramid"):
        words = [str(word).replace("shapes.py", kind) for word in test_processes.TOKENIZER]
        found[kind] = folder / kind
        done([*words, "--config.steps=1", "--workdir", found[kind]])
    return found


@pytest.mark.parametrize(
    "family, processes, permuted, mesh, strategy",
    [
        ("raster", 2, False, (8, 1, 1), "data"),
        ("raster", 2, False, (1, 1, 8), "tensor"),
        ("raster", 2, True, (2, 4, 1), "fsdp"),
        ("raster", 4, True, (2, 2, 2), "tensor"),
        ("masked", 2, True, (1, 4, 2), "tensor"),
        ("next_scale", 4, True, (2, 4, 1), "fsdp"),
    ],
)
def test_the_picture_that_training_draws_is_that_of_one_process(
    family, processes, permuted, mesh, strategy, tokenizers, tmp_path
):
    tokenizer = tokenizers["shapes.py:pyramid" if family == "next_scale" else "shapes.py"]
    words = [str(w).replace("shapes.py", f"shapes.py:{family}") for w in test_processes.GENERATOR]
    words += [f"--config.data.tokenizer={tokenizer}", "--config.steps=1"]
    words += ["--config.held_out.samples=2", f"--config.strategy={strategy}"]
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    words += [f"--config.mesh.{axis}={size}" for axis, size in axes]
    done([*words, "--workdir", tmp_path / "one"])
    program = test_processes.PERMUTED if permuted else ""
    how = dict(processes=processes, devices=8 // processes, program=program)
    done([*words, "--workdir", tmp_path / "many"], **how)
    pictures = [sorted((tmp_path / name / "images").iterdir()) for name in ("one", "many")]
    assert [[file.name for file in found] for found in pictures] == [["samples-0000001.png"]] * 2
    one, many = (np.asarray(Image.open(found[0])).astype(int) for found in pictures)
    assert one.std() > 10 and np.abs(one - many).max() <= 1
