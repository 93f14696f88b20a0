"""IBQ (arXiv:2412.02692): tokenizers, and generators of the one with 16,384 codes.

A tokenizer's file holds the live weights and their averages, a generator's its tokenizer as well.
"""

from tokgen.zoo.model import Model

FAMILY = dict(licence="Apache-2.0", family="IBQ", paper="arXiv:2412.02692")


def _tokenizer(name: str, file: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="ibq",
        repository=f"TencentARC/IBQ-Tokenizer-{name}",
        file=file,
        parameters=parameters,
        size=nbytes,
        fid=fid,
        **FAMILY,
    )


def _generator(size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="ibq_generator",
        repository=f"TencentARC/IBQ-AR-{size}",
        file=f"AR_256_{size}.ckpt",
        parameters=parameters,
        size=nbytes,
        tokenizer="ibq-tokenizer-16384",
        fid=fid,
        classes="imagenet",
        **FAMILY,
    )


MODELS = {
    "ibq-tokenizer-1024": _tokenizer(
        "1024", "imagenet256_1024.ckpt", 107_049_859, 856_398_872, 2.24
    ),
    "ibq-tokenizer-8192": _tokenizer(
        "8192", "imagenet256_8192.ckpt", 108_884_867, 871_078_936, 1.87
    ),
    "ibq-tokenizer-16384": _tokenizer(
        "16384", "imagenet256_16384.ckpt", 110_982_019, 887_856_152, 1.37
    ),
    "ibq-tokenizer-262144": _tokenizer(
        "262144", "imagenet256_262144.ckpt", 173_896_579, 1_391_172_632, 1.00
    ),
    "ibq-tokenizer-pretrain-16384": _tokenizer(
        "16384-Pretrain", "IBQ_pretrain_16384.ckpt", 110_982_019, 887_856_152, 2.06
    ),
    "ibq-tokenizer-pretrain-262144": _tokenizer(
        "262144-Pretrain", "IBQ_pretrain_262144.ckpt", 173_896_579, 1_391_172_632, 1.53
    ),
    "ibq-b": _generator("B", 342_994_944, 1_815_907_852, 2.88),
    "ibq-l": _generator("L", 649_640_960, 3_042_491_916, 2.45),
    "ibq-xl": _generator("XL", 1_076_103_168, 4_748_340_748, 2.14),
    "ibq-xxl": _generator("XXL", 2_063_331_840, 8_697_255_436, 2.05),
}
