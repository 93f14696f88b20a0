"""TiTok's generators (arXiv:2406.07550): 32 to 128 tokens of one dimension, in few steps.

    tokgen pretokenize --tokenizer TOKENIZER --data DIR --out runs/tokens
    python train_generator.py --config configs/generator/titok.py:l32 --workdir runs/titok \\
        --config.data.tokens=runs/tokens

TOKENIZER is that of configs/tokenizer/titok.py, trained or imported (`tokenizer_titok_l32.bin`),
DIR ImageNet as class folders; views are the centre crop and its mirror image, as published.

| variant | tokens | network | steps | parameters (published) | FID, IS | guidance | noise |
|---|---|---|---|---|---|---|---|
| l32 | 32 | BERT | 8 | 177,202,432 (177M) | 2.77, - | 4.5, linear | 9.5 |
| b64 | 64 | BERT | 8 | 177,227,008 (177M) | 2.48, 216.6 | 3.0, linear | 11.0 |
| s128 | 128 | U-ViT | 64 | 294,990,848 (287M) | 1.97, 281.8 | 6.9, power-cosine | 2.8 |

Published samples: 50,000, 50 per class, logits divided by 0.5 + 0.8 (1 - (s + 1) / T). Guidance of
the table is published as cond + s (cond - uncond) where it is linear: s + 1 here. Noise falls to 0
in a line and acts twice: on the tokens, which makes the last step the arg-max, and on the
confidence, a logit. "fast" takes half the steps of l32 and b64 and a quarter of those of s128; its
FID is not published.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| l32 | a100:4x8 | 32,1,1 data | 6.519 GB | 7.07 or 10.6 ms |
| s128 | v5e:16x16 | 256,1,1 data | 9.441 GB | 13.3 or 24.8 ms |

Measured here: not trained at full size.

Published on 32 GPUs of 64 images each, about 800 epochs. The released training program cannot
select the U-ViT; s128 has the settings of the others.
"""

from ml_collections import ConfigDict

BERT = dict(
    variant="bert",
    entry="typed",
    head="bare",
    width=768,
    depth=24,
    heads=16,
    hidden=3072,
    rates=dict(token=0.1, attention=0.1, residual=0.1),
)
UVIT = dict(
    variant="uvit",
    stack="u_shaped",
    entry="plain",
    head="biased",
    width=1024,
    depth=21,
    heads=16,
    hidden=4096,
    rates=dict(token=0.0, attention=0.0, residual=0.0),
)
LINEAR = dict(guidance="linear", ranking="raw_logit", annealing="softmax", drawing="noise")
POWER = dict(LINEAR, guidance="power_cosine", power=3.0)
# Network, sampling as published, steps of the fast preset
SIZES = {
    "l32": (BERT, dict(LINEAR, steps=8, weight=1 + 4.5, noise=9.5), 4),
    "b64": (BERT, dict(LINEAR, steps=8, weight=1 + 3.0, noise=11.0), 4),
    "s128": (UVIT, dict(POWER, steps=64, weight=6.9, noise=2.8), 16),
}


def get_config(variant="l32"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        raise ValueError(f"variants are {', '.join(SIZES)}")
    network, paper, few = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 500_000
    config.batch_size = 2048
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # without one: the tokenizer that encodes `images`
        images="",
        labels="",  # what class folders mean; without it: as in the tokenizer's config
        views="center,flip",
    )
    config.generator = dict(
        network,
        name="masked",
        steps=paper["steps"],
        schedule="arccos",
        masking="counted",
        visible=0.1,  # weight of the known tokens in the loss
        smoothing=0.1,
        label_drop=0.1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-4,
        warmup=10_000,
        start=0.0,
        decay="cosine",
        final=1e-5 / 2e-4,
        b1=0.9,
        b2=0.96,
        weight_decay=0.03,
        decayed=r"(.*/)?kernel",  # no embedding, norm or bias
        clip=1.0,
    )
    config.ema = 0.999
    config.presets = dict(
        default=dict(paper), paper=paper, fast=dict(paper, steps=few, precision="bfloat16")
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    config.made_for = dict(
        tokenizer=f"configs/tokenizer/titok.py:{variant}", pixels=256, classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
