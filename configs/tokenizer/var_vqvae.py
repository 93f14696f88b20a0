"""VAR's multi-scale tokenizer (arXiv:2404.02905): one codebook, residuals over ten grids.

    python train_tokenizer.py --config configs/tokenizer/var_vqvae.py --workdir runs/var \\
        --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR \\
        --config.discriminator.features=DINO

DIR holds images as class folders or flat (published: OpenImages); VGG, LINEAR and DINO see
docs/data.md. Without DINO the discriminator is a PatchGAN.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| 256 | 680 on 10 grids | 4,096 x 32 | 108,948,355 (109M) | none; others quote 0.9 to 1.0 |
| 512 | 2,240 on 10 grids | 4,096 x 32 | 108,948,355 (109M) | none |
| 1024 | 9,451 on 14 grids | 4,096 x 32 | 108,948,355 (109M) | none |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 256 | a100:4x8 | 32,1,1 data | 16.91 GB | 164 or 167 ms |

Measured here: not trained at full size.

Published are one set of weights, of 256 pixels, and the other grids for them. The recipe is that
of the public trainer for one scale (vaex). It resizes the shorter side to 288 pixels with
Lanczos, here to 256 up to 288 with a bicubic filter; it has dropout of 0.05 and a blur of the
discriminator's images that fades out, here there is neither. Its 250 epochs are counted on
ImageNet. The rates rise over 1 % of them, of the discriminator over 2 %: with fewer steps set the
`warmup` of both.
"""

from ml_collections import ConfigDict

SCALES = {
    "256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
NETWORK = dict(
    name="conv",
    widths=(160, 160, 320, 320, 640),
    blocks=2,
    hidden=32,
    projection=3,
    variant="taming",
)
ADAM = dict(learning_rate=3e-4, b1=0.5, b2=0.9, start=0.005, final=0.3, clip=10.0)
EPOCHS, EPOCH = 250, 1_281_167 // 768


def get_config(variant="256"):
    """`variant` is one of SCALES."""
    if variant not in SCALES:
        *names, last = SCALES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    size = int(variant)
    config = ConfigDict()
    config.seed = 0
    config.steps = EPOCHS * EPOCH
    config.batch_size = 768
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(size, size), channels=3, crop="random", zoom=1.125, flip=False)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(NETWORK)
    config.quantizer = dict(
        name="multiscale",
        scales=SCALES[variant],
        phi=4,
        ratio=0.5,
        quantizer=dict(
            name="vq", codes=4096, channels=32, normalize=False, revive=0.0, init="uniform"
        ),
    )
    config.decoder = dict(NETWORK)
    config.loss = dict(l1=0.2, l2=1.0, lpips=1.0, codebook=1.0, commitment=0.25)
    config.perceptual = dict(lpips="")
    config.discriminator = dict(
        weight=0.4,  # times the adaptive weight
        limit=1e4,
        floor=0.015,
        epsilon=1e-6,
        start=0.2,
        ramp=0.02,
        loss="hinge_sum",
        generator_loss="hinge",
        augmented=("translation", "color", "cutout"),
        consistency=4.0,
        features="",
        network=dict(name="feature_heads"),
        optimizer=dict(ADAM, warmup=EPOCHS * EPOCH // 50, weight_decay=5e-4),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(ADAM, name="adamw", warmup=EPOCHS * EPOCH // 100, weight_decay=5e-3)
    config.ema = 0.9999
    config.average = "var"
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
