"""`tokgen evaluate --protocol` from its command line: wrong references and samples, one message."""

import dataclasses
import json
import pathlib
import re
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import test_collect, test_feature_extractors
from tokgen import cli
from tokgen.backbones import features, inception as backbone
from tokgen.evaluation import collect, feature_extractors, protocols, references, score as scores
from tokgen.metrics import frechet
from tokgen.sampling import drawing

COUNT = test_collect.COUNT


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with `reference.npz` and `samples.npz` of the same kind."""
    folder = tmp_path_factory.mktemp("score")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractors, "EACH", 1)
        test_collect.write_reference(folder / "reference.npz")
    np.savez(folder / "samples.npz", arr_0=pictures(), arr_1=np.arange(COUNT) % 3)
    return folder


def pictures(count: int = COUNT) -> np.ndarray:
    return test_feature_extractors.pictures(count, seed=9)


@pytest.fixture
def small(monkeypatch):
    """Few metrics, and few images of a device at a time."""
    local = dataclasses.replace(protocols.PROTOCOLS["local"], metrics=("sfid", "is", "precision"))
    monkeypatch.setitem(protocols.PROTOCOLS, "local", local)
    monkeypatch.setattr(feature_extractors, "EACH", 2)


@pytest.fixture
def idle(small, monkeypatch):
    """Nothing may be drawn, and no image be seen."""

    def never(*words, **options):
        raise AssertionError("a wrong reference was noticed too late")

    monkeypatch.setattr(feature_extractors, "_seen", never)
    monkeypatch.setattr(drawing, "draw", never)


def evaluate(capsys, *words) -> tuple[int, str]:
    """(exit code, the message) of a command line."""
    capsys.readouterr()
    code = cli.main(["evaluate", *map(str, words)])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) <= 1
    return code, "".join(errors)


def refused(capsys, *words) -> str:
    code, message = evaluate(capsys, *words)
    assert code == 2 and message.startswith("tokgen evaluate: error: ")
    return message


def changed(place: pathlib.Path, out: pathlib.Path, **more) -> pathlib.Path:
    """The reference with other words in its record."""
    found = references.read(place / "reference.npz")
    own = ("digest", "checksums", "format")
    record = {name: value for name, value in found.record.items() if name not in own}
    references.save(
        out / "changed.npz",
        record | more,
        found.moments,
        found.features,
        found.index_n,
        found.label_n,
        found.network,
    )
    return out / "changed.npz"


def broken(place: pathlib.Path, out: pathlib.Path, at: int | None) -> pathlib.Path:
    whole = (place / "reference.npz").read_bytes()
    cut = len(whole) // 3
    wrong = whole[:cut] if at is None else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    (out / "broken.npz").write_bytes(wrong)
    return out / "broken.npz"


def bare(out: pathlib.Path, **arrays) -> pathlib.Path:
    np.savez(out / "bare.npz", **arrays)
    return out / "bare.npz"


OTHER = {"name": "local", "fingerprint": "b" * 64}
TORCH = {"name": "inception_torch", "fingerprint": "b" * 64}
WRONG = {
    "layer": (lambda p, o: changed(p, o, layers={"spatial": 28}), "layer: need pooled, found spat"),
    "size": (lambda p, o: changed(p, o, size=[32, 32]), "images: need 16x16, found 32x32"),
    "crop": (lambda p, o: changed(p, o, crop="random"), "crop: need center, found random"),
    "protocol": (lambda p, o: changed(p, o, protocol="cmmd"), "protocol: need local, found cmmd"),
    "weights": (lambda p, o: changed(p, o, extractor=OTHER), "weights of local: need "),
    "network": (lambda p, o: changed(p, o, extractor=TORCH), "need local, found inception_torch"),
    "flipped": (lambda p, o: broken(p, o, 300_000), "broken.npz is damaged"),
    "first": (lambda p, o: broken(p, o, 0), "broken.npz is damaged"),
    "truncated": (lambda p, o: broken(p, o, None), "broken.npz is damaged"),
    "images": (lambda p, o: bare(o, arr_0=pictures(4)), "images .arr_0. and no statistics"),
    "plain": (lambda p, o: bare(o, mu=np.zeros(6), sigma=np.eye(6)), "say --assume adm-50k"),
    "absent": (lambda p, o: o / "no.npz", "no reference at .*no.npz: make one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reference_is_refused_before_an_image_is_seen(place, tmp_path, capsys, idle, case):
    make, words = WRONG[case]
    given = make(place, tmp_path)
    out = tmp_path / "out"
    told = refused(
        capsys,
        *(place / "samples.npz", "--protocol", "local", "--accept", "few"),
        *("--reference", given, "--out", out),
    )
    assert re.search(words, told)
    assert not (out / "parts").exists() and not (out / "run.json").exists()


def test_swapped_and_other_numbers_are_refused(place, tmp_path, capsys, idle, monkeypatch):
    out, reference = tmp_path / "out", place / "reference.npz"
    words = ("--protocol", "local", "--out", out, "--reference")
    swapped = refused(capsys, reference, *words, place / "samples.npz")
    assert "swapped" in swapped
    both = refused(capsys, reference, *words, reference)
    assert "reference.npz holds reference statistics" in both and "swapped" in both
    for change, told in (
        ({"reference": 61}, "images of the reference: need 61, found 60"),
        ({"samples": 64}, "local needs 64 images; found 48: give more"),
        ({"split": "held_out"}, "split: need held_out, found train"),
    ):
        fixed = dataclasses.replace(protocols.PROTOCOLS["local"], **change)
        with monkeypatch.context() as patch:
            patch.setitem(protocols.PROTOCOLS, "local", fixed)
            assert told in refused(capsys, place / "samples.npz", *words, reference)
            if change.get("samples"):
                asked = (*words, reference, "--samples", 48)
                assert "defined for 64" in refused(capsys, place / "samples.npz", *asked)
    few = refused(capsys, place / "samples.npz", *words, reference, "--samples", 90)
    assert "needs 90 images; found 48: give more, or say --samples 48" in few


def test_too_few_images_are_said_before_they_are_seen(place, tmp_path, capsys, idle, monkeypatch):
    local = dataclasses.replace(protocols.PROTOCOLS["local"], metrics=("fid",))
    monkeypatch.setitem(protocols.PROTOCOLS, "local", local)
    words = ("--protocol", "local", "--out", tmp_path, "--reference", place / "reference.npz")
    told = refused(capsys, place / "samples.npz", *words)
    assert "192 features needs more images" in told and "48 samples and 60 of the ref" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--protocol", "locale"), "did you mean 'local'"),
        (("--protocol", "local"), "needs --out DIR"),
        (("--protocol", "local", "--out", "o"), "--reference FILE.npz"),
        (("--protocol", "adm-50k", "--out", "o"), "--reference FILE.npz"),
        (("--protocol", "val-centercrop-rfid", "--out", "o"), "give the tokenizer's checkpoint"),
        (("--protocol", "local", "--out", "o", "--reference", "r", "--seed", -1), "--seed in"),
        (("--protocol", "local", "--out", "o", "--reference", "r", "--batch", 0), "at least 1"),
        (("--protocol", "local", "--reference", "r", "--out", "samples.npz"), "is a file"),
        (("--reference", "r"), "name its --protocol"),
        (("--lpips", "vgg.pth"), "--lpips are of a score"),
        (("--protocol", "local", "--out", "o", "--reference", "reference.npz", "--weights", "w"),
         "leave --weights out"),
        (("--protocol", "local", "--out", "o", "--reference", "reference.npz", "--lpips", "w"),
         "--lpips compares originals"),
        (("--protocol", "local", "--out", "o", "--reference", "reference.npz", "--assume",
          "adm-50k"), "--assume is for files without a record"),
        (("--protocol", "adm-50k", "--out", "o", "--reference", "reference.npz"),
         "needs 50000 images; found 48"),
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_meant(place, capsys, monkeypatch, idle, words, told):
    monkeypatch.chdir(place)
    assert told in refused(capsys, "samples.npz", *words)


def test_what_is_scored_is_never_replaced_by_its_score(place, tmp_path, capsys, idle, monkeypatch):
    out = tmp_path / "scores"
    out.mkdir()
    (out / collect.RUN).write_text("{}")
    (out / collect.RESULTS).write_text("{}\n")
    shutil.copy(place / "samples.npz", out)
    words = ("--protocol", "local", "--reference", place / "reference.npz", "--out", out)
    (tmp_path / "link").symlink_to(out)
    for given in (out / "samples.npz", tmp_path / "link" / "samples.npz"):
        told = refused(capsys, given, *words, "--overwrite")
        assert "--overwrite would remove what is scored" in told
    # weights lie in it
    text = ("--weights", out / "samples.npz", "--overwrite")
    assert "holds what the command reads" in refused(capsys, place / "samples.npz", *words, *text)
    assert (out / "samples.npz").exists()


def test_samples_that_are_none(place, tmp_path, capsys, idle):
    words = ("--protocol", "local", "--out", tmp_path / "out")
    words += ("--reference", place / "reference.npz", "--accept", "few")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(pictures(1)[0]).save(folder / "a.jpg")
    assert "lossy form (a.jpg" in refused(capsys, folder, *words)
    (folder / "a.jpg").unlink()
    assert "no images in" in refused(capsys, folder, *words)
    Image.fromarray(pictures(1)[0]).save(folder / "a.png")
    inside = (*words[:3], folder / "out", *words[4:])
    assert "--out must not lie in what is scored" in refused(capsys, folder, *inside)
    assert "no checkpoint at" in refused(capsys, tmp_path / "nothing", *words)
    image_NHW3 = bare(tmp_path, arr_0=pictures().astype(np.float32))
    assert "uint8 [N, H, W, 3], 0 to 255; found float32" in refused(capsys, image_NHW3, *words)
    large = bare(tmp_path, arr_0=test_feature_extractors.pictures(4, (32, 32)))
    assert "images: need 32x32, found 16x16" in refused(capsys, large, *words)


def test_copies_and_blank_images_are_found_and_may_be_accepted(place, tmp_path, capsys, small):
    image_NHW3 = pictures()
    image_NHW3[5:9], image_NHW3[11:13] = image_NHW3[4], 7
    file, out = bare(tmp_path, arr_0=image_NHW3), tmp_path / "out"
    words = (file, "--protocol", "local", "--reference", place / "reference.npz")
    words += ("--out", out, "--accept", "few")
    told = refused(capsys, *words)
    assert "5 duplicates and 2 constant among 48 images" in told
    assert "2 constant among" in refused(capsys, *words, "--accept", "duplicates")
    assert not (out / collect.RESULTS).exists()
    code, _ = evaluate(capsys, *words, "--accept", "duplicates", "--accept", "constant")
    assert code == 0
    (line,) = collect.results(out)
    assert line["suspicious"] == {"duplicates": 5, "constant": 2}


def test_labels_are_those_of_the_reference_by_name(place, tmp_path, capsys, small, monkeypatch):
    """Of classes that are a part of them; numbers count; those of other names are left out."""
    local = dataclasses.replace(protocols.PROTOCOLS["local"], metrics=("class_accuracy",))
    monkeypatch.setitem(protocols.PROTOCOLS, "local", local)
    image_NHW3, values = pictures(12), {}
    sets = {"known": ("dog", "owl"), "strange": ("bird", "fish")}
    for name, classes in sets.items():
        for number, image_HW3 in enumerate(image_NHW3):
            folder = tmp_path / name / classes[number // 6]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW3).save(folder / f"{number:02d}.png")
    label_N = 1 + np.arange(12) // 6
    np.savez(tmp_path / "numbers.npz", arr_0=image_NHW3, arr_1=label_N)
    np.savez(tmp_path / "more.npz", arr_0=image_NHW3, arr_1=label_N + 5)
    for name in ("known", "strange", "numbers.npz", "more.npz"):
        words = ("--protocol", "local", "--reference", place / "reference.npz")
        out = tmp_path / f"out-{name}"
        assert evaluate(capsys, tmp_path / name, *words, "--out", out)[0] == 0
        (values[name],) = collect.results(out)
    assert values["known"]["metrics"] == values["numbers.npz"]["metrics"]
    network = references.read(place / "reference.npz")
    network = feature_extractors.from_arrays(network.network, network.record["extractor"])
    logits_NK = feature_extractors.features(network, image_NHW3, ("logits",))["logits"]
    share = np.mean(logits_NK.argmax(1) == label_N)
    assert values["known"]["metrics"]["class_accuracy"]["value"] == pytest.approx(share)
    for name in ("strange", "more.npz"):
        assert "other classes" in values[name]["absent"]["class_accuracy"]


@pytest.mark.parametrize(
    ("names", "known", "real", "labels"),
    [
        (("dog", "cat"), (), ("cat", "dog"), [1, 0]),  # a published network has no classes
        (("dog", "wolf"), (), ("cat", "dog"), None),
        (("cat", "dog"), ("cat", "dog"), ("dog", "cat"), None),
        (("0", "1"), ("cat", "dog"), ("cat", "dog"), [0, 1]),
        ((), (), ("cat", "dog"), [0, 1]),
        ((), (), ("1", "10", "2"), None),  # is label 1 the class 1, or the second one?
        (("cat", "dog"), (), (), [0, 1]),
    ],
)
def test_labels_cross_by_name_or_not_at_all(names, known, real, labels, capsys):
    extractor = types.SimpleNamespace(record={"classes": known})
    reference = types.SimpleNamespace(record={"classes": real})
    label_N, count = scores.labels_of(np.array([0, 1]), names, 2, extractor, reference)
    assert count == (0 if labels is None else 2)
    assert labels is None or label_N.tolist() == labels
    if labels is None and real != ("dog", "cat"):
        assert "no metrics by class: " in capsys.readouterr().err


def test_labels_mean_nothing_to_a_local_network_without_classes(capsys):
    """It tells which way is up: of 5 classes labels had no logit, of 4 they had others'."""
    names = ("a", "b", "c", "d")
    for record in ({"name": "local"}, {"name": "local", "classes": []}):
        extractor = types.SimpleNamespace(record=record)
        reference = types.SimpleNamespace(record={"classes": []})
        assert scores.labels_of(np.arange(4), names, 4, extractor, reference)[1] == 0
        assert "the reference has no classes" in capsys.readouterr().err


