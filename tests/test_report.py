"""What people look at: grids, the metrics file of a resumed run, curves, the table."""

import json
import sys
import types

import jax
import numpy as np
from PIL import Image

from tokgen import image_grid, metrics_log, report, sharding


def test_grid_geometry():
    """Each image where the formula says, white between, around, and where images are missing."""
    rng = np.random.default_rng(0)
    image_BHW3 = rng.integers(0, 200, (5, 4, 6, 3), dtype=np.uint8)
    sheet = image_grid.grid(image_BHW3, 3, gap=2)
    assert sheet.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3) and sheet.dtype == np.uint8
    seen = np.full(sheet.shape, 255, np.uint8)
    for i, image_HW3 in enumerate(image_BHW3):
        row, column = divmod(i, 3)
        y, x = 2 + row * 6, 2 + column * 8
        np.testing.assert_array_equal(sheet[y : y + 4, x : x + 6], image_HW3)
        seen[y : y + 4, x : x + 6] = image_HW3
    np.testing.assert_array_equal(sheet, seen)
    doubled = image_grid.grid(image_BHW3[:1], 3, gap=0, scale=2)
    np.testing.assert_array_equal(doubled[::2, ::2], image_BHW3[0])
    np.testing.assert_array_equal(doubled[1::2, 1::2], image_BHW3[0])


def test_pairs_stand_beside_each_other():
    left, right = np.zeros((3, 2, 2, 1), np.uint8), np.full((3, 2, 2, 1), 9, np.uint8)
    left[2] = 4
    sheet = image_grid.beside(left, right, pairs=2, gap=0)[..., 0]
    expected = [[0, 0, 9, 9, 0, 0, 9, 9]] * 2 + [[4, 4, 9, 9, 255, 255, 255, 255]] * 2
    np.testing.assert_array_equal(sheet, expected)


def test_png_of_colour_and_gray(tmp_path):
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        image_HWC = rng.integers(0, 255, (5, 7, channels), dtype=np.uint8)
        image_grid.save_png(tmp_path / "x.png", image_HWC)
        with Image.open(tmp_path / "x.png") as image:
            assert image.mode == ("L" if channels == 1 else "RGB")
            np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), image_HWC)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]  # no half-written one


def test_a_resumed_run_drops_the_lines_that_it_takes_again(tmp_path):
    log = metrics_log.Log(tmp_path)
    for step in (1, 2, 3, 4):
        log.scalars(step, {"loss": 4.0 / step, "bad": np.float32("nan")})
    log.scalars(2, {"psnr": 20.0}, split="held_out")
    log.close()
    with open(tmp_path / metrics_log.LOG, "a") as file:
        file.write('{"step": 5, "split": "tr')  # killed while it wrote
    log = metrics_log.Log(tmp_path, step=2)
    assert [(r["step"], r["split"]) for r in metrics_log.read(tmp_path)] == [
        *((1, "train"), (2, "train"), (2, "held_out"))
    ]
    log.scalars(3, {"loss": 7.0})
    log.close()
    records = metrics_log.read(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 2, 3]
    assert records[-1]["loss"] == 7 and records[0]["loss"] == 4
    assert records[0]["bad"] is None  # and not NaN, which no JSON reader but Python's knows
    for line in (tmp_path / metrics_log.LOG).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: 1 / 0)


def test_tensorboard_keeps_what_was_logged_of_the_step_that_is_resumed(tmp_path):
    """It hides what earlier files have from the step on that a file begins with."""
    for step, logged in ((0, (1, 2, 3)), (2, (3, 4))):
        log = metrics_log.Log(tmp_path / str(step), step=step)
        for number in logged:
            log.scalars(number, {"loss": 1.0})
        log.close()
    before, after = (events(next((tmp_path / n / "tensorboard").iterdir())) for n in "02")
    begun = next(each.step for each in after if each.HasField("session_log"))
    steps = [each.step for each in before if each.HasField("summary") and each.step < begun]
    assert steps + [each.step for each in after if each.HasField("summary")] == [1, 2, 3, 4]


def events(file):
    """TFRecords: a length, its checksum, so many bytes, theirs."""
    from tensorboardX.proto import event_pb2

    found, data = [], file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_curves_are_a_picture(tmp_path):
    assert metrics_log.curves(tmp_path) is None  # nothing to show yet
    log = metrics_log.Log(tmp_path)
    for step in range(5):
        log.scalars(step, {"loss": 1 / (step + 1), "constant": 3.0})
        log.scalars(step, {"loss": 2 / (step + 1)}, split="held_out")
    log.image(4, "samples", np.zeros((6, 8, 1), np.uint8))
    log.close()
    with Image.open(tmp_path / "curves.png") as image:
        image.load()
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    # matplotlib's first two colours: a line per split
    assert {(31, 119, 180), (255, 127, 14)} <= colours
    with Image.open(tmp_path / "images" / "samples-0000004.png") as image:
        assert image.size == (8, 6)
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_table_ends_in_the_sum():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    kernel = jax.device_put(np.zeros((128, 96)), jax.NamedSharding(mesh, jax.P("fsdp")))
    leaves = {
        "encoder/kernel": kernel,
        "encoder/bias": types.SimpleNamespace(shape=(7,), size=7),
        "scale": types.SimpleNamespace(shape=(), size=1),
    }
    lines = report.table(leaves).splitlines()
    assert lines[0].split() == ["encoder/kernel", "128x96", "12,288", "('fsdp',)"]
    assert lines[1].split() == ["encoder/bias", "7", "7"]
    assert lines[2].split() == ["scale", "1"]
    assert lines[3].split() == ["total", "12,296"]
    assert len({len(line) for line in lines[1:]}) == 1  # numbers end in one column


