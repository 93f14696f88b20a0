"""IBQ and Open-MAGVIT2 as SEED-Voken publishes them: checkpoints of Lightning, generators in them.

A generator's file holds its tokenizer, too; its keys begin with `transformer`.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import TokenLayout
from tokgen.pretrained.families import causal, vqgan

CELLS = 256
CLASS_TABLE = "transformer.class_emb.embedding_table.weight"

# What a System of a tokenizer and one of a generator have in common with their namesakes.
TOKENIZER = dict(
    unwrap=("state_dict.first_stage_model", "state_dict"),  # the first: in a generator's file
    wrap=("state_dict",),
    aside=(r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)"),
    average=vqgan.average,
    licence="Apache-2.0",
)
GENERATOR = dict(
    unwrap=("state_dict",),
    wrap=("state_dict",),
    aside=(r"(first|cond)_stage_model\..*",),  # the tokenizer
    licence="Apache-2.0",
)


def section(published: dict) -> dict:
    """The published sizes of a generator; {} where they are not given."""
    return causal.section(published, "model", "init_args", "transformer_config", "params")


def tokens(
    published: dict, weights: Mapping[str, np.ndarray], vocab: tuple[int, ...]
) -> tuple[TokenLayout, int]:
    """(layout, classes) of a generator whose symbols have the sizes `vocab`."""
    cells = section(published).get("block_size", CELLS)
    return causal.square(vocab, cells), len(weights[CLASS_TABLE]) - 1


def settings(
    published: dict, weights: Mapping[str, np.ndarray], *, recipe: str, width: int, blocks: str
) -> ml_collections.ConfigDict:
    """Our config of a generator with LlamaGen's blocks, whose keys begin with `blocks`.

    Without a published configuration sizes are the weights', and heads have 64 channels.
    """
    config = configs.load(recipe)
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.width = width
    config.generator.depth = causal.depth(weights, blocks)
    config.generator.heads = causal.heads(section(published), "n_head", width)
    config.generator.hidden = len(weights[f"{blocks}.0.feed_forward.w1.weight"])
    return config
