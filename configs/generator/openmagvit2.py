"""Open-MAGVIT2's generator (arXiv:2409.04410): 64 x 4,096 symbols per position, drawn in order.

    python train_generator.py --config configs/generator/openmagvit2.py:b --workdir runs/magvit2 \\
        --config.data.tokenizer=TOKENIZER --config.data.images=DIR

TOKENIZER is that of configs/tokenizer/openmagvit2.py, trained or imported, DIR ImageNet as class
folders. LlamaGen's transformer over the positions; of each, a smaller one draws the first 6 bits,
then the other 12.

| variant | tokens | parameters (published) | FID, IS | guidance | temperature |
|---|---|---|---|---|---|
| b | 16 x 16 x 2 | 343,570,432 (343M) | 3.08, 258.3 | 1.9, 2.0 | 1.0, 1.0 |
| l | 16 x 16 x 2 | 804,362,240 (804M) | 2.51, 271.7 | 1.9, 1.9 | 1.1, 1.0 |
| xl | 16 x 16 x 2 | 1,486,679,040 (1.5B) | 2.33, 271.8 | 1.75, 1.85 | 1.1, 1.0 |

Our tables have 4,096 rows for both symbols: 2 x 4,032 x width more than published, which nobody
reads. Published samples: 50,000, no top-k, no top-p, settings per symbol as in the table (preset
"paper"). Published on 32, 64 and 96 GPUs, 768 images a step, 300, 300 and 350 epochs.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| b | a100:4x8 | 32,1,1 data | 8.444 GB | 56.7 or 63.9 ms |
| xl | a100:12x8 | 96,1,1 data | 35.98 GB | 81.4 or 112 ms |

Measured here: not trained at full size.

No average of the weights, as published; bfloat16, there float16. Published views are random crops
and mirror images of 256 pixels, here five crops of int(1.1 size) pixels and theirs.
"""

from ml_collections import ConfigDict

EPOCH = 1_281_167 // 768
# Width, depth, heads, depth over symbols, epochs, rate, epochs of warm-up, guidance, temperature
SIZES = {
    "b": (1024, 24, 16, 2, 300, 3e-4, 6, (1.9, 2.0), (1.0, 1.0)),
    "l": (1280, 36, 20, 3, 300, 3e-4, 6, (1.9, 1.9), (1.1, 1.0)),
    "xl": (1536, 48, 24, 4, 350, 2.4e-4, 7, (1.75, 1.85), (1.1, 1.0)),
}


def get_config(variant="b"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        raise ValueError(f"variants are {', '.join(SIZES)}")
    width, depth, heads, factor, epochs, rate, warmup, weight, temperature = SIZES[variant]
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
        conditioning="label",
        positions="rotary",
        variant="llama",
        head="factor",
        factor=factor,
        width=width,
        depth=depth,
        heads=heads,
        label_drop=0.1,
        remat="full",
        rates=dict(token=0.1, attention=0.0, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=rate,
        warmup=warmup * EPOCH,
        start=0.005,
        decay="linear",
        hold=0.05,
        final=0.1,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
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
    config.made_for = dict(
        tokenizer="configs/tokenizer/openmagvit2.py:in256", pixels=256, classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
