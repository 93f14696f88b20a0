"""The judge is read back as it was trained, and judges form and not colour."""

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import judge
from tokgen.data import shapes


def test_second_call_reads_what_the_first_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(judge, "STEPS", 3)
    image_NHW3 = shapes.Source(split="held_out").batch(range(20))
    first = judge.load_or_train()
    monkeypatch.setattr(judge, "_train", None)  # a second training would fail
    second = judge.load_or_train()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    found = judge.predictions(second, image_NHW3, batch=8)
    np.testing.assert_array_equal(found, judge.predictions(first, image_NHW3, batch=20))
    assert len(list(tmp_path.glob("judge-*.npz"))) == 1


def test_a_shift_of_colour_changes_nothing():
    with jax.default_matmul_precision("highest"):
        network = judge.Judge((32, 32), 3, 10, rngs=judge.nnx.Rngs(0))
        image_BHW3 = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
        shift = jnp.array([0.1, -0.2, 0.3]).reshape(1, 1, 1, 3)
        np.testing.assert_allclose(network(image_BHW3), network(image_BHW3 + shift), atol=1e-5)


def test_turns_are_the_eight_symmetries_of_the_square():
    image_BHW3 = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))
    ways = [
        np.rot90(flipped, k, (1, 2))
        for flipped in (image_BHW3, image_BHW3[:, :, ::-1])
        for k in range(4)
    ]
    seen = set()
    for seed in range(60):
        turned = np.asarray(judge._turned(image_BHW3, jax.random.key(seed)))
        (match,) = [i for i, way in enumerate(ways) if np.array_equal(way, turned)]
        seen.add(match)
    assert seen == set(range(8))
