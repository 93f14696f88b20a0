"""Open-MAGVIT2 (arXiv:2409.04410): bit tokenizers, and generators that read 6 and 12 bits.

A tokenizer's file holds the live weights and their averages, a generator's its tokenizer as well.
"""

from tokgen.zoo.model import Model

FAMILY = dict(licence="Apache-2.0", family="Open-MAGVIT2", paper="arXiv:2409.04410")


def _tokenizer(name: str, file: str, parameters: int, nbytes: int, fid: float, **more) -> Model:
    return Model(
        system="openmagvit2",
        repository=f"TencentARC/Open-MAGVIT2-Tokenizer-{name}",
        file=file,
        parameters=parameters,
        size=nbytes,
        fid=fid,
        **FAMILY,
        **more,
    )


def _generator(size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="openmagvit2_generator",
        repository=f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution",
        file=f"AR_256_{size}.ckpt",
        parameters=parameters,
        size=nbytes,
        tokenizer="openmagvit2-tokenizer",
        fid=fid,
        classes="imagenet",
        **FAMILY,
    )


MODELS = {
    "openmagvit2-tokenizer": _tokenizer(
        "256-resolution", "imagenet_256_L.ckpt", 115_127_829, 921_022_632, 1.17
    ),
    "openmagvit2-tokenizer-128": _tokenizer(
        *("128-resolution", "imagenet_128_L.ckpt", 112_021_653, 896_173_224, 1.18),
        pixels=128,
        overrides=("view.size=128,128",),
    ),
    "openmagvit2-tokenizer-pretrain-262144": _tokenizer(
        "262144-Pretrain", "pretrain256_262144.ckpt", 115_127_829, 921_022_632, 1.67
    ),
    "openmagvit2-tokenizer-pretrain-16384": _tokenizer(
        "16384-Pretrain", "pretrain256_16384.ckpt", 115_094_033, 920_752_264, 2.55
    ),
    "openmagvit2-b": _generator("B", 351_827_968, 1_834_793_044, 3.08),
    "openmagvit2-l": _generator("L", 814_684_160, 3_677_960_276, 2.51),
    "openmagvit2-xl": _generator("XL", 1_499_065_344, 6_407_227_476, 2.33),
}
