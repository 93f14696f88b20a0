"""Class-conditional small photographs, one token at a time, over the tokens of cifar10_f4.

    tokgen pretokenize --tokenizer runs/cifar10_f4 --data DIR --out runs/cifar10_tokens
    python train_generator.py --config configs/generator/cifar10.py --workdir runs/cifar10 \\
        --config.data.tokens=runs/cifar10_tokens

The Llama form of LlamaGen (arXiv:2406.06525) at a width that two CPU cores train in minutes.
Variants: `raster` (the default), `columns`, and `random` (a new order for every image, with
target-aware positions as in RAR, arXiv:2411.00776).
"""

from ml_collections import ConfigDict


def get_config(variant="raster"):
    """`variant` is the order: "raster", "columns" or "random"."""
    if variant not in ("raster", "columns", "random"):
        raise ValueError("variants are raster, columns and random")
    config = ConfigDict()
    config.seed = 0
    config.steps = 3500
    config.batch_size = 32
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # where its tokenizer lies now, if it was moved
    )
    config.generator = dict(
        name="autoregressive",
        order=variant,
        places="target_aware" if variant == "random" else "rotary",
        parts="llama_narrow",
        width=128,
        depth=4,
        heads=4,
        label_drop=0.1,
        window=64,
        unroll=4,  # no loop over layers: faster steps on a CPU, and four compile quickly
        rates=dict(token=0.0, attention=0.0, residual=0.0),
    )
    config.optimizer = dict(
        name="muon",  # a lower loss than AdamW after as many steps (benchmarks/RESULTS.md)
        learning_rate=2e-3,
        warmup=100,
        b2=0.95,
        weight_decay=0.01,
        clip=1.0,
    )
    config.ema = 0.998
    config.presets = dict(default=dict(temperature=1.0, guidance="constant", weight=1.5))
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.held_out = dict(images=1000, samples=8)
    config.report = dict(scalars=100, save=875)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
