"""The entropy of a language is that of all its images, counted; its records are drawn from it."""

import itertools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.config import building
from tokgen.data import loader, markov

TINY = {
    "mesh": lambda: markov.mesh((2, 3), 3, 2, concentration=0.6, language=5),
    "one row": lambda: markov.mesh((1, 4), 3, 2, concentration=0.6, language=5),
    "one column": lambda: markov.mesh((4, 1), 3, 2, concentration=0.6, language=5),
    "pyramid": lambda: markov.pyramid((1, 2, 3), 2, 2, concentration=0.6, language=5),
}
WHOLE = {"mesh": markov.mesh, "pyramid": markov.pyramid}


def neighbours(name: str) -> list[tuple[int | None, int | None]]:
    """Positions that a token of a tiny language depends on, written out by hand."""
    if name == "mesh":
        # 0 1 2
        # 3 4 5
        return [(None, None), (0, None), (1, None), (None, 0), (3, 1), (4, 2)]
    if name == "one row":
        return [(None, None), (0, None), (1, None), (2, None)]
    if name == "one column":
        return [(None, None), (None, 0), (None, 1), (None, 2)]
    # 0, then 1 2 over 3 4, then nine whose centres at 1/6, 1/2 and 5/6 lie in cell 0, 1 and 1
    parents = [None, 0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 3, 4, 4]
    return [(parents[p] if p else None, p) for p in parents]


def probability(language, name: str, label: int, tokens) -> float:
    """Of a whole image, table by table."""
    scales = [0] + 4 * [1] + 9 * [2] if name == "pyramid" else [0] * len(tokens)
    product = 1.0
    for token, scale, around in zip(tokens, scales, neighbours(name), strict=True):
        first, second = (language.symbols if at is None else tokens[at] for at in around)
        product *= language.table_ARUUV[label, scale, first, second, token]
    return product


