"""The peers' training steps, for `peers`: their networks as they start, losses, clip and AdamW.

As their own training programs take them, in float32 and without an average of the parameters: what
is masked, shuffled, dropped or made of the tokens, in the step. Tokens and labels are at random.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
from collections.abc import Callable

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# Of the networks in 1d-tokenizer
SMALL = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
FULL = dict(hidden_size=768, num_hidden_layers=24, num_attention_heads=16, intermediate_size=3072)


def rar(arguments: argparse.Namespace, batch: int = 8, **sizes) -> Callable:
    """RAR's, in random orders."""
    import torch
    from modeling.modules import ARLoss
    from modeling.rar import RAR
    from omegaconf import OmegaConf

    network = dict(dropout=0.1, attn_drop=0.1, class_label_dropout=0.1, use_checkpoint=False)
    network |= dict(image_seq_len=256, condition_num_classes=1000, **sizes)
    config = dict(model=dict(vq_model=dict(codebook_size=1024), generator=network))
    config = OmegaConf.create(config)
    model, criterion = RAR(config), ARLoss(config)
    model.set_random_ratio(1.0)
    tokens, classes = torch.randint(0, 1024, (batch, 256)), torch.arange(batch)

    def loss():
        condition = model.preprocess_condition(classes.clone(), cond_drop_prob=0.1)
        return criterion(*model(tokens, condition, return_labels=True))[0]

    return _step(model, loss, lr=4e-4, betas=(0.9, 0.96), weight_decay=0.03)


def llamagen(arguments: argparse.Namespace, batch: int = 8, **sizes) -> Callable:
    """LlamaGen's."""
    import torch
    from autoregressive.models.gpt import ModelArgs, Transformer

    of_images = dict(vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1)
    model = Transformer(ModelArgs(**of_images, model_type="c2i", **sizes))
    tokens, classes = torch.randint(0, 16384, (batch, 256)), torch.arange(batch)

    def loss():
        return model(cond_idx=classes, idx=tokens[:, :-1], targets=tokens)[1]

    return _step(model, loss, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def var(arguments: argparse.Namespace, depth: int, batch: int = 4) -> Callable:
    """VAR's, of tokens that are there already."""
    import torch
    from models import build_vae_var

    with contextlib.redirect_stdout(io.StringIO()):
        vae, model = build_vae_var("cpu", SIDES, num_classes=1000, depth=depth)
    vae.eval().requires_grad_(False)
    tokens = [torch.randint(0, 4096, (batch, side * side)) for side in SIDES]
    every, classes = torch.cat(tokens, dim=1), torch.arange(batch)
    criterion = torch.nn.CrossEntropyLoss(reduction="none")

    def loss():
        logits = model(classes, vae.quantize.idxBl_to_var_input(tokens))
        return criterion(logits.view(-1, 4096), every.view(-1)).mean()

    betas = dict(betas=(0.9, 0.95), fused=True)
    return _step(model, loss, clip=2.0, lr=1e-4, weight_decay=0.05, **betas)


def maskbit(arguments: argparse.Namespace, batch: int = 4, **sizes) -> Callable:
    """MaskBit's, 14 bits in two halves."""
    import torch
    from modeling.bert import LFQBert
    from modeling.modules import MLMLoss, get_mask_tokens

    model = LFQBert(codebook_size=16384, codebook_splits=2, use_prenorm=False, dropout=0.1, **sizes)
    criterion = MLMLoss(label_smoothing=0.1)
    tokens, classes = torch.randint(0, 128, (batch, 256, 2)), torch.arange(batch)

    def loss():
        masked, masks = get_mask_tokens(tokens, 128, mode="arccos")
        logits = model(masked, classes.clone(), torch.rand(batch) < 0.1)
        return criterion(logits, tokens, masks)[0]

    return _step(model, loss, lr=1e-4, betas=(0.9, 0.96), weight_decay=0.045)


def _step(model, loss: Callable, *, clip: float = 1.0, **options) -> Callable:
    """A step of AdamW on what the loss says, its gradients clipped."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def way():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    return way


BERT = dict(hidden_dim=384, depth=6, heads=6, mlp_dim=1536)
# Task -> (checkout, what makes the way)
TASKS = {
    "RAR 384x6 step": ("1d-tokenizer", functools.partial(rar, **SMALL)),
    "RAR-B step": ("1d-tokenizer", functools.partial(rar, **FULL)),
    "LlamaGen 384x6 step": ("LlamaGen", functools.partial(llamagen, dim=384, n_layer=6, n_head=6)),
    "VAR-d6 step": ("VAR", functools.partial(var, depth=6)),
    "MaskBit 384x6 step": ("maskbit", functools.partial(maskbit, **BERT)),
}
