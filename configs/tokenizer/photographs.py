"""The convolutional families on photographs of 256 x 256 pixels, narrow enough for two CPU cores.

    python train_tokenizer.py --config configs/tokenizer/photographs.py:taming \\
        --workdir runs/photographs/taming --config.data.path=DIR

DIR is a folder of photographs. Levels, networks and quantizers are the published ones, the widths a
quarter of them (WIDTH instead of 128, the least that 32 groups of a norm allow), one block per
level, 300 steps of one image, squared error only, no discriminator. A smoke test at full resolution
and no recipe: those are in the files named after the systems.

| variant | tokens | codes | network |
|---|---|---|---|
| maskgit | 16 x 16 | 1,024 | MaskGIT's VQGAN |
| maskbit | 16 x 16 | 2^14 bits | the same, learned downsampling |
| taming | 16 x 16 | 1,024 | VQGAN with attention |
| llamagen | 16 x 16 | 16,384 on the sphere | VQGAN with attention |
| magvit2 | 16 x 16 | 2^18 bits | Open-MAGVIT2 |
| ibq | 16 x 16 | 1,024 by their products | VQGAN with attention |
| var | 680 on ten grids | 4,096 | VQGAN with attention |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| taming | h100:1 | 1,1,1 data | 200.8 MB | 0.0512 ms |
"""

from ml_collections import ConfigDict

WIDTH = 32
SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

# Variant of the networks, channels between the networks and the quantizer, quantizer.
FAMILIES = {
    "maskgit": ("maskgit", 0, dict(name="vq", codes=1024, channels=256, normalize=False)),
    "maskbit": ("maskbit", 0, dict(name="lfq", bits=14, temperature=0.01)),
    "taming": ("taming", 256, dict(name="vq", codes=1024, channels=256, normalize=False)),
    "llamagen": ("taming", 256, dict(name="vq", codes=16384, channels=8)),
    "magvit2": ("magvit2", 0, dict(name="lfq", bits=18, temperature=0.01, entropy="shifted")),
    "ibq": ("taming", 256, dict(name="ibq", codes=1024, channels=256, temperature=0.01)),
    "var": (
        "taming",
        32,
        dict(
            name="multiscale",
            scales=SCALES,
            quantizer=dict(name="vq", codes=4096, channels=32, normalize=False),
        ),
    ),
}


def get_config(variant="maskgit"):
    """`variant` is one of FAMILIES."""
    if variant not in FAMILIES:
        *names, last = FAMILIES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    network, hidden, quantizer = FAMILIES[variant]
    network = dict(
        name="conv",
        widths=tuple(WIDTH * times for times in (1, 1, 2, 2, 4)),
        blocks=1,
        hidden=hidden,
        projection=3 if variant == "var" else 1,
        variant=network,
    )
    config = ConfigDict()
    config.seed = 0
    config.steps = 300
    config.batch_size = 1  # a step costs about 0.9 s of CPU time
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.25, flip=True)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(network)
    config.quantizer = quantizer
    config.decoder = dict(network)
    config.loss = dict(
        l1=0.0,
        l2=1.0,
        lpips=0.0,
        codebook=1.0,
        commitment=0.25,
        index=1.0,
        sample_entropy=0.02,
        batch_entropy=-0.02,
    )
    config.perceptual = dict(lpips="")
    config.discriminator = dict(weight=0.0)
    config.safeguards = dict(usage=0.0, worse=0.0)
    config.optimizer = dict(name="adamw", learning_rate=1e-3, warmup=20, b2=0.99, clip=1.0)
    config.ema = 0.99
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=16)
    config.report = dict(scalars=10, save=100)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
