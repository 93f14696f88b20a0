"""The page tells what was measured, holds its pictures, and replaces an old one only when whole."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tokgen import runtime
from tokgen.data import shapes
from tokgen.demo import demo, edited, families, page
from tokgen.interfaces import UserError


def measured() -> tuple[dict, dict, dict]:
    summary = {
        "psnr_db": 28.3,
        "ssim": 0.91,
        "codebook_usage": 0.95,
        "codebook_perplexity": 31.0,
        "class_accuracy": 0.875,
        "class_accuracy_by_class": dict.fromkeys(shapes.CLASSES, 0.5),
        "classified_samples": 500,
        "classifier_accuracy": 1.0,
        "classifier_on_reconstructions": 0.99,
        "nats_per_token": 0.7,
        "nats_error": 0.004,
        "unigram_nats": 3.4,
        "edits": {"left": 0.625, "center": 0.75, "classes": 0.375, "variation": 1.0},
        "sampling": {"temperature": 0.7, "weight": 2.0},
        "seconds": {"The generator is trained": 125.4},
        "minutes": 8.1,
        "cpu_minutes": 14.0,
        "machine": "a <machine>",
        "date": "2026-01-01",
        "versions": {"jax": "1.2.3"},
    }
    names = (
        "first",
        "pairs",
        "completions_0",
        "completions_1",
        "tokenizer_curves",
        "generator_curves",
    )
    names += tuple(f"class_{name}" for name in shapes.CLASSES)
    names += tuple(f"edit_{kind}" for kind in edited.SHOWN)
    pictures = {name: np.full((4, 6, 3), i, np.uint8) for i, name in enumerate(names)}
    pictures["decode"] = b"GIF of a decode"
    told = {
        "layout": "8 x 8 tokens of 240 codes",
        "tokenizer_parameters": "1,000",
        "generator_parameters": "2,000",
        "tokenizer_steps": 10,
        "generator_steps": 20,
        "freedom": "free",
        "folder": "runs/my demo",
    }
    return summary, pictures, told


def test_page_holds_every_picture_and_figure():
    summary, pictures, told = measured()
    text = page.document(summary, pictures, told)
    found = []
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    assert sorted(int(image[0, 0, 0]) for image in found) == list(range(len(pictures) - 1))
    assert base64.b64encode(pictures["decode"]).decode() in text
    for figure in ("28.30 dB", "95.0 %", "87.5 %", "0.700", "3.400", "8.1 minutes", "of 240"):
        assert figure in text
    assert "a &lt;machine&gt;" in text and "<machine>" not in text
    for title, share in (("a half", 62), ("a box", 75), ("Another class", 38), ("variation", 100)):
        assert re.search(rf"{title}</b>: [^<]*; {share} % recognised\.<", text)
    assert re.search(r"Out-painting</b>: [^<]*more\.<", text)  # of a class of none
    assert "http" not in text  # one file, which needs nothing from anywhere


def test_page_begins_with_a_picture_and_says_what_recognised_means_before_it_says_it():
    text = page.document(*measured())
    body = text[text.index("<body>") :]
    assert len(body[: body.index("<img")]) < 400  # a title and two lines, on a phone too
    assert body.index("A <b>classifier</b>") < body.index("recognised")
    assert "prefers-color-scheme: dark" in text and "refresh" not in text
    assert "<td>2 min 05 s</td>" in text
    assert (
        "tokgen app &#x27;runs/my demo/generator&#x27; &#x27;runs/my demo/tokenizer&#x27;" in text
    )


def test_page_shows_families_side_by_side():
    summary, pictures, told = measured()
    assert "Four families" not in page.document(summary, pictures, told)
    figures = dict(
        tokens=64,
        nats_per_token=0.7,
        nats_per_image=44.8,
        bound=False,
        unigram_nats=3.5,
        class_accuracy=0.875,
        ms_per_image=12.3,
        steps=2000,
    )
    summary["families"] = {
        name: figures | {"edits": dict.fromkeys(kinds, 0.125)}
        for name, kinds in families.EDITS.items()
    }
    summary["families"]["masked"] |= {"bound": True, "nats_per_token": 0.9}
    for i, (name, kinds) in enumerate(families.EDITS.items()):
        pictures[f"family_{name}"] = np.full((4, 6, 3), 100 + i, np.uint8)
        pictures[f"decode_{name}"] = b"GIF of a decode"
        for kind in kinds:
            pictures[f"edit_{kind}_{name}"] = np.full((4, 6, 3), 200 + i, np.uint8)
    text = page.document(summary, pictures, told)
    assert text.count("data:image/png") + text.count("data:image/gif") == len(pictures)
    assert "at most 0.900" in text and text.count("at most") == 1
    assert "next scale" in text and "12.3" in text and "44.8" in text
    assert text.count("12 % recognised") == 9  # finer scales by one of them alone


def test_what_is_shown_step_by_step_are_classes_of_shapes():
    assert set(page.TRACED + families.TRACED) <= set(shapes.CLASSES)


def test_freedom_in_words():
    assert "radius 10.5 to 13.5" in demo.describe(shapes.EASY)
    assert "any two distinct colours" in demo.describe(shapes.HARD)


def test_failed_training_is_told_and_keeps_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("old")
    earlier = {"psnr_db": 1, "class_accuracy": 1, "judged_samples": 1}  # of an earlier version
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(demo.local_classifier, "load_or_train", lambda: None)
    monkeypatch.setattr(demo.runtime, "devices", lambda batch: None)
    monkeypatch.setattr(demo, "TOKENIZER", "configs/tokenizer/absent.py")
    asked = dict(tokenizer_steps=1, generator_steps=1, samples=10)
    with pytest.raises(UserError, match="not empty: it holds index.html.*--overwrite"):
        demo.run(tmp_path, **asked)
    with pytest.raises(UserError, match="train_tokenizer.py ended with exit code 2"):
        demo.run(tmp_path, **asked, overwrite=True)
    assert (tmp_path / "index.html").read_text() == "old"


def test_a_demo_goes_on_where_it_was_stopped_and_of_other_steps_anew(tmp_path, monkeypatch):
    trained, stops = [], []

    def train(program, settings, workdir, steps, given=()):
        if stops and workdir.name == stops[-1]:
            raise stops.pop() and KeyboardInterrupt
        trained.append((workdir.name, steps, workdir.exists()))
        workdir.mkdir(exist_ok=True)

    monkeypatch.setattr(demo.local_classifier, "load_or_train", lambda: None)
    monkeypatch.setattr(demo.runtime, "devices", lambda batch: None)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "pretokenize", lambda tokenizer, out: out.mkdir(exist_ok=True))
    monkeypatch.setattr(demo, "measure", lambda *words: measured())
    monkeypatch.setattr(demo.edited, "measure", lambda *words: (measured()[0]["edits"], {}))

    def run(steps, stop=(), overwrite=False):
        trained.clear()
        stops.extend(stop)
        options = dict(tokenizer_steps=steps, generator_steps=2, samples=10)
        demo.run(tmp_path / "out", overwrite=overwrite, **options)

    with pytest.raises(KeyboardInterrupt):
        run(1, ["generator"])
    with pytest.raises(UserError, match="tokenizer_steps: 1 there, 3 here"):
        run(3)
    run(1)
    assert trained == [("tokenizer", 1, True), ("generator", 2, False)]
    kept = (tmp_path / "out" / "index.html").read_text()
    assert "CPU minutes since it was gone on with" in kept
    with pytest.raises(KeyboardInterrupt):
        run(3, ["generator"], overwrite=True)
    assert (tmp_path / "out" / "index.html").read_text() == kept
    run(4, overwrite=True)
    assert trained == [("tokenizer", 4, False), ("generator", 2, False)]
    run(4, overwrite=True)  # a finished one is not gone on with
    assert trained == [("tokenizer", 4, False), ("generator", 2, False)]
    assert "gone on with" not in (tmp_path / "out" / "index.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 10"):
        demo.run(tmp_path, samples=9)


@pytest.mark.parametrize("option", ["tokenizer_steps", "generator_steps"])
def test_steps_are_looked_at_before_anything_is_trained(tmp_path, option):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} must be at least 1"):
        demo.run(tmp_path, samples=10, **{option: 0})


CHILD = """
import signal, sys, time
def heard(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, heard)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), runtime.Stopped(signal.SIGTERM, "terminated")]
)
def test_who_ends_the_demo_ends_its_program_which_saves_first(monkeypatch, tmp_path, error):
    out, whole = tmp_path / "out", subprocess.Popen.wait

    def wait(child, timeout=None):
        while not out.read_text():
            time.sleep(0.01)
        monkeypatch.setattr(subprocess.Popen, "wait", whole)
        raise error

    with open(out, "w") as file:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        with pytest.raises(type(error)):
            demo.finished([sys.executable, "-c", CHILD], "prog", stdout=file)
    assert out.read_text() == "begun\nsaved\n"


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_a_program_that_fails_fails_the_demo(code):
    def run():
        demo.finished([sys.executable, "-c", f"import sys; sys.exit({code})"], "prog")

    assert runtime.call("tokgen demo", run) == code
