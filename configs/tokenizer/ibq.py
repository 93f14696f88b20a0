"""IBQ (arXiv:2412.02692): index backpropagation, a softmax that trains the whole codebook.

    python train_tokenizer.py --config configs/tokenizer/ibq.py:16384 --workdir runs/ibq \\
        --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR

DIR is ImageNet as class folders in `train` and `val`; VGG and LINEAR see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| 1024 | 16 x 16 | 1,024 x 256 | 107,049,859 (107M) | 2.24 |
| 8192 | 16 x 16 | 8,192 x 256 | 108,884,867 (109M) | 1.87 |
| 16384 | 16 x 16 | 16,384 x 256 | 110,982,019 (111M) | 1.37 |
| 262144 | 16 x 16 | 262,144 x 256 | 173,896,579 (174M) | 1.00 |

The two models trained on 200 million photographs, `IBQ_pretrain_*.ckpt` (2.06 and 1.53), have the
sizes of 16384 and 262144, and ran for 1.5 million steps.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 16384 | a100:4x8 | 32,1,1 data | 7.467 GB | 70.3 or 72.7 ms |

Measured here: not trained at full size.

Images are resized by a bicubic filter, there by a bilinear one; the average of the weights has a
warm-up, there none; bfloat16, there float16 (bfloat16 for 8192). With 262,144 codes the softmax of
an image takes 256 MiB.
"""

from ml_collections import ConfigDict

NETWORK = dict(
    name="conv", widths=(128, 128, 256, 256, 512), blocks=4, hidden=256, variant="taming"
)
EPOCH = 1_281_167 // 256
# Epochs, and after which of them the learning rate falls to a tenth.
EPOCHS = {
    "1024": (330, (250, 300)),
    "8192": (280, (250,)),
    "16384": (330, (250, 300)),
    "262144": (330, (250, 300)),
}


def get_config(variant="16384"):
    """`variant` is one of EPOCHS, the number of codes."""
    if variant not in EPOCHS:
        *names, last = EPOCHS
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    epochs, drops = EPOCHS[variant]
    drops = tuple(drop / epochs for drop in drops)
    rate = dict(learning_rate=1e-4, decay="constant", drops=drops, b1=0.5, b2=0.9, clip=0.0)
    config = ConfigDict()
    config.seed = 0
    config.steps = epochs * EPOCH
    config.batch_size = 256
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.0, flip=False)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(NETWORK)
    config.quantizer = dict(
        name="ibq", codes=int(variant), channels=256, temperature=0.01, entropy="shifted"
    )
    config.decoder = dict(NETWORK)
    config.loss = dict(
        l1=1.0,
        l2=0.0,
        lpips=1.0,
        index=1.0,
        commitment=1.0,
        codebook=0.25,
        sample_entropy=0.05,
        batch_entropy=-0.05,
    )
    config.perceptual = dict(lpips="")
    config.discriminator = dict(
        weight=0.1,
        limit=0.0,  # a constant weight
        start=0.0,
        loss="hinge",
        generator_loss="pooled",
        lecam=0.05,
        lecam_form="logits",
        first="discriminator",
        network=dict(name="patchgan", width=64, layers=3, norm="batch"),
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
