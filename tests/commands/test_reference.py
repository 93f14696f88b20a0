"""`tokgen reference`: statistics as numpy has them, beside the network that they were seen by."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import test_feature_extractors
from tokgen import cli, distributed, interfaces, sharding
from tokgen.backbones import features, inception
from tokgen.evaluation import (
    feature_extractors,
    local_classifier,
    protocols,
    reference_making,
    references,
    score_page,
)

ONE = test_feature_extractors.mesh_of(1)
WORDS = ("--steps", 24, "--images", 30)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight devices of two cores would each take the same step."""
    monkeypatch.setattr(sharding, "make_mesh", lambda: ONE)


def folder_of(path: pathlib.Path, classes: tuple[str, ...], count: int = 12) -> pathlib.Path:
    """Images that are dark or light by class, and darker below than above; two held out of each."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(classes or ("",)):
        for split, number in (("train", count), ("test", 4)):
            place = path / split / name
            place.mkdir(parents=True)
            for index in range(number):
                image_HW3 = draw.integers(0, 60, (16, 16, 3)) + 120 * label
                image_HW3[:8] += 70
                Image.fromarray(image_HW3.astype(np.uint8)).save(place / f"{index:02d}.png")
    return path


def single(path: pathlib.Path) -> pathlib.Path:
    """Two classes of an image each: nothing is held out."""
    for number, name in enumerate(("dark", "light")):
        (path / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (90 * number, 30, 60)).save(path / name / "0.png")
    return path


def nested(path: pathlib.Path) -> pathlib.Path:
    """Two classes, each in folders of its own."""
    for number, name in enumerate(("cats/tabby", "cats/tiger", "dogs/boxer")):
        single(path / name)
        for color in ("dark", "light"):
            (path / name / color / "0.png").rename(path / name / f"{color}{number}.png")
            (path / name / color).rmdir()
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Two folders of images and a reference of each.

    The network of the one without classes is trained for a few steps; the other's, which
    tests/evaluation/test_local_classifier.py trains, is drawn.
    """
    folder = tmp_path_factory.mktemp("reference")
    folder_of(folder / "named", ("dark", "light"), 16)
    folder_of(folder / "plain", (), 24)
    recipe = dataclasses.replace(local_classifier.PHOTOGRAPHS, batch=8, ema=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKGEN_CACHE", str(folder / "cache"))
        patch.setattr(local_classifier, "PHOTOGRAPHS", recipe)
        patch.setattr(sharding, "make_mesh", lambda: ONE)
        make(folder / "plain", folder / "plain.npz", *WORDS)
        drawn = test_feature_extractors.local(2).network.network
        patch.setattr(local_classifier, "of_images", lambda *words, **options: drawn)
        make(folder / "named", folder / "named.npz", *WORDS)
    return folder


def make(data, out, *words) -> int:
    return cli.main(["reference", str(data), "--out", str(out), *map(str, words)])


def seen(network: feature_extractors.Extractor, image_NHW3) -> dict[str, np.ndarray]:
    return feature_extractors.features(network, np.asarray(image_NHW3))


def pixels(folder: pathlib.Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])


@pytest.mark.parametrize("name", ["named", "plain"])
def test_statistics_are_numpys_and_the_network_comes_back_to_the_bit(place, name):
    found = references.read(place / f"{name}.npz")
    network = feature_extractors.from_arrays(found.network, found.record["extractor"])
    assert network.record["fingerprint"] == found.record["extractor"]["fingerprint"]
    image_NHW3 = pixels(place / name / "train")
    chosen = np.arange(found.record["count"]) * len(image_NHW3) // found.record["count"]
    features = seen(network, image_NHW3[chosen])
    assert sorted(found.index_n) == chosen.tolist() and (np.diff(found.index_n) < 0).any()
    row_n = np.searchsorted(chosen, found.index_n)
    for layer, width in (("pooled", 192), ("spatial", 28)):
        rows_ND = features[layer]
        assert found.record["layers"][layer] == width == rows_ND.shape[1]
        np.testing.assert_array_equal(found.features[layer], rows_ND[row_n])
        rows_ND = rows_ND.astype(np.float64)
        mean_D, covariance_DD = rows_ND.mean(0), np.cov(rows_ND, rowvar=False)
        for ours, numpys in (
            (found.moments[layer].mean_D, mean_D),
            (found.moments[layer].covariance_DD, covariance_DD),
        ):
            np.testing.assert_allclose(ours, numpys, rtol=0, atol=1e-12 * np.abs(numpys).max())
    label_n = found.index_n >= 16 if name == "named" else 0 * found.index_n
    np.testing.assert_array_equal(found.label_n, label_n)


