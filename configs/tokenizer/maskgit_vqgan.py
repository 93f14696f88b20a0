"""MaskGIT's VQGAN (arXiv:2202.04200): 1,024 codes of 256 numbers, stride 16, no attention.

    python train_tokenizer.py --config configs/tokenizer/maskgit_vqgan.py --workdir runs/maskgit \\
        --config.data.path=DIR --config.perceptual.resnet50=FILE

DIR is ImageNet as class folders in `train` and `val`; FILE see docs/data.md.

| variant | pixels | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|---|
| 256 | 256 | 16 x 16 | 1,024 | 54,515,587 (54.5M) | 2.28 |
| 512 | 512 | 32 x 32 | 1,024 | 54,515,587 (54.5M) | 1.97 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 256 | v5e:8x8 | 16,1,4 tensor | 11.46 GB | 26.7 or 30.9 ms |

Measured here: not trained at full size.

No trainer was published, only its configuration. It names neither the weight of the squared error
(here 1 on [0, 1]), nor the network of the perceptual loss, of which it takes features (here the
logits of ResNet-50), nor the augmentation (here ADM's crop and flips). The configuration that it
builds on has a constant rate, an average of 0.999 and, beside them, a warm-up of 2,000 steps, which
is left out here.
"""

from ml_collections import ConfigDict

WIDTHS = (128, 128, 256, 256, 512)


def get_config(variant="256"):
    """`variant` is "256" or "512"."""
    if variant not in ("256", "512"):
        raise ValueError("variants are 256 and 512")
    size = int(variant)
    config = ConfigDict()
    config.seed = 0
    config.steps = 1_000_000
    config.batch_size = 256
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(size, size), channels=3, crop="random", zoom=1.25, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskgit")
    config.quantizer = dict(
        name="vq",
        codes=1024,
        channels=256,
        normalize=False,
        revive=0.0,
        init="fan_in",
        temperature=0.01,
        entropy="shifted",
    )
    config.decoder = dict(name="conv", widths=WIDTHS, blocks=2, variant="maskgit")
    config.loss = dict(
        l1=0.0,
        l2=0.25,  # 1 on [0, 1], where errors are half as large
        resnet50=0.1,
        codebook=1.0,
        commitment=0.25,
        sample_entropy=0.1,
        batch_entropy=-0.1,
    )
    config.perceptual = dict(resnet50="")
    config.discriminator = dict(
        weight=0.1,
        limit=0.0,  # a constant weight
        start=0.0,
        loss="non_saturating",
        generator_loss="non_saturating",
        r1=10.0,
        network=dict(name="stylegan", form="blur", multiplier=1),
        optimizer=dict(learning_rate=1e-4, b1=0.0, b2=0.99, clip=0.0, decay="constant"),
    )
    config.safeguards = dict(usage=0.02, worse=0.0)  # no step precedes the discriminator's first
    config.optimizer = dict(
        name="adamw", learning_rate=1e-4, b1=0.0, b2=0.99, clip=0.0, decay="constant"
    )
    config.ema = 0.999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
