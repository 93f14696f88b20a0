"""VAR's generator: both fixtures array by array, its file given back, files without a config."""

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.pretrained import parity, transfer
from tokgen.pretrained.formats import reader
from tokgen.pretrained.systems import var_generator

SYSTEMS = ("var", "var_shared_aln")


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_array_agrees(shared, name):
    # a decode is -1 where the cache makes a difference
    lines, _ = parity.hold(parity.Folder(shared / "parity" / name))
    verdicts = {line.name: line.verdict for line in lines}
    given = {"labels", "margin", *(f"gt_indices_{k}" for k in range(5))}
    assert {array for array, verdict in verdicts.items() if verdict == "given"} == given
    assert set(verdicts.values()) == {"given", "pass"}, verdicts
    assert len(verdicts) >= 21


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_export_gives_the_file_back(shared, name):
    folder = parity.Folder(shared / "parity" / name)
    imported = folder.imported()
    wanted, found = reader.read(folder.file()), transfer.publish(imported, name)
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    # a model that was trained here has no arrays aside: they follow from its layout
    buffers = var_generator.buffers(imported.module)
    assert set(buffers) == set(imported.aside)
    for key, array in buffers.items():
        assert array.dtype == wanted[key].dtype, key
        np.testing.assert_array_equal(array, wanted[key], err_msg=key)


def published(pyramid, width=128, heads=2, classes=1000):
    """Zeros in the shapes of a file of published form, of one layer."""
    length = sum(n * n for n in pyramid)
    shapes = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, length, width),
        "word_embed.weight": (width, 32),
        "class_emb.weight": (classes + 1, width),
        "blocks.0.attn.scale_mul_1H11": (1, heads, 1, 1),
        "blocks.0.ffn.fc1.weight": (4 * width, width),
        "head.weight": (4096, width),
    }
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("pyramid", var_generator.PYRAMIDS)
def test_without_a_config_the_published_grids_are_known(pyramid):
    weights = published(pyramid)
    layout, classes = var_generator.tokens({}, weights)
    assert (layout.vocab, classes) == ((4096,), 1000)
    assert layout.grids == tuple((n, n) for n in pyramid)
    config = var_generator.settings({}, weights)
    section = config.generator
    assert (section.width, section.depth, section.heads, section.channels) == (128, 1, 2, 32)
    assert section.variant == "var" and section.hidden == 512
    assert config.presets.paper.to_dict() == dict(
        guidance="per_scale", weight=1.5, top_k=900, top_p=0.96
    )


def test_the_form_is_read_from_the_keys():
    weights = published((1, 2))
    weights["shared_ada_lin.1.weight"] = np.zeros((6 * 128, 128))
    forms = [var_generator.settings({}, weights).generator.variant]
    del weights["blocks.0.attn.scale_mul_1H11"]
    section = var_generator.settings({}, weights).generator
    assert section.heads == 2  # 64 channels each
    forms.append(section.variant)
    del weights["shared_ada_lin.1.weight"]
    forms.append(var_generator.settings({"num_heads": 4}, weights).generator.variant)
    assert forms == ["var_shared", "var_shared_plain", "var_plain"]
    assert var_generator.settings({"num_heads": 4}, weights).generator.heads == 4


def test_grids_that_nobody_published_must_be_named():
    weights = published((1, 2, 3))
    assert var_generator.tokens({"patch_nums": [1, 2, 3]}, weights)[0].length == 14
    for said in ({}, {"patch_nums": [1, 2, 4]}):
        with pytest.raises(UserError, match=r"patch_nums.*14.*--config"):
            var_generator.tokens(said, weights)
    with pytest.raises(UserError, match="norm_eps=1e-05"):
        var_generator.settings({"norm_eps": 1e-5}, weights)
