"""The peers' side of `beside`: their own networks and their own code, from checkouts of theirs.

    PYTHON benchmarks/peers.py TASK --checkouts DIR [--dtype bfloat16] [--way compiled]

Called by decode.py, tokenizers.py and training_step.py. DIR holds the checkouts by their names
(1d-tokenizer, LlamaGen, VAR, maskbit, maskgit); PYTHON has torch, timm, einops, omegaconf,
transformers and accelerate, for the tasks of maskgit jax and flax. Weights are random; packages
that a peer imports and does not use for the task are stood in for where they are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import pathlib
import sys
import types
import unittest.mock
from collections.abc import Callable

import machine
import peer_steps

BATCH = 4
UNUSED = (
    *("torchvision", "torchvision.models", "torchvision.models.feature_extraction"),
    *("torchvision.ops", "torchvision.ops.misc", "torchvision.datasets"),
    *("torchvision.transforms", "torchvision.transforms.functional"),
    *("diffusers", "diffusers.models", "huggingface_hub", "open_clip"),
    *("requests", "safetensors", "safetensors.torch", "webdataset", "pandas"),
)
# Of MaskGIT alone: einops looks whether there is a tensorflow
TENSORFLOW = ("tensorflow", "tensorflow.compat", "tensorflow.compat.v2", "tensorflow_hub")


class StandIn(types.ModuleType):
    """A module of which anything may be imported, and nothing is used."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return unittest.mock.MagicMock(name=f"{self.__name__}.{name}")


def begin(checkouts: str, peer: str) -> None:
    """Make a checkout's modules the first to be found."""
    # the benchmarks beside this one have names of packages that peers import
    sys.path.remove(str(pathlib.Path(__file__).parent))
    sys.path.insert(0, str(pathlib.Path(checkouts, peer).resolve()))
    unused = UNUSED + TENSORFLOW if peer == "maskgit" else UNUSED
    absent = {
        root
        for root in (name.partition(".")[0] for name in unused)
        if importlib.util.find_spec(root) is None
    }
    for name in unused:
        if name.partition(".")[0] in absent:
            sys.modules[name] = module = StandIn(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)


def random(module, dtype: str):
    """The module in a dtype, ready to be called; numbers near 0, scales near 1."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.ndim == 1 and float(parameter.float().mean()) > 0.5
            noise = 0.02 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(noise + 1 if scale else noise)
    return module.eval().requires_grad_(False).to(getattr(torch, dtype))


def quiet(call: Callable) -> Callable:
    """Without gradients."""
    import torch

    def way():
        with torch.inference_mode():
            return call()

    return way


def rar(arguments: argparse.Namespace, **sizes) -> Callable:
    """RAR's generate(): 256 tokens, guided."""
    import torch
    from modeling.rar import RAR
    from omegaconf import OmegaConf

    network = dict(dropout=0.1, attn_drop=0.1, class_label_dropout=0.1, use_checkpoint=False)
    network |= dict(image_seq_len=256, condition_num_classes=1000, **sizes)
    config = dict(model=dict(vq_model=dict(codebook_size=1024), generator=network))
    model = RAR(OmegaConf.create(config))
    model.set_random_ratio(0.0)
    model = random(model, arguments.dtype)
    how = dict(guidance_scale=16.0, randomize_temperature=1.0, guidance_scale_pow=2.75)
    return quiet(lambda: model.generate(condition=torch.arange(BATCH), **how))


def llamagen(arguments: argparse.Namespace, until: int = -1, **sizes) -> Callable:
    """LlamaGen's generate(): 256 tokens, guided, up to a token or to the end."""
    import torch
    from autoregressive.models import generate
    from autoregressive.models.gpt import ModelArgs, Transformer

    if not hasattr(torch.backends.cuda, "sdp_kernel"):  # gone from present torch
        torch.backends.cuda.sdp_kernel = lambda **_: contextlib.nullcontext()
    of_images = dict(vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1)
    model = Transformer(ModelArgs(**of_images, model_type="c2i", **sizes))
    model = random(model, arguments.dtype)
    if arguments.way != "eager":
        dtype = getattr(torch, arguments.dtype)
        model.setup_caches(max_batch_size=2 * BATCH, max_seq_length=257, dtype=dtype)
        model.setup_caches = lambda **_: None  # made once, or each call would be compiled again
        if arguments.way == "frozen":
            import torch._inductor.config

            torch._inductor.config.freezing = True
        model.forward = torch.compile(model.forward, fullgraph=True)
    how = dict(cfg_scale=2.0, cfg_interval=until, temperature=1.0, top_k=0, top_p=1.0)

    def way():
        with torch.no_grad():  # its cache is a buffer, which inference mode would not let it write
            return generate.generate(model, torch.arange(BATCH), 256, sample_logits=True, **how)

    return way


