"""The generators of `make demo`: class-conditional, over tokens of coloured shapes.

    python train_generator.py --config configs/generator/shapes.py --workdir runs/generator \\
        --config.data.tokens=runs/tokens

One variant per family, at a width that two CPU cores train in minutes: `raster` (the default; the
Llama form of LlamaGen, arXiv:2406.06525), `random` (a new order for every image, with target-aware
positions as in RAR, arXiv:2411.00776), `masked` (many tokens at a time, arXiv:2202.04200),
`next_scale` (one grid at a time, arXiv:2404.02905; over the tokens of shapes.py:pyramid).

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| raster | h100:1 | 1,1,1 data | 156.5 MB | 0.0138 ms |
"""

from ml_collections import ConfigDict

NETWORK = dict(
    width=128,
    depth=4,
    heads=4,
    label_drop=0.1,
    unroll=4,  # no loop over layers: faster steps on a CPU, and four compile quickly
    rates=dict(token=0.0, attention=0.0, residual=0.0),
)
FAMILIES = {
    "raster": dict(
        name="autoregressive", order="raster", positions="rotary", variant="llama_narrow", window=64
    ),
    "random": dict(
        name="autoregressive",
        order="random",
        positions="target_aware",
        variant="llama_narrow",
        window=64,
    ),
    "masked": dict(
        name="masked", steps=12, schedule="cosine", masking="counted", variant="llama_narrow"
    ),
    "next_scale": dict(name="next_scale", channels=16, variant="var", gates=0.1),
}


def get_config(variant="raster"):
    """`variant` is one of FAMILIES."""
    if variant not in FAMILIES:
        raise ValueError(f"variants are {', '.join(FAMILIES)}")
    config = ConfigDict()
    config.seed = 0
    config.steps = 3000
    config.batch_size = 32
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # where its tokenizer lies now, if it was moved
    )
    config.generator = FAMILIES[variant] | NETWORK
    config.optimizer = dict(
        name="muon",  # a lower loss than AdamW after as many steps (benchmarks/RESULTS.md)
        learning_rate=2e-3,
        warmup=100,
        b2=0.95,
        weight_decay=0.01,
        clip=1.0,
    )
    config.ema = 0.998
    default = dict(temperature=0.7, guidance="constant", weight=2.0)
    if variant == "masked":  # without noise the surest tokens alone are kept, the same every time
        default |= dict(temperature=1.0, noise=4.5)
    config.presets = dict(default=default)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    form = ":pyramid" if variant == "next_scale" else ""
    config.made_for = dict(tokenizer=f"configs/tokenizer/shapes.py{form}", pixels=32, classes=10)
    config.held_out = dict(images=500, samples=8)
    config.report = dict(scalars=100, save=500)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
