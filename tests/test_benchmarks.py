"""Every benchmark runs; what it would print on an idle machine is not a test's affair."""

import argparse
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import recipes
from tokgen import cli, runtime
from tokgen.checkpoints import checkpoint, loading
from tokgen.config import building, reading

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
PARTS = {"machine", "beside", "networks", "peers", "peer_steps", "aot"}  # of programs
PROGRAMS = {file.stem for file in FOLDER.glob("*.py")} - PARTS
PAIR = ["configs/tokenizer/shapes.py", "configs/generator/shapes.py"]


def quick(name: str, *words: str) -> list[str]:
    """The lines that a benchmark prints."""
    # a quick run is hardly more than compiling: without optimizations it takes half the time
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("NPROC", None)  # it goes with the eight devices of this process
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_header(line: str) -> None:
    """Date, versions, hardware and load."""
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC; Python 3\.\d+", line)
    assert re.search(r"numpy \d+\.\d+.*; .*\d+ cores.*; load [\d.]+ [\d.]+ [\d.]+$", line)


def figures(line: str) -> list[float]:
    """The numbers behind the words of a line."""
    return [float(text) for text in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w%])", line)]


@pytest.mark.long
def test_training_step():
    header, *lines = quick("training_step", "--devices", "2")
    check_header(header)
    assert ", 2 x " in header
    assert [line.split(":")[0] for line in lines[::4]] == PAIR
    for first in range(0, len(lines), 4):
        rate, step, cost = (figures(line)[0] for line in lines[first + 1 : first + 4])
        batch = figures(lines[first].split("batch")[1])[0]
        # one repeat: the same seconds said in two ways
        assert rate * step == pytest.approx(1000 * batch, rel=0.1)
        assert cost > 0


@pytest.mark.long
def test_training_step_table():
    header, titles, line = quick("training_step", "--table", "--pairs", "1", "--rows", "RAR 384x6")
    check_header(header)
    assert titles.split()[:2] == ["task", "dtype"] and line.startswith("RAR 384x6")
    cost, least, most, first, peak = figures(line[36:])[:5]
    assert 0 < least <= cost <= most and first > 0 and peak > 100


@pytest.mark.long
def test_decode_without_cache_draws_what_is_drawn_with_one():
    header, _, _, *lines = quick("decode")
    check_header(header)
    rows = [line.split() for line in lines]
    assert [row[:3] for row in rows] == [
        ["2", weight, cache] for weight in ("1.0", "2.0") for cache in ("yes", "no")
    ]
    assert {row[-1] for row in rows} == {"100.00%"}


@pytest.mark.long
def test_decode_table():
    """A row per network and dtype, measured in a process of its own; a peer only where it is."""
    rows = ["TiTok generator 384x6", "sampler, 1024 x 4096"]
    header, titles, *lines = quick("decode", "--table", "--pairs", "1", "--rows", *rows)
    check_header(header)
    assert titles.split()[:2] == ["task", "dtype"] and len(lines) == 4
    for line, row in zip(lines, [rows[0], rows[0], rows[1], rows[1]], strict=True):
        assert line.startswith(row)
        cost, least, most, first, peak = figures(line[36:])[:5]
        assert 0 < least <= cost <= most and first > 0 and peak > 100


@pytest.mark.long
def test_tokenizers():
    header, titles, *lines = quick("tokenizers", "--precision", "float32")
    check_header(header)
    assert titles.split()[:2] == ["task", "dtype"]
    assert [line.split()[2] for line in lines] == ["decode", "encode"]
    for line in lines:
        cost, least, most, first, peak = figures(line[36:])[:5]
        assert 0 < least <= cost <= most and first > 0 and peak > 100


def test_table_of_an_unknown_row(monkeypatch):
    """Refused before anything is measured, with the rows that there are."""
    monkeypatch.syspath_prepend(FOLDER)
    beside = importlib.import_module("beside")
    with pytest.raises(SystemExit, match="no row is called RAR-C; there are: RAR-B"):
        beside.table("decode.py", {"RAR-B": None}, ["float32"], argparse.Namespace(rows=["RAR-C"]))


@pytest.mark.long
def test_memory():
    header, columns, *lines = quick("memory")
    check_header(header)
    assert [line.split()[0] for line in lines] == ["tokenizer", "generator", "sampling"]
    for line in lines:
        before = line.index("compiled") if "compiled" in line else line.index("arguments")
        peak, imports = figures(line[:before])[-2:]
        assert peak > imports > 10
        arguments, temporary, _ = figures(line[before:])
        assert 0 < arguments < peak
        assert 0 < temporary < peak
    assert columns.split()[0] == "program"