def var(arguments: argparse.Namespace, depth: int, pixels: bool = True) -> Callable:
    """VAR's autoregressive_infer_cfg(), its last step of pixels or without it."""
    import torch
    from models import build_vae_var

    with contextlib.redirect_stdout(io.StringIO()):
        vae, model = build_vae_var(
            *("cpu", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), num_classes=1000, depth=depth
        )
    vae, model = random(vae, arguments.dtype), random(model, arguments.dtype)
    if not pixels:
        vae.fhat_to_img = lambda latents: latents
    how = dict(g_seed=0, cfg=1.5, top_k=900, top_p=0.95)
    return quiet(lambda: model.autoregressive_infer_cfg(BATCH, torch.arange(BATCH), **how))


def var_sampler(arguments: argparse.Namespace) -> Callable:
    """VAR's draw of 1,024 tokens of 4,096."""
    import torch
    from models.helpers import sample_with_top_k_top_p_

    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 256, 4096, generator=draw)
    # it writes into what it is given
    return quiet(lambda: sample_with_top_k_top_p_(logits.clone(), 900, 0.95, draw))


def maskbit(arguments: argparse.Namespace, steps: int) -> Callable:
    """MaskBit's sample(), so many steps of 64, without its tokenizer."""
    import torch
    from modeling.bert import LFQBert
    from modeling.modules import sample

    network = dict(hidden_dim=1024, depth=24, heads=16, mlp_dim=4096, dropout=0.1)
    model = LFQBert(
        codebook_size=16384, codebook_splits=2, use_prenorm=False, input_stride=16, **network
    )
    model = random(model, arguments.dtype)

    class NoPixels(torch.nn.Module):
        def decode_tokens(self, tokens):
            return tokens

    how = dict(softmax_temperature=1.0, randomize_temperature=7.8, guidance_scale=7.1)
    how |= dict(mask_schedule_strategy="arccos", guidance_annealing="cosine", scale_pow=3.0)
    how |= dict(mask_token=128, patch_size=16, codebook_size=16384, codebook_splits=2)
    how |= dict(num_samples=BATCH, labels=torch.arange(BATCH), num_steps=steps)
    return quiet(lambda: sample(model, NoPixels(), **how))


def titok(arguments: argparse.Namespace, **sizes) -> Callable:
    """The generate() of TiTok-L-32's generator: 8 steps, guided."""
    import torch
    from modeling.maskgit import ImageBert

    config = _titok_config("l32")
    config.model.generator.update(sizes)
    model = random(ImageBert(config), arguments.dtype)
    how = dict(guidance_scale=4.5, guidance_decay=config.model.generator.guidance_decay)
    how |= dict(randomize_temperature=9.5, num_sample_steps=8)
    return quiet(lambda: model.generate(condition=torch.arange(BATCH), **how))


def maskgit(arguments: argparse.Namespace) -> Callable:
    """The decode() of MaskGIT's own JAX: 8 steps, a network of 384 x 6."""
    import jax
    import jax.numpy as jnp

    jnp.DeviceArray = jax.Array  # gone from present jax
    from maskgit.libml import parallel_decode
    from maskgit.nets import maskgit_transformer

    network = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6)
    network |= dict(intermediate_size=1536, max_position_embeddings=257)
    model = maskgit_transformer.Transformer(
        vocab_size=1024 + 1000 + 1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        **network,
    )
    ids = jnp.full((BATCH, 257), 2024, jnp.int32).at[:, 0].set(1024)
    weights = jax.jit(lambda key: model.init(key, ids, deterministic=True))(jax.random.key(0))

    @jax.jit
    def decode(weights, ids, key):
        return parallel_decode.decode(
            *(ids, key, lambda seen: model.apply(weights, seen, deterministic=True)),
            mask_token_id=2024,
            num_iter=8,
            choice_temperature=4.5,
            mask_scheduling_method="cosine",
        )

    return lambda: jax.block_until_ready(decode(weights, ids, jax.random.key(1)))