@pytest.mark.parametrize("name", ["named", "plain"])
def test_the_network_says_how_well_it_does_on_held_out_images(place, name):
    """In classes; of a folder without any, it learned which way is up."""
    found = references.read(place / f"{name}.npz")
    told = found.record["extractor"]
    assert told["images"] == "held-out images"
    network = feature_extractors.from_arrays(found.network, told)
    image_NHW3 = pixels(place / name / "test")
    logits_NK = seen(network, image_NHW3)["logits"]
    if name == "named":
        assert told["classes"] == ["dark", "light"] == found.record["classes"]
        assert told["accuracy"] == np.mean(logits_NK.argmax(1) == np.repeat([0, 1], 4))
        return
    assert told["accuracy"] > 0.45 and told["classes"] == [] and logits_NK.shape[1] == 4
    # each image once, turned as the draw says
    way_N = np.random.default_rng([0, 0]).integers(0, 4, len(image_NHW3))
    turned = [np.rot90(image_HW3, way) for image_HW3, way in zip(image_NHW3, way_N, strict=True)]
    right = np.mean(seen(network, np.stack(turned))["logits"].argmax(1) == way_N)
    assert told["accuracy"] == right


def test_where_nothing_is_held_out_the_network_is_tried_on_its_own_images(tmp_path, monkeypatch):
    drawn = test_feature_extractors.local(2).network.network
    monkeypatch.setattr(local_classifier, "of_images", lambda *words, **options: drawn)
    assert make(single(tmp_path / "single"), tmp_path / "a.npz", "--steps", 1) == 0
    told = references.read(tmp_path / "a.npz").record["extractor"]
    assert told["images"] == "its own images" and told["examined"] == 2


def test_folders_of_class_folders_are_read_as_it_is_said(place, tmp_path):
    """Also by the page of a score, which shows real images once more."""
    words = ("--labels", "outer", "--split", "all", "--network", place / "named.npz")
    assert make(nested(tmp_path / "nested"), tmp_path / "a.npz", *words) == 0
    made = references.read(tmp_path / "a.npz")
    assert made.record["classes"] == ["cats", "dogs"] and made.record["labels"] == "outer"
    np.testing.assert_array_equal(made.label_n, made.index_n >= 4)
    real, why = score_page._real(made)
    assert not why and real(np.arange(6)).shape == (6, 16, 16, 3)


def test_record_says_what_must_agree(place):
    record = references.read(place / "named.npz").record
    wanted = {"protocol": "local", "split": "train", "count": 30, "size": [16, 16]}
    assert {name: record[name] for name in wanted} == wanted
    assert record["crop"] == "center" and record["dataset"] == str(place / "named")
    assert record["extractor"]["trained_on"] == record["fingerprint"]


