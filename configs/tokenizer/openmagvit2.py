"""Open-MAGVIT2 (arXiv:2409.04410): 18 bits per token, a decoder normalised by its codes.

    python train_tokenizer.py --config configs/tokenizer/openmagvit2.py --workdir runs/magvit2 \\
        --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR

DIR is ImageNet as class folders in `train` and `val`, for the two `pretrain` variants a folder of
photographs (published: 100 million); VGG and LINEAR see docs/data.md.

| variant | pixels | tokens | codes | parameters (published) | published rFID (ImageNet val) |
|---|---|---|---|---|---|
| in256 | 256 | 16 x 16 | 2^18 | 115,127,829 (115M) | 1.17 |
| in128 | 128 | 16 x 16 | 2^18 | 112,021,653 (112M) | 1.18; of 256 pixels 0.34 |
| pretrain_262144 | 256 | 16 x 16 | 2^18 | 115,127,829 (115M) | 1.67 |
| pretrain_16384 | 256 | 16 x 16 | 2^14 | 115,094,033 (115M) | 2.55 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| in256 | a100:4x8 | 32,1,1 data | 6.608 GB | 48.6 or 51 ms |

Measured here: not trained at full size.

Images are resized by a bicubic filter, there by a bilinear one; the average of the weights has a
warm-up, there none; bfloat16, there float16. A token of 18 bits is written as
the two symbols that the published generator reads, of 6 and 12 bits.
"""

from ml_collections import ConfigDict

F16, F8 = (128, 128, 256, 256, 512), (128, 256, 256, 512)
EPOCH = 1_281_167 // 256
PATCHES = dict(name="patchgan", width=64, layers=3, norm="batch")

# Pixels, widths, bits, steps, learning rate, weight of LeCam, discriminator.
SIZES = {
    "in256": (256, F16, 18, 270 * EPOCH, dict(drops=(200 / 270, 250 / 270)), 0.05, PATCHES),
    "in128": (128, F8, 18, 350 * EPOCH, dict(drops=(250 / 350, 300 / 350)), 0.01, PATCHES),
    "pretrain_262144": (256, F16, 18, 1_500_000, dict(drops=(0.8 / 1.5, 1 / 1.5)), 0.05, PATCHES),
    "pretrain_16384": (
        256,
        F16,
        14,
        1_500_000,
        dict(decay="cosine", warmup=5000, final=0.01),
        0.05,
        dict(name="blur", width=128, stages=3),
    ),
}


def get_config(variant="in256"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        *names, last = SIZES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    size, widths, bits, steps, rate, lecam, discriminator = SIZES[variant]
    rate = dict(learning_rate=1e-4, decay="constant", b1=0.5, b2=0.9, clip=0.0) | rate
    config = ConfigDict()
    config.seed = 0
    config.steps = steps
    config.batch_size = 256
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(size, size), channels=3, crop="random", zoom=1.0, flip=False)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(name="conv", widths=widths, blocks=4, variant="magvit2")
    # the two symbols that the published generator reads; it changes no weight
    groups = (6, 12) if bits == 18 else None
    config.quantizer = dict(
        name="lfq", bits=bits, groups=groups, temperature=0.01, entropy="shifted"
    )
    config.decoder = dict(name="conv", widths=widths, blocks=4, variant="magvit2")
    config.loss = dict(
        l1=1.0,
        l2=0.0,
        lpips=1.0,
        commitment=0.25,
        sample_entropy=0.1,
        batch_entropy=-0.1,
    )
    config.perceptual = dict(lpips="")
    config.discriminator = dict(
        weight=0.1,
        limit=0.0,  # a constant weight
        start=0.0,
        loss="hinge",
        generator_loss="pooled",
        lecam=lecam,
        lecam_form="logits",
        network=discriminator,
        optimizer=dict(rate),
    )
    config.safeguards = dict(usage=0.02, worse=0.0)  # no step precedes the discriminator's first
    config.optimizer = dict(rate, name="adamw")
    config.ema = 0.999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
