"""Pages are well-formed, in one file, escaped; their figures and pictures are the right ones."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from tokgen.data import sources
from tokgen.evaluation import collect, feature_extractors, page, references, score_page
from tokgen.metrics import moments

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(html.parser.HTMLParser):
    """What a page holds; an error where a tag is closed that is not open, or left open."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words, self.sources, self.marks = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        self.marks += [attrs["class"]] if "class" in attrs else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def pictures(self):
        found = []
        for source in self.sources:
            head, data = source.split(",", 1)
            assert head == "data:image/png;base64"
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")))
        return found


def parsed(file) -> Parsed:
    """A page, after what holds for every page."""
    text = file.read_text(encoding="utf-8")
    found = Parsed(text)
    assert "script" not in found.tags and not re.search(r"https?://|@import|url\(", text)
    assert "viewport" in text and "prefers-color-scheme" in text
    found.pictures()
    return found


def result(**more) -> dict:
    """A line of results as tokgen evaluate writes it."""
    return {
        "format": collect.FORMAT,
        "protocol": "local",
        "samples": 130,
        "images": {
            "checkpoint": f"/runs/{EVIL}",
            "fingerprint": "f" * 64,
            "preset": "default",
            "settings": {"temperature": 0.9, "weight": 1.5},
            "seed": 7,
        },
        "size": [4, 4],
        "extractor": {"name": "local", "fingerprint": "e" * 64, "classes": ["cat", EVIL, "dog"]},
        "reference": {"dataset": EVIL, "split": "train", "count": 50, "digest": "d" * 64},
        "seed": 7,
        "metrics": {
            "fid": {"value": 10.0, "low": 9.0, "high": 11.5, "bias": 2.0, "features": 200},
            "precision": {"value": 0.5, "k": 3, "images": 50},
            "is": {"value": 3.0, "std": 0.0, "parts": 2, "part": 65},
        },
        "absent": {"classwise": EVIL},
        "suspicious": {"duplicates": 1, "constant": 0},
        "images_sha256": "a" * 64,
        "time": "2026-01-01T00:00:00Z",
        "versions": {"jax": "1.2.3"},
        **more,
    }


class Numbered:
    """Images whose pixels say their number; it notes the parts that are asked for."""

    classes = ()

    def __init__(self, count: int):
        self.count, self.asked = count, []

    def part(self, start, stop):
        self.asked.append((start, stop))
        numbers = np.arange(start, stop, dtype=np.uint8)[:, None, None, None]
        return {"image": np.broadcast_to(numbers, (stop - start, 4, 4, 3))}


def seen(feature_ND, label_N=(), values=()) -> collect.Found:
    digest_N = np.array([b"x"] * len(feature_ND))
    return collect.Found(
        {"pooled": feature_ND}, {}, dict(values), {}, np.asarray(label_N, np.int32), digest_N,
        np.zeros(len(feature_ND), bool),
    )  # fmt: skip


EXTRACTOR = feature_extractors.Extractor("local", None, ("pooled",), {})


def reference_of(dataset, feature_nD, index_n, fingerprint) -> references.Reference:
    record = {
        "dataset": str(dataset),
        "split": "all",
        "size": [4, 4],
        "fingerprint": fingerprint,
        "layers": {"pooled": feature_nD.shape[1]},
    }
    found = moments.Moments.of(feature_nD)
    none = np.zeros(0, np.int32)
    return references.Reference(
        dataset, record, {"pooled": found}, {"pooled": feature_nD}, index_n, none, {}
    )