def test_another_references_network_is_used_again(place, tmp_path, monkeypatch):
    """Of the held-out images, an archive of them: the same features from either."""
    monkeypatch.setattr(local_classifier, "of_images", None)  # training would fail
    network = ("--network", place / "named.npz")
    assert make(place / "named", tmp_path / "a.npz", *network, "--split", "held_out") == 0
    np.savez(
        tmp_path / "data.npz",
        arr_0=pixels(place / "named" / "test"),
        arr_1=np.repeat([0, 1], 4),
    )
    assert make(tmp_path / "data.npz", tmp_path / "b.npz", *network, "--split", "held_out") == 0
    first, folder, archive = (
        references.read(file)
        for file in (place / "named.npz", tmp_path / "a.npz", tmp_path / "b.npz")
    )
    for other in (folder, archive):
        extractor = other.record["extractor"]
        assert extractor["fingerprint"] == first.record["extractor"]["fingerprint"]
        assert other.record["count"] == 8 and other.record["split"] == "held_out"
    for layer in ("pooled", "spatial"):
        np.testing.assert_array_equal(folder.features[layer], archive.features[layer])
    np.testing.assert_array_equal(folder.label_n, archive.label_n)
    assert archive.record["classes"] == ["0", "1"] and folder.digest != archive.digest


