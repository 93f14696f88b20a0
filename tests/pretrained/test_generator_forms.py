"""Forms of the generators' fixtures that the recorded ones do not have."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.generators import masked as objectives
from tokgen.interfaces import TokenLayout
from tokgen.nn.precision import Precision
from tokgen.pretrained import parity
from tokgen.pretrained.families import masked
from tokgen.pretrained.systems import maskbit_generator, maskgit_generator


@pytest.mark.parametrize(
    ("schedule", "steps", "index", "slots", "count"),
    [
        ("linear", 6, 4, 6, 0),
        ("linear", 9, 2, 3, 2),
        ("linear", 12, 9, 12, 1),
        ("linear", 18, 5, 9, 6),
        ("power", 9, 5, 9, 5),
        ("power", 12, 8, 16, 6),
        ("power", 12, 9, 36, 10),
        ("power", 15, 8, 25, 15),
    ],
)
def test_counts_are_those_of_maskgits_compiled_loop(schedule, steps, index, slots, count):
    # recorded from the published decoder; exact quotients give one more or one less
    share_T = maskgit_generator.compiled(schedule, steps)
    assert np.floor(np.float32(slots) * share_T[index]) == count
    ratio = np.float32(index + 1) / np.float32(steps)
    exact = 1 - ratio ** maskgit_generator.COMPILED[schedule]
    assert np.floor(np.float32(slots) * exact) != count


def _by_place(logits_BlGV, tokens_BlG):
    return jnp.broadcast_to(jnp.arange(tokens_BlG.shape[1], dtype=jnp.float32)[:, None], (1, 2, 1))


def _alike(logits_BlGV, tokens_BlG):
    return jnp.zeros(tokens_BlG.shape)


def test_maskbits_sampler_starts_anew_where_one_slot_is_left_too_early():
    layout = TokenLayout((4,), ((1, 2),))
    options = dict(width=8, depth=1, heads=1, precision=Precision(), rngs=nnx.Rngs(0))
    generator = objectives.Generator(layout, 2, **options)
    labels_B = np.zeros(1, np.int32)
    unknown = {}
    for name, watched in (("theirs", maskbit_generator._watched), ("ours", masked.watched)):
        copy = watched(generator, steps=4, schedule="root")
        final, grids, _ = masked.run(copy, labels_B, masked.greedy((), confidence=_by_place))
        unknown[name] = (grids == layout.absent).sum((1, 2, 3)).tolist()
        assert (final < layout.absent).all()
    assert unknown == {"theirs": [2, 1, 2, 1], "ours": [2, 1, 1, 1]}
    copy = maskbit_generator._watched(generator, steps=4, schedule="root")
    _, grids, _ = masked.run(copy, labels_B, masked.greedy((), confidence=_alike))
    assert (grids == layout.absent).all()  # ties are masked together


def test_layers_that_a_model_lacks_are_left_out_of_its_norms():
    gradients = {"blocks.0.fc": np.ones(4), "head": np.zeros(1)}
    names = parity.there(gradients, ("head", "blocks.1.fc", "blocks.0.fc"))
    norms, _ = parity.grad_norms(gradients, names)
    np.testing.assert_array_equal(norms, [0, 2])
