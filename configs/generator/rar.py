"""RAR (arXiv:2411.00776): trained in random orders that turn into raster order.

    tokgen pretokenize --tokenizer TOKENIZER --data DIR --views ten --out runs/tokens
    python train_generator.py --config configs/generator/rar.py:b --workdir runs/rar \\
        --config.data.tokens=runs/tokens

TOKENIZER is that of configs/tokenizer/maskgit_vqgan.py, trained or imported, DIR ImageNet as class
folders. Every sample has a random order up to step 125,000, none has after 187,500, a share that
falls in a line between. Published are ten crops of int(1.1 size) pixels.

| variant | tokens | parameters (published) | FID, IS | temperature | guidance, power |
|---|---|---|---|---|---|
| b | 16 x 16 | 260,923,648 (261M) | 1.95, 290.5 | 1.0 | 16.0, 2.75 |
| l | 16 x 16 | 461,668,352 (461M) | 1.70, 299.5 | 1.02 | 15.5, 2.5 |
| xl | 16 x 16 | 955,425,024 (955M) | 1.50, 306.9 | 1.02 | 6.9, 1.5 |
| xxl | 16 x 16 | 1,498,520,704 (1.5B) | 1.48, 326.0 | 1.02 | 8.0, 1.2 |

Published on 32 GPUs of 64 images each, 400 epochs. Samples: 50,000, 50 per class, in raster order,
no top-k, no top-p; the preset "paper" holds the numbers of the table, "demo" those of its program.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| b | a100:4x8 | 32,1,1 data | 6.262 GB | 112 or 117 ms |
| xxl | a100:4x8 | 32,1,1 data | 35.96 GB | 640 or 669 ms |
| xxl | v5e:16x16 | 64,4,1 fsdp | 9.187 GB | 127 or 226 ms |

Measured here: not trained at full size.

No average of the weights, as published; bfloat16. Matrices start from a normal distribution,
published is one cut at 100 standard deviations.
"""

from ml_collections import ConfigDict

# Width, depth, hidden width, temperature, guidance, power
SIZES = {
    "b": (768, 24, 3072, 1.0, 16.0, 2.75),
    "l": (1024, 24, 4096, 1.02, 15.5, 2.5),
    "xl": (1280, 32, 5120, 1.02, 6.9, 1.5),
    "xxl": (1408, 40, 6144, 1.02, 8.0, 1.2),
}
# By the published rule of names: the blocks' maps to their adaptive norms decay, the head's doesn't
# ("ln" is in its name); the learned first vector does, no table does
DECAYED = r"transformer/.*kernel|head/head/kernel|conditioning/token"


def get_config(variant="b"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        raise ValueError(f"variants are {', '.join(SIZES)}")
    width, depth, hidden, temperature, weight, power = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 250_000
    config.batch_size = 2048
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # without one: the tokenizer that encodes `images`
        images="",
        labels="",  # what class folders mean; without it: as in the tokenizer's config
        views="ten",
    )
    config.generator = dict(
        name="autoregressive",
        order="raster",
        shuffle=(125_000, 187_500),
        conditioning="cls_label",
        positions="rar",
        variant="rar",
        head="adaptive",
        unused=1,  # the row of a mask token that published files have
        width=width,
        depth=depth,
        heads=16,
        hidden=hidden,
        label_drop=0.1,
        remat="full",
        rates=dict(token=0.0, attention=0.1, residual=0.1, hidden=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=4e-4,
        warmup=62_500,
        start=0.0,
        decay="cosine",
        final=1e-5 / 4e-4,
        b1=0.9,
        b2=0.96,
        weight_decay=0.03,
        decayed=DECAYED,
        clip=1.0,
    )
    config.ema = 0.0
    paper = dict(temperature=temperature, guidance="power_cosine", weight=weight, power=power)
    demo = dict(temperature=temperature, guidance="constant", weight=4.0)
    fast = dict(paper, precision="bfloat16")
    config.presets = dict(default=dict(paper), paper=paper, demo=demo, fast=fast)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    config.made_for = dict(
        tokenizer="configs/tokenizer/maskgit_vqgan.py:256", pixels=256, classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
