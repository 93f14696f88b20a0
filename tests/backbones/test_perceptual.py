import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import perceptual


def _image(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


class Squares(nnx.Module):
    """The mean squared difference."""

    def __call__(self, a_BHW3, b_BHW3):
        return jnp.square(a_BHW3 - b_BHW3).mean((1, 2, 3))


class Classifier(nnx.Module):
    """Two logits that can be followed by hand."""

    def __call__(self, image_BHW3):
        half = image_BHW3.shape[1] // 2
        upper = image_BHW3[:, :half].mean((1, 2, 3))
        return jnp.stack([upper, jnp.square(image_BHW3).mean((1, 2, 3))], 1)


@pytest.mark.parametrize("size", [(40, 36), (300, 240)])
def test_logits_are_compared_of_images_resized_as_published(size):
    """PIL's triangle, smoothed where it shrinks: jax.image.resize has the same definition."""
    a, b = _image(0, 2, *size, 3), _image(1, 2, *size, 3)
    classifier = Classifier()
    at_224 = [
        classifier(jax.image.resize(x, (2, 224, 224, 3), "linear", antialias=True)) for x in (a, b)
    ]
    wanted = np.square(np.asarray(at_224[0] - at_224[1])).sum(1) / 2
    np.testing.assert_allclose(perceptual.Logits(classifier)(a, b), wanted, rtol=1e-4)
    with pytest.raises(interfaces.UserError, match="of one size"):
        perceptual.Logits(classifier)(a, b[:1])


def test_distances_are_weighted_and_added():
    a, b = _image(0, 2, 8, 8, 3), _image(1, 2, 8, 8, 3)
    l2, logits = Squares(), perceptual.Logits(Classifier())
    both = perceptual.Sum([l2, logits], (1.0, 0.1))
    np.testing.assert_allclose(both(a, b), l2(a, b) + 0.1 * logits(a, b), rtol=1e-6)
    with pytest.raises(ValueError, match="2 distances and 1 weights"):
        perceptual.Sum([l2, logits], (1.0,))


def test_every_distance_is_found_where_it_is_declared():
    assert list(perceptual.known()) == ["convnext_small", "lpips", "resnet50"]
    for name, found in perceptual.known().items():
        assert f"config.loss.{name}=0 trains without" in found.source
