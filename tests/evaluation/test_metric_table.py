"""Every figure is what tokgen.metrics says of the same features; what cannot be had says why."""

import dataclasses
import math

import numpy as np
import pytest

from tokgen.evaluation import metric_table, protocols, score_page
from tokgen.interfaces import UserError
from tokgen.metrics import (
    accuracy,
    bootstrap,
    frechet,
    inception_score,
    kernels,
    memorisation,
    metric,
    moments,
    neighbours,
    vendi,
)

D, K, N, n, SEED = 6, 3, 240, 300, 7
EVERY = tuple(name for name, one in metric_table.known().items() if one.measure)


def sets() -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """(features of samples, of real images, labels of both); the samples lie tighter."""
    draw = np.random.default_rng(0)
    centre_KD = draw.normal(size=(K, D))
    label_N, label_n = np.sort(draw.integers(0, K, N)), draw.integers(0, K, n)
    rows_ND = centre_KD[label_N] + 0.5 * draw.normal(size=(N, D))
    real_nD = centre_KD[label_n] + 0.8 * draw.normal(size=(n, D))
    logits_NK = 3 * draw.normal(size=(N, K)) + 4 * np.eye(K)[label_N]
    found = {"pooled": rows_ND, "spatial": draw.normal(size=(N, 4)), "logits": logits_NK}
    real = {"pooled": real_nD, "spatial": draw.normal(size=(n, 4)) + 1}
    single = (
        {name: rows.astype(np.float32) for name, rows in part.items()} for part in (found, real)
    )
    return *single, label_N, label_n


def compared(**more) -> metric.Compared:
    found, real, label_N, label_n = sets()
    given = {
        "splits": (0, None),
        "layer": "pooled",
        "logits": "logits",
        "features": found,
        "reference": real,
        "moments": {name: moments.Moments.of(rows) for name, rows in real.items()},
        "label_N": label_N,
        "label_n": label_n,
        "classes": K,
        "least": None,
        "seed": SEED,
    }
    return metric.Compared(**(given | more))


def measured(name: str, one: metric.Compared) -> dict:
    return metric_table.named(name).measure(one)


@pytest.fixture(scope="module")
def figures() -> dict[str, dict]:
    found, absent = metric_table.score(compared(), EVERY, what="")
    assert not absent and set(found) == set(EVERY) and len(EVERY) >= 16
    return found


def test_frechet_distances_are_of_their_layers(figures):
    found, real, _, _ = sets()
    for name, layer in (("fid", "pooled"), ("sfid", "spatial")):
        a, b = found[layer].astype(np.float64), real[layer].astype(np.float64)
        wanted = frechet.distance(
            a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
        )
        figure = figures[name]
        np.testing.assert_allclose(figure["value"], wanted, rtol=1e-9)
        assert figure["low"] < wanted < figure["high"] and 0 < figure["error"] < wanted
        assert figure["features"] == a.shape[1]
    assert figures["fid"]["value"] != figures["sfid"]["value"]


def test_the_bias_shown_is_that_of_so_many_images():
    """Of standard normals against exact moments: d / N + d (d + 1) / 4 N, here 0.039."""
    exact = moments.Moments.from_covariance(np.zeros(D), np.eye(D), 1e9)
    shown = []
    for seed in range(6):
        rows_ND = np.random.default_rng(seed).normal(size=(400, D)).astype(np.float32)
        one = compared(features={"pooled": rows_ND}, moments={"pooled": exact})
        shown.append(measured("fid", one)["bias"])
        few = compared(features={"pooled": rows_ND[:14]}, moments={"pooled": exact})
        closed = frechet.between(moments.Moments.of(rows_ND[:14]), exact)
        assert measured("fid", few)["bias"] == pytest.approx(
            closed.bias
        )  # seven chunks are too few
        assert "low" not in measured("fid", few)
    assert np.mean(shown) == pytest.approx(frechet.bias(D, 400), rel=0.25)


