"""Feature networks: an image's features depend on nothing beside it, and networks tell apart."""

import hashlib

import jax
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, parameters, sharding
from tokgen.backbones import features, inception
from tokgen.evaluation import feature_extractors, local_classifier
from tokgen.interfaces import UserError

ABOUT = {"classes": ["cat", "dog", "owl"], "trained_on": "f" * 64}


def weights(classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a local network, drawn by numpy: nothing is compiled for them."""

    def make():
        return feature_extractors.Local(
            local_classifier.PhotographClassifier(3, classes, rngs=nnx.Rngs(0))
        )

    _, params, _ = parameters.split(nnx.eval_shape(make))
    draws, found = np.random.default_rng(seed), {}
    for path, leaf in parameters.paths(params).items():
        if path.endswith("kernel"):
            scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            found[path] = draws.normal(scale=scale, size=leaf.shape).astype(np.float32)
        else:
            found[path] = np.full(leaf.shape, path.endswith("scale"), np.float32)
    return found


def local(classes: int = 3, seed: int = 0) -> feature_extractors.Extractor:
    return feature_extractors.from_arrays(weights(classes, seed), ABOUT)


class Means(nnx.Module):
    """Features by hand: means of colours, and of columns; nothing is trained."""

    def __init__(self, factor: float = 1.0):
        self.factor = interfaces.Statistic(np.float32(factor))

    def __call__(self, image_BHW3):
        x_BHW3 = self.factor[...] * image_BHW3.astype("float32")
        colours_B3 = x_BHW3.mean((1, 2))
        return {
            "pool3": jax.numpy.concatenate([colours_B3, x_BHW3.std((1, 2))], axis=1),
            "spatial": x_BHW3[:, ::4].mean((2, 3)),
            "logits_unbiased": colours_B3 / 16,
        }


def pictures(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1, 1), sharding.AXES
    )


def test_features_do_not_depend_on_devices_nor_on_neighbours():
    """Bit for bit: sixteen images of a device are one program, however many devices there are."""
    network, image_NHW3 = local(), pictures(40)
    found = {
        n: feature_extractors.features(network, image_NHW3, mesh=mesh_of(n)) for n in (1, 2, 8)
    }
    assert {name: rows.shape for name, rows in found[1].items()} == {
        "pooled": (40, 192), "spatial": (40, 28), "logits": (40, 3)
    }  # fmt: skip
    for name, rows_ND in found[1].items():
        assert rows_ND.dtype == np.float32 and len(np.unique(rows_ND, axis=0)) == 40
        for other in (2, 8):
            np.testing.assert_array_equal(found[other][name], rows_ND)
    order_N = np.random.default_rng(1).permutation(40)
    mixed = feature_extractors.features(network, image_NHW3[order_N], mesh=mesh_of(1))
    alone = feature_extractors.features(network, image_NHW3[17:18], mesh=mesh_of(1))
    for name, rows_ND in found[1].items():
        np.testing.assert_array_equal(mixed[name], rows_ND[order_N])
        np.testing.assert_array_equal(alone[name], rows_ND[17:18])


def test_what_a_local_network_gives_is_that_of_its_classifier_on_images_in_the_unit_range():
    network, image_NHW3 = local(), pictures(16)
    found = feature_extractors.features(network, image_NHW3, mesh=mesh_of(1))
    look = jax.jit(lambda local_classifier, image_BHW3: local_classifier.features(image_BHW3))
    wanted = look(network.network.network, image_NHW3.astype(np.float32) / 255)
    for name, rows_ND in wanted.items():
        scale = np.abs(rows_ND).max()
        np.testing.assert_allclose(found[name] / scale, rows_ND / scale, atol=1e-5)


def test_a_local_network_comes_back_from_its_arrays():
    kept = weights()
    network = feature_extractors.from_arrays(kept, ABOUT)
    again = feature_extractors.from_arrays(feature_extractors.arrays(network), network.record)
    assert again.record == network.record
    assert network.record == {
        "name": "local",
        **ABOUT,
        "fingerprint": network.record["fingerprint"],
    }
    for path, array in feature_extractors.arrays(again).items():
        np.testing.assert_array_equal(array, kept[path])
    assert local(seed=1).record["fingerprint"] != network.record["fingerprint"]
    one = kept | {"network/conv_out/kernel": kept["network/conv_out/kernel"] * (1 + 1e-6)}
    changed = feature_extractors.from_arrays(one, ABOUT).record["fingerprint"]
    assert changed != network.record["fingerprint"]


@pytest.mark.parametrize("change", [{"network/conv_out/kernel": None}, {"network/more": 0}, {}])
def test_arrays_of_no_local_network_are_refused(change):
    kept = weights() | {name: np.zeros(3) for name in change}
    kept = {n: a for n, a in kept.items() if change.get(n, a) is not None}
    if not change:
        name = "network/norm_out/scale"
        kept[name] = kept[name][:5]
    with pytest.raises(UserError, match="make them again"):
        feature_extractors.from_arrays(kept, ABOUT)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((32, 32), (32, 32)), ((64, 64), (64, 64)), ((256, 128), (64, 32)), ((17, 31), (16, 30)),
     ((500, 20), (64, 8)), ((4, 4), (8, 8))],
)  # fmt: skip
def test_size_that_a_local_network_sees(size, wanted):
    rows, columns = feature_extractors.seen(size)
    assert rows % 2 == columns % 2 == 0 and max(rows, columns) <= feature_extractors.LARGEST
    assert abs(rows - wanted[0]) <= 2 and abs(columns - wanted[1]) <= 2


def test_published_networks_are_read_from_a_file_that_is_told(tmp_path, monkeypatch):
    file = tmp_path / "weights.npz"
    np.savez(file, factor=np.float32(2))
    published = features.FeatureNetwork(
        lambda arrays: Means(float(arrays["factor"])), ("pool3", "spatial"), "It is from nowhere."
    )
    monkeypatch.setattr(feature_extractors.reader, "network", lambda path: dict(np.load(path)))
    monkeypatch.setitem(inception.FEATURE_NETWORKS, "inception", published)
    found = feature_extractors.from_file("inception", str(file))
    record = found.record
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (record["name"], record["file"]) == ("inception", "weights.npz")
    told = feature_extractors.described(found)
    assert all(word in told for word in ("weights.npz", record["sha256"][:16], "from nowhere"))
    np.savez(file, factor=np.float32(3))
    other = feature_extractors.from_file("inception", str(file)).record
    assert other["fingerprint"] != record["fingerprint"]
    # the same numbers under the name of another preprocessing are another network
    assert feature_extractors.fingerprint("dinov2", found.network) != record["fingerprint"]
    for words, message in (
        (("inception", ""), "needs its weight file: --weights FILE. It is from nowhere"),
        (("inception", str(tmp_path / "no.npz")), "no weight file at"),
        (("vgg", str(file)), "a feature network that is read from a file must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            feature_extractors.from_file(*words)