@pytest.mark.long
def test_data_loading():
    header, *lines = quick("data_loading")
    check_header(header)
    rates = {line[:32].strip(): figures(line[32:]) for line in lines[2:-3]}
    assert rates["bare, pil"][-1] == rates["bare, simplejpeg"][-1] == 1.0
    assert min(rate[0] for rate in rates.values()) > 0
    assert len(rates) == 20
    assert "images per CPU second" in lines[-3]
    # a view of 256 tokens of two bytes, not all ten
    assert "one view of each" in lines[-1] and "512 to the device" in lines[-1]


def pictures(folder: pathlib.Path, *names: str, count: int = 8) -> pathlib.Path:
    """Pictures of noise, three of four to train on, in the folders of `names`."""
    drawn = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    for number, image_HW3 in enumerate(drawn):
        split = "train" if 4 * number < 3 * count else "test"
        place = folder / split / names[number % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HW3).save(place / f"{number}.png")
    return folder


@pytest.mark.long
def test_quantizers(tmp_path):
    words = ["--data", str(pictures(tmp_path / "images", ".")), "--workdir", str(tmp_path / "runs")]
    header, titles, _, row = quick(
        "quantizers", *words, "--names", "fsq", "--steps", "2", "--images", "2"
    )
    check_header(header)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(titles.strip("|").split("|")) and cells[0] == "fsq"
    assert float(cells[1].split()[0]) > 5 and cells[5] == "638"  # 64 log2(1000)


def test_known_answers():
    header, titles, row = quick("known_answers", "--families", "raster")
    check_header(header)
    name, count, steps, nats, _, _, entropy, excess, *_ = row.split()
    assert (name, steps, titles.split()[0]) == ("raster", "2", "family")
    assert int(count.replace(",", "")) > 1000
    # hardly trained: what an even guess pays, and what that is beyond the entropy
    assert float(nats) == pytest.approx(np.log(8), rel=0.05) and 1 < float(entropy) < np.log(8)
    assert float(excess) == pytest.approx(100 * (float(nats) / float(entropy) - 1), abs=3)


@pytest.mark.long
def test_memorise():
    header, titles, row = quick("memorise", "--family", "masked")
    check_header(header)
    name, nats, right, steps, seconds = row.split()
    assert (name, steps, titles.split()[0]) == ("masked", "4", "family")
    assert 3 < float(nats) < 5 and right.endswith("%") and float(seconds) > 0  # log 64 is 4.16


@pytest.mark.long
def test_families(tmp_path, monkeypatch):
    """A tokenizer and a generator as they started: figures of noise, but all of them; a grid."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    data = pictures(tmp_path / "images", "bird", "cat")
    narrow = ["encoder.widths=(16,)", "decoder.widths=(16,)", "encoder.blocks=1"]
    settings = reading.load(PAIR[0], narrow)
    tokenizer = tmp_path / "tokenizer"
    layout = recipes.square(8, 240)
    recipes.save(
        tokenizer,
        settings,
        lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)),
        kind="tokenizer",
        layout=layout,
        best="l2",
    )
    shards, generator = tmp_path / "tokens", tmp_path / "generator"
    words = ["--tokenizer", str(tokenizer), "--data", str(data), "--out", str(shards)]
    assert cli.main(["pretokenize", *words, "--batch", "8"]) == 0
    loaded = loading.load_tokenizer(tokenizer)
    small = reading.load(PAIR[1], ["generator.width=16", "generator.depth=1"])
    recipes.save(
        generator,
        small,
        lambda: building.generator(small, layout, 2, rngs=nnx.Rngs(0)),
        kind="generator",
        layout=layout,
        classes=("bird", "cat"),
        best="nats_per_token",
        tokenizer=checkpoint.reference(loaded.step, generator)
        | {"fingerprint": loaded.fingerprint},
    )
    words = ["--data", str(data), "--tokens", str(shards), "--tokenizer", str(tokenizer)]
    words += ["--out", str(tmp_path / "grids"), "--generators", f"raster={generator}"]
    header, judged, titles, row = quick("families", *words)
    check_header(header)
    assert "of 2 held-out images" in judged
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(titles.strip("|").split("|")) and cells[0] == "raster"
    token, image = (float(cell.split()[0]) for cell in cells[2:4])
    assert token == pytest.approx(np.log(240), rel=0.1) and image == pytest.approx(
        64 * token, rel=1e-3
    )
    assert min(float(cell.split()[0]) for cell in cells[5:]) > 0
    with Image.open(tmp_path / "grids" / "raster.png") as grid:
        assert grid.size[0] > grid.size[1] > 2 * 64


@pytest.mark.long
def test_ladders(tmp_path, monkeypatch):
    """A row per set, a figure per column; a plot; every distance is said to rise or not."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    data, reference = tmp_path / "images", tmp_path / "reference.npz"
    pictures(data, "bird", "cat", count=64)
    words = ["reference", str(data), "--out", str(reference), "--steps", "2", "--split", "all"]
    assert cli.main(words) == 0
    narrow = ["encoder.widths=(16,)", "decoder.widths=(16,)", "encoder.blocks=1"]
    settings, tokenizer = reading.load(PAIR[0], narrow), tmp_path / "tokenizer"
    recipes.save(
        tokenizer,
        settings,
        lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)),
        kind="tokenizer",
        layout=recipes.square(8, 240),
        best="l2",
    )
    words = ["--data", str(data), "--reference", str(reference), "--tokenizer", str(tokenizer)]
    header, *lines = quick("ladders", *words, "--out", str(tmp_path / "plots"))
    check_header(header)
    rows = [line for line in lines if line.startswith("|")]
    found = json.loads((tmp_path / "plots" / "ladders.json").read_text())
    assert len(rows) == len(found) + 2 and "blur 2.0" in found
    columns = [row.count("|") for row in rows]
    assert len(set(columns)) == 1 and "| fid |" in rows[0]
    (said,) = [line for line in lines if line.startswith("fid:")]
    assert "real < reconstructed < blur 1.0 < noise" in said
    with Image.open(tmp_path / "plots" / "ladders.png") as plot:
        assert min(plot.size) > 300