def test_a_published_network_sees_all_images_once(tmp_path, monkeypatch):
    """Of 30 images, read in parts of 8, 12 are kept; larger ones are cut to the size."""
    published = features.FeatureNetwork(
        lambda arrays: test_feature_extractors.Means(),
        inception.MEASURED,
        "It is from nowhere.",
    )
    monkeypatch.setitem(inception.FEATURE_NETWORKS, "inception", published)
    monkeypatch.setattr(feature_extractors.reader, "network", lambda path: {})
    for module, name, value in (
        (reference_making, "PART", 8),
        (references, "KEPT", 12),
        (feature_extractors, "EACH", 1),
    ):
        monkeypatch.setattr(module, name, value)
    image_NHW3 = test_feature_extractors.pictures(30, (16, 24))
    np.savez(tmp_path / "data.npz", arr_0=image_NHW3)
    (tmp_path / "weights").touch()
    words = ("--protocol", "adm-50k", "--weights", tmp_path / "weights", "--size", 16)
    words += ("--split", "train")  # an archive does not say
    assert make(tmp_path / "data.npz", tmp_path / "a.npz", *words) == 0
    found = references.read(tmp_path / "a.npz")
    x_NHW3 = image_NHW3[:, :, 4:20].astype(np.float64)
    rows_ND = np.concatenate([x_NHW3.mean((1, 2)), x_NHW3.std((1, 2))], axis=1)
    assert found.moments["pool3"].count == 30 and found.record["size"] == [16, 16]
    np.testing.assert_allclose(found.moments["pool3"].mean_D, rows_ND.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        found.moments["pool3"].covariance_DD, np.cov(rows_ND, rowvar=False), rtol=1e-3, atol=1e-3
    )
    assert len(found.index_n) == 12 == len(set(found.index_n)) and not found.network
    np.testing.assert_allclose(found.features["pool3"], rows_ND[found.index_n], rtol=1e-4)
    assert found.record["extractor"]["name"] == "inception" and found.record["split"] == "train"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("named", "--out", "a.txt"), "--out names an .npz file; found a.txt"),
        (("named", "--out", "named.npz/a.npz"), "cannot write"),
        (("nothing", "--out", "a.npz"), "an image folder is needed at nothing"),
        (("nothing.npz", "--out", "a.npz"), "nothing.npz"),
        (("named", "--out", "a.npz", "--protocol", "fid"), "--protocol must be one of"),
        (("named", "--out", "a.npz", "--protocol", "adm-50k"), "needs its weight file"),
        (("named", "--out", "a.npz", "--weights", "w"), "leave --weights out"),
        (("named", "--out", "a.npz", "--protocol", "adm-50k", "--network", "n"), "--network is of"),
        (("named", "--out", "a.npz", "--network", "data.npz"), "holds images (arr_0)"),
        (("named", "--out", "a.npz", "--size", "4"), "at least 8"),
        (("named", "--out", "a.npz", "--images", "-1"), "at least 0"),
        (("named", "--out", "a.npz", "--split", "some"), "split must be one of"),
        (("named", "--out", "a.npz", "--label", "fine"), "--label (it is for sets of TFDS"),
        (("single", "--out", "a.npz", "--split", "held_out"), "nothing was held out"),
        (("nested", "--out", "a.npz"), "--labels outer in commands"),
        (("data.npz", "--out", "a.npz", "--labels", "none"), "--labels (it is for folders and"),
        (("damaged", "--out", "a.npz"), "first image, and a.png cannot be read"),
    ],
)
def test_command_lines_that_cannot_be_meant(place, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(place)
    monkeypatch.setattr(local_classifier, "of_images", None)
    np.savez(place / "data.npz", arr_0=test_feature_extractors.pictures(2))
    single(place / "single")
    nested(place / "nested")
    for name in ("a.png", "b.png"):
        (place / "damaged").mkdir(exist_ok=True)
        (place / "damaged" / name).write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.main(["reference", *words]) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert error.startswith("tokgen reference: error: ") and told in error
    assert said in ([], ["named: 2 classes (dark 16, light 16); train 32"])
    assert not (place / "a.npz").exists()


def test_images_that_cannot_be_read_are_counted_and_named(place, tmp_path, capsys):
    folder = folder_of(tmp_path / "some", ("dark", "light"))
    (folder / "train" / "dark" / "03.png").write_bytes(b"no picture")
    assert make(folder, tmp_path / "a.npz", "--network", place / "named.npz") == 0
    made = references.read(tmp_path / "a.npz")
    assert made.record["count"] == 23 == len(made.index_n) and 3 not in made.index_n
    told = made.record["unreadable"]
    assert (told["count"], told["of"]) == (1, 24) and "train/dark/03.png" in told["files"]
    said = capsys.readouterr().err
    assert "1 of 24 images cannot be read" in said and said.count("03.png") == 1


@pytest.mark.parametrize("count", [1, 256, 257, 40_000, 1_281_167])
def test_runs_are_few_of_whole_parts_and_of_every_image(count):
    runs = reference_making.runs_of(np.arange(count))
    assert len(runs) <= 64 and np.array_equal(np.concatenate(runs), np.arange(count))
    assert all(len(run) % 256 == 0 for run in runs[:-1])


def test_statistics_have_the_same_bits_whoever_sees_which_run(place, tmp_path, monkeypatch):
    """One process, and the shares of three, one after another; one of four runs has no image."""
    monkeypatch.setattr(reference_making, "PART", 8)
    monkeypatch.setattr(reference_making, "RUNS", 4)
    folder = folder_of(tmp_path / "some", ("dark", "light"), 16)
    for index in range(8):
        (folder / "train" / "light" / f"{index:02d}.png").write_bytes(b"no picture")
    found = references.read(place / "named.npz")
    network = feature_extractors.from_arrays(found.network, found.record["extractor"])
    runs, kept_n = reference_making.runs_of(np.arange(32)), np.arange(0, 32, 3)

    def seen_by(share: tuple[int, int]) -> reference_making.Measured:
        monkeypatch.setattr(distributed, "share", lambda: share)
        settings = reference_making.Settings(str(folder), "a.npz")
        source = reference_making.source_of(settings, "train")
        return reference_making.seen(network, source, (16, 16), runs, kept_n, tmp_path)

    one = reference_making.joined(seen_by((0, 1)), 0)
    shares = [seen_by((share, 3)) for share in range(3)]
    many = reference_making.joined(shares[-1], 0)
    assert one.count == many.count == 24 and one.widths == many.widths
    for name, array in (("index_n", one.index_n), ("label_n", one.label_n)):
        np.testing.assert_array_equal(getattr(many, name), array)
    for layer in ("pooled", "spatial"):
        np.testing.assert_array_equal(many.features[layer], one.features[layer])
        for name, array in one.moments[layer].arrays().items():
            np.testing.assert_array_equal(many.moments[layer].arrays()[name], array)


def test_protocols_are_known_by_name():
    assert protocols.named("local").extractor == "local"
    with pytest.raises(interfaces.UserError, match="did you mean 'fd-dinov2'"):
        protocols.named("fd-dino")