@pytest.fixture
def real(tmp_path):
    """Six real images, each of one gray, two of which lie in the directions of samples."""
    from tokgen.data import folder

    (tmp_path / "real").mkdir()
    for number in range(6):
        pixels = np.full((4, 4, 3), 200 + 10 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{number}.png")
    source = folder.Source(tmp_path / "real", split="all")
    feature_nD = np.eye(8, dtype=np.float32)[2:7]
    index_n = np.array([5, 0, 1, 2, 3])
    return reference_of(tmp_path / "real", feature_nD, index_n, source.fingerprint)


def samples_seen() -> collect.Found:
    """130 samples of three classes; number 100 lies on a kept real image, the others nearly."""
    draws = np.random.default_rng(0)
    feature_ND = np.abs(draws.normal(size=(130, 8))).astype(np.float32)
    feature_ND[100] = np.eye(8, dtype=np.float32)[2]
    return seen(feature_ND, np.arange(130) % 3)


def test_page_of_samples(tmp_path, real):
    images = Numbered(130)
    file = score_page.write(tmp_path, result(), samples_seen(), images, EXTRACTOR, real)
    assert file.name == "index.html"
    found = parsed(file)
    words = " ".join(found.words)
    for part in ("9 to 11.5", "50\u00a0%", "k = 3", "lower", "higher", EVIL, "1.2.3", "d" * 64,
                 "e" * 64, "weight 1.5", "4 x 4", "1 of 130 images are copies", "no more samples",
                 "the number of samples makes 2", "parts of 65"):  # fmt: skip
        assert part in words, part
    # parts as the evaluation has them: whatever else would be drawn anew
    assert set(images.asked) <= {(0, 64), (64, 128), (128, 130)}
    *classes, nearest = found.pictures()
    scale = page.SMALLEST // 4
    step = 4 * scale + 2
    assert len(classes) == 3
    for label, sheet in enumerate(classes):
        middle = sheet[2 + step // 2, 2 + step // 2 :: step, 0]
        assert middle.tolist() == [label + 3 * n for n in range(score_page.SHOWN)]
    first = nearest[2 + step // 2, 2 + step // 2 :: step, 0]
    assert first[:2].tolist() == [100, 200 + 10 * 5]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dataset": "/nowhere/at all"}, "not there any more"),
        ({"fingerprint": "other"}, "is not what it was"),
        ({"dataset": "tfds:cats"}, "not opened"),
    ],
)
def test_real_images_that_cannot_be_shown_are_said(tmp_path, real, change, why):
    real.record.update(change)
    found = parsed(
        score_page.write(tmp_path, result(), samples_seen(), Numbered(130), EXTRACTOR, real)
    )
    assert why in " ".join(found.words) and len(found.pictures()) == 3


def test_broken_real_image_is_gray(tmp_path, real):
    class Broken(sources.RandomAccess):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": b"no image", "label": 0}

    assert (score_page._pixels(Broken(), 0, (4, 4)) == 128).all()


def test_samples_without_classes_or_real_features(tmp_path, real):
    real.features.clear()
    line = result(samples=20)
    unlabelled = seen(np.ones((20, 8), np.float32))
    found = parsed(score_page.write(tmp_path, line, unlabelled, Numbered(20), EXTRACTOR, real))
    assert len(found.pictures()) == 1
    assert "holds no features" in " ".join(found.words)


class Pairs(Numbered):
    """Reconstructions: images that go by `index_N`; originals are 100 brighter."""

    def __init__(self, count):
        super().__init__(count)
        self.index_N = np.arange(count)[::-1]  # image i of the evaluation has the gray index_N[i]

    def part(self, start, stop):
        self.asked.append((start, stop))
        gray = self.index_N[start:stop].astype(np.uint8)[:, None, None, None]
        image = np.broadcast_to(gray, (stop - start, 4, 4, 3))
        return {"image": image, "original": image + 100}


@pytest.mark.parametrize("count", [3, 70])
def test_page_of_reconstructions(tmp_path, count):
    images, draws = Pairs(count), np.random.default_rng(0)
    value_N = draws.permutation(count) + 10.0
    line = result(samples=count, metrics={"psnr_db": {"value": 20.0}})
    feature_ND = np.ones((count, 8), np.float32)
    found = seen(feature_ND, values={"psnr_db": value_N})
    page_ = parsed(score_page.write(tmp_path, line, found, images, EXTRACTOR, None))
    assert len(images.asked) == 1  # one pass, of the length that was compiled
    assert images.index_N.tolist() == list(range(count))[::-1]
    step = 4 * (page.SMALLEST // 4) + 2
    corners = [sheet[2 + step // 2, 2 + step // 2 :: step, 0] for sheet in page_.pictures()]
    worst, best = (int(images.index_N[f(value_N)]) for f in (np.argmin, np.argmax))
    for corner, gray in zip(corners, (worst, best, count - 1), strict=True):
        assert corner[:2].tolist() == [gray + 100, gray]


def test_classes_shown_are_spread_over_all():
    rows = score_page.rows_of(np.repeat(np.arange(100), 20), 2000)
    assert list(rows) == list(range(0, 100, 10))
    for label, index_n in rows.items():
        assert index_n.tolist() == list(range(20 * label, 20 * label + score_page.SHOWN))


def test_large_images_are_halved_to_their_means():
    image_HW3 = np.zeros((162, 163, 3), np.uint8)
    image_HW3[::2, ::2] = 200  # every square of four has one
    sheet = page.sheet(image_HW3[None], 1).split(",", 1)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))))
    assert shown.shape == (81 + 4, 81 + 4, 3) and (shown[2:-2, 2:-2] == 50).all()


def test_plots_take_any_name():
    """Names of folders are no mathematics."""
    series = {"a$b_{": [(2, 1.0, 0.1), (1, 2.0, 0.2)], "_hidden": [(1, 3.0, 0)]}
    for address in (
        page.lines(series, "x", "y"),
        page.points({"$\\": (0.1, 0.2, 0, 0.1)}, "x", "y"),
    ):
        assert address.startswith("data:image/png;base64,")


def test_names_of_a_network_of_other_classes_are_not_used():
    line = result()
    assert score_page.names_of(line, np.arange(3)) == ("cat", EVIL, "dog")
    assert score_page.names_of(line, np.arange(4)) == ()
    own = Numbered(4)
    own.classes = ("a", "b", "c", "d")
    assert score_page.names_of(line, np.arange(4), own) == own.classes
    assert score_page.class_name(3, ()) == "class 3" and score_page.class_name(0, ("a",)) == "a"