def test_metrics():
    """Either version of a figure says the same; the peak holds what was there first."""
    header, titles, _, *rows = quick("metrics")
    check_header(header)
    cells = {row.split("|")[1].strip(): row.split("|")[1:-1] for row in rows}
    assert all(len(row) == titles.count("|") - 1 for row in cells.values())
    for case in ("fid", "recall"):
        values = [figures(cells[name][2]) for name in (case, f"{case}_plain")]
        assert min(values[0]) > 0 and values[0] == pytest.approx(values[1], rel=1e-4)
    for row in cells.values():
        peak, first = (float(cell) for cell in row[-2:])
        assert peak >= first > 10


@pytest.mark.long
def test_full_size():
    header, columns, tokenizer, generator = quick("full_size", "--precisions", "float32")
    check_header(header)
    assert columns.split()[:4] == ["model", "file", "import", "of"]
    assert tokenizer.startswith("llamagen-tokenizer ") and generator.startswith("llamagen-l ")
    assert len(figures(tokenizer)) == 4  # the file, the peak, seconds, the peak in files
    assert len(figures(generator)) == 6 and "failed" not in tokenizer + generator


@pytest.mark.long
def test_device(tmp_path, monkeypatch):
    """On a CPU, whose rates are measured; what is not reached is listed, and no case runs over."""
    monkeypatch.setenv("OUT", str(tmp_path))
    header, columns, row, missed = quick("device")
    check_header(header)
    assert columns.split()[:3] == ["case", "device", "compiled"] and row.startswith("rar-b:64 ")
    assert min(figures(row)) > 0 and missed == "not reached: rar-b:1 (no time left)"
    (found,) = json.loads((tmp_path / "device.json").read_text())["found"]
    assert found["sound"] and found["roofline"] > 0 and found["batch"] == 2
    *_, missed = quick("device", "--seconds", "1")
    assert missed == "not reached: rar-b:64 (no time left), rar-b:1 (no time left)"


@pytest.mark.long
def test_roofline():
    chip, titles, row = quick("roofline", "--chip", "A100", "--batch", "2")
    assert chip.startswith("A100: 312 TFLOP/s, 2.00 TB/s, 80 GB") and titles.endswith("images/s")
    assert row.startswith("rar-b ") and len(figures(row)) == 5 and min(figures(row)) > 0


@pytest.mark.long
def test_editing(tmp_path):
    recipes.tiny(tmp_path, "raster", "masked", "next_scale")
    demo = str(tmp_path / "runs")
    words = ("--images", "20", "--particles", "2", "--masks", "left", "nothing", "--steps", "8")
    words += ("--sheets", str(tmp_path / "sheets"))
    parts = ("--parts", "likelihood", "growing", "scales")
    header, *lines = quick("editing", demo, "--families", "masked", *words, *parts)
    check_header(header)
    rows = [line.split() for line in lines if line]
    real, pasted, edited = rows[0], rows[2], rows[3]
    assert real[:5] == ["nats", "of", "20", "real", "images:"]
    assert pasted[:3] == ["masked", "left", "2"] and float(pasted[3]) > 0
    assert edited[1] == "nothing" and edited[6] == real[5] and float(edited[9]) == 0
    seams = {row[1]: float(row[2]) for row in rows if row[0] == "masked" and len(row) == 3}
    assert set(seams) == {"halves", "wholes"} and 0 <= min(seams.values()) <= 1
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 2 + 2 + 3


def test_every_benchmark_is_run_here_and_told_in_the_results():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    results = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    for program in PROGRAMS:
        assert any(name.startswith(program) for name in tested), program
        assert f"benchmarks/{program}.py" in results