def vqgan(arguments: argparse.Namespace, task: str) -> Callable:
    """MaskGIT's VQGAN as 1d-tokenizer has it in PyTorch."""
    import torch
    from modeling.modules import maskgit_vqgan
    from omegaconf import OmegaConf

    sizes = dict(channel_mult=[1, 1, 2, 2, 4], num_resolutions=5, num_res_blocks=2, dropout=0.0)
    sizes |= dict(hidden_channels=128, num_channels=3, resolution=256, z_channels=256)
    config = OmegaConf.create(sizes)
    encoder = random(maskgit_vqgan.Encoder(config), arguments.dtype)
    decoder = random(maskgit_vqgan.Decoder(config), arguments.dtype)
    quantizer = maskgit_vqgan.VectorQuantizer(1024, 256, commitment_cost=0.25)
    quantizer = random(quantizer, arguments.dtype)
    image, codes = _picture(arguments), torch.arange(256)[None]
    if task == "encode":
        return quiet(lambda: quantizer(encoder(image)))
    return quiet(lambda: decoder(quantizer.get_codebook_entry(codes)))


def llamagen_vq(arguments: argparse.Namespace, task: str) -> Callable:
    """LlamaGen's VQ-16."""
    import torch
    from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel

    model, image = random(VQModel(ModelArgs()), arguments.dtype), 2 * _picture(arguments) - 1
    if task == "encode":
        return quiet(lambda: model.encode(image))
    return quiet(lambda: model.decode_code(torch.arange(256), [1, 8, 16, 16]))


def var_vqvae(arguments: argparse.Namespace, task: str) -> Callable:
    """VAR's multi-scale VQVAE."""
    import torch
    from models import build_vae_var

    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    with contextlib.redirect_stdout(io.StringIO()):
        model, _ = build_vae_var("cpu", sides, num_classes=1000, depth=2)
    model, image = random(model, arguments.dtype), 2 * _picture(arguments) - 1
    if task == "encode":
        return quiet(lambda: model.img_to_idxBl(image))
    tokens = [torch.arange(side * side)[None] for side in sides]
    return quiet(lambda: model.idxBl_to_img(tokens, same_shape=True, last_one=True))


def titok_tokenizer(arguments: argparse.Namespace, task: str, name: str) -> Callable:
    """TiTok, to pixels by MaskGIT's VQGAN."""
    import torch
    from modeling.titok import TiTok

    model = random(TiTok(_titok_config(name)), arguments.dtype)
    image, codes = _picture(arguments), torch.arange(model.num_latent_tokens)[None]
    if task == "encode":
        return quiet(lambda: model.encode(image))
    return quiet(lambda: model.decode_tokens(codes))


def maskbit_tokenizer(arguments: argparse.Namespace, task: str) -> Callable:
    """MaskBit's of 14 bits."""
    import torch
    from modeling.conv_vqgan import ConvVQModel
    from omegaconf import OmegaConf

    sizes = dict(quantizer_type="lookup-free", codebook_size=16384, token_size=14)
    sizes |= dict(commitment_cost=0.25, entropy_loss_weight=0.02, entropy_loss_temperature=0.01)
    sizes |= dict(entropy_gamma=1.0, num_channels=3, hidden_channels=128, num_res_blocks=2)
    sizes |= dict(channel_mult=[1, 1, 2, 2, 4], num_resolutions=5, sample_with_conv=True)
    model = random(ConvVQModel(OmegaConf.create(sizes)), arguments.dtype)
    image, codes = _picture(arguments), torch.arange(256)[None]
    if task == "encode":
        return quiet(lambda: model.encode(image))
    return quiet(lambda: model.decode_tokens(codes))