# ---------------------------------------------------------------- a published network


@pytest.fixture
def inception(tmp_path, monkeypatch) -> pathlib.Path:
    """A weight file of a network by the name of Inception, whose features are means by hand."""
    published = features.FeatureNetwork(
        lambda arrays: test_feature_extractors.Means(float(arrays["factor"])),
        backbone.MEASURED,
        "It is from nowhere.",
    )
    for name in ("inception", "inception_torch"):
        monkeypatch.setitem(backbone.FEATURE_NETWORKS, name, published)
    monkeypatch.setattr(feature_extractors.reader, "network", lambda path: dict(np.load(path)))
    monkeypatch.setattr(references, "WIDTHS", {"inception": {"pool3": 6, "spatial": 4}})
    adm = dataclasses.replace(
        protocols.PROTOCOLS["adm-50k"],
        metrics=("fid", "sfid", "is", "precision", "recall"),
        samples=COUNT,
        against=COUNT,
        compared=30,
    )
    monkeypatch.setitem(protocols.PROTOCOLS, "adm-50k", adm)
    np.savez(tmp_path / "weights.npz", factor=np.float32(1))
    return tmp_path / "weights.npz"


def by_hand(image_NHW3) -> dict[str, np.ndarray]:
    x_NHW3 = image_NHW3.astype(np.float64)
    pool_N6 = np.concatenate([x_NHW3.mean((1, 2)), x_NHW3.std((1, 2))], axis=1)
    return {"mu": pool_N6, "mu_s": x_NHW3[:, ::4].mean((2, 3))}


