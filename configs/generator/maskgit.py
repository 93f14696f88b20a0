"""MaskGIT (arXiv:2202.04200): all tokens at a time, the surest kept.

    tokgen pretokenize --tokenizer TOKENIZER --data DIR --views ten --out runs/tokens
    python train_generator.py --config configs/generator/maskgit.py:256 --workdir runs/maskgit \\
        --config.data.tokens=runs/tokens

TOKENIZER is that of configs/tokenizer/maskgit_vqgan.py, trained or imported
(`tokenizer_imagenet256_checkpoint`), DIR ImageNet as class folders.

| variant | tokens | steps | parameters | published FID, IS |
|---|---|---|---|---|
| 256 | 16 x 16 | 8 | 172,457,193 (172M; 227M with the tokenizer) | 6.18, 182.1 |
| 512 | 32 x 32 | 12 | 173,047,017 | 7.32, 156.0 |

Published samples: 50,000 at temperature 1 and without guidance (the model knows no "no class"),
Gumbel noise of scale 4.5 on the confidence, falling to 0. The released program takes 16 steps and
reports an FID of 6.06 at 256 pixels: preset "released". "fast" halves the steps; its FID is not
published.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 256 | h100:1x8 | 8,1,1 data | 21.53 GB | 9.05 or 10.4 ms |
| 256 | v5e:8x8 | 64,1,1 data | 6.449 GB | 7.69 or 14.4 ms |

Measured here: not trained at full size.

The training program was never released. Its configuration counts 2,000,000 steps, the paper 300
epochs: these. Shares of masked tokens are cos(pi r / 2) at a uniform r, the paper's; the
configuration also names a least share of 0.5. The constant rate after the warm-up and the average
of 0.999 are those of the configuration that both models build on. Not published, and chosen here:
what decays (all), no clipping, the crops.
"""

from ml_collections import ConfigDict

STEPS = {"256": 8, "512": 12}


def get_config(variant="256"):
    """`variant` is "256" or "512", the pixels along an edge."""
    if variant not in STEPS:
        raise ValueError(f"variants are {' and '.join(STEPS)}")
    steps = STEPS[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 300 * 1_281_167 // 256
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
        name="masked",
        variant="maskgit",
        entry="normed",
        head="tied_to_all",
        width=768,
        depth=24,
        heads=16,
        hidden=3072,
        steps=steps,
        schedule="cosine",
        masking="counted",
        visible=0.0,  # weight of the known tokens in the loss
        smoothing=0.1,
        mean="samples",  # of every sample's own mean
        label_drop=None,
        rates=dict(token=0.1, attention=0.1, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        warmup=5000,
        decay="constant",
        b1=0.9,
        b2=0.96,
        weight_decay=0.045,
        decayed=".*",
        clip=0.0,
    )
    config.ema = 0.999
    paper = dict(steps=steps, noise=4.5)
    config.presets = dict(
        default=dict(paper),
        paper=paper,
        released=dict(paper, steps=16),
        fast=dict(paper, steps=steps // 2, precision="bfloat16"),
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    config.made_for = dict(
        tokenizer=f"configs/tokenizer/maskgit_vqgan.py:{variant}", pixels=int(variant), classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
