"""MaskBit (arXiv:2409.16211): VQGAN+, bit tokenizers, and generators that read two symbols.

Published programs rename `token_emb` of a generator's file: its keys are taken for the older ones.
"""

from tokgen.zoo.model import Model

FAMILY = dict(licence="Apache-2.0", family="MaskBit", paper="arXiv:2409.16211")


def _tokenizer(bits: int, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="maskbit_tokenizer",
        repository=f"markweber/maskbit_tokenizer_{bits}bit",
        file=f"maskbit_tokenizer_{bits}bit.bin",
        parameters=parameters,
        size=nbytes,
        fid=fid,
        **FAMILY,
    )


def _generator(bits: int, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="maskbit_lfqbert_older",
        otherwise="maskbit_lfqbert",
        repository=f"markweber/maskbit_generator_{bits}bit",
        file=f"maskbit_generator_{bits}bit.bin",
        parameters=parameters,
        size=nbytes,
        tokenizer=f"maskbit-tokenizer-{bits}bit",
        fid=fid,
        classes="imagenet",
        **FAMILY,
    )


MODELS = {
    "vqgan-plus-10bit": Model(
        system="maskbit_vqganplus",
        repository="markweber/vqgan_plus_paper",
        file="vqgan_plus_paper.bin",  # named as its repository, as the author's others are
        parameters=55_990_915,
        size=223_963_660,
        fid=1.67,
        **FAMILY,
    ),
    "vqgan-plus-12bit": Model(
        system="maskbit_vqganplus",
        repository="markweber/vqgan_plus_12bit",
        file="vqgan_plus_12bit.bin",
        parameters=55_007_683,
        size=220_030_732,
        fid=1.39,
        **FAMILY,
    ),
    "maskbit-tokenizer-10bit": _tokenizer(10, 54_469_005, 217_917_020, 1.76),
    "maskbit-tokenizer-12bit": _tokenizer(12, 54_479_247, 218_113_644, 1.52),
    "maskbit-tokenizer-14bit": _tokenizer(14, 54_489_489, 218_875_516, 1.37),
    "maskbit-tokenizer-16bit": _tokenizer(16, 54_499_731, 222_193_292, 1.29),
    "maskbit-tokenizer-18bit": _tokenizer(18, 54_509_973, 236_914_332, 1.16),
    "maskbit-10bit": _generator(10, 304_728_128, 1_218_912_532, 1.68),
    "maskbit-12bit": _generator(12, 304_795_776, 1_219_183_128, 1.65),
    "maskbit-14bit": _generator(14, 304_929_024, 1_219_716_124, 1.62),
    "maskbit-16bit": _generator(16, 305_193_472, 1_220_773_920, 1.64),
    "maskbit-18bit": _generator(18, 305_720_320, 1_222_881_316, 1.67),
}