def adm(path: pathlib.Path, image_NHW3, *, kept: int) -> pathlib.Path:
    """Statistics as ADM's evaluator has them: of all images, of which it keeps some."""
    found, arrays = by_hand(image_NHW3), {"arr_0": image_NHW3[:kept]}
    for mean, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        arrays[mean], arrays[sigma] = found[mean].mean(0), np.cov(found[mean], rowvar=False)
    np.savez(path, **{name: array for name, array in arrays.items() if len(array)})
    return path


def test_the_published_form_of_a_reference_needs_assume(
    place, tmp_path, capsys, inception, monkeypatch
):
    real_nHW3 = test_feature_extractors.pictures(80, seed=4) // 2
    reference = adm(tmp_path / "adm.npz", real_nHW3, kept=30)
    words = (place / "samples.npz", "--protocol", "adm-50k", "--reference", reference)
    words += ("--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractors, "_seen", None)
        weights = ("--weights", inception)
        assert "say --assume adm-50k" in refused(capsys, *words, *weights)
        told = refused(capsys, *words, *weights, "--assume", "fd-dinov2")
        assert "takes features of dinov2" in told
        assert "--weights FILE. It is from" in refused(capsys, *words, "--assume", "adm-50k")
    code, _ = evaluate(capsys, *words, "--weights", inception, "--assume", "adm-50k")
    assert code == 0
    (line,) = collect.results(tmp_path / "out")
    wanted, seen = by_hand(real_nHW3), by_hand(pictures())
    for name, mean in (("fid", "mu"), ("sfid", "mu_s")):
        value = frechet.from_features(seen[mean], wanted[mean])
        assert line["metrics"][name]["value"] == pytest.approx(value, rel=1e-3)
    assert line["reference"]["assumed"] and line["extractor"]["file"] == "weights.npz"
    assert line["metrics"]["recall"]["images"] == 30
    assert line["metrics"]["precision"]["images"] == COUNT
    assert json.dumps(line) + "\n" == (tmp_path / "out" / collect.RESULTS).read_text()


def test_statistics_alone_give_the_distance_and_say_what_is_absent(
    place, tmp_path, capsys, inception
):
    reference = adm(tmp_path / "fid.npz", test_feature_extractors.pictures(80), kept=0)
    words = (place / "samples.npz", "--protocol", "adm-50k", "--reference", reference)
    words += ("--out", tmp_path / "out", "--weights", inception, "--assume", "adm-50k")
    assert evaluate(capsys, *words)[0] == 0
    (line,) = collect.results(tmp_path / "out")
    assert set(line["metrics"]) == {"fid", "sfid", "is"}
    assert set(line["absent"].values()) == {"the reference holds no features of single images"}


def test_another_published_network_is_refused(place, tmp_path, capsys, inception):
    with np.load(adm(tmp_path / "adm.npz", pictures(), kept=1)) as archive:
        moments = references.moments_.Moments.from_covariance(archive["mu"], archive["sigma"], 48)
    given = tmp_path / "ours.npz"
    for name, factor, told in (
        ("inception_torch", 1, "feature network: need inception, found inception_torch"),
        ("inception", 2, "weights of inception: need "),
    ):
        np.savez(tmp_path / "other.npz", factor=np.float32(factor))
        other = feature_extractors.from_file(name, str(tmp_path / "other.npz"))
        record = {"protocol": "adm-50k", "split": "train", "count": 48, "size": [16, 16]}
        record |= {"crop": "center", "extractor": other.record, "layers": {"pool3": 6}}
        none = np.zeros(0, int)
        references.save(given, record, {"pool3": moments}, {}, none, none, {})
        words = ("--reference", given, "--out", tmp_path / "out", "--weights", inception)
        assert told in refused(capsys, place / "samples.npz", "--protocol", "adm-50k", *words)