@pytest.mark.parametrize("name", TINY)
def test_entropy_is_that_of_all_images(name):
    language = TINY[name]()
    L, V = language.length, language.symbols
    images_NL = np.array(list(itertools.product(range(V), repeat=L)))
    entropies, shares_V = [], np.zeros(V)
    for label in range(len(language.classes)):
        chance_N = np.array([probability(language, name, label, image) for image in images_NL])
        assert chance_N.sum() == pytest.approx(1, abs=1e-12)
        label_N = np.full(len(images_NL), label)
        found_N = language.nats(images_NL[..., None], label_N).sum(-1)
        np.testing.assert_allclose(np.exp(-found_N), chance_N, rtol=1e-10)
        entropies.append(-(chance_N * np.log(chance_N)).sum() / L)
        for symbol in range(V):
            shares_V[symbol] += chance_N @ (images_NL == symbol).mean(1) / len(language.classes)
    assert language.entropy() == pytest.approx(np.mean(entropies), rel=1e-12)
    assert language.unigram() == pytest.approx(-(shares_V * np.log(shares_V)).sum(), rel=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_cost_of_samples_has_the_entropy_as_its_mean(name):
    language = WHOLE[name]()
    tokens_NLG, label_N = language.sample(10_000, seed=3)
    cost_N = language.nats(tokens_NLG, label_N).mean(-1)
    error = cost_N.std(ddof=1) / len(cost_N) ** 0.5
    assert abs(cost_N.mean() - language.entropy()) < 4 * error
    assert error < 0.003 and 1.0 < language.entropy() < 1.5 < language.unigram() < np.log(8)


@pytest.mark.parametrize("name", ["mesh", "one column"])
def test_frequencies_of_whole_images_are_their_probabilities(name):
    language = TINY[name]()
    tokens_NLG, label_N = language.sample(20_000, seed=4)
    L, V = language.length, language.symbols
    number_N = tokens_NLG[..., 0] @ V ** np.arange(L)[::-1]
    for label in range(len(language.classes)):
        drawn_N = number_N[label_N == label]
        images = itertools.product(range(V), repeat=L)
        chance_I = np.array([probability(language, name, label, image) for image in images])
        count_I = np.bincount(drawn_N, minlength=V**L)
        # the rare ones together, so that every expectation is at least five
        rare_I = chance_I * len(drawn_N) < 5
        expected = np.append(chance_I[~rare_I], chance_I[rare_I].sum()) * len(drawn_N)
        found = np.append(count_I[~rare_I], count_I[rare_I].sum())
        assert expected.min() >= 5
        statistic, freedom = ((found - expected) ** 2 / expected).sum(), len(found) - 1
        assert freedom > 12 and abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_records_are_of_the_language_and_of_their_index_alone():
    one = markov.mesh(count=4000, seed=1)
    records = one.__getitems__(range(2000))
    again = markov.mesh(count=4000, seed=1)[1234]
    np.testing.assert_array_equal(again["tokens"], records[1234]["tokens"])
    assert again["label"] == 1234 % 4 == records[1234]["label"]
    tokens_NLG = np.stack([record["tokens"][0] for record in records])
    assert tokens_NLG.shape == (2000, 36, 1) and tokens_NLG.dtype == np.int32
    label_N = np.array([record["label"] for record in records])
    cost_N = one.nats(tokens_NLG, label_N).mean(-1)
    assert abs(cost_N.mean() - one.entropy()) < 4 * cost_N.std() / 2000**0.5
    # under the tables of another seed the same tokens cost far more
    assert markov.mesh(language=1).nats(tokens_NLG, label_N).mean() > 2 * one.entropy()


def test_splits_seeds_and_tables_differ_and_reruns_do_not():
    one = markov.mesh(count=100)
    others = [
        markov.mesh(count=100, split="held_out"),
        markov.mesh(count=100, seed=1),
        markov.mesh(count=100, language=1),
        markov.pyramid(count=100),
    ]
    prints = [one.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == 5 and markov.mesh(count=100).fingerprint == one.fingerprint
    first = one[7]["tokens"]
    assert not any(np.array_equal(first, other[7]["tokens"]) for other in others)
    np.testing.assert_array_equal(first, markov.mesh(count=100)[7]["tokens"])
    np.testing.assert_array_equal(one.table_ARUUV, others[0].table_ARUUV)
    with pytest.raises(IndexError):
        one[100]


def test_stream_reads_it_as_token_shards():
    source = markov.pyramid(count=64)
    with loader.batches(source, seed=0, batch_size=8, threads=0, prefetch=0) as batches:
        seen = [next(batches) for _ in range(8)]
    tokens_BLG = np.concatenate([batch["tokens"] for batch in seen])
    assert tokens_BLG.shape == (64, 21, 1)
    whole = {record["tokens"].tobytes() for record in source.__getitems__(range(64))}
    assert {tokens_LG.tobytes() for tokens_LG in tokens_BLG} == whole
    once = next(iter(loader.once(source, batch_size=64)))
    np.testing.assert_array_equal(once["label"], np.arange(64) % 4)


@pytest.mark.parametrize("sides", [(1, 2, 4), (1, 2, 3, 6)])
def test_what_a_next_scale_generator_sees_tells_the_coarser_tokens(sides):
    """Channel by channel the map from tokens to inputs is linear and loses nothing."""
    V, language = 8, markov.pyramid(sides)
    grid = (sides[-1], sides[-1])
    inner = dict(name="vq", codes=V, channels=V, normalize=False, update="frozen")
    section = dict(name="multiscale", quantizer=inner, scales=sides, phi=0)
    codec = building.build(section, "quantizer", grid=grid, rngs=nnx.Rngs(0))
    codec.inner.codebook[...] = jnp.asarray(markov.codes(V))
    assert codec.layout == interfaces.TokenLayout.from_json(language.layout)
    told = sum(side**2 for side in sides[:-1])
    # tokens that are 0 but at one position, one after the other: columns of the map, by channel 1
    basis_PLG = np.zeros((told, language.length, 1), np.int32)
    basis_PLG[np.arange(told), np.arange(told)] = 1
    map_Pl = np.asarray(codec.known_before(jnp.asarray(basis_PLG)))[..., 1].astype(np.float64)
    assert np.linalg.matrix_rank(map_Pl) == told
    tokens_NLG, _ = language.sample(50, seed=2)
    known_NlC = np.asarray(codec.known_before(jnp.asarray(tokens_NLG)), np.float64)
    found_NPC = np.einsum("lP,NlC->NPC", np.linalg.pinv(map_Pl), known_NlC)
    np.testing.assert_array_equal(found_NPC.argmax(-1), tokens_NLG[:, :told, 0])
    one_hot_NPC = np.eye(V)[tokens_NLG[:, :told, 0]]
    np.testing.assert_allclose(found_NPC, one_hot_NPC, atol=1e-3)


def test_source_travels_to_another_process():
    source = markov.mesh((2, 2), 3, count=10)
    rebuilt = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(rebuilt[3]["tokens"], source[3]["tokens"])


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: markov.mesh(split="test"), "split must be one of"),
        (lambda: markov.mesh(count=0), "count >= 1"),
        (lambda: markov.mesh(concentration=0.0), "concentration above 0"),
        (lambda: markov.pyramid(classes=0), "at least one class"),
        (lambda: markov.pyramid(seed=-1), "seed"),
    ],
)
def test_mistakes_are_told(make, part):
    with pytest.raises(interfaces.UserError, match=part):
        make()
