"""The tokenizer of `make demo`: 8 x 8 tokens of a 32 x 32 image of a coloured shape.

    python train_tokenizer.py --config configs/tokenizer/shapes.py --workdir runs/tokenizer

FSQ (arXiv:2309.15505) with 240 codes; an encoder that sees 4 x 4 pixels at a time and a decoder
that looks around. Variants: `vq`, `ema` (learned codebooks of 256), `hard` (freer shapes),
`pyramid` (residual tokens on grids of 1, 2, 4 and 8, for next-scale generators; arXiv:2404.02905).

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| | h100:1 | 1,1,1 data | 6.059 MB | 0.00128 ms |
| pyramid | v5e:2x2 | 4,1,1 data | 11.16 MB | 0.0119 or 0.0226 ms |
"""

from ml_collections import ConfigDict


def get_config(variant=""):
    """`variant` is "", "vq", "ema", "hard" or "pyramid"."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 5000
    config.batch_size = 16  # on a CPU a step costs in proportion: more, smaller steps win
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="shapes", size=(32, 32), channels=3, count=20000, form="easy")
    config.view = dict(size=(32, 32), channels=3, crop="center", flip=False)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(name="conv", widths=(64,), blocks=2, stem=4, variant="local")
    config.quantizer = dict(name="fsq", levels=(8, 6, 5))
    config.decoder = dict(name="conv", widths=(64,), blocks=2, stem=4, variant="light")
    config.loss = dict(l1=0.0, l2=1.0, lpips=0.0, codebook=1.0, commitment=0.25)
    config.perceptual = dict(lpips="")  # weight files, comma between two
    config.discriminator = dict(
        weight=0.0,  # 0: no discriminator
        start=0.5,  # as a share of the run: the discriminator begins to learn
        warmup=0.05,  # and this much later the tokenizer begins to play against it
        network=dict(name="patchgan", width=64, layers=3, norm="batch"),
        optimizer=dict(learning_rate=2e-4, b1=0.5, b2=0.9, clip=1.0, decay="constant"),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(name="adamw", learning_rate=3e-3, warmup=50, b2=0.99, clip=1.0)
    config.ema = 0.998
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=500)
    config.report = dict(scalars=100, save=1000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    if variant in ("vq", "ema"):
        update = "gradient" if variant == "vq" else "ema"
        config.quantizer = dict(name="vq", codes=256, channels=8, update=update)
    elif variant == "hard":
        config.data.form = "hard"
    elif variant == "pyramid":
        config.quantizer = dict(
            name="multiscale",
            scales=(1, 2, 4, 8),
            phi=1,
            ratio=0.5,
            quantizer=dict(name="vq", codes=256, channels=16),
        )
    elif variant:
        raise ValueError("variants are vq, ema, hard and pyramid")
    return config
