"""Rules between published arrays and ours: there and back, and what they do to gradients."""

import math

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.pretrained import keymap, parity

ORDER = (2, 0, 1)
DOUBLED = keymap.one(lambda a, shape: (2 * a + 1).reshape(shape), lambda a: (a.ravel() - 1) / 2)
COPIED = keymap.Rule(lambda a, shapes: [a, a[::-1]], lambda parts: parts[0])
UNUSED = keymap.one(lambda a, shape: a[1:], lambda a: np.concatenate([np.zeros_like(a[:1]), a]))

# rule, shape of the published array, shapes of ours
CASES = {
    "as it is": (keymap.AS_IS, (3, 2), [(3, 2)]),
    "linear": (keymap.LINEAR, (6, 4), [(4, 2, 3)]),
    "linear out": (keymap.LINEAR_OUT, (4, 6), [(2, 3, 4)]),
    "convolution": (keymap.CONV, (4, 3, 2, 2), [(2, 2, 3, 4)]),
    "thirds": (keymap.thirds(keymap.LINEAR), (12, 5), [(5, 2, 2)] * 3),
    "rows apart": (keymap.rows_apart(), (9, 2), [(1, 5, 2), (4, 2)]),
    "rows of two groups": (keymap.rows_apart(), (9, 2), [(2, 3, 2), (3, 2)]),
    "numbers apart": (keymap.rows_apart(0), (9,), [(2, 3), (3,)]),
    "rows of matrices apart": (keymap.rows_apart(2), (3, 2, 2), [(2, 2, 2), (1, 2, 2)]),
    "chunks": (keymap.chunks(ORDER), (6, 4), [(4, 3, 2)]),
    "chunks of a bias": (keymap.chunks_bias(ORDER), (6,), [(3, 2)]),
    "doubled": (DOUBLED, (4,), [(2, 2)]),
    "copied": (COPIED, (3, 2), [(3, 2), (3, 2)]),
    "unused": (UNUSED, (4, 2), [(3, 2)]),
}


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def test_a_rule_works_both_ways(case):
    rule, shape, shapes = case
    array = np.random.default_rng(0).normal(size=shape)
    if rule is UNUSED:
        array[0] = 0
    parts = rule.ours(array, shapes)
    assert [part.shape for part in parts] == shapes
    np.testing.assert_allclose(rule.published(parts), array, rtol=1e-15)


def test_a_gradient_goes_through_the_transpose(case):
    """Against the whole Jacobian, one published element after the other."""
    rule, shape, shapes = case
    random, size = np.random.default_rng(1), math.prod(shape)
    array = random.normal(size=shape)
    slopes = [random.normal(size=part) for part in shapes]
    wanted, base = np.zeros(size), rule.ours(array, shapes)
    for i in range(size):
        moved = array + np.eye(size)[i].reshape(shape)
        after = rule.ours(moved, shapes)
        pairs = zip(slopes, base, after, strict=True)
        wanted[i] = sum(np.vdot(slope, b - a) for slope, a, b in pairs)
    places = tuple(f"ours/{i}" for i in range(len(shapes)))
    rows = [keymap.Row("a", places, rule), keymap.row("counts", "a/statistic")]
    found = keymap.gradients(rows, dict(zip(places, slopes, strict=True)), {"a": array})
    assert set(found) == {"a"}
    np.testing.assert_allclose(found["a"], wanted.reshape(shape), atol=1e-12)


def test_a_layer_of_a_stacked_parameter_has_its_own_gradient():
    slope = np.arange(12.0).reshape(3, 2, 2)
    rows = [keymap.row(f"blocks.{i}.weight", ("blocks/kernel", i), keymap.LINEAR) for i in range(3)]
    published = {row.key: np.zeros((2, 2)) for row in rows}
    found = keymap.gradients(rows, {"blocks/kernel": slope}, published)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(found[row.key], slope[i].T)


def test_chunks_are_placed_as_their_order_says():
    weight, bias = np.arange(24.0).reshape(6, 4), np.arange(6.0)
    (kernel,) = keymap.chunks(ORDER).ours(weight, [(4, 3, 2)])
    (ours,) = keymap.chunks_bias(ORDER).ours(bias, [(3, 2)])
    for chunk, there in enumerate(ORDER):
        for k in range(2):
            assert ours[chunk, k] == bias[2 * there + k]
            np.testing.assert_array_equal(kernel[:, chunk, k], weight[2 * there + k])


def test_parts_lie_one_after_the_other():
    rows = np.arange(18.0).reshape(9, 2)
    symbols, labels = keymap.rows_apart().ours(rows, [(1, 5, 2), (4, 2)])
    np.testing.assert_array_equal(symbols[0], rows[:5])
    np.testing.assert_array_equal(labels, rows[5:])


@pytest.mark.parametrize("order", [(0, 2), (0, 0, 1), (1, 2, 3)])
def test_an_order_names_every_chunk_once(order):
    for rule in (keymap.chunks, keymap.chunks_bias):
        with pytest.raises(ValueError, match="name each from 0 once"):
            rule(order)


@pytest.mark.parametrize("shape", [(10, 2), (9, 3), (18,)])
def test_rows_that_do_not_fill_their_places_are_a_misfit(shape):
    places = {"embeddings/table": (1, 5, 2), "labels/table": (4, 2)}
    rows = [keymap.Row("embed.weight", tuple(places), keymap.rows_apart())]
    _, problems, _ = keymap._problems(places, rows, {"embed.weight": np.zeros(shape)})
    (problem,) = problems
    assert "embed.weight" in problem and "(1, 5, 2)" in problem and str(shape) in problem


def test_norms_are_those_of_the_names_and_of_everything():
    gradients = {"a": np.array([[3.0, 4.0]]), "b": np.array([12.0]), "c": np.zeros(2)}
    norms, whole = parity.grad_norms(gradients, ("b", "a"))
    np.testing.assert_allclose(norms, [12.0, 5.0])
    np.testing.assert_allclose(whole, 13.0)
    with pytest.raises(UserError, match="no gradient of d"):
        parity.grad_norms(gradients, ("a", "d"))


def test_numbers_in_another_order_are_not_taken():
    """As many of them do not make the same weights."""
    rows = [keymap.row("a", "a", keymap.LINEAR), keymap.row("b", "b", keymap.reshaped(1, -1, 1))]
    weights = {"a": np.ones((3, 2)), "b": np.ones((6, 1, 1))}
    _, problems, count = keymap._problems({"a": (3, 2), "b": (6,)}, rows, weights)
    assert count == 2 and "a has the shape (3, 2)" in problems[0] and "(6, 1, 1)" in problems[1]
    weights = {"a": np.ones((2, 3)), "b": np.ones((1, 6, 1))}
    assert keymap._problems({"a": (3, 2), "b": (6,)}, rows, weights)[1:] == ([], 0)


def test_a_message_does_not_list_a_million_names():
    rows = [keymap.row(f"row{i}", f"a{i}") for i in range(1000)]
    weights = {f"key{i}": np.ones(3) for i in range(1000)} | {"x" * 10**6: np.ones(3)}
    _, problems, count = keymap._problems({f"a{i}": (3,) for i in range(1000)}, rows, weights)
    assert count == 2001 and "1000 missing: row0" in problems[0] and "and 960 more" in problems[0]
    assert sum(map(len, problems)) < 5000
