"""TiTok in two stages (arXiv:2406.07550): an image as 32 to 128 tokens of one dimension.

    python train_tokenizer.py --config configs/tokenizer/titok.py:l32 --workdir runs/titok_l32 \\
        --config.data.path=DIR --config.teacher=runs/maskgit --config.perceptual.convnext_small=FILE

DIR is ImageNet as class folders in `train` and `val`; FILE see docs/data.md. The teacher is a
trained or imported MaskGIT VQGAN (`maskgit_vqgan.py`): for a million steps the tokens learn to
predict its codes, then its decoder is tuned with theirs for half a million.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| l32 | 32 | 4,096 x 12 on the sphere | 641,054,735 (641M) | 2.21 |
| b64 | 64 | 4,096 x 12 on the sphere | 204,814,095 (205M) | 1.70 |
| s128 | 128 | 4,096 x 12 on the sphere | 83,674,639 (84M) | 1.71 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| l32 | a100:4x8 | 32,1,1 data | 20.76 GB | 42.7 or 49.3 ms |

Measured here: not trained at full size.

bfloat16, there float16. Queries, keys and values start from the distribution of the other layers,
there from Xavier's.
"""

from ml_collections import ConfigDict

SIZES = {
    "l32": dict(tokens=32, width=1024, depth=24, heads=16),
    "b64": dict(tokens=64, width=768, depth=12, heads=12),
    "s128": dict(tokens=128, width=512, depth=8, heads=8),
}
FIRST, SECOND = 1_000_000, 500_000  # steps of the stages
STEPS = FIRST + SECOND
ADAM = dict(learning_rate=1e-4, b1=0.9, b2=0.999, final=0.1, weight_decay=1e-4, clip=1.0)
DECAYED = r"(?!encoder/conv_patch/|decoder/(codes/)?embed/).*kernel"  # no embedding


def get_config(variant="l32"):
    """`variant` is one of SIZES."""
    if variant not in SIZES:
        *names, last = SIZES
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    network = dict(SIZES[variant], name="vit", patch=16)
    config = ConfigDict()
    config.seed = 0
    config.steps = STEPS
    config.batch_size = 256
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.0, flip=True)
    config.pixels = (0.0, 1.0)
    config.encoder = dict(network, readout="reinterpreted")
    config.quantizer = dict(
        name="vq", codes=4096, channels=12, normalize=True, revive=0.0, init="uniform"
    )
    config.decoder = dict(
        name="two_stage",
        codebook=(1024, 256),
        codes=dict(network, channels=1024, head="codes"),
        pixels=dict(
            name="conv",
            latent=256,
            grid=(16, 16),
            widths=(128, 128, 256, 256, 512),
            blocks=2,
            variant="maskgit",
        ),
    )
    config.loss = dict(
        l1=0.0,
        l2=0.25,  # 1 on [0, 1], where errors are half as large
        convnext_small=0.1,
        codes=1.0,
        codebook=1.0,
        commitment=0.25,
    )
    config.teacher = ""
    config.stages = (
        dict(
            share=FIRST / STEPS,
            objective="codes",
            train=r"(encoder|quantizer|decoder/codes)/.*",
            optimizer=dict(b2=0.99, warmup=10_000),
        ),
        dict(
            share=SECOND / STEPS,
            objective="pixels",
            train=r"decoder/.*",
            loss=dict(codebook=0.0, commitment=0.0),
            optimizer=dict(warmup=5000),
        ),
    )
    config.perceptual = dict(convnext_small="")
    config.discriminator = dict(
        weight=0.01,
        limit=0.0,  # a constant weight
        start=(FIRST + 20_000) / STEPS,  # step 20,000 of the second stage
        loss="hinge",
        generator_loss="hinge",
        lecam=0.001,
        lecam_form="means",
        network=dict(name="blur", width=128, stages=3),
        optimizer=dict(ADAM, warmup=5000),
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