def test_figures_of_pairs_take_equal_numbers_in_a_mixed_order(figures):
    found, real, _, _ = sets()
    order_N = np.random.default_rng(SEED).permutation(N)
    rows_ND, real_nD = found["pooled"][order_N], real["pooled"][:N]
    precise, recalled = neighbours.precision_recall(real_nD, rows_ND, 3)
    assert precise > recalled + 0.05  # the samples lie tighter: turned round, it would be seen
    dense, covered = neighbours.density_coverage(real_nD, rows_ND, 5)
    wanted = {"precision": precise, "recall": recalled, "density": dense, "coverage": covered}
    wanted["vendi"] = vendi.score(rows_ND)
    wanted["cmmd"] = kernels.cmmd(kernels.unit(rows_ND), kernels.unit(real_nD))
    for name, value in wanted.items():
        assert figures[name]["value"] == pytest.approx(value, rel=1e-6), name
        assert figures[name]["images"] == N
    assert figures["coverage"]["expected"] == 1 - 2**-5
    assert figures["vendi"]["real"] == pytest.approx(vendi.score(real_nD))
    assert figures["precision"]["error"] == pytest.approx(
        math.sqrt(precise * (1 - precise) / N), rel=1e-6
    )


def test_neighbours_under_adm_are_of_all_samples_against_the_kept_images():
    """10,000 real against 50,000 samples (fact sheet 4): radii depend on the numbers."""
    found, real, _, _ = sets()
    assert protocols.PROTOCOLS["adm-50k"].against == protocols.PROTOCOLS["adm-50k"].samples
    one = compared(most=60, against=200)
    order_N = np.random.default_rng(SEED).permutation(N)[:200]
    wanted = neighbours.precision_recall(real["pooled"][:60], found["pooled"][order_N], 3)
    shown = measured("precision", one), measured("recall", one)
    assert tuple(figure["value"] for figure in shown) == wanted
    assert [figure["images"] for figure in shown] == [200, 60]
    equal = compared(most=60)
    assert measured("recall", equal)["images"] == measured("density", equal)["images"] == 60
    assert measured("recall", equal)["value"] != shown[1]["value"]