def maskgit_vqgan(arguments: argparse.Namespace, task: str) -> Callable:
    """MaskGIT's VQGAN in its own JAX."""
    import jax
    import jax.numpy as jnp

    jnp.DeviceArray = jax.Array
    from maskgit.configs import vqgan_config
    from maskgit.nets import vqgan_tokenizer

    model = vqgan_tokenizer.VQVAE(config=vqgan_config.get_config(), dtype=jnp.float32, train=False)
    image = {"image": jax.random.uniform(jax.random.key(0), (1, 256, 256, 3))}

    def both(model, image):  # its own call hands the decoder a tuple
        return model.decode(model.encode(image)[0])

    weights = jax.jit(lambda key: model.init(key, image, method=both))(jax.random.key(0))
    given = image if task == "encode" else jnp.zeros((1, 16, 16), jnp.int32)
    method = model.encode_to_indices if task == "encode" else model.decode_from_indices
    run = jax.jit(lambda weights, given: model.apply(weights, given, method=method))
    return lambda: jax.block_until_ready(run(weights, given))


def _picture(arguments: argparse.Namespace):
    import torch

    draw = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, 256, 256, generator=draw).to(getattr(torch, arguments.dtype))


def _titok_config(name: str):
    from omegaconf import OmegaConf

    (root,) = [path for path in sys.path if path.endswith("1d-tokenizer")]
    return OmegaConf.load(f"{root}/configs/infer/TiTok/titok_{name}.yaml")


# Task -> (checkout, what makes the way)
TASKS = {
    "RAR 384x6": ("1d-tokenizer", functools.partial(rar, **peer_steps.SMALL)),
    "RAR-B": ("1d-tokenizer", functools.partial(rar, **peer_steps.FULL)),
    "LlamaGen 384x6": ("LlamaGen", functools.partial(llamagen, dim=384, n_layer=6, n_head=6)),
    "LlamaGen 384x6, half": (
        "LlamaGen",
        functools.partial(llamagen, until=128, dim=384, n_layer=6, n_head=6),
    ),
    "GPT-B": ("LlamaGen", functools.partial(llamagen, dim=768, n_layer=12, n_head=12)),
    "VAR-d6 tokens": ("VAR", functools.partial(var, depth=6, pixels=False)),
    "VAR-d6": ("VAR", functools.partial(var, depth=6)),
    "VAR-d16": ("VAR", functools.partial(var, depth=16)),
    "VAR's sampler": ("VAR", var_sampler),
    "MaskBit, 2 steps": ("maskbit", functools.partial(maskbit, steps=2)),
    "TiTok-L-32 generator": ("1d-tokenizer", titok),
    "TiTok generator 384x6": ("1d-tokenizer", functools.partial(titok, **peer_steps.SMALL)),
    "MaskGIT in JAX": ("maskgit", maskgit),
}
TOKENIZERS = {
    "maskgit-vqgan": ("1d-tokenizer", vqgan),
    "maskgit-vqgan in JAX": ("maskgit", maskgit_vqgan),
    "LlamaGen VQ-16": ("LlamaGen", llamagen_vq),
    "VAR VQVAE": ("VAR", var_vqvae),
    "TiTok-S-128": ("1d-tokenizer", functools.partial(titok_tokenizer, name="s128")),
    "TiTok-L-32": ("1d-tokenizer", functools.partial(titok_tokenizer, name="l32")),
    "MaskBit 14-bit": ("maskbit", maskbit_tokenizer),
}
TASKS |= peer_steps.TASKS | {
    f"{name} {task}": (peer, functools.partial(make, task=task))
    for name, (peer, make) in TOKENIZERS.items()
    for task in ("decode", "encode")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkouts", required=True, metavar="DIR")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--way", default="eager", choices=("eager", "compiled", "frozen"))
    arguments = parser.parse_args()
    peer, make = TASKS[arguments.task]
    begin(arguments.checkouts, peer)

    def ready() -> Callable:
        if peer != "maskgit":
            import torch

            torch.set_num_threads(1)
            torch.manual_seed(0)
        return make(arguments)

    machine.serve(lambda: (ready(), lambda: None))


if __name__ == "__main__":
    main()
