"""The best of several candidates, by likelihood and by a classifier."""

import functools

import numpy as np
import PIL.Image
import pytest

from tokgen.data import shapes
from tokgen.evaluation import ranking, reference_making, references
from tokgen.interfaces import UserError
from tokgen.sampling import drawing, presets

X = 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What `tokgen reference` writes: a reference with a classifier, hardly trained, of shapes."""
    folder = tmp_path_factory.mktemp("ranking")
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    names = tuple(shapes.Source(split="train", count=1).classes)
    for i, name in enumerate(names * 4):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise[i]).save(folder / "data" / name / f"{i}.png")
    settings = reference_making.Settings(
        str(folder / "data"), str(folder / "shapes.npz"), size=(32, 32), steps=3
    )
    reference_making.make(settings)
    return folder / "shapes.npz"


@pytest.mark.parametrize("by", ["likelihood", "classifier"])
def test_of_each_image_the_candidate_with_the_highest_score_is_kept(by, model, reference, capfd):
    found = model("raster")
    rank = ranking.LIKELIHOOD if by == "likelihood" else str(reference)
    how = dict(number=2, seed=3, progress=False)
    capfd.readouterr()
    kept = found.sample([4, 7], candidates=X, rank=rank, batch=3, **how)
    assert "3 candidates of each of 4 images: 12 are drawn" in capfd.readouterr().err
    asked = found._editing(presets.Choice())
    score = ranking.Ranking(X, rank).score(asked.generator, None, found.classes, 4)
    # candidate c of image i is image i + c APART
    draw = functools.partial(
        *(drawing.draw, asked.generator, asked.decoder.module, kept.kind_N, asked.sampler),
        **dict(seed=3, batch=4, what=""),
    )
    candidates = [draw(index_N=np.arange(4) + c * ranking.APART) for c in range(X)]
    first = found.sample([4, 7], **how)
    np.testing.assert_array_equal(candidates[0][0], first.tokens_NLG)
    score_NX = np.stack([score(*each, kept.kind_N) for each in candidates], axis=1)
    best_N = score_NX.argmax(1)
    assert len(set(best_N.tolist())) > 1
    for i, c in enumerate(best_N):
        np.testing.assert_array_equal(kept.tokens_NLG[i], candidates[c][0][i])
        np.testing.assert_array_equal(kept.image_NHW3[i], candidates[c][1][i])


def test_edits_are_ranked_alike(model, images):
    found = model("raster")
    how = dict(mask="bottom", seed=3, progress=False, batch=4)
    kept = found.edit(images, [0, 1, 2], number=2, candidates=X, **how)
    nats_N = -found.log_likelihood(tokens=kept.tokens_NLG, classes=[0, 0, 1, 1, 2, 2])
    first = found.edit(images, [0, 1, 2], number=2, **how)
    first_N = -found.log_likelihood(tokens=first.tokens_NLG, classes=[0, 0, 1, 1, 2, 2])
    assert (nats_N <= first_N + 1e-6).all() and (nats_N < first_N - 1e-3).any()
    np.testing.assert_array_equal(kept.source_N, first.source_N)
    np.testing.assert_array_equal(kept.image_NHW3[:, :16], first.image_NHW3[:, :16])


def test_what_cannot_rank_is_refused_before_anything_is_drawn(model, images, reference, tmp_path):
    with pytest.raises(UserError, match="exact likelihood"):
        model("masked").sample("ring", candidates=2)
    with pytest.raises(UserError, match="exact likelihood"):
        model("masked").edit(images, 1, mask="left", candidates=2)
    with pytest.raises(UserError, match="no file"):
        model("raster").sample("ring", candidates=2, rank="clasifier")
    for count in (0, 256):
        with pytest.raises(UserError, match="from 1 to 255"):
            model("raster").sample("ring", candidates=count)
    with pytest.raises(UserError, match="--grow"):
        model("raster").edit(images, 1, grow="right=8", candidates=2)
    other = references.read(reference)
    other.record["extractor"]["classes"] = ["cat"] * 10
    path = tmp_path / "cats.npz"
    record = {"protocol": "local", "layers": [], "extractor": other.record["extractor"]}
    references.save(path, record, {}, {}, other.index_n, other.label_n, other.network)
    with pytest.raises(UserError, match="must know the generator's classes"):
        model("raster").sample("ring", candidates=2, rank=str(path))
