"""VQGAN+ of MaskBit (arXiv:2409.16211): its networks and losses around a learned codebook.

    python train_tokenizer.py --config configs/tokenizer/vqgan_plus.py:12bit \\
        --workdir runs/vqgan_plus --config.data.path=DIR --config.perceptual.resnet50=FILE

DIR is ImageNet as class folders in `train` and `val`; FILE see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| 10bit | 16 x 16 | 1,024 x 256 | 55,990,915 (56M) | 1.67 |
| 12bit | 16 x 16 | 4,096 x 64 | 55,007,683 (55M) | 1.39 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 12bit | a100:4x8 | 32,1,1 data | 6.262 GB | 35.1 or 37.5 ms |

Measured here: not trained at full size.

The paper's rFID of 1.52 at 10 bits is of a later recipe, whose config is not published. Crops
differ from the published ones as in `maskbit.py`.
"""

from ml_collections import ConfigDict

CODES = {"10bit": (1024, 256), "12bit": (4096, 64)}
WIDTHS = (128, 128, 256, 256, 512)
STEPS = 1_350_000
ADAM = dict(
    learning_rate=1e-4,
    b1=0.9,
    b2=0.999,
    warmup=5000,
    final=0.1,
    weight_decay=1e-4,
    decayed=".*",  # norms, biases and the codebook too
    clip=1.0,
)


def get_config(variant="10bit"):
    """`variant` is "10bit" or "12bit"."""
    if variant not in CODES:
        raise ValueError("variants are 10bit and 12bit")
    codes, channels = CODES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = STEPS
    config.batch_size = 256
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.12, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskbit")
    config.quantizer = dict(
        name="vq", codes=codes, channels=channels, normalize=False, revive=0.0, init="uniform"
    )
    config.decoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskbit")
    config.loss = dict(
        l1=0.0,
        l2=1.0,  # 4 on [0, 1], where errors are half as large
        resnet50=0.1,
        codebook=1.0,
        commitment=0.25,
        sample_entropy=0.0,  # as shipped
        batch_entropy=0.0,
    )
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
