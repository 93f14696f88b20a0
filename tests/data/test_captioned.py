"""Text features stay with their image, through shuffles, replacements and evaluation."""

import io

import numpy as np
import pytest
from PIL import Image

from tokgen import interfaces
from tokgen.config import building
from tokgen.data import captioned, folder, loader, shapes, views


def features(path, count, dtype=np.float32, split="train"):
    """A file whose row i is full of i, at a length of 2 and 3 channels."""
    path.mkdir(exist_ok=True)
    text_NTE = np.broadcast_to(np.arange(count, dtype=dtype)[:, None, None], (count, 2, 3))
    np.save(path / f"{split}.npy", text_NTE)
    return path


def pictures(path, count, broken=()):
    """A folder of images, the i-th of them of the colour 5 i."""
    path.mkdir()
    for index in range(count):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (5 * index,) * 3).save(data, "PNG")
        data = b"broken" if index in broken else data.getvalue()
        (path / f"{index:02d}.png").write_bytes(data)
    return folder.Source(path, split="all")


def taken(source, steps=3):
    view = views.View((8, 8), flip=True)
    with loader.batches(source, view, seed=1, batch_size=4, max_bad=1.0) as batches:
        return [next(batches) for _ in range(steps)], batches.bad


def test_every_image_comes_with_its_own_row(tmp_path):
    source = captioned.Source(pictures(tmp_path / "images", 12), features(tmp_path / "text", 12))
    batches, bad = taken(source)
    order = np.concatenate([batch["image"][:, 0, 0, 0] // 5 for batch in batches])
    text = np.concatenate([batch["text"] for batch in batches])
    assert bad == 0 and sorted(order) == list(range(12)) and list(order) != list(range(12))
    assert text.shape == (12, 2, 3) and text.dtype == np.float32
    np.testing.assert_array_equal(text, np.broadcast_to(order[:, None, None], (12, 2, 3)))


def test_the_replacement_of_a_broken_image_brings_its_own_text(tmp_path):
    source = pictures(tmp_path / "images", 8, broken=(3, 6))
    source = captioned.Source(source, features(tmp_path / "text", 8, np.float16))
    batches, bad = taken(source, steps=2)
    assert bad == 2
    for batch in batches:
        assert batch["text"].dtype == np.float32
        np.testing.assert_array_equal(batch["text"][:, 0, 0], batch["image"][:, 0, 0, 0] // 5)


def test_one_pass_keeps_the_order_that_is_asked_for(tmp_path):
    drawn = shapes.Source((8, 8), count=6)
    source = captioned.Source(drawn, features(tmp_path, 6))
    (batch,) = loader.once(source, views.View((8, 8)), batch_size=3, indices=[5, 0, 2])
    np.testing.assert_array_equal(batch["text"][:, 1, 2], [5, 0, 2])
    np.testing.assert_array_equal(batch["image"][1], drawn[0]["image"])
    assert source.name(4) == drawn.name(4) and source.classes == drawn.classes


def test_sources_without_text_give_none():
    batches, _ = taken(shapes.Source((8, 8), count=8), steps=1)
    assert set(batches[0]) == {"image", "label"}


def test_a_config_names_both_parts(tmp_path):
    section = dict(
        name="captioned",
        images=dict(name="shapes", size=(8, 8), count=5),
        features=str(features(features(tmp_path, 5), 5, split="held_out")),
    )
    building.check(dict(data=section))
    for split in ("train", "held_out"):
        source = building.build(section, "data", split=split)
        assert source.inner.split == source.split == split and len(source) == 5
    with pytest.raises(interfaces.UserError, match="counts"):
        building.check(dict(data=dict(section, images=dict(name="shapes", counts=5))))


def test_where_nothing_is_held_out_there_are_no_texts(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    nothing = folder.Source(tmp_path, split="held_out", held_out=0.0)
    source = captioned.Source(nothing, tmp_path / "none", split="held_out")
    assert len(source) == 0 and source.classes == () and source.fingerprint == nothing.fingerprint


def test_the_fingerprint_knows_images_and_features(tmp_path):
    def fingerprint(count=5, seed=0, change=None, dtype=np.float32):
        features(tmp_path, count, dtype)
        if change is not None:
            text_NTE = np.load(tmp_path / "train.npy")
            text_NTE[change] += 1
            np.save(tmp_path / "train.npy", text_NTE)
        return captioned.Source(shapes.Source((8, 8), count=count, seed=seed), tmp_path).fingerprint

    assert fingerprint() == fingerprint()
    changed = [
        fingerprint(seed=1),
        fingerprint(change=(4, 1, 2)),
        fingerprint(dtype=np.float16),
        fingerprint(count=6),
    ]
    assert len({fingerprint(), *changed}) == 5


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2, 3), np.float32), "5 images.*4 rows"),
        (np.zeros((5, 6), np.float32), r"\(5, 6\)"),
        (np.zeros((5, 2, 3), np.int64), "int64"),
        (np.array([{}] * 5), "no .npy file of numbers"),
        (None, "found no file"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, array, message):
    if array is not None:
        np.save(tmp_path / "train.npy", array)
    with pytest.raises(interfaces.UserError, match=message):
        captioned.Source(shapes.Source((8, 8), count=5), tmp_path)


def test_a_file_that_is_no_array_is_said(tmp_path):
    shapes_of = ((5, 10**9, 10**9), (5, 2**32, 2**32), (5, 2**70, 1), (5, -1, 3))
    for shape in (None, *shapes_of):
        with open(tmp_path / "train.npy", "wb") as file:
            if shape is None:
                file.write(b"nothing of the kind")
            else:  # more than there is
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(bytes(64))
        with pytest.raises(interfaces.UserError, match=r"no \.npy file"):
            captioned.Source(shapes.Source((8, 8), count=5), tmp_path)
