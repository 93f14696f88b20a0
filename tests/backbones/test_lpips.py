import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import lpips, perceptual
from tokgen.pretrained.formats import reader

FIXTURE = Path(__file__).parents[3] / "shared" / "parity" / "lpips"
ALEXNET = {  # torchvision's features
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}


class Toy(nnx.Module):
    """Two maps that can be followed by hand: the positive part, and a quarter of the places."""

    def __call__(self, image_BHW3):
        x = jax.nn.relu(image_BHW3)
        return x, x[:, ::2, ::2, :2]


def _toy():
    return lpips.LPIPS(Toy(), [np.array([1.0, 2.0, 3.0]), np.array([0.5, 4.0])])


def _image(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_distance_follows_the_written_out_formula():
    a, b = _image(0, 2, 4, 6, 3), _image(1, 2, 4, 6, 3)
    wanted = np.zeros(2)
    for n in range(2):
        for head, channels, stride in (((1, 2, 3), 3, 1), ((0.5, 4), 2, 2)):
            places = []
            for i in range(0, 4, stride):
                for j in range(0, 6, stride):
                    x, y = (
                        np.maximum(each[n, i, j, :channels], 0).astype(float) for each in (a, b)
                    )
                    x, y = (each / (np.sqrt((each**2).sum()) + 1e-10) for each in (x, y))
                    places.append((np.array(head) * (x - y) ** 2).sum())
            wanted[n] += np.mean(places)
    np.testing.assert_allclose(_toy()(a, b), wanted, rtol=1e-5)
    np.testing.assert_allclose(_toy().levels(a, b).sum(1), wanted, rtol=1e-5)


def test_an_image_is_no_distance_from_itself():
    a = _image(0, 2, 4, 4, 3)
    np.testing.assert_array_equal(_toy()(a, a), [0, 0])


def test_gradients_reach_both_images_and_stay_finite_where_features_vanish():
    a, b = jnp.asarray(_image(0, 1, 4, 4, 3)), jnp.asarray(_image(1, 1, 4, 4, 3))
    b = b.at[:, :2].set(-1)  # ReLU leaves nothing there
    gradients = jax.jit(jax.grad(lambda a, b: _toy()(a, b).sum(), argnums=(0, 1)))
    for gradient in gradients(a, b):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient)


def test_images_of_two_sizes_are_refused():
    with pytest.raises(interfaces.UserError, match="of one size"):
        _toy()(np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 5, 3)))


@pytest.fixture(scope="module")
def published():
    """Weights of AlexNet and its heads under their published names."""
    rng = np.random.default_rng(0)
    trunk, heads = {}, {}
    for level, (number, shape) in enumerate(ALEXNET.items()):
        kernel = rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        trunk[f"features.{number}.weight"] = kernel.astype(np.float32)
        trunk[f"features.{number}.bias"] = rng.standard_normal(shape[0], np.float32)
        heads[f"lin{level}.model.1.weight"] = rng.random((1, shape[0], 1, 1), np.float32)
    trunk["classifier.1.bias"] = np.zeros(4096, np.float32)
    return trunk, heads


