"""Images to be scored: read in parts to the byte, and refused where they are not what they seem."""

import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from tokgen.data import npz, pixels
from tokgen.evaluation import given_images
from tokgen.interfaces import UserError


def pictures(count: int = 20, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def as_folder(path: pathlib.Path, image_NHW3, ending: str = "png") -> pathlib.Path:
    path.mkdir(parents=True, exist_ok=True)
    for number, image_HW3 in enumerate(image_NHW3):
        Image.fromarray(image_HW3).save(path / f"{number:03d}.{ending}")
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_parts_of_an_archive_are_its_bytes_in_any_order(tmp_path, save):
    image_NHW3, label_N = pictures(), np.arange(20) % 3
    save(tmp_path / "a.npz", arr_0=image_NHW3, arr_1=label_N)
    opened = given_images.given(tmp_path / "a.npz")
    assert len(opened) == 20 and opened.size == (6, 5)
    for start, stop in ((0, 7), (7, 14), (14, 20), (3, 5), (5, 20), (0, 20), (19, 20), (0, 1)):
        part = opened.part(start, stop)
        np.testing.assert_array_equal(part["image"], image_NHW3[start:stop])
        np.testing.assert_array_equal(part["label"], label_N[start:stop])
        assert part["label"].dtype == np.int32
    np.savez(tmp_path / "b.npz", arr_0=image_NHW3)
    assert set(given_images.given(tmp_path / "b.npz").part(0, 2)) == {"image"}


def test_an_archive_is_read_once_from_end_to_end(tmp_path, monkeypatch):
    """Not from its beginning for every part: of 50,000 images that would be terabytes."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=pictures(64))
    opened, read = npz.Archive(tmp_path / "a.npz"), []
    inflate = zipfile.ZipExtFile._read1

    def counted(self, n):
        found = inflate(self, n)
        read.append(len(found))
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", counted)
    for start in range(0, 64, 4):
        opened.part(start, start + 4)
    assert sum(read) <= pictures(64).nbytes + 4096


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_named(tmp_path, save):
    file = tmp_path / "a.npz"
    save(file, arr_0=pictures(), arr_1=np.zeros(20, int))
    whole = file.read_bytes()
    # among the pixels, or what they were deflated to
    file.write_bytes(whole[:400] + bytes([whole[400] ^ 255]) + whole[401:])
    with pytest.raises(UserError, match="a.npz is damaged.*restore a copy"):
        opened = given_images.given(file)
        for start in range(0, 20, 4):
            opened.part(start, start + 4)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read.*a.npz as .npz"):
        given_images.given(file)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": pictures().astype(np.float32) / 255}, "uint8.*found float32"),
        ({"arr_0": np.full((2, 6, 5, 3), np.nan, np.float32)}, "uint8.*found float32"),
        ({"arr_0": pictures().astype(np.int64)}, "uint8.*found int64"),
        ({"arr_0": pictures()[..., 0]}, r"uint8 \[N, H, W, 3\].*\(20, 6, 5\)"),
        ({"arr_0": pictures().transpose(0, 3, 1, 2)}, r"uint8 \[N, H, W, 3\].*\(20, 3, 6, 5\)"),
        ({"arr_0": pictures(0)}, r"\(0, 6, 5, 3\)"),
        ({"arr_0": np.asfortranarray(pictures())}, "column order"),
        ({"images": pictures()}, "no array arr_0 of images; found images"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics.*swapped"),
        ({"arr_0": pictures(), "arr_1": np.zeros(19, int)}, r"arr_1.*\(20,\).*\(19,\)"),
        ({"arr_0": pictures(), "arr_1": np.zeros(20)}, "arr_1.*found float64"),
        ({"arr_0": pictures(), "arr_1": np.arange(20) - 1}, "0 or above.*least -1"),
        ({"arr_0": pictures(), "arr_1": np.arange(20) + 2**40}, "below 1048576.*greatest 1099511"),
        ({"arr_0": pictures(), "arr_1": np.full(20, 2**20)}, "below 1048576.*greatest 1048576"),
        ({"arr_0": pictures(), "arr_1": np.array(["cat"] * 20, object)}, "arr_1.*found object"),
    ],
)
def test_archives_that_are_no_samples(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=words):
        given_images.given(tmp_path / "a.npz")


def test_folders_of_class_folders_are_read_as_it_is_said(tmp_path):
    for number, name in enumerate(("cats/tabby", "cats/tiger", "dogs/boxer")):
        as_folder(tmp_path / name, pictures(3 * number + 2)[-2:])
    with pytest.raises(UserError, match="--labels outer in commands"):
        given_images.given(tmp_path)
    outer, none = (given_images.given(tmp_path, labels=labels) for labels in ("outer", "none"))
    assert outer.classes == ("cats", "dogs") and none.classes == ()
    np.testing.assert_array_equal(outer.part(0, 6)["label"], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(outer.part(0, 6)["image"], none.part(0, 6)["image"])
    assert "label" not in none.part(0, 6) and outer.identity != none.identity


def test_paths_that_are_no_samples(tmp_path):
    (tmp_path / "a.npz").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    words = {"a.npz": "cannot read", "a.txt": "an .npz or a folder", "b.npz": "no such path"}
    for name, said in (words | {"empty": "no images"}).items():
        with pytest.raises(UserError, match=said):
            given_images.given(tmp_path / name)


def test_a_folder_is_read_in_the_order_of_its_names_with_its_classes(tmp_path):
    image_NHW3 = pictures(6)
    flat = given_images.given(as_folder(tmp_path / "flat", image_NHW3))
    assert len(flat) == 6 and flat.size == (6, 5) and set(flat.part(0, 2)) == {"image"}
    np.testing.assert_array_equal(flat.part(2, 5)["image"], image_NHW3[2:5])
    for name, part in (("cat", image_NHW3[:2]), ("dog", image_NHW3[2:])):
        as_folder(tmp_path / "sorted" / name, part)
    named = given_images.given(tmp_path / "sorted")
    assert named.classes == ("cat", "dog")
    found = named.part(0, 6)
    np.testing.assert_array_equal(found["image"], image_NHW3)
    np.testing.assert_array_equal(found["label"], [0, 0, 1, 1, 1, 1])


def test_a_folder_written_by_sample_is_its_archive(tmp_path):
    as_folder(tmp_path, pictures(3, (40, 40)))
    np.savez(tmp_path / "samples.npz", arr_0=pictures())
    assert len(given_images.given(tmp_path)) == 20


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.png"])
def test_lossy_images_are_refused_also_under_another_name(tmp_path, name):
    as_folder(tmp_path, pictures(2))
    kind = "WEBP" if name.endswith("webp") else "JPEG"
    Image.fromarray(pictures(1)[0]).save(tmp_path / name, format=kind)
    with pytest.raises(UserError, match=f"1 images in a lossy form .{name}.*--accept lossy"):
        opened = given_images.given(tmp_path)
        opened.part(0, 3)
    assert len(given_images.given(tmp_path, ("lossy",)).part(0, 3)["image"]) == 3


def test_mixed_sizes_and_broken_pictures_are_named(tmp_path):
    as_folder(tmp_path, pictures(3))
    Image.fromarray(pictures(1, (6, 6))[0]).save(tmp_path / "001.png")
    with pytest.raises(UserError, match="one size: 000.png is 6 x 5, 001.png is 6 x 6"):
        given_images.given(tmp_path).part(0, 3)
    (tmp_path / "001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read 001.png"):
        given_images.given(tmp_path).part(0, 3)
    (tmp_path / "000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read 000.png.* and 1 others.*001.png"):
        given_images.given(tmp_path)


def test_identity_says_that_samples_changed(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, arr_0=pictures())
    before = given_images.given(file).identity
    assert given_images.given(file).identity == before
    np.savez(file, arr_0=pictures()[::-1])
    assert given_images.given(file).identity != before
    place = as_folder(tmp_path / "plain", pictures(2), "bmp")
    before = given_images.given(place).identity
    as_folder(place, pictures(2)[::-1], "bmp")  # the same names and lengths
    assert given_images.given(place).identity != before


def test_copies_and_images_of_one_colour_are_counted_and_refused_above_a_percent():
    image_NHW3 = pictures(300)
    image_NHW3[7] = image_NHW3[9] = image_NHW3[3]
    image_NHW3[4] = np.array([1, 2, 3], np.uint8)
    image_NHW3[5] = image_NHW3[4]
    image_NHW3[5, 0, 0, 0] = 9  # nearly of one colour
    digest_N, constant_N = given_images.digests(image_NHW3), given_images.constants(image_NHW3)
    assert np.flatnonzero(constant_N).tolist() == [4]
    found = given_images.suspicious(digest_N, constant_N)
    assert found == {"duplicates": 2, "constant": 1}
    given_images.check(found, 300)
    given_images.check({"duplicates": 3, "constant": 3}, 300)
    both = {"duplicates": 4, "constant": 5}
    with pytest.raises(
        UserError,
        match="4 duplicates and 5 constant among 300.*--accept duplicates --accept constant",
    ):
        given_images.check(both, 300)
    with pytest.raises(UserError, match="^5 constant among"):
        given_images.check(both, 300, ["duplicates"])
    given_images.check(both, 300, ["duplicates", "constant"])


def test_fewer_images_are_taken_from_all_over_a_set(tmp_path):
    """Sorted by class, the first ones would be of one class."""
    image_NHW3 = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    label_N = np.repeat(np.arange(5), 10)
    np.savez(tmp_path / "a.npz", arr_0=image_NHW3, arr_1=label_N)
    spread = given_images.Spread(given_images.given(tmp_path / "a.npz"), 20)
    parts = [spread.part(start, start + 5) for start in (0, 5, 10, 15, 0)]
    wanted_N = np.arange(20) * 50 // 20
    found = np.concatenate([part["image"] for part in parts])
    np.testing.assert_array_equal(found, image_NHW3[np.r_[wanted_N, wanted_N[:5]]])
    labels = np.concatenate([part["label"] for part in parts[:4]])
    assert np.bincount(labels).tolist() == [4] * 5 and len(spread) == 20
    assert spread.identity != given_images.given(tmp_path / "a.npz").identity


@pytest.mark.parametrize(
    "ending", [e for e in (".jpe", ".JFIF", ".avif", ".webp") if e.lower() in pixels.EXTENSIONS]
)
def test_forms_that_change_pixels_are_refused_by_every_ending(tmp_path, ending):
    (tmp_path / f"a{ending}").write_bytes(b"whatever it holds")
    with pytest.raises(UserError, match="lossy form"):
        given_images.given(tmp_path)


def test_labels_of_samples_have_the_names_that_were_written_beside_them(tmp_path):
    image_NHW3 = np.zeros((4, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=image_NHW3, arr_1=np.array([0, 2, 1, 2]))
    assert given_images.given(tmp_path).classes == ()
    assert given_images.given(tmp_path).notes == ("labels 0 to 2, without names",)
    for text, names in (
        ('{"names": ["a", "b", "c"]}', ("a", "b", "c")),
        ('{"names": ["a"]}', ()),
        ('{"names": [1, 2, 3]}', ()),
        ("[]", ()),
        ("no record", ()),
    ):
        (tmp_path / "samples.json").write_text(text)
        assert given_images.given(tmp_path).classes == names
