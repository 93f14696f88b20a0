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


def test_of_texts_the_features_are_told_beside_the_tokens():
    """120 features of 2,048 channels in float16 are a thousand times the tokens."""
    few = ("generator.depth=1", "generator.width=64", "generator.heads=2", "generator.hidden=64")
    recipe = recipes.read("configs/generator/llamagen.py:t2i_xl_256", few)
    told = dict(token_set.rows(recipe))
    assert "for every 1,000,000 images" in told["tokens on disk"]
    assert told["texts on disk"].startswith("491.5 GB for every 1,000,000 images")
    assert "of one 491.5 kB, 120 features of 2,048 numbers in float16" in told["texts on disk"]
    assert list(dict(token_set.rows(recipes.read("configs/generator/shapes.py")))) == [
        "tokens on disk"
    ]


def test_imagenet_in_ten_crops_is_what_the_documents_say():
    """Ten records of a label and 256 tokens of two bytes, and what a file has beside them."""
    recipe = recipes.read("configs/generator/rar.py:b")
    ((name, words),) = token_set.rows(recipe)
    assert name == "tokens on disk"
    assert words.startswith("at most 7.5") and "ImageNet's 1,281,167 images" in words
    assert words.endswith("10 views of 256 tokens in uint16")
    assert token_set.TokenSet(recipe.dearest.step.frozen.layout, tuple("abcdefghij")).image == 5160
