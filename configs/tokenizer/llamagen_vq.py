"""LlamaGen's tokenizers (arXiv:2406.06525): VQGAN with 16,384 codes on a sphere in 8 dimensions.

    python train_tokenizer.py --config configs/tokenizer/llamagen_vq.py --workdir runs/llamagen \\
        --config.data.path=DIR --config.perceptual.lpips=VGG,LINEAR

DIR is ImageNet as class folders in `train` and `val`; VGG and LINEAR see docs/data.md.

| variant | tokens | codes | parameters (published) | published rFID |
|---|---|---|---|---|
| vq16 | 16 x 16 | 16,384 x 8 | 71,883,403 (72M) | 2.19; of 384 pixels 0.94, of 512 0.70 |
| vq8 | 32 x 32 | 16,384 x 8 | 70,109,835 (70M) | 0.59 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| vq16 | a100:1x8 | 8,1,1 data | 8.427 GB | 68.1 or 69 ms |

Measured here: not trained at full size.

bfloat16 in the networks alone; the average of the weights has a warm-up, there none; codes start
evenly on the sphere, there drawn in a cube and brought to it. The entropies, of weight 0 there,
are not computed. `vq_ds16_t2i.pt` has the sizes of vq16, trained on captioned photographs.
"""

from ml_collections import ConfigDict

WIDTHS = {"vq16": (128, 128, 256, 256, 512), "vq8": (128, 256, 256, 512)}
STEPS = 40 * (1_281_167 // 128)  # 40 epochs


def get_config(variant="vq16"):
    """`variant` is "vq16" or "vq8"."""
    if variant not in WIDTHS:
        raise ValueError("variants are vq16 and vq8")
    network = dict(name="conv", widths=WIDTHS[variant], blocks=2, hidden=256, variant="taming")
    config = ConfigDict()
    config.seed = 0
    config.steps = STEPS
    config.batch_size = 128
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(256, 256), channels=3, crop="random", zoom=1.25, flip=True)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(network)
    config.quantizer = dict(name="vq", codes=16384, channels=8, normalize=True, revive=0.0)
    config.decoder = dict(network)
    config.loss = dict(l1=0.0, l2=1.0, lpips=1.0, codebook=1.0, commitment=0.25)
    config.perceptual = dict(lpips="")
    config.discriminator = dict(
        weight=0.5,
        limit=0.0,  # a constant weight
        start=20_000 / STEPS,
        loss="hinge",
        generator_loss="hinge",
        loss_weight=0.5,
        network=dict(name="patchgan", width=64, layers=3, norm="batch"),
        optimizer=dict(learning_rate=1e-4, b1=0.9, b2=0.95, clip=1.0, decay="constant"),
    )
    config.safeguards = dict(usage=0.02, worse=2.0)
    config.optimizer = dict(
        name="adamw", learning_rate=1e-4, b1=0.9, b2=0.95, clip=1.0, decay="constant"
    )
    config.ema = 0.9999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