def test_all_arrangements_of_the_files_give_one_network(published, tmp_path):
    trunk, heads = published
    folder, saved = tmp_path / "folder", tmp_path / "lpips.safetensors"
    folder.mkdir()
    safetensors.numpy.save_file(trunk, folder / "trunk.safetensors")
    safetensors.numpy.save_file(heads, folder / "heads.safetensors")
    features = {key: array for key, array in trunk.items() if key.startswith("features.")}
    module = {f"net.slice1.{key[9:]}": array for key, array in features.items()}
    module["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    module |= heads | {f"lins.{key[3:]}": array for key, array in heads.items()}
    safetensors.numpy.save_file(module, saved)

    a, b = _image(0, 1, 31, 31, 3), _image(1, 1, 31, 31, 3)
    wanted = lpips.from_weights(trunk | heads)(a, b)
    assert wanted > 0
    pair = [str(folder / "trunk.safetensors"), str(folder / "heads.safetensors")]
    for paths in (pair, [str(folder)], [str(saved)]):
        found = perceptual.load("lpips", paths, read=reader.read)
        np.testing.assert_array_equal(found(a, b), wanted)


def test_missing_and_leftover_keys_are_listed(published):
    trunk, heads = published
    weights = trunk | heads | {"lin7.extra": np.zeros(3)}
    del weights["features.3.bias"], weights["lin2.model.1.weight"]
    with pytest.raises(interfaces.UserError) as error:
        lpips.from_weights(weights)
    assert "missing: features.3.bias, lin2.model.1.weight;" in str(error.value)
    assert "left over: lin7.extra." in str(error.value)


def test_weights_that_are_not_finite_are_refused(published):
    trunk, heads = published
    weights = trunk | heads
    for key in ("features.3.bias", "lin2.model.1.weight"):
        wrong = weights[key].copy()
        wrong.flat[:2] = np.nan, np.inf
        found = f"LPIPS holds numbers that are not finite in 1 arrays: {key} [(]2 of"
        with pytest.raises(interfaces.UserError, match=found):
            lpips.from_weights(weights | {key: wrong})


def test_heads_of_another_trunk_are_refused(published):
    trunk, heads = published
    weights = trunk | heads | {"lin1.model.1.weight": np.zeros((1, 128, 1, 1))}
    with pytest.raises(interfaces.UserError, match=r"\(1, 192, 1, 1\), has \(1, 128, 1, 1\)"):
        lpips.from_weights(weights)


def test_the_error_of_a_missing_file_says_where_weights_come_from(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(interfaces.UserError, match="no weight file") as error:
            perceptual.load("lpips", [str(path)], read=reader.read)
        assert "torchvision" in str(error.value)
        assert "PerceptualSimilarity" in str(error.value)
        assert "trains without" in str(error.value)


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="no parity fixtures")
@pytest.mark.parametrize("kind", ["vgg", "alex"])
def test_published_lpips_is_reproduced(kind):
    config = json.loads((FIXTURE / "config.json").read_text())
    case = np.load(FIXTURE / "case.npz")
    weights = reader.read(FIXTURE / config["heads"][kind])
    for key, shape in config[f"{kind}_keys"].items():
        rng = np.random.default_rng(zlib.crc32((config["salt"] + key).encode()))
        scale = 0.1 if key.endswith("bias") else np.sqrt(2 / np.prod(shape[1:]))
        weights[key] = (rng.standard_normal(shape) * scale).astype(np.float32)
    network = lpips.from_weights(weights)
    a, b = (jnp.asarray(case[name].transpose(0, 2, 3, 1)) for name in ("image0", "image1"))

    def seen(b, network, a):
        levels = network.levels(a, b)
        return levels.sum(), (levels, [features.mean((1, 2)) for features in network.trunk(a)])

    (_, (levels, means)), gradient = jax.jit(jax.value_and_grad(seen, has_aux=True))(b, network, a)
    for level in range(5):
        _close(means[level], case[f"{kind}_feat{level}_mean"], 1e-4)
        _close(levels[:, level], case[f"{kind}_layer{level}"], 1e-4)
    _close(levels.sum(1), case[f"{kind}_distance"], 1e-4)
    _close(gradient.transpose(0, 3, 1, 2), case[f"{kind}_grad"], 1e-3)


def _close(array, wanted, tolerance):
    np.testing.assert_allclose(array, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_distances_are_built_by_name(published, tmp_path):
    trunk, heads = published
    safetensors.numpy.save_file(trunk | heads, tmp_path / "lpips.safetensors")
    paths = [str(tmp_path / "lpips.safetensors")]
    a, b = _image(0, 1, 31, 31, 3), _image(1, 1, 31, 31, 3)
    found = perceptual.build({"lpips": (0.5, paths)}, read=reader.read)(a, b)
    np.testing.assert_array_equal(
        found, 0.5 * perceptual.load("lpips", paths, read=reader.read)(a, b)
    )
    with pytest.raises(interfaces.UserError, match="convnext_small, lpips, resnet50; found 'vgg'"):
        perceptual.build({"vgg": (1.0, paths)}, read=reader.read)
    with pytest.raises(interfaces.UserError, match="no weight file.*IMAGENET1K_V1"):
        perceptual.build({"resnet50": (0.1, [str(tmp_path / "none")])}, read=reader.read)
