"""A classifier is read back as it was trained; that of shapes tells form and not colour."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from PIL import Image

from tests.evaluation import test_feature_extractors
from tokgen import interfaces, parameters, sharding
from tokgen.data import folder, pixels, shapes, views
from tokgen.evaluation import local_classifier

WAYS = ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A mesh of one device compiles fastest."""
    device = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(device, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)


@pytest.fixture
def photographs(tmp_path):
    """A folder of two classes, dark and light, twelve of each and two held out."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        for split, count in (("train", 12), ("test", 2)):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                array = draw.integers(0, 100, (16, 16, 3)) + 150 * label
                Image.fromarray(array.astype(np.uint8)).save(place / f"{number}.png")
    return tmp_path / "images"


def test_second_call_reads_what_the_first_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(local_classifier, "STEPS", 3)
    image_NHW3 = shapes.Source(split="held_out").batch(range(20))
    first = local_classifier.load_or_train()
    monkeypatch.setattr(local_classifier, "_trained", None)  # a second training would fail
    second = local_classifier.load_or_train()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    found = local_classifier.predictions(second, image_NHW3, batch=8)
    np.testing.assert_array_equal(found, local_classifier.predictions(first, image_NHW3, batch=20))
    assert len(list(tmp_path.glob("classifier-*.npz"))) == 1


def test_classifier_of_photographs_learns_is_kept_and_belongs_to_its_images(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path))
    recipe = dataclasses.replace(local_classifier.PHOTOGRAPHS, steps=12, batch=8, ema=0.5)
    first = local_classifier.of_photographs(photographs, (16, 16), recipe=recipe)
    held_out = folder.Source(photographs, split="held_out")
    image_NHW3 = np.stack([pixels.decode(held_out[i]["image"], 3) for i in range(4)])
    found_N = local_classifier.predictions(first, image_NHW3, batch=3)
    np.testing.assert_array_equal(found_N, [held_out[i]["label"] for i in range(4)])
    monkeypatch.setattr(local_classifier, "_trained", None)
    second = local_classifier.of_photographs(photographs, (16, 16), recipe=recipe)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    (photographs / "train" / "dark" / "0.png").unlink()  # other images, another classifier
    with pytest.raises(TypeError, match="not callable"):
        local_classifier.of_photographs(photographs, (16, 16), recipe=recipe)
    assert len(list(tmp_path.glob("classifier-*.npz"))) == 1


def test_every_photograph_is_seen_once_in_each_epoch(photographs):
    source = folder.Source(photographs, split="train")
    batches = local_classifier._shuffled(source, views.fixed("center", (16, 16), 3), 9, seed=4)
    drawn = [next(batches) for _ in range(8)]  # three epochs of 24
    label_N = np.concatenate([batch["label"] for batch in drawn])
    bytes_N = [image.tobytes() for batch in drawn for image in batch["image"]]
    whole = {pixels.decode(source[i]["image"], 3).tobytes(): source[i]["label"] for i in range(24)}
    epochs = [bytes_N[first : first + 24] for first in (0, 24, 48)]
    assert all(set(epoch) == set(whole) for epoch in epochs) and len(whole) == 24
    assert [whole[image] for image in bytes_N] == label_N.tolist()
    assert epochs[0] != epochs[1] != epochs[2]


def test_photograph_is_classified_by_ten_views():
    network = local_classifier.PhotographClassifier(
        3, 10, (8, 8, 8), rngs=local_classifier.nnx.Rngs(0)
    )
    image_NHW3 = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    wider = np.pad(image_NHW3, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = [wider[:, 1 + y : 17 + y, 1 + x : 17 + x] for y, x in WAYS]
    several = np.concatenate([*moved, *(view[:, :, ::-1] for view in moved)]).astype(np.float32)
    logits_NV = jax.jit(lambda network, several: network(several))(network, several / 255)
    logits_NV = np.asarray(logits_NV, np.float64).reshape(10, 40, 10)
    ranked_NV = np.sort(logits_NV.sum(0), axis=-1)
    clear_N = ranked_NV[:, -1] - ranked_NV[:, -2] > 1e-4
    wanted_N = logits_NV.sum(0).argmax(-1)
    assert clear_N.sum() > 30 and (wanted_N != logits_NV[0].argmax(-1)).any()
    found_N = local_classifier.predictions(network, image_NHW3, batch=40)
    np.testing.assert_array_equal(found_N[clear_N], wanted_N[clear_N])


def test_a_shift_of_colour_changes_nothing():
    with jax.default_matmul_precision("highest"):
        network = local_classifier.ShapeClassifier(
            (32, 32), 3, 10, rngs=local_classifier.nnx.Rngs(0)
        )
        image_BHW3 = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
        shift = jnp.array([0.1, -0.2, 0.3]).reshape(1, 1, 1, 3)
        np.testing.assert_allclose(network(image_BHW3), network(image_BHW3 + shift), atol=1e-5)


def test_turns_are_the_eight_symmetries_of_the_square():
    image_BHW3 = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    ways = [
        np.rot90(flipped, k, (1, 2))
        for flipped in (image_BHW3, image_BHW3[:, :, ::-1])
        for k in range(4)
    ]
    seen, turn = set(), jax.jit(local_classifier._turned)
    for seed in range(60):
        turned = np.asarray(turn(image_BHW3, jax.random.key(seed)))
        (match,) = [i for i, way in enumerate(ways) if np.array_equal(way, turned)]
        seen.add(match)
    assert seen == set(range(8))


def test_photographs_are_mirrored_one_by_one_and_moved_together():
    image_BHW3 = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    sides = ((0, 0), (local_classifier.SHIFT,) * 2, (local_classifier.SHIFT,) * 2, (0, 0))
    places = range(2 * local_classifier.SHIFT + 1)
    ways = {}
    for mirrored, part in ((0, image_BHW3), (1, image_BHW3[:, :, ::-1])):
        wider = np.pad(part, sides, mode="reflect")
        for row in places:
            for column in places:
                ways[mirrored, row, column] = wider[:, row : row + 8, column : column + 8]
    moves, mirrors, shifted = set(), set(), jax.jit(local_classifier._shifted)
    for seed in range(120):
        found = np.asarray(shifted(jnp.asarray(image_BHW3), jax.random.key(seed)))
        which = [
            next(way for way, part in ways.items() if np.array_equal(part[b], found[b]))
            for b in range(3)
        ]
        assert len({(row, column) for _, row, column in which}) == 1
        moves.add(which[0][1:])
        mirrors.add(tuple(mirrored for mirrored, _, _ in which))
    assert len(mirrors) == 8 and len(moves) == len(places) ** 2


# ---------------------------------------------------------------- which way is up


@pytest.mark.parametrize(("size", "ways"), [((6, 6), 4), ((4, 6), 2)])
def test_an_image_is_turned_as_its_label_says(size, ways):
    """By quarters, or where those would change its size by halves; the given ones stay."""
    image_BHW3 = np.random.default_rng(0).integers(0, 256, (8, *size, 3), np.uint8)
    assert local_classifier.turns_of(size) == ways
    way_B, before = np.arange(8) % ways, image_BHW3.copy()
    turned_BHW3 = local_classifier.turned(image_BHW3, way_B, ways)
    for image_HW3, found_HW3, way in zip(image_BHW3, turned_BHW3, way_B, strict=True):
        np.testing.assert_array_equal(found_HW3, np.rot90(image_HW3, way * 4 // ways))
    np.testing.assert_array_equal(image_BHW3, before)


def test_turns_of_a_batch_are_those_of_its_number():
    image_BHW3 = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)
    batches = [{"image": image_BHW3, "label": np.zeros(40, int)}] * 2
    first, second = local_classifier._upright(iter(batches), 4, seed=3)
    again = next(local_classifier._upright(iter(batches), 4, seed=3))
    other = next(local_classifier._upright(iter(batches), 4, seed=4))
    np.testing.assert_array_equal(first["label"], again["label"])
    assert set(first["label"]) == {0, 1, 2, 3} and first["label"].dtype == np.int32
    for differs in (second, other):
        assert (first["label"] != differs["label"]).any()
    np.testing.assert_array_equal(
        first["image"], local_classifier.turned(image_BHW3, first["label"], 4)
    )


def test_features_are_the_mean_of_the_last_map_its_first_channels_and_what_is_read_from_it():
    network = test_feature_extractors.local(5).network.network
    image_BHW3 = np.random.default_rng(0).random((4, 16, 16, 3), np.float32)
    look = jax.jit(lambda network, image_BHW3: network.features(image_BHW3))
    found = {name: np.asarray(rows, np.float64) for name, rows in look(network, image_BHW3).items()}
    map_BHWc = found["spatial"].reshape(4, 2, 2, local_classifier.SPATIAL)
    np.testing.assert_allclose(
        map_BHWc.mean((1, 2)), found["pooled"][:, : local_classifier.SPATIAL], atol=1e-6
    )
    kernel_CK = np.asarray(network.conv_out.kernel[...], np.float64)[0, 0]
    np.testing.assert_allclose(found["logits"], found["pooled"] @ kernel_CK, rtol=1e-4, atol=1e-5)


class Opinion(nnx.Module):
    """Class 1 where an image is light."""

    def __init__(self, weight):
        self.weight = nnx.Param(jnp.asarray(weight))

    def classes(self, image_BHW3):
        light_B = image_BHW3.mean((1, 2, 3)) * self.weight[...]
        return jnp.stack([0.5 + 0 * light_B, light_B], -1).argmax(-1)


def test_weights_that_are_not_finite_have_no_opinion():
    image_NHW3 = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert local_classifier.predictions(Opinion(1.0), image_NHW3).tolist() == [0, 1]
    with pytest.raises(interfaces.UserError, match="classifier's weights must be finite"):
        local_classifier.predictions(Opinion(np.nan), image_NHW3)


def test_a_cache_that_cannot_be_written_costs_no_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "file"))

    def make():
        return nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    params = parameters.split(make())[1]
    found = local_classifier._kept((), ("a test",), make, lambda: params)
    np.testing.assert_array_equal(found.kernel[...], params["kernel"])
    said = capsys.readouterr().err
    assert "not kept for the next time" in said and said.count("\n") == 1
