"""References: read back to the bit, never when damaged, and refused where anything differs."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tokgen.evaluation import feature_extractors, protocols, references
from tokgen.interfaces import UserError
from tokgen.metrics import moments

WIDTHS = {"pooled": 5, "spatial": 3}
NETWORK = feature_extractors.Extractor(
    "local", None, ("pooled", "spatial", "logits"), {"name": "local", "fingerprint": "a" * 64}
)


def record(**more) -> dict:
    return {
        "protocol": "local",
        "dataset": "cats",
        "split": "train",
        "count": 40,
        "size": [16, 16],
        "crop": "center",
        "classes": ["cat", "dog"],
        "extractor": {**NETWORK.record, "classes": ["cat", "dog"]},
        "layers": WIDTHS,
    } | more


def features(count: int = 40) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    return {name: draw(size=(count, D)).astype(np.float32) for name, D in WIDTHS.items()}


def save(path: pathlib.Path, **more) -> pathlib.Path:
    """A reference of made-up features."""
    found = features()
    references.save(
        path,
        record(**more),
        {name: moments.Moments.of(rows) for name, rows in found.items()},
        {name: rows[:12] for name, rows in found.items()},
        np.arange(12) * 3,
        np.arange(12) % 2,
        {"network/kernel": np.ones((2, 3), np.float32)},
    )
    return path


def test_a_reference_comes_back_to_the_bit(tmp_path):
    found = references.read(save(tmp_path / "new" / "a.npz"))
    for layer, rows in features().items():
        wanted = moments.Moments.of(rows)
        assert found.moments[layer].count == 40
        np.testing.assert_array_equal(found.moments[layer].mean_D, wanted.mean_D)
        np.testing.assert_array_equal(found.moments[layer].scatter_DD, wanted.scatter_DD)
        np.testing.assert_array_equal(found.features[layer], rows[:12])
    np.testing.assert_array_equal(found.index_n, np.arange(12) * 3)
    np.testing.assert_array_equal(found.label_n, np.arange(12) % 2)
    np.testing.assert_array_equal(found.network["network/kernel"], np.ones((2, 3)))
    assert {k: found.record[k] for k in record()} == record() and len(found.digest) == 64
    assert references.read(save(tmp_path / "b.npz")).digest == found.digest
    assert references.read(save(tmp_path / "b.npz", split="all")).digest != found.digest
    assert not list((tmp_path / "new").glob(".*"))


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(tmp_path):
    file = save(tmp_path / "a.npz")
    whole, before = file.read_bytes(), references.read(file)
    found = 0
    for place in range(0, len(whole), 29):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            after = references.read(file)
        except UserError as error:
            assert str(file) in str(error)
            found += 1
            continue
        # a field of the zip that nobody reads, such as a date
        assert after.digest == before.digest
        for layer, rows in before.features.items():
            np.testing.assert_array_equal(after.features[layer], rows)
            np.testing.assert_array_equal(
                after.moments[layer].scatter_DD, before.moments[layer].scatter_DD
            )
    assert found > 0.7 * len(range(0, len(whole), 29))
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.npz is damaged or no .npz"):
            references.read(file)


def test_what_was_changed_by_hand_is_damage(tmp_path):
    file = save(tmp_path / "a.npz")
    with np.load(file) as archive:
        arrays = dict(archive)
    for name, array in (
        ("features/pooled", arrays["features/pooled"] + 1),
        ("record", np.array(str(arrays["record"]).replace("cats", "dogs"))),
        ("record", np.array("{}")),
        ("record", np.array("[1]")),
        ("record", np.array("no json")),
        ("more", np.zeros(2)),
    ):
        np.savez(file, **(arrays | {name: array}))
        with pytest.raises(UserError, match="a.npz is damaged: .* restore a copy"):
            references.read(file)
    np.savez(file, **{n: a for n, a in arrays.items() if n != "moments/pooled/mean"})
    with pytest.raises(UserError, match="damaged: checksum of moments/pooled/mean"):
        references.read(file)


def test_files_that_are_no_reference(tmp_path):
    image_NHW3 = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=image_NHW3, arr_1=np.zeros(3, int))
    np.savez(tmp_path / "other.npz", weights=image_NHW3)
    np.save(tmp_path / "array.npy", image_NHW3)
    (tmp_path / "text.npz").write_text("no archive")
    for name, words in {
        "images.npz": "holds images .arr_0. and no statistics.*swapped",
        "other.npz": "holds no statistics; found weights",
        "array.npy": "damaged or no .npz",
        "text.npz": "damaged or no .npz",
        "no.npz": "no reference at",
        ".": "no reference at",
    }.items():
        with pytest.raises(UserError, match=words):
            references.read(tmp_path / name)


# ---------------------------------------------------------------- what must agree


def agreed(path, name="local", extractor=NETWORK, size=(16, 16), count=40) -> None:
    references.check(references.read(path), name, extractor, size=size, count=count)


def test_a_reference_of_the_same_kind_is_taken(tmp_path):
    agreed(save(tmp_path / "a.npz"))
    agreed(save(tmp_path / "a.npz", split="held_out", count=7))  # the local protocol names none


@pytest.mark.parametrize(
    ("more", "against", "words"),
    [
        ({"layers": {"spatial": 3}}, {}, "layer: need pooled, found spatial"),
        ({"size": [32, 16]}, {}, "size of the images: need 16x16, found 32x16"),
        ({}, {"size": (64, 64)}, "size of the images: need 64x64, found 16x16"),
        ({"crop": "random"}, {}, "crop: need center, found random"),
        (
            {"extractor": {"name": "local", "fingerprint": "b" * 64}},
            {},
            "weights of local: need aaaaaaaaaaaaaaaa, found bbbbbbbbbbbbbbbb",
        ),
        (
            {"extractor": {"name": "inception_torch", "fingerprint": "a" * 64}},
            {},
            "feature network: need local, found inception_torch",
        ),
        ({"protocol": "adm-50k"}, {}, "protocol: need local, found adm-50k"),
        ({}, {"name": "few"}, "protocol: need few, found local"),
        ({"protocol": "few", "count": 39}, {"name": "few"}, "reference: need 40, found 39"),
        ({"protocol": "few", "available": 50}, {"name": "few"}, "its split: need 50, found 40"),
        ({"protocol": "few", "split": "all"}, {"name": "few"}, "split: need train, found all"),
        ({"protocol": "few"}, {"name": "few", "count": 10}, "samples: need 9, found 10"),
    ],
)
def test_a_difference_is_named_alone(tmp_path, monkeypatch, more, against, words):
    few = dataclasses.replace(protocols.PROTOCOLS["local"], samples=9, reference=40, split="train")
    monkeypatch.setitem(protocols.PROTOCOLS, "few", few)
    against = {"count": 9 if against.get("name") else 40} | against
    with pytest.raises(UserError) as caught:
        agreed(save(tmp_path / "a.npz", **more), **against)
    told = str(caught.value)
    assert words in told and "tokgen reference" in told and "\n" not in told
    others = told.split("; ")[1:]
    assert len(others) == 1, "one difference, one word of it"


def test_all_differences_are_in_one_message(tmp_path):
    file = save(tmp_path / "a.npz", size=[8, 8], crop="none", layers={"spatial": 3})
    with pytest.raises(UserError, match="; crop: .*; size of the images: .*; layer: "):
        agreed(file)


# ---------------------------------------------------------------- plain statistics of others


@pytest.fixture
def inception(monkeypatch) -> feature_extractors.Extractor:
    """Inception by name, of few features."""
    monkeypatch.setattr(references, "WIDTHS", {"inception": {"pool3": 4, "spatial": 3}})
    return feature_extractors.Extractor(
        "inception", None, ("pool3", "spatial"), {"name": "inception", "fingerprint": "c" * 64}
    )


def statistics(D: int, names=("mu", "sigma")) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(D).normal(size=(30, D))
    return dict(zip(names, (rows.mean(0), np.cov(rows, rowvar=False)), strict=True))


def test_plain_statistics_need_somebody_who_knows_them(tmp_path, inception):
    file = tmp_path / "fid.npz"
    np.savez(file, **statistics(4))
    with pytest.raises(UserError, match="say --assume adm-50k or val-centercrop-rfid"):
        references.read(file)
    for name in ("local", "fd-dinov2", "cmmd"):
        with pytest.raises(UserError, match=f"--assume {name} takes features of .*--assume adm"):
            references.read(file, name)
    with pytest.raises(UserError, match="did you mean 'adm-50k'"):
        references.read(file, "adm-50")
    found = references.read(file, "adm-50k")
    np.testing.assert_allclose(
        found.moments["pool3"].covariance_DD, statistics(4)["sigma"], rtol=1e-12
    )
    np.testing.assert_array_equal(found.moments["pool3"].mean_D, statistics(4)["mu"])
    assert found.record["assumed"] and "spatial" not in found.moments and not found.features
    options = dict(extractor=inception, size=(256, 256))
    references.check(found, "adm-50k", count=50_000, **options)
    with pytest.raises(UserError, match="samples: need 50000, found 100"):
        references.check(found, "adm-50k", count=100, **options)
    with pytest.raises(UserError, match="protocol: need val-centercrop-rfid, found adm-50k"):
        references.check(found, "val-centercrop-rfid", count=50_000, **options)


def test_plain_statistics_of_another_layer(tmp_path, inception):
    file = tmp_path / "fid.npz"
    for arrays, words in (
        (statistics(6), "width of the layer pool3: need 4, found 6"),
        (statistics(4) | statistics(5, ("mu_s", "sigma_s")), "layer spatial: need 3, found 5"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=words):
            references.check(
                references.read(file, "adm-50k"),
                "adm-50k",
                inception,
                size=(256, 256),
                count=50_000,
            )


def test_images_beside_statistics_say_their_size(tmp_path, inception):
    file = tmp_path / "adm.npz"
    image_NHW3 = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(file, arr_0=image_NHW3, **statistics(4), **statistics(3, ("mu_s", "sigma_s")))
    found = references.read(file, "adm-50k")
    assert set(found.moments) == {"pool3", "spatial"}
    kept = references.images_of(file)
    np.testing.assert_array_equal(kept.part(0, 5)["image"], image_NHW3)
    options = dict(extractor=inception, count=50_000)
    references.check(found, "adm-50k", size=(8, 8), **options)
    with pytest.raises(UserError, match="size of the images: need 64x64, found 8x8"):
        references.check(found, "adm-50k", size=(64, 64), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mu": np.zeros((1, 4))}, r"\[D\] and \[D, D\]; found \(1, 4\)"),
        ({"sigma": np.eye(5)}, r"found \(4,\) and \(5, 5\)"),
        ({"sigma": np.full((4, 4), np.nan)}, "not finite"),
        ({"mu": np.array(["a", "b", "c", "d"])}, "must hold numbers"),
    ],
)
def test_plain_statistics_that_cannot_be_any(tmp_path, change, words):
    np.savez(tmp_path / "fid.npz", **(statistics(4) | change))
    with pytest.raises(UserError, match=words):
        references.read(tmp_path / "fid.npz", "adm-50k")


def test_assume_is_not_for_a_file_that_says_what_it_is(tmp_path):
    file = save(tmp_path / "a.npz")
    assert references.read(file, "local").record["protocol"] == "local"
    with pytest.raises(UserError, match="--assume is for files without a record.*local, not adm"):
        references.read(file, "adm-50k")


def test_a_reference_of_a_later_form_is_said_to_be_one(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(references, "FORMAT", 2)
        file = save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="has format 2; this tokgen reads 1"):
        references.read(file)
    assert json.loads(str(np.load(file)["record"]))["format"] == 2