def test_figures_of_all_images(figures):
    found, real, label_N, label_n = sets()
    rows_ND, real_nD = found["pooled"], real["pooled"]
    kid = kernels.kid(rows_ND, real_nD, seed=2020)
    assert figures["kid"] == {
        "value": 1000 * kid.value, "error": 1000 * kid.error, "std": 1000 * kid.std, "subset": N
    }  # fmt: skip
    authentic_N = memorisation.authentic(rows_ND, real_nD)
    assert figures["authenticity"]["value"] == np.mean(authentic_N)
    mifid = memorisation.mifid(figures["fid"]["value"], rows_ND, real_nD)
    assert figures["mifid"] == {"value": mifid.value, "distance": mifid.distance, "images": n}
    top = accuracy.top(found["logits"], label_N)
    assert figures["class_accuracy"] == {"value": top.value, "error": top.error}
    real_moments = moments.Moments.of(real_nD)
    line = frechet.infinity(rows_ND, real_moments, seed=SEED, smallest=N // 2)
    assert figures["fid_infinity"]["value"] == line.value < figures["fid"]["value"]
    line = inception_score.infinity(found["logits"], seed=SEED, smallest=N // 2)
    assert figures["is_infinity"] == {
        "value": line.value, "error": line.error, "slope": line.slope
    }  # fmt: skip
    width = frechet.class_width(int(np.bincount(label_N).min()), D)
    axes_Dw = frechet.principal(real_moments, width)
    apart_K = [
        frechet.from_features(rows_ND[label_N == k] @ axes_Dw, real_nD[label_n == k] @ axes_Dw)
        for k in range(K)
    ]
    np.testing.assert_allclose(figures["classwise"]["value"], np.mean(apart_K), rtol=1e-5)
    np.testing.assert_allclose(figures["classwise"]["by_class"], apart_K, atol=1e-3)
    share_K, given_K = (np.bincount(label) / len(label) for label in (label_n, label_N))
    assert figures["classwise"]["divergence"] == pytest.approx(share_K @ np.log(share_K / given_K))
    assert figures["classwise"]["axes"] == width


def test_inception_score_does_not_depend_on_the_order_of_samples():
    """Sorted by class, published parts of consecutive samples score far too low."""
    found, _, label_N, _ = sets()
    logits_NK = found["logits"]
    size = N // 8
    sorted_, mixed = (
        compared(
            splits=(size, None),
            features={"pooled": found["pooled"][order], "logits": logits_NK[order]},
        )
        for order in (np.arange(N), np.random.default_rng(3).permutation(N))
    )
    plain = inception_score.score(logits_NK, inception_score.consecutive(N, size)).mean
    shown = measured("is", sorted_)
    assert (shown["parts"], shown["part"]) == (8, size) and shown["std"] > 0
    assert shown["value"] == pytest.approx(measured("is", mixed)["value"], rel=0.05)
    assert plain < 0.85 * shown["value"]
    whole = inception_score.score(logits_NK, [np.arange(N)]).mean
    for one in (sorted_, mixed):  # the local protocol: all in one part
        one = dataclasses.replace(one, splits=(0, None))
        assert measured("is", one)["value"] == pytest.approx(whole, rel=1e-12)
    seeded = (size, 2020)
    seeds = [measured("is", compared(splits=seeded, seed=seed))["value"] for seed in (0, 1)]
    assert seeds[0] == seeds[1]


def test_nearest_images_are_those_of_the_largest_cosine():
    found, real, _, _ = sets()
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in
            (found["pooled"].astype(np.float64), real["pooled"].astype(np.float64)))  # fmt: skip
    cosine_Nn = a @ b.T
    sample_N, real_N, similarity_N = score_page.nearest(compared())
    order_N = np.argsort(-cosine_Nn.max(1))[: score_page.NEAREST]
    np.testing.assert_array_equal(sample_N, order_N)
    np.testing.assert_array_equal(real_N, cosine_Nn.argmax(1)[order_N])
    np.testing.assert_allclose(similarity_N, cosine_Nn.max(1)[order_N], rtol=1e-9)


# ---------------------------------------------------------------- what cannot be measured


def without(name: str) -> dict:
    found, real, label_N, label_n = sets()
    lonely_N = np.where(np.arange(N) < N - 1, 0, 1)
    return {
        "spatial": {"moments": {"pooled": moments.Moments.of(real["pooled"])}},
        "features": {"reference": {}},
        "logits": {"logits": "", "features": {k: found[k] for k in ("pooled", "spatial")}},
        "labels": {"label_N": np.zeros(0, np.int32)},
        "classes": {"classes": 0},
        "real classes": {"label_n": np.zeros(0, np.int32)},
        "a class": {"label_N": lonely_N},
        "a real class": {"label_n": np.arange(n) % 2},
    }[name]


@pytest.mark.parametrize("name", EVERY)
def test_fewer_images_than_a_metric_states_are_an_error_and_as_many_are_none(name):
    def few(count: int) -> metric.Compared:
        found, _, label_N, _ = sets()
        found = {layer: rows[:count] for layer, rows in found.items()}
        return compared(features=found, label_N=label_N[:count], classes=0, least=2)

    one = metric_table.named(name)
    for count in range(1, 8):
        if one.lacking(few(count)):
            continue
        if count >= one.least:
            one.measure(few(count))
        else:
            with pytest.raises(UserError, match=r"need"):
                one.measure(few(count))


def lacking(name: str, one: metric.Compared) -> str:
    return metric_table.named(name).lacking(one)


NEIGHBOURS = {
    *("kid", "cmmd", "precision", "recall", "density", "coverage", "vendi", "authenticity"),
    *("mifid", "classwise"),
}


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("spatial", {"sfid"}, "no moments of the layer spatial"),
        ("features", NEIGHBOURS, "no features of single images"),
        ("logits", {"is", "is_infinity", "class_accuracy"}, "network has no classes"),
        ("labels", {"classwise", "class_accuracy"}, "samples have no labels"),
        ("classes", {"classwise", "class_accuracy"}, "of other classes than the reference"),
        ("real classes", {"classwise"}, "reference has no classes"),
        ("a class", {"classwise"}, "2 of 3 classes have no two samples"),
        ("a real class", {"classwise"}, "1 of 3 classes have no two kept reference images"),
    ],
)
def test_what_is_absent_says_why(name, metrics, words):
    one = compared(**without(name))
    reasons = {name: lacking(name, one) for name in EVERY}
    assert {name for name, why in reasons.items() if why} == metrics
    assert all(words in reasons[name] for name in metrics)


def test_fewer_images_than_features():
    found, real, label_N, label_n = sets()
    few = {name: rows[:5] for name, rows in found.items()}
    one = compared(features=few, label_N=label_N[:5])
    with pytest.raises(UserError, match="6 features needs at least 7 images.*found 5 generated"):
        measured("fid", one)
    assert lacking("sfid", one) == ""  # it has four
    assert "4 features need more images than that; found 4" in lacking(
        "sfid", compared(features={name: rows[:4] for name, rows in found.items()})
    )
    for infinite in ("fid_infinity", "is_infinity"):
        assert lacking(infinite, one) == "it needs 200 samples"
    accepted = compared(features=few, label_N=label_N[:5], least=2)
    wanted = frechet.from_features(few["pooled"], real["pooled"])
    assert measured("fid", accepted)["value"] == pytest.approx(wanted, rel=1e-6)
    names = tuple(name for name in EVERY if name != "fid_infinity")
    figures, absent = metric_table.score(accepted, names, what="")
    assert set(absent) == {"is_infinity", "classwise"} and figures["precision"]["k"] == 3