def test_figures_name_what_is_there():
    values = {"psnr_db": 25.3149, "ssim": np.float32(0.5)}
    assert report.metrics(values, ("psnr_db", "lpips", "ssim")) == "psnr_db 25.31, ssim 0.5"


def test_progress_in_a_log_file_is_a_line_per_half_minute(capsys):
    """The rate is that of the last minute: what was slow before does not stay in it."""
    now = [0.0]
    bar = report.Lines(1000, initial=100, what="tokenizer", clock=lambda: now[0])
    for second in range(1, 241):
        now[0] = float(second)
        if second <= 120:
            if second % 10 == 0:
                bar.update()
        else:
            bar.update(3)
        bar.set_postfix_str(f"l1 {second}")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 240 // 30
    assert said[0] == "tokenizer: 103/1000 steps, 10 s/step, ETA 2:29:30, l1 29"
    assert said[3].startswith("tokenizer: 112/1000 steps, 10 s/step, ETA 2:28:00")
    assert said[-1] == "tokenizer: 472/1000 steps, 3 steps/s, ETA 0:02:56, l1 239"
    now[0] = 250
    bar.close()
    bar.close()
    assert capsys.readouterr().err == "tokenizer: 472/1000 steps in 0:04:10, 1.49 steps/s\n"


def test_progress_that_is_taken_back_has_the_rate_of_what_is_done_again(capsys):
    now = [0.0]
    bar = report.Lines(1000, unit="image", clock=lambda: now[0])
    for second in range(1, 30):
        now[0] = float(second)
        bar.update(10)
    bar.n = 100
    for second in range(30, 61):
        now[0] = float(second)
        bar.update(2)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["102/1000 images", "162/1000 images"]
    assert "2 images/s" in said[1]
    silent = report.Lines(9, shown=False, clock=lambda: now[0])
    now[0] = 200
    silent.update(9)
    silent.close()
    assert capsys.readouterr().err == ""


def test_what_is_done_soon_is_not_told(capsys):
    now = [0.0]
    for took, lines in ((1, 0), (3, 1)):
        now[0] = 0.0
        with report.Lines(2, unit="image", what="sample", delay=2, clock=lambda: now[0]) as bar:
            now[0] = took
            bar.update(2)
        assert capsys.readouterr().err.count("sample: 2/2 images") == lines


def test_a_notebook_draws_bars_although_it_is_no_terminal(monkeypatch, capsys):
    assert isinstance(report.bar(2), report.Lines)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with report.bar(2, what="sample", delay=60) as bar:
        bar.update(2)
    assert not isinstance(bar, report.Lines) and capsys.readouterr().err == ""
    with report.bar(2, what="sample") as bar:
        bar.update(2)
        report.say("a line above it")
    said = capsys.readouterr().err
    assert "sample: 100%" in said and "a line above it\n" in said


def test_a_bar_without_a_terminal_is_lines(capsys):
    with report.bar(3, what="draw", unit="image") as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix_str("loss 1")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("draw: 3/3 images in 0:00:00")


def test_a_figure_that_there_is_none_of_is_none_everywhere(tmp_path):
    assert report.row("psnr_db_error", None).split() == ["psnr_db_error", "none"]
    assert report.row("usage", 0.00002).split()[1] == "2e-05"
    assert report.row("psnr_db", 25.31).split()[1] == "25.3100"
    assert report.row("images", 3).split()[1] == "3"
    assert report.metrics({"nats": 1.5, "nats_error": None}, ("nats", "nats_error")) == "nats 1.5"
    log = metrics_log.Log(tmp_path)
    log.scalars(1, {"nats": 1.5, "nats_error": None}, split="held_out")
    log.close()
    assert metrics_log.read(tmp_path)[0]["nats_error"] is None


def test_a_figure_that_is_not_finite_is_no_point_and_no_warning(tmp_path, monkeypatch, caplog):
    log = metrics_log.Log(tmp_path)
    points = []
    add = log.events.add_scalar
    monkeypatch.setattr(
        log.events, "add_scalar", lambda *point: (points.append(point), add(*point))
    )
    log.scalars(1, {"nats": 1.5, "nats_error": None, "worst": np.inf}, split="held_out")
    log.scalars(2, {"loss": np.float32("nan")})
    log.close()
    assert points == [("held_out/nats", 1.5, 1)] and not caplog.records


def test_work_goes_on_when_nobody_listens(monkeypatch):
    """A closed terminal, a pipe without a reader, a log on a full disk."""

    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(report.sys, "stderr", Gone())
    report.say("lost")
    with report.bar(2, what="draw") as bar:
        bar.update(2)
