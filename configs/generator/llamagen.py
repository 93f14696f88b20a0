"""LlamaGen (arXiv:2406.06525): ImageNet classes or texts, one token at a time in raster order.

    tokgen pretokenize --tokenizer TOKENIZER --data DIR --views ten --out runs/tokens
    python train_generator.py --config configs/generator/llamagen.py:l --workdir runs/llamagen \\
        --config.data.tokens=runs/tokens

TOKENIZER is that of configs/tokenizer/llamagen_vq.py, trained or imported (`vq_ds16_c2i.pt`; of
384 pixels for the variants that end so), DIR ImageNet as class folders. Published are ten crops of
int(1.1 size) pixels, one of them at random in every epoch.

| variant | tokens | parameters (published) | FID, IS (256 pixels) | guidance |
|---|---|---|---|---|
| b | 16 x 16 | 110,888,448 (111M) | 5.46, 193.6 | 2.0 |
| l | 16 x 16 | 342,910,976 (343M) | 3.80, 248.3 | 2.0 |
| xl | 16 x 16 | 774,699,520 (775M) | 3.39, 227.1 | 1.75 |
| xxl | 16 x 16 | 1,410,972,672 (1.4B) | 3.09, 253.6 | 1.75 |
| 3b | 16 x 16 | 3,096,659,200 (3.1B) | 3.05, 222.3 | 1.65 |
| b384 | 24 x 24 | as b | 6.09, 182.5 | 2.0 |
| l384 | 24 x 24 | as l | 3.07, 256.1 | 2.0 |
| xl384 | 24 x 24 | as xl | 2.62, 244.1 | 1.75 |
| xxl384 | 24 x 24 | as xxl | 2.34, 253.9 | 1.75 |
| 3b384 | 24 x 24 | as 3b | 2.18, 263.3 | 1.65 |
| t2i_xl_256 | 16 x 16 | 777,678,080 | - | 7.5, top-k 1000 |
| t2i_xl_512 | 32 x 32 | 777,678,080 | - | 7.5, top-k 1000 |

Published samples: 50,000, classes drawn evenly, temperature 1, no top-k, no top-p; of 24 x 24
tokens resized to 256 pixels by a bicubic filter. The preset "paper" holds these numbers.

The t2i variants read text features (FLAN-T5-XL, 120 x 2048, padded on the left, given as arrays:
--config.data.text=DIR, see docs/data.md). Published: stage 1 on 50 million captioned images of
256 pixels; stage 2 on 10 million of 512, from stage 1 (--config.init_from). How many steps that
took is not published: theirs here are one pass.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| b | a100:1x8 | 8,1,1 data | 2.661 GB | 19.9 or 21.4 ms |
| 3b | a100:4x8 | 16,2,1 fsdp | 37.16 GB | 152 or 243 ms |
| 3b | v5e:8x8 | 8,8,1 fsdp | 10.48 GB | 197 or 318 ms |

Measured here: not trained at full size.

No average of the weights, as published; bfloat16.
"""

from ml_collections import ConfigDict

EPOCH = 1_281_167 // 256
# Width, depth, heads, guidance
SIZES = {
    "b": (768, 12, 12, 2.0),
    "l": (1024, 24, 16, 2.0),
    "xl": (1280, 36, 20, 1.75),
    "xxl": (1536, 48, 24, 1.75),
    "3b": (3200, 24, 32, 1.65),
}
TEXTS = {"t2i_xl_256": 50_000_000, "t2i_xl_512": 10_000_000}  # images of a stage
VARIANTS = (*SIZES, *(f"{size}384" for size in SIZES), *TEXTS)


def get_config(variant="b"):
    """`variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        *names, last = VARIANTS
        raise ValueError(f"variants are {', '.join(names)} and {last}")
    size = "xl" if variant in TEXTS else variant.removesuffix("384")
    width, depth, heads, weight = SIZES[size]
    config = ConfigDict()
    config.seed = 0
    config.steps = TEXTS[variant] // 256 if variant in TEXTS else 300 * EPOCH
    config.batch_size = 256
    config.precision = dict(params="float32", compute="bfloat16")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # without one: the tokenizer that encodes `images`
        images="",
        labels="",  # what class folders mean; without it: as in the tokenizer's config
        views="ten",
    )
    config.generator = dict(
        name="autoregressive",
        order="raster",
        conditioning="label",
        positions="rotary",
        variant="llama",
        head="linear",
        width=width,
        depth=depth,
        heads=heads,
        label_drop=0.1,
        remat="full",
        rates=dict(token=0.1, attention=0.0, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        decay="constant",
        b1=0.9,
        b2=0.95,
        weight_decay=0.05,
        decayed=r"(.*/)?(kernel|table)",  # all that has two axes, embeddings too
        clip=1.0,
    )
    config.ema = 0.0
    paper = dict(temperature=1.0, guidance="constant", weight=weight)
    if variant in TEXTS:
        config.data.views = "center"
        config.data.text = ""
        config.generator.conditioning = "captions"
        config.generator.texts = (120, 2048)
        paper = dict(temperature=1.0, guidance="constant", weight=7.5, top_k=1000)
    fast = dict(paper, precision="bfloat16")
    config.presets = dict(default=dict(paper), paper=paper, fast=fast)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    pixels = {"384": 384, "512": 512}.get(variant[-3:], 256)
    config.made_for = dict(
        tokenizer="configs/tokenizer/llamagen_vq.py:vq16",
        pixels=pixels,
        classes=0 if variant in TEXTS else 1000,
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
