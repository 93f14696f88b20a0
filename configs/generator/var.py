"""VAR (arXiv:2404.02905): class-conditional ImageNet, one grid at a time from 1 x 1 to 16 x 16.

    python train_generator.py --config configs/generator/var.py:d16 --workdir runs/var \\
        --config.data.tokenizer=TOKENIZER --config.data.images=DIR

TOKENIZER is the multi-scale tokenizer of configs/tokenizer/var_vqvae.py, trained or imported
(`tokgen import vae_ch160v4096z32.pth --system var_vqvae --out TOKENIZER`), DIR ImageNet as class
folders; images are tokenised while training, as published. Token shards of `tokgen pretokenize` do
as well: --config.data.tokens=SHARDS.

| variant | tokens | parameters (published) | batch, epochs | FID, IS (paper v2) | FID (code) |
|---|---|---|---|---|---|
| d16 | 680 on 10 grids | 310,283,520 (310M) | 768, 200 | 3.30, 274.4 | 3.55 |
| d20 | 680 on 10 grids | 600,917,136 (600M) | 768, 250 | 2.57, 302.6 | 2.95 |
| d24 | 680 on 10 grids | 1,033,399,360 (1.0B) | 768, 350 | 2.09, 312.9 | 2.33 |
| d30 | 680 on 10 grids | 2,010,020,356 (2.0B) | 1024, 350 | 1.92, 323.1 | 1.97 |
| d36s | 2,240 on 10 grids, 512 pixels | 2,353,893,904 (2.3B) | 768, 350 | 2.63, 303.2 | 2.63 |

d36s shares the vectors of its adaptive norms between blocks. Published samples: 50,000, 50 per
class, preset "paper" (t = 1.5 at the last scale, guidance t k / 9 at scale k; top-k 900, top-p
0.96); the preset "demo" is that of its notebook.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| d16 | h100:4x8 | 32,1,1 data | 7.448 GB | 30.3 or 33.4 ms |
| d16 | v5e:16x16 | 256,1,1 data | 7.852 GB | 19 or 33.1 ms |
| d30 | v5e:16x16 | 64,4,1 fsdp | 12.93 GB | 157 or 291 ms |
| d30 | h100:8x8 | 64,1,1 data | 48.24 GB | 125 or 145 ms |

Measured here: not trained at full size.

Published are crops at random places of an image whose shorter side is 1.125 times as long, resized
with Lanczos, never mirrored; here five fixed crops at 1.1 times, and the centre. It trained in
float16 with a loss scale, here in bfloat16.
"""

from ml_collections import ConfigDict

IMAGES = 1_281_167
# Depth, variant of the transformer, batch size, epochs, rate per 256 images, gates, last rate, last
# weight decay
VARIANTS = {
    "d16": (16, "var", 768, 200, 1e-4, 1e-3, 0.1, 0.05),
    "d20": (20, "var", 768, 250, 1e-4, 1e-3, 0.1, 0.05),
    "d24": (24, "var", 768, 350, 8e-5, 1e-4, 0.01, 0.05),
    "d30": (30, "var", 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
    "d36s": (36, "var_shared", 768, 350, 8e-5, 5e-6, 0.01, 0.08),
}
PLAIN_CROPS = "center,top_left,top_right,bottom_left,bottom_right,middle"
# Of the published no-decay list: start vector, positions, levels, tables of shared norms, biases,
# scales
DECAYED = r"(.*/)?kernel|labels/table"


def get_config(variant="d16"):
    """`variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"variants are {', '.join(VARIANTS)}")
    depth, network, batch, epochs, rate, gates, final, decay_end = VARIANTS[variant]
    config = ConfigDict()
    config.seed = 0
    config.steps = epochs * IMAGES // batch
    config.batch_size = batch
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # where its tokenizer lies now; with `images`, what encodes them
        images="",  # without shards: a folder that is encoded on the fly
        labels="",  # what class folders mean; without it: as in the tokenizer's config
        views=PLAIN_CROPS,
    )
    config.generator = dict(
        name="next_scale",
        channels=32,  # of the tokenizer's codes
        variant=network,
        width=64 * depth,
        depth=depth,
        heads=depth,
        gates=gates,
        smoothing=0.0,
        label_drop=0.1,
        remat="full",
        rates=dict(path=0.1 * depth / 24),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=rate * batch / 256,
        warmup=config.steps // 50,
        start=0.005,
        decay="linear",
        hold=0.05,
        final=final,
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        weight_decay_end=decay_end,
        decayed=DECAYED,
        clip=2.0,
    )
    config.ema = 0.0
    paper = dict(guidance="per_scale", weight=1.5, top_k=900, top_p=0.96)
    demo = dict(guidance="per_scale", weight=4.0, top_k=900, top_p=0.95)
    fast = dict(paper, precision="bfloat16")
    config.presets = dict(default=dict(paper), paper=paper, demo=demo, fast=fast)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    side = 512 if variant.endswith("s") else 256
    config.made_for = dict(
        tokenizer=f"configs/tokenizer/var_vqvae.py:{side}", pixels=side, classes=1000
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
