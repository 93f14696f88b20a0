"""Next patch prediction (arXiv:2412.15321): LlamaGen, trained on groups of tokens first.

    tokgen pretokenize --tokenizer TOKENIZER --data DIR --views ten --out runs/tokens
    python train_generator.py --config configs/generator/npp.py:l --workdir runs/npp \\
        --config.data.tokens=runs/tokens

TOKENIZER is that of configs/tokenizer/llamagen_vq.py at 256 pixels, DIR ImageNet as class folders.
For 150 epochs a sequence is 8 x 8 groups of 2 x 2 tokens, each the mean of its tokens' vectors,
which predict all tokens of the next group; then 150 epochs are plain LlamaGen. That costs 0.6 of
LlamaGen's training; model and sampling are LlamaGen's own.

| variant | tokens | parameters (published) | FID | LlamaGen's | guidance |
|---|---|---|---|---|---|
| b | 16 x 16 | 110,888,448 (111M) | 4.47 | 5.46 | 2.0 |
| l | 16 x 16 | 342,910,976 (343M) | 2.76 | 3.80 | 1.75 |
| xl | 16 x 16 | 774,699,520 (775M) | 2.65 | 3.39 | 1.70 |
| xxl | 16 x 16 | 1,410,972,672 (1.4B) | 2.55 | 3.09 | 1.65 |

Published weights: `c2i_*_256.pt` in LlamaGen's form (`tokgen import --system llamagen_c2i`).

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| b | a100:1x8 | 8,1,1 data | 3.363 GB | 19.9 or 21.4 ms |
| xxl | a100:4x8 | 32,1,1 data | 33.86 GB | 70.6 or 98.5 ms |

Measured here: not trained at full size.

The schedule is that of the published example: two levels, half of the epochs each, a warm-up of an
epoch at the start of both, a line down to a tenth in the last fifth of both. The published script
for large models has four levels (groups of 8 x 8, 4 x 4, 2 x 2, 1) and a rate of 0.67 for them.
"""

from ml_collections import ConfigDict

EPOCH = 1_281_167 // 256
STAGE = 150  # epochs
# Width, depth, heads, guidance
SIZES = {
    "b": (768, 12, 12, 2.0),
    "l": (1024, 24, 16, 1.75),
    "xl": (1280, 36, 20, 1.70),
    "xxl": (1536, 48, 24, 1.65),
}


def get_config(variant="b"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        raise ValueError(f"variants are {', '.join(SIZES)}")
    width, depth, heads, weight = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 2 * STAGE * EPOCH
    config.batch_size = 256
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
        groups=((2, STAGE * EPOCH),),
        conditioning="label",
        positions="rotary",
        variant="llama",
        head="linear",
        width=width,
        depth=depth,
        heads=heads,
        label_drop=0.1,
        remat="full",
        rates=dict(token=0.1, attention=0.0, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        warmup=EPOCH,
        decay="linear",
        hold=(0.8 * STAGE - 1) / (STAGE - 1),  # after the warm-up, to four fifths of a stage
        final=0.1,
        restarts=(0.5,),
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        decayed=r"(.*/)?(kernel|table)",  # all that has two axes, embeddings too
        clip=1.0,
    )
    config.ema = 0.0
    paper = dict(temperature=1.0, guidance="constant", weight=weight)
    fast = dict(paper, precision="bfloat16")
    config.presets = dict(default=dict(paper), paper=paper, fast=fast)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    config.made_for = dict(
        tokenizer="configs/tokenizer/llamagen_vq.py:vq16", pixels=256, classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
