"""Every quantizer between the same encoder and decoder, with the same data and budget.

    python train_tokenizer.py --config configs/tokenizer/ablation.py:fsq \\
        --workdir runs/ablation/fsq --config.data.path=DIR

DIR is an image folder as in `cifar10_f4.py`: 32 x 32 pixels become 8 x 8 positions. About 1,024
codes (10 bits) each, and about three minutes of two CPU cores. What differs is the quantizer, the
weights of its own losses, and the width of the layer that leads to it.

| variant | bits per image | published in |
|---|---|---|
| vq | 640 | arXiv:1711.00937, dead rows drawn from the batch |
| vq_ema | 640 | the same, rows as moving averages (its appendix A.1) |
| vq_l2 | 640 | on the unit sphere, arXiv:2110.04627 |
| vq_entropy | 640 | with MaskGIT's entropies and no revival, arXiv:2202.04200 |
| vq_clustering | 640 | dead rows pulled to latents, arXiv:2307.15139 |
| fsq | 638 (1,000 codes) | arXiv:2309.15505 |
| ibq | 640 | arXiv:2412.02692 |
| lfq | 640 | arXiv:2310.05737 |
| bsq | 640 | arXiv:2406.07548 |
| multiscale_vq | 850 (85 tokens) | arXiv:2404.02905 |
| multiscale_fsq | 847 (85 tokens) | the same pyramid around FSQ |
| gaussian | continuous, 4 numbers per position | arXiv:1312.6114 |

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| fsq | h100:1 | 1,1,1 data | 24.93 MB | 0.00744 ms |
"""

from ml_collections import ConfigDict

LEARNED = dict(name="vq", codes=1024, channels=8)
PYRAMID = dict(name="multiscale", scales=(1, 2, 4, 8), phi=4, ratio=0.5)
LEVELS = (8, 5, 5, 5)

# Quantizer, and the weights of its losses that differ from those below.
QUANTIZERS = {
    "vq": (dict(LEARNED, normalize=False), {}),
    "vq_ema": (dict(LEARNED, normalize=False, update="ema"), {}),
    "vq_l2": (dict(LEARNED), {}),
    "vq_entropy": (dict(LEARNED, normalize=False, revive=0.0, temperature=0.01), {}),
    "vq_clustering": (dict(LEARNED, normalize=False, revival="clustering"), {}),
    "fsq": (dict(name="fsq", levels=LEVELS), {}),
    "ibq": (
        dict(name="ibq", codes=1024, channels=64, temperature=0.01),
        dict(commitment=1.0, codebook=0.25, sample_entropy=0.05, batch_entropy=-0.05),
    ),
    "lfq": (dict(name="lfq", bits=10, temperature=0.01), {}),
    "bsq": (dict(name="bsq", bits=10, temperature=0.01), {}),
    "multiscale_vq": (dict(PYRAMID, quantizer=dict(LEARNED, normalize=False)), {}),
    "multiscale_fsq": (dict(PYRAMID, quantizer=dict(name="fsq", levels=LEVELS)), {}),
    "gaussian": (dict(name="gaussian", channels=4), {}),
}


def get_config(variant="vq"):
    """`variant` is one of QUANTIZERS."""
    if variant not in QUANTIZERS:
        *names, last = QUANTIZERS
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    quantizer, weights = QUANTIZERS[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000
    config.batch_size = 16
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(32, 32), channels=3, crop="center", zoom=1.25, flip=True)
    config.pixels = (-1.0, 1.0)
    config.encoder = dict(name="conv", widths=(128,), blocks=2, stem=4, variant="light")
    config.quantizer = quantizer
    config.decoder = dict(name="conv", widths=(128,), blocks=2, stem=4, variant="light")
    config.loss = dict(
        l1=0.0,
        l2=1.0,
        lpips=0.0,
        codebook=1.0,
        commitment=0.25,
        index=1.0,
        sample_entropy=0.02,  # MaskBit's, whose squared error has the weight of ours
        batch_entropy=-0.02,
        kl=1e-6,
    )
    config.loss.update(weights)
    config.perceptual = dict(lpips="")
    config.discriminator = dict(weight=0.0)
    config.safeguards = dict(usage=0.0, worse=0.0)  # a collapse is to be measured, not stopped
    config.optimizer = dict(name="adamw", learning_rate=2e-3, warmup=100, b2=0.99, clip=1.0)
    config.ema = 0.999
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3
    config.held_out = dict(images=1000)
    config.report = dict(scalars=100, save=3000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
