"""What a scan finds, tells, keeps, and refuses; and `tokgen data`, which prints it."""

import numpy as np
import pytest
from PIL import Image

from tokgen import cli, interfaces, runtime
from tokgen.data import folder, pixels, scan, shapes, sources

LARGE = (9000, 9000)  # more pixels than are allowed, in a few bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scans"


def write(root, count=12, classes=("cat", "dog")):
    draw = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


def damaged(root):
    """{name: words that say what is wrong with it}."""
    (root / "cat" / "01.png").write_bytes(b"")
    (root / "cat" / "02.png").write_text("a page that was saved as a picture")
    whole = (root / "dog" / "03.png").read_bytes()
    (root / "dog" / "03.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", LARGE).save(root / "dog" / "04.png")
    return {
        "cat/01.png": "empty (0 bytes)",
        "cat/02.png": "begins with b'a page",
        "dog/03.png": "truncated",
        "dog/04.png": "9000 x 9000 pixels, more than the 64000000",
    }


def test_headers_see_what_needs_no_decoding_and_a_full_scan_all(tmp_path, recwarn):
    wrong = damaged(write(tmp_path / "base"))
    source = folder.Source(tmp_path / "base", split="all")
    found = scan.headers(source)
    assert found.sizes == {(8, 8): 21} and found.forms == {"PNG": 21}
    files = source.unreadable.files()
    assert set(files) == set(wrong) - {"dog/03.png"}
    scan.full(source)
    files = source.unreadable.files()
    assert set(files) == set(wrong)
    assert all(words in files[name] for name, words in wrong.items())
    assert not recwarn.list and not any(" at 0x" in reason for reason in files.values())


def test_a_scan_is_kept_until_a_file_changes(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "base")
    damaged(root)
    first = scan.full(folder.Source(root, split="all"))
    monkeypatch.setattr(pixels, "decode", None)  # nothing is decoded again
    source = folder.Source(root, split="all")
    assert scan.full(source) == first and len(source.unreadable) == 4
    for file in cache.iterdir():  # whatever became of it, it is no result
        file.write_text('{"count": null}')
    monkeypatch.undo()
    monkeypatch.setenv("TOKGEN_CACHE", str(cache.parent))
    assert scan.full(folder.Source(root, split="all")) == first
    Image.new("RGB", (8, 8), "red").save(root / "cat" / "01.png")
    source = folder.Source(root, split="all")
    assert scan.full(source).sha256 != first.sha256 and len(source.unreadable) == 3


def test_before_training_all_that_is_measured_is_decoded(tmp_path, capfd, monkeypatch):
    root = write(tmp_path / "base", 30)
    train, held_out = (folder.Source(root, split=s, held_out=0.2) for s in ("train", "held_out"))
    broken = [held_out.name(1), train.name(3)]
    for name in broken:
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:-30])  # the header is sound
    monkeypatch.setattr(scan, "SECONDS", -1.0)  # no time for training images
    scan.before(train, held_out, np.arange(len(held_out)), channels=3, max_bad=1e-3)
    said = capfd.readouterr().err
    assert said.count(f"{broken[0]}: ") == 1 and broken[1] not in said
    assert f"1 of {len(held_out)} images cannot be read (left out)" in said
    monkeypatch.undo()
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "other"))
    scan.before(train, held_out, np.arange(len(held_out)), channels=3, max_bad=1e-3)
    said = capfd.readouterr().err
    assert broken[0] not in said and said.count(f"{broken[1]}: ") == 1  # each is told once
    with pytest.raises(interfaces.UserError, match="1 of .* --config.max_bad=SHARE"):
        scan.before(train, held_out, np.arange(3), channels=3, max_bad=0.0)
    with pytest.raises(interfaces.UserError, match="none of the 1 images that are to be measured"):
        scan.before(train, held_out, np.array([1]), channels=3, max_bad=1e-3)


def test_drawn_images_need_no_scan():
    drawn = shapes.Source((8, 8), count=20)
    scan.before(drawn, drawn, np.arange(5), channels=3, max_bad=0.0)
    assert len(scan.readable(drawn, np.arange(5))) == 5


def test_tokens_without_an_image_to_measure_are_refused_before_training(capfd):
    class Shards(sources.RandomAccess):
        holds, layout, missing = (
            "tokens",
            {},
            {1: ("cat/1.png", "cut off"), 4: ("cat/4.png", "empty")},
        )

        def __len__(self):
            return 6

        def __getitems__(self, indices):
            raise AssertionError("nothing is read")

        def name(self, index):
            return self.missing[index][0]

    scan.before(Shards(), Shards(), np.array([0, 1]), channels=3, max_bad=0.0)
    said = capfd.readouterr().err
    assert "cat/4.png: empty" in said and "others stand in" in said and "left out" in said
    with pytest.raises(interfaces.UserError, match="none of the 2 held-out.*has tokens"):
        scan.before(Shards(), Shards(), np.array([4, 1]), channels=3, max_bad=0.0)


def test_a_source_of_whole_images_is_not_read_for_its_headers(tmp_path):
    source = folder.Source(write(tmp_path / "base"), split="all")

    class Whole(sources.RandomAccess):
        classes, read = source.classes, []

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            self.read.append(index)
            return source[index]

    assert scan.headers(Whole()) == scan.Found() and not Whole.read
    found = scan.full(Whole())
    assert found.sizes == {(8, 8): 24} and sorted(Whole.read) == list(range(24))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_every_beginning_of_a_sample_is_spread_evenly(length):
    order = scan.evenly(length)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    for count in (8, 32):
        if length >= 64:
            gaps = np.diff(np.sort(order[:count]))
            assert gaps.max() <= 2 * length / count


def test_the_command_prints_what_is_understood_and_every_name(tmp_path, capsys):
    root = write(tmp_path / "base", 16)
    wrong = damaged(root)
    assert cli.main(["data", str(root)]) == 0
    said = capsys.readouterr().out
    assert "2 classes (cat 16, dog 16)" in said and "8 x 8 (" in said
    assert "cat/01.png: the file is empty" in said and "dog/03.png" not in said
    assert cli.main(["data", str(root), "--scan", "full"]) == 0
    said = capsys.readouterr().out
    assert "32 images decoded, 4 of them cannot be read" in said
    assert all(said.count(f"{name}: ") == 1 for name in wrong) and " at 0x" not in said
    assert cli.main(["data", str(tmp_path / "nothing")]) == 2


def test_a_cache_that_cannot_be_written_costs_no_scan(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(runtime, "cache_folder", lambda: tmp_path / "file")
    assert scan.full(folder.Source(write(tmp_path / "base"), split="all")).decoded == 24
    assert "not kept" in capfd.readouterr().err


def test_the_latest_scans_are_kept(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scan, "KEPT", 2)
    for number in range(4):
        scan.full(folder.Source(write(tmp_path / f"{number}", 2), split="all"))
    assert len(list(cache.iterdir())) == 2
