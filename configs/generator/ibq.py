"""IBQ's generator (arXiv:2412.02692): raster order over 16,384 codes, adaptive norms.

    python train_generator.py --config configs/generator/ibq.py:b --workdir runs/ibq \\
        --config.data.tokenizer=TOKENIZER --config.data.images=DIR

TOKENIZER is that of configs/tokenizer/ibq.py, trained or imported, DIR ImageNet as class folders.
LlamaGen's transformer, whose norms are shifted, scaled and gated by the class at every position.

| variant | tokens | parameters (published) | epochs | FID, IS | guidance, temperature |
|---|---|---|---|---|---|
| b | 16 x 16 | 342,994,944 (342M) | 300 | 2.88, 254.7 | 2.25, 1.10 |
| l | 16 x 16 | 649,640,960 (649M) | 350 | 2.45, 267.5 | 2.0, 1.00 |
| xl | 16 x 16 | 1,076,103,168 (1.1B) | 400 | 2.14, 279.0 | 2.35, 1.15 |
| xxl | 16 x 16 | 2,063,331,840 (2.1B) | 450 | 2.05, 286.7 | 2.85, 1.20 |

Published samples: 50,000, no top-k, no top-p (preset "paper"). Published on 32, 64, 64 and 96 GPUs,
768 images a step.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| b | a100:4x8 | 32,1,1 data | 8.232 GB | 35.9 or 42.9 ms |
| xxl | a100:12x8 | 96,1,1 data | 49.52 GB | 72.8 or 114 ms |

Measured here: not trained at full size.

No average of the weights, as published; bfloat16, there float16. Published views are random crops
and mirror images of 256 pixels, here five crops of int(1.1 size) pixels and theirs.
"""

from ml_collections import ConfigDict

EPOCH = 1_281_167 // 768
# Width, depth, variant of the transformer, epochs, of these warm-up, last rate, last decay,
# guidance, temperature
SIZES = {
    "b": (1024, 16, "ibq", 300, 6, 0.1, None, 2.25, 1.10),
    "l": (1280, 20, "ibq", 350, 7, 0.1, None, 2.0, 1.00),
    "xl": (1536, 24, "ibq_xl", 400, 8, 0.01, None, 2.35, 1.15),
    "xxl": (1920, 30, "ibq_xxl", 450, 9, 0.01, 0.08, 2.85, 1.20),
}


def get_config(variant="b"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        raise ValueError(f"variants are {', '.join(SIZES)}")
    width, depth, network, epochs, warmup, final, decay_end, weight, temperature = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = epochs * EPOCH
    config.batch_size = 768
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
        conditioning="adaptive_label",
        positions="rotary",
        variant=network,
        head="adaptive_rms",
        width=width,
        depth=depth,
        heads=width // 64,
        label_drop=0.1,
        remat="full",
        rates=dict(token=0.1, attention=0.0, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=3e-4,
        warmup=warmup * EPOCH,
        start=0.005,
        decay="linear",
        hold=0.05,
        final=final,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        weight_decay_end=decay_end,
        decayed=r"(.*/)?(kernel|table)",  # all that has two axes, embeddings too
        clip=1.0,
    )
    config.ema = 0.0
    paper = dict(temperature=temperature, guidance="constant", weight=weight)
    fast = dict(paper, precision="bfloat16")
    config.presets = dict(default=dict(paper), paper=paper, fast=fast)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    config.made_for = dict(tokenizer="configs/tokenizer/ibq.py:16384", pixels=256, classes=1000)
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