def test_features_of_another_width_are_named():
    found, _, _, _ = sets()
    wide = {**found, "pooled": np.concatenate([found["pooled"]] * 2, axis=1)}
    with pytest.raises(UserError, match="pooled of the samples has 12 features.*reference 6"):
        measured("fid", compared(features=wide))


def test_intervals_cover_other_draws_of_the_samples():
    """A quarter of the time by a hair, 95 % by its name: of twenty draws at most four are out."""
    found, real, _, _ = sets()
    draw, out = np.random.default_rng(5), 0
    truth_ND = draw.normal(size=(40_000, D)).astype(np.float32)
    target = moments.Moments.of(real["pooled"])
    for _ in range(20):
        rows_ND = truth_ND[draw.choice(len(truth_ND), 500, replace=False)]
        figure = measured("fid", compared(features={"pooled": rows_ND}, moments={"pooled": target}))
        wanted = frechet.between(moments.Moments.of(truth_ND), target).value + figure["bias"]
        out += not figure["low"] <= wanted <= figure["high"]
    assert out <= 4
    assert bootstrap.of_mean(np.ones(9), seed=0).error == 0


def test_figures_that_are_not_finite_are_none_and_say_so():
    figures = {
        "fid": {"value": float("nan"), "low": 1.0, "high": 2.0},
        "kid": {"value": 3.0, "error": float("inf"), "subset": 5},
        "is": {"value": 2.0, "low": float("nan"), "high": 3.0, "parts": 1},
    }
    kept, absent = metric_table.settled(figures, {"cmmd": "no"})
    assert kept == {"kid": {"value": 3.0, "subset": 5}, "is": {"value": 2.0, "parts": 1}}
    assert absent == {"cmmd": "no", "fid": "it is not finite: found nan"}


# ---------------------------------------------------------------- what is declared


def test_every_protocol_has_the_metrics_that_it_is_published_with():
    wide = {"kid", "density", "coverage", "fid_infinity", "vendi", "authenticity"}
    ratio = {"precision", "recall"}
    every = {
        "adm-50k": {"fid", "sfid", "is", "is_infinity", "mifid"} | ratio | wide,
        "val-centercrop-rfid": {"fid", "sfid", "is", "kid"} | ratio,
        "fd-dinov2": {"fid"} | ratio | wide,
        "cmmd": {"cmmd", "kid", "vendi"},
        "local": set(EVERY),
    }
    assert {name: set(metric_table.of_protocol(name)) for name in protocols.PROTOCOLS} == every
    assert metric_table.of_protocol("local")[:6] == (
        *("fid", "sfid", "is", "precision", "recall", "kid"),
    )


def test_what_metrics_declare_is_known():
    for name, one in metric_table.known().items():
        assert set(one.protocols) <= set(protocols.PROTOCOLS), name
        assert one.better in ("lower", "higher", ""), name
        assert bool(one.measure) == bool(one.protocols), name


def test_directions():
    names = ("fid", "recall", "psnr_db", "lpips_vgg", "x")
    assert [metric_table.better(n) for n in names] == ["lower", "higher", "higher", "lower", ""]


def test_two_metrics_of_one_name_are_a_mistake(tmp_path, monkeypatch):
    import tokgen.metrics

    text = "from tokgen.metrics import metric\nMETRICS = (metric.Metric('fid', 'x', 'lower'),)\n"
    (tmp_path / "twice.py").write_text(text)
    paths = [*tokgen.metrics.__path__, str(tmp_path)]
    monkeypatch.setattr(tokgen.metrics, "__path__", paths)
    with pytest.raises(ValueError, match="two metrics are called fid"):
        metric_table.known()


def test_beside_a_share_stands_a_share():
    found = {"value": 0.5, "expected": 0.96875, "k": 5}
    *_, beside = metric_table.cells("coverage", found)
    assert beside == "96.88\N{NO-BREAK SPACE}% expected of equal sets; k = 5"
    *_, beside = metric_table.cells("codebook_usage", found)
    assert beside == "0.9688 expected of as many tokens at random"
