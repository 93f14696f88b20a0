"""TiTok in one stage (described in arXiv:2501.07730): straight to pixels, codes or a Gaussian.

    python train_tokenizer.py --config configs/tokenizer/titok_onestage.py:bl128_vq8k \\
        --workdir runs/titok --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR \\
        --config.perceptual.convnext_small=FILE

DIR is ImageNet as class folders in `train` and `val`; VGG, LINEAR and FILE see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| bl64_vq8k | 64 | 8,192 x 64 | 390,016,148 (390M) | 2.06 |
| bl128_vq8k | 128 | 8,192 x 64 | 390,179,988 (390M) | 1.49 |
| sl256_vq8k | 256 | 8,192 x 64 | 330,260,884 (330M) | 1.03 |
| ll32_vae_c16 | 32 | 16 numbers | 606,879,604 (607M) | 1.61 |
| bl64_vae_c16 | 64 | 16 numbers | 389,418,100 (389M) | 1.25 |
| bl128_vae_c16 | 128 | 16 numbers | 389,581,940 (390M) | 0.84 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| bl128_vq8k | a100:4x8 | 32,1,1 data | 16.55 GB | 37.2 or 44.9 ms |

Measured here: not trained at full size.

Only the configurations with text (`tatitok.py`) were published; these follow them. bfloat16, there
float16. Queries, keys and values start from the distribution of the other layers, there from
Xavier's.
"""

from ml_collections import ConfigDict

WIDTHS = {
    "s": dict(width=512, depth=8, heads=8),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
}
CODES = dict(name="vq", codes=8192, channels=64, normalize=False, revive=0.0, init="uniform")
GAUSSIAN = dict(name="gaussian", channels=16)

# Encoder, decoder, tokens, quantizer.
SIZES = {
    "bl64_vq8k": ("b", "l", 64, CODES),
    "bl128_vq8k": ("b", "l", 128, CODES),
    "sl256_vq8k": ("s", "l", 256, CODES),
    "ll32_vae_c16": ("l", "l", 32, GAUSSIAN),
    "bl64_vae_c16": ("b", "l", 64, GAUSSIAN),
    "bl128_vae_c16": ("b", "l", 128, GAUSSIAN),
}
STEPS = 650_000
ADAM = dict(
    learning_rate=1e-4, b1=0.9, b2=0.999, warmup=10_000, final=0.1, weight_decay=1e-4, clip=1.0
)
DECAYED = r"(?!encoder/conv_patch/|decoder/embed/).*kernel"  # no embedding


def get_config(variant="bl64_vq8k"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        *names, last = SIZES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    encoder, decoder, tokens, quantizer = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = STEPS
    config.batch_size = 256
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.0, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(WIDTHS[encoder], name="vit", tokens=tokens, patch=16)
    config.quantizer = dict(quantizer)
    config.decoder = dict(WIDTHS[decoder], name="vit", tokens=tokens, patch=16)
    config.loss = dict(
        l1=0.0,
        l2=0.25,  # 1 on [0, 1], where errors are half as large
        lpips=1.0,
        convnext_small=0.1,
        codebook=1.0,
        commitment=0.25,
        kl=1e-6,
    )
    config.perceptual = dict(lpips="", convnext_small="")
    config.discriminator = dict(
        weight=0.1,
        limit=0.0,  # a constant weight
        start=200_000 / STEPS,
        loss="hinge",
        generator_loss="hinge",
        lecam=0.001,
        lecam_form="means",
        network=dict(name="blur", width=128, stages=3),
        optimizer=dict(ADAM),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(ADAM, name="adamw", decayed=DECAYED)
    config.ema = 0.999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
