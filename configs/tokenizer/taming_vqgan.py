"""VQGAN (arXiv:2012.09841) and the stride-8 form of latent diffusion (arXiv:2112.10752).

    python train_tokenizer.py --config configs/tokenizer/taming_vqgan.py:f16_16384 \\
        --workdir runs/taming --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR

DIR is ImageNet as class folders in `train` and `val`; VGG and LINEAR see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID (ImageNet val) |
|---|---|---|---|---|
| f16_1024 | 16 x 16 | 1,024 x 256 | 72,141,699 (72.1M) | 7.94 |
| f16_16384 | 16 x 16 | 16,384 x 256 | 76,073,859 (76.1M) | 4.98 |
| f8_16384 | 32 x 32 | 16,384 x 4 | 67,717,295 | 1.14, trained on OpenImages |
| f8_256 | 32 x 32 | 256 x 4 | 67,652,783 | 1.49, trained on OpenImages |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| f16_16384 | a100:1x8 | 8,1,1 data | 10.28 GB | 53.8 or 55.6 ms |

Measured here: not trained at full size.

The weight 1 is that of the commitment and 0.25 that of the codebook: swapped, as in the released
models. Images are resized by a bicubic filter, there by a bilinear one. Neither the length of the
runs nor the number of devices is published: here 500,000 steps of 8 x 12 images. The released
stride-16 models were resumed runs, with the discriminator from step 0. The stride-8 forms take the
losses of f16_16384. The stride-8 model with a Gumbel softmax has no counterpart here.
"""

from ml_collections import ConfigDict

F16 = dict(name="conv", widths=(128, 128, 256, 256, 512), blocks=2, hidden=256, variant="taming")
F8 = dict(name="conv", widths=(128, 256, 256, 512), blocks=2, hidden=4, variant="taming")

# Network, codes, numbers per code, weight of the discriminator, layers of the discriminator.
SIZES = {
    "f16_1024": (F16, 1024, 256, 0.8, 3),
    "f16_16384": (F16, 16384, 256, 0.75, 2),
    "f8_16384": (F8, 16384, 4, 0.75, 3),
    "f8_256": (F8, 256, 4, 0.75, 3),
}
RATE = 96 * 4.5e-6  # images of a step times the published base rate


def get_config(variant="f16_1024"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        *names, last = SIZES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    network, codes, channels, weight, layers = SIZES[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 500_000
    config.batch_size = 96
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.0, flip=False)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(network)
    config.quantizer = dict(
        name="vq", codes=codes, channels=channels, normalize=False, revive=0.0, init="uniform"
    )
    config.decoder = dict(network)
    config.loss = dict(l1=1.0, l2=0.0, lpips=1.0, codebook=0.25, commitment=1.0)
    config.perceptual = dict(lpips="")
    config.discriminator = dict(
        weight=weight,  # times the adaptive weight, between 0 and 10,000
        start=0.5,  # step 250,001
        loss="hinge",
        generator_loss="hinge",
        network=dict(name="patchgan", width=64, layers=layers, norm="batch"),
        optimizer=dict(learning_rate=RATE, b1=0.5, b2=0.9, clip=0.0, decay="constant"),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(
        name="adamw", learning_rate=RATE, b1=0.5, b2=0.9, clip=0.0, decay="constant"
    )
    config.ema = 0.0
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
