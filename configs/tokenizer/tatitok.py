"""TA-TiTok (arXiv:2501.07730): the one-stage TiTok whose decoder also reads a caption.

    python train_tokenizer.py --config configs/tokenizer/tatitok.py:bl64_vq \\
        --workdir runs/tatitok --config.data.images.path=DIR --config.data.features=TEXT \\
        --config.perceptual.lpips=VGG,LINEAR --config.perceptual.convnext_small=FILE

DIR is a folder of photographs (published: a part of DataComp, shorter than twice their width and
the other way round); TEXT a folder with `train.npy` and `held_out.npy`, the 77 outputs of CLIP's
ViT-L/14-336 text tower for every image. VGG, LINEAR and FILE see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID (ImageNet val) |
|---|---|---|---|---|
| bl32_vq | 32 | 8,192 x 64 | 390,800,532 (391M) | 3.95 |
| bl64_vq | 64 | 8,192 x 64 | 390,882,452 (391M) | 2.43 |
| bl128_vq | 128 | 8,192 x 64 | 391,046,292 (391M) | 1.53 |
| bl32_vae | 32 | 16 numbers | 390,202,484 (390M) | 1.53 |
| bl64_vae | 64 | 16 numbers | 390,284,404 (390M) | 1.47 |
| sl128_vae | 128 | 16 numbers | 330,275,188 (330M) | 0.90 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| bl64_vq | a100:4x8 | 32,1,1 data | 16.43 GB | 36.9 or 44.6 ms |

Measured here: not trained at full size.

bfloat16, there float16. The decoder starts as the encoder does, there from PyTorch's defaults.
The size of a step is published per device (32 images); here it is 256.
"""

from ml_collections import ConfigDict

WIDTHS = {
    "s": dict(width=512, depth=8, heads=8),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
}
CODES = dict(
    name="vq", codes=8192, channels=64, normalize=False, revival="clustering", init="uniform"
)
GAUSSIAN = dict(name="gaussian", channels=16)

# Encoder, decoder, tokens, quantizer.
SIZES = {
    "bl32_vq": ("b", "l", 32, CODES),
    "bl64_vq": ("b", "l", 64, CODES),
    "bl128_vq": ("b", "l", 128, CODES),
    "bl32_vae": ("b", "l", 32, GAUSSIAN),
    "bl64_vae": ("b", "l", 64, GAUSSIAN),
    "sl128_vae": ("s", "l", 128, GAUSSIAN),
}
STEPS = 650_000
ADAM = dict(
    learning_rate=1e-4, b1=0.9, b2=0.999, warmup=10_000, final=0.1, weight_decay=1e-4, clip=1.0
)
DECAYED = r"(?!encoder/conv_patch/|decoder/embed/).*kernel"  # no embedding; but that of the text


def get_config(variant="bl64_vq"):
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
    config.data = dict(
        name="captioned", images=dict(name="folder", path="", held_out=0.02), features=""
    )
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.0, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(WIDTHS[encoder], name="vit", tokens=tokens, patch=16)
    config.quantizer = dict(quantizer)
    config.decoder = dict(WIDTHS[decoder], name="vit", tokens=tokens, patch=16, text=(77, 768))
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
