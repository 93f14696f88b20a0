"""MaskBit (arXiv:2409.16211): bits in two halves, masked half by half, without embeddings.

    python train_generator.py --config configs/generator/maskbit.py:14bit --workdir runs/maskbit \\
        --config.data.tokenizer=TOKENIZER --config.data.images=DIR

TOKENIZER is that of configs/tokenizer/maskbit.py, trained or imported, DIR ImageNet as class
folders. Images are encoded as they come; shards of tokens do as well (--config.data.tokens).

| variant | bits | parameters (published) | steps | FID, IS | guidance, power | noise |
|---|---|---|---|---|---|---|
| 10bit | 10 | 304,728,128 (305M) | 64 | 1.68, - | 6.4, 2.5 | 10.5 |
| 12bit | 12 | 304,795,776 (305M) | 64 | 1.65, 341.8 | 7.1, 3.0 | 8.2 |
| 14bit | 14 | 304,929,024 (305M) | 64 | 1.62, 338.7 | 7.1, 3.0 | 7.8 |
| 14bit, preset paper_128 | 14 | the same | 128 | 1.56, 341.7 | 7.1, 3.0 | 9.0 |
| 14bit, preset paper_256 | 14 | the same | 256 | 1.52, 328.6 | 5.8, 3.0 | 10.3 |
| 16bit | 16 | 305,193,472 (305M) | 64 | 1.64, - | 6.5, 2.5 | 7.5 |
| 18bit | 18 | 305,720,320 (305M) | 64 | 1.67, - | 5.7, 2.5 | 8.5 |
| tokens | 14 | 304,980,992 | 64 | - | 7.1, 3.0 | 7.8 |

"tokens" is the BERT with a table of embeddings for each half and an output that is tied to it; no
weights of it are published. Published samples: 50,000, classes in 50 permutations, temperature 1.
Guidance of the table is published as cond + s (cond - uncond): s + 1 here. "fast" takes 32 steps;
its FID is not published.

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| 14bit | a100:4x8 | 32,1,1 data | 35.66 GB | 50 or 61.8 ms |
| 14bit | v5e:16x16 | 256,1,1 data | 10.81 GB | 27 or 38.9 ms |

Measured here: not trained at full size.

The loss covers every slot, masked or not, alike. Published crops take 80 to 100 % of the area; here
they are the ten crops. Queries, keys and values start from the distribution of the other layers,
there from Xavier's.
"""

from ml_collections import ConfigDict

# Sampling as published: guidance, its power, noise
PAPER = {
    "10bit": (6.4, 2.5, 10.5),
    "12bit": (7.1, 3.0, 8.2),
    "14bit": (7.1, 3.0, 7.8),
    "16bit": (6.5, 2.5, 7.5),
    "18bit": (5.7, 2.5, 8.5),
    "tokens": (7.1, 3.0, 7.8),
}
LONGER = dict(paper_128=(7.1, 3.0, 9.0, 128), paper_256=(5.8, 3.0, 10.3, 256))
FORMS = {
    "bits": dict(inputs="bits", head="transformed"),
    "tokens": dict(inputs="tokens", head="tied_per_position"),
}


def sampling(weight: float, power: float, noise: float, steps: int = 64) -> dict:
    """A preset."""
    return dict(guidance="power_cosine", weight=1 + weight, power=power, noise=noise, steps=steps)


def get_config(variant="14bit"):
    """`variant` is one of PAPER."""
    if variant not in PAPER:
        raise ValueError(f"variants are {', '.join(PAPER)}")
    config = ConfigDict()
    config.seed = 0
    config.steps = 1_350_000
    config.batch_size = 1024
    config.precision = dict(params="float32", compute="float32")
    config.data = dict(
        tokens="",  # folder that tokgen pretokenize wrote
        tokenizer="",  # without one: the tokenizer that encodes `images`
        images="",
        labels="",  # what class folders mean; without it: as in the tokenizer's config
        views="ten",
    )
    config.generator = dict(
        FORMS.get(variant, FORMS["bits"]),
        name="masked",
        variant="bert",
        entry="normed",
        width=1024,
        depth=24,
        heads=16,
        hidden=4096,
        steps=64,
        schedule="arccos",
        masking="tossed",
        visible=1.0,  # weight of the known slots in the loss
        smoothing=0.1,
        label_drop=0.1,
        rates=dict(token=0.1, attention=0.1, residual=0.1),
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        warmup=5000,
        start=0.0,
        decay="cosine",
        final=0.1,
        b1=0.9,
        b2=0.96,
        weight_decay=0.045,
        decayed=".*",  # norms and biases too
        clip=1.0,
    )
    config.ema = 0.999
    paper = sampling(*PAPER[variant])
    config.presets = dict(
        default=dict(paper), paper=paper, fast=dict(paper, steps=32, precision="bfloat16")
    )
    if variant == "14bit":
        config.presets.update({name: sampling(*row) for name, row in LONGER.items()})
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.strategy = "data"
    config.max_bad = 1e-3  # share of images that may be unreadable, where images are encoded
    bits = "14bit" if variant == "tokens" else variant
    config.made_for = dict(
        tokenizer=f"configs/tokenizer/maskbit.py:lfq{bits.removesuffix('bit')}",
        pixels=256,
        classes=1000,
    )
    config.held_out = dict(images=5000, samples=8)
    config.report = dict(scalars=100, save=10_000)
    config.keep = dict(latest=1, best=1)
    config.init_from = ""
    return config
