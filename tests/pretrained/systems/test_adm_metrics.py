"""The fixture of metrics, array by array; and one like it of other sizes, made by definition."""

import json

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from tokgen.interfaces import UserError
from tokgen.pretrained import parity

GIVEN = {"ref_features", "gen_features", "logits", "codes"}


def write(path, arrays):
    np.savez(path / "case.npz", **arrays)
    (path / "config.json").write_text(json.dumps({}))
    return parity.Folder(path, "metrics")


def held(folder):
    lines, computed = parity.hold(folder)
    return {line.name: line for line in lines}, computed


def near(wanted, found):
    """The published tolerance; a distance that is 0 is within 1e-6."""
    largest = np.abs(wanted).max()
    return np.abs(np.float64(wanted) - found).max() <= (1e-6 if largest < 1e-9 else 1e-4 * largest)


def test_the_shared_fixture(shared):
    folder = parity.Folder(shared / "parity" / "metrics")
    lines, computed = held(folder)
    assert {name for name, line in lines.items() if line.verdict == "given"} == GIVEN
    assert set(computed) == set(folder.arrays) - GIVEN
    for name, found in computed.items():
        assert near(folder.arrays[name], found), name
    assert abs(computed["fid_self"]) < 1e-6


def balls(centres, k):
    """Squared distances to the k-th other point, one by one."""
    squares = ((centres[:, None] - centres[None]) ** 2).sum(-1)
    return np.sort(squares, 1)[:, k]  # the point itself stands first


def share_inside(points, centres, radii):
    squares = ((points[:, None] - centres[None]) ** 2).sum(-1)
    return (squares <= radii[None]).any(1).mean()


def score(logits):
    log = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    mean = np.exp(log).mean(0)
    return np.exp((np.exp(log) * (log - np.log(mean)[None])).sum(1).mean())


def distance(a, b):
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(scipy.linalg.eigvals(first @ second).astype(complex)).real.sum()
    step = a.mean(0) - b.mean(0)
    return step @ step + np.trace(first) + np.trace(second) - 2 * root


@pytest.fixture
def arrays():
    """More generated images than real ones, other k and another split, by their definitions."""
    random = np.random.default_rng(9)
    real, made = (
        random.gamma(2, size=(n, 10)) @ random.random((10, 10)) + c for n, c in ((60, 0), (90, 0.5))
    )
    logits, codes = random.standard_normal((75, 9)) * 2, random.integers(3, 50, (40, 6))
    share = np.bincount(codes.ravel(), minlength=64) / codes.size
    seen = share[share > 0]
    found = {
        "ref_features": real,
        "gen_features": made,
        "logits": logits,
        "fid": distance(real, made),
        "fid_singular": distance(real, made[:5]),
        "titok_rfid": distance(real, made[:60]),
        "probs": scipy.special.softmax(logits, axis=1),
        "is_all": score(logits),
        "is_split40": np.mean([score(logits[:40]), score(logits[40:])]),
        "titok_is": score(logits[:60]),
        "precision_k4": share_inside(made, real, balls(real, 4)),
        "recall_k4": share_inside(real, made, balls(made, 4)),
        "ref_radii_k2": balls(real, 2),
        "codebook_usage": len(seen) / 64,
        "codebook_entropy": -(seen * np.log2(seen)).sum(),
    }
    return {name: np.asarray(array, np.float32) for name, array in found.items()} | {
        "codes": codes.astype(np.int32)
    }


def test_a_fixture_of_other_sizes(arrays, tmp_path):
    lines, computed = held(write(tmp_path, arrays))
    assert set(computed) == set(arrays) - GIVEN
    for name, found in computed.items():
        assert near(arrays[name], found), name
        assert lines[name].verdict == "pass", name


def test_one_feature_that_moved_is_seen(arrays, tmp_path):
    moved = arrays["gen_features"].copy()
    moved[3, 2] += 1.0
    lines, _ = held(write(tmp_path, arrays | {"gen_features": moved, "extra": np.ones(2)}))
    found = {name: line.verdict for name, line in lines.items()}
    assert found["fid"] == found["fid_singular"] == found["titok_rfid"] == "fail"
    assert found["ref_radii_k2"] == found["is_all"] == "pass"
    assert found["extra"] == "uncovered"


def test_an_input_that_is_missing_is_named(arrays, tmp_path):
    del arrays["codes"]
    with pytest.raises(UserError, match="lacks the array 'codes'"):
        held(write(tmp_path, arrays))
