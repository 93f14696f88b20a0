"""Class-conditional small photographs, over the tokens of a tokenizer of cifar10_f4.

    tokgen pretokenize --tokenizer runs/cifar10_f4 --data DIR --out runs/cifar10_tokens
    python train_generator.py --config configs/generator/cifar10.py --workdir runs/cifar10 \\
        --config.data.tokens=runs/cifar10_tokens

One variant per family, at a width that two CPU cores train in minutes. `raster` (the default; the
Llama form of LlamaGen, arXiv:2406.06525) and `columns` read a single grid. `sequence`, `random` (a
new order for every image, with target-aware positions as in RAR, arXiv:2411.00776) and `masked`
(many tokens at a time, arXiv:2202.04200) read any tokens, a pyramid's too, coarse to fine.
`next_scale` (one grid at a time, arXiv:2404.02905) needs those of cifar10_f4.py:pyramid.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| raster | h100:1 | 1,1,1 data | 162.3 MB | 0.0151 ms |
"""

from tokgen.config import reading

SHARED = ("raster", "random", "masked", "next_scale")
GRIDS = {"columns": dict(order="columns"), "sequence": dict(positions="learned")}  # as raster, but


def get_config(variant="raster"):
    """`variant` is one of SHARED or GRIDS; what is not said here is shapes.py's."""
    if variant not in (*SHARED, *GRIDS):
        raise ValueError(f"variants are {', '.join((*SHARED, *GRIDS))}")
    like = variant if variant in SHARED else "raster"
    config = reading.shipped(f"configs/generator/shapes.py:{like}")
    config.generator.update(GRIDS.get(variant, {}))
    config.steps = 3500
    config.presets.default.update(temperature=1.0, weight=1.5)
    form = ":pyramid" if variant == "next_scale" else ""
    config.made_for.tokenizer = f"configs/tokenizer/cifar10_f4.py{form}"
    config.held_out.images = 1000
    config.report.save = 875
    return config
