"""Variants of the transformer: what published ones disagree about, one named constant each.

A config holds the name, so that it can be saved. To port a system, add a constant here; nobody
edits the transformer.
"""

from __future__ import annotations

import dataclasses

from tokgen import choices
from tokgen.nn import attention, blocks, linear, mlp, norms

# LlamaGen, arXiv:2406.06525: RMSNorm with eps 1e-5, no biases, mlp.SwiGLU, normal(0.02)
LLAMA = blocks.Variant(
    blocks.PreNorm, norms.RMSNorm, mlp.SwiGLU, mlp.swiglu_hidden, linear.published
)

# LlamaGen for widths under 512: the MLP is not rounded up to 256, starts scale with fan in
LLAMA_NARROW = blocks.Variant(
    blocks.PreNorm, norms.RMSNorm, mlp.SwiGLU, mlp.swiglu_hidden_narrow, linear.fan_in
)

# The vision transformer of TiTok, arXiv:2406.07550: LayerNorm with eps 1e-5, biases, exact GELU
VIT = blocks.Variant(
    blocks.PreNorm, norms.torch_norm, mlp.GeluMLP, mlp.four_times, linear.published, attention.ALL
)

# TiTok's U-ViT generator: no bias of query, key and value
UVIT = blocks.Variant(
    blocks.PreNorm, norms.torch_norm, mlp.GeluMLP, mlp.four_times, linear.published, ("out",)
)

# BERT as TiTok and MaskBit have it: LayerNorm after the sum, eps 1e-12, exact GELU
BERT = blocks.Variant(
    blocks.PostNorm, norms.bert_norm, mlp.GeluMLP, mlp.four_times, linear.published, attention.ALL
)

# MaskBit's token-embedding variant: the norm before the branch
BERT_PRENORM = dataclasses.replace(BERT, block=blocks.PreNorm, closing=norms.bert_norm)

# MaskGIT, arXiv:2202.04200: BERT with the GELU of JAX
MASKGIT = blocks.Variant(
    blocks.PostNorm, norms.bert_norm, mlp.tanh_mlp, mlp.four_times, linear.published, attention.ALL
)

# RAR, arXiv:2411.00776: adaptive norms that have a scale and a bias, normed queries and keys
RAR = blocks.Variant(
    blocks.Adaptive,
    norms.LayerNorm,
    mlp.GeluMLP,
    mlp.four_times,
    linear.published,
    attention.ALL,
    attention.HeadNorm,
)

# VAR, arXiv:2404.02905: adaptive norms, cosine attention, keys without a bias, tanh GELU
VAR = blocks.Variant(
    blocks.Adaptive,
    norms.Standardized,
    mlp.tanh_mlp,
    mlp.four_times,
    linear.third,
    ("query", "value", "out"),
    attention.Cosine,
)

# VAR d36: six vectors for all blocks
VAR_SHARED = dataclasses.replace(VAR, block=blocks.SharedAdaptive, shared=blocks.Shared)

# VAR's code with its cosine attention off: no published weights
VAR_PLAIN = dataclasses.replace(VAR, similarity=attention.Quartered)
VAR_SHARED_PLAIN = dataclasses.replace(VAR_SHARED, similarity=attention.Quartered)

# IBQ, arXiv:2412.02692, by its code: LlamaGen's norm and MLP in adaptive blocks, whose gates start
# the lower the deeper the model (B and L; XL; XXL)
IBQ = blocks.Variant(
    blocks.Adaptive,
    norms.RMSNorm,
    mlp.SwiGLU,
    mlp.swiglu_hidden,
    linear.published,
    starts=(0.01, 0.01, 2e-5) * 2,
)
IBQ_XL = dataclasses.replace(IBQ, starts=(0.01, 0.01, 2e-6) * 2)
IBQ_XXL = dataclasses.replace(IBQ, starts=(0.01, 0.01, 2e-7) * 2)


KNOWN = {name.lower(): it for name, it in vars().items() if isinstance(it, blocks.Variant)}


def named(name: str) -> blocks.Variant:
    """The constant of this file that a config names, in lower case."""
    return choices.named(KNOWN, name, "variant")
