"""Bytes of token sets against files that the writer wrote."""

import os

import numpy as np
import pytest

from tests import recipes as known
from tests.data import test_token_shards
from tokgen.data import token_writer
from tokgen.planning import recipes, token_set


@pytest.mark.parametrize("vocab, side, views", [((256,), 8, 3), ((256, 256), 4, 1)])
def test_bytes_are_those_that_are_written(tmp_path, vocab, side, views):
    """Of tokens that say nothing twice: no file is larger, and what is not there is filling."""
    layout, images = known.square(side, *vocab), 1500
    tokens = token_set.TokenSet(layout, tuple(f"view{n}" for n in range(views)))
    writer = token_writer.Writer(
        tmp_path,
        **test_token_shards.plan(
            layout=layout.to_json(),
            images={"train": images},
            views=tokens.views,
            classes=[],
            shard_images=token_writer.SHARD,
        ),
    )
    draw = np.random.default_rng(0)
    for shard in writer.remaining():
        shape = (images, views, layout.length, layout.groups)
        writer.write(shard, draw.integers(0, 256, shape), np.zeros(images, int))
    writer.finish()
    (file,) = tmp_path.glob("*.array_record")
    size = os.path.getsize(file)
    assert images * tokens.image <= size <= tokens.most(images) <= size + 2**17
    assert tokens.image == views * (4 + layout.length * layout.groups)


def test_imagenet_in_ten_crops_is_what_the_documents_say():
    """Ten records of a label and 256 tokens of two bytes, and what a file has beside them."""
    recipe = recipes.read("configs/generator/rar.py:b")
    ((name, words),) = token_set.rows(recipe)
    assert name == "tokens on disk"
    assert words.startswith("at most 7.5") and "ImageNet's 1,281,167 images" in words
    assert words.endswith("10 views of 256 tokens in uint16")
    assert token_set.TokenSet(recipe.dearest.step.frozen.layout, tuple("abcdefghij")).image == 5160
