"""The bit tokenizers of MaskBit (arXiv:2409.16211): a sign per channel, nothing to look up.

    python train_tokenizer.py --config configs/tokenizer/maskbit.py:lfq14 --workdir runs/maskbit \\
        --config.data.path=DIR --config.perceptual.resnet50=FILE

DIR is ImageNet as class folders in `train` and `val`; FILE see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| lfq10 | 16 x 16 | 2^10 | 54,469,005 (54M) | 1.76 |
| lfq12 | 16 x 16 | 2^12 | 54,479,247 (54M) | 1.52 |
| lfq14 | 16 x 16 | 2^14 | 54,489,489 (54M) | 1.37 |
| lfq16 | 16 x 16 | 2^16 | 54,499,731 (54M) | 1.29 |
| lfq18 | 16 x 16 | 2^18 | 54,509,973 (54M) | 1.16, one bit of it constant |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| lfq14 | a100:4x8 | 32,1,1 data | 6.255 GB | 35.1 or 37.5 ms |

Measured here: not trained at full size.

Published crops take 80 to 100 % of the area at a ratio of 3/4 to 4/3, by a bilinear filter; here
they keep the ratio and are bicubic.
"""

from ml_collections import ConfigDict

BITS = {"lfq10": 10, "lfq12": 12, "lfq14": 14, "lfq16": 16, "lfq18": 18}
WIDTHS = (128, 128, 256, 256, 512)
STEPS = 1_350_000
ADAM = dict(
    learning_rate=1e-4,
    b1=0.9,
    b2=0.999,
    warmup=5000,
    final=0.1,
    weight_decay=1e-4,
    decayed=".*",  # norms and biases too
    clip=1.0,
)


def get_config(variant="lfq14"):
    """`variant` is one of BITS."""
    if variant not in BITS:
        *names, last = BITS
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    config = ConfigDict()
    config.seed = 0
    config.steps = STEPS
    config.batch_size = 256
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    # 1.12: the side that has the same part of the image as 80 % of the area
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.12, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskbit")
    bits = BITS[variant]
    # two symbols to a token, as the published generators read it; it changes no weight
    halves = (bits // 2, bits // 2)
    config.quantizer = dict(
        name="lfq", bits=bits, groups=halves, temperature=0.01, entropy="clamped"
    )
    config.decoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskbit")
    config.loss = dict(
        l1=0.0,
        l2=1.0,  # 4 on [0, 1], where errors are half as large
        resnet50=0.1,
        commitment=0.25,
        sample_entropy=0.02,
        batch_entropy=-0.02,
    )
    # three times as strong at first, falling for 2,000 steps
    fading = (3.0, 2000 / STEPS)
    config.anneal = dict(sample_entropy=fading, batch_entropy=fading)
    config.perceptual = dict(resnet50="")
    config.discriminator = dict(
        weight=0.02,
        limit=0.0,  # a constant weight
        start=20_000 / STEPS,
        loss="hinge",
        generator_loss="hinge",
        lecam=0.001,
        lecam_form="means",
        network=dict(name="blur", width=128, stages=4),
        optimizer=dict(ADAM),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(ADAM, name="adamw")
    config.ema = 0.999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
