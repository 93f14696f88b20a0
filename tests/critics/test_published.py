"""Every array of the critics' fixtures, computed with ours."""

import numpy as np
import pytest

from tokgen.pretrained import critics, parity

NAMES = ("disc_patchgan", "disc_stylegan", "disc_maskbit", "maskgit_discriminator", "lpips")


@pytest.mark.parametrize("name", NAMES)
def test_every_array_of_the_fixture_is_reproduced(name, shared):
    folder = parity.Folder(shared / "parity" / name)
    lines, computed = parity.hold(folder)
    assert not [line for line in lines if line.verdict in ("fail", "uncovered")]
    # nothing that the original computed may pass for an input
    given = {line.name for line in lines if line.verdict == "given"}
    assert given <= {"real", "fake", "image", "image_fake", "image0", "image1"} | {
        "aw_weight",
        "aw_u",
        "aw_v",
    }
    assert len(computed) + len(given) == len(lines)


@pytest.mark.parametrize("rule", [critics.FLAT_CHW, critics.FLAT_HWC])
def test_the_flattened_map_goes_both_ways(rule):
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    published = rule.published([kernel])
    np.testing.assert_array_equal(rule.ours(published, [kernel.shape])[0], kernel)
    x = np.random.default_rng(1).normal(size=(4, 4, 3)).astype(np.float32)
    wanted = np.einsum("hwc,hwco->o", x, kernel)
    flat = {critics.FLAT_CHW: x.transpose(2, 0, 1), critics.FLAT_HWC: x}[rule].reshape(-1)
    matrix = published.T if rule is critics.FLAT_CHW else published
    np.testing.assert_allclose(flat @ matrix, wanted, rtol=1e-5)
