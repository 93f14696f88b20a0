"""LlamaGen (arXiv:2406.06525): tokenizers, and generators of classes and of texts.

Of 384 pixels samples are measured at 256. XL, XXL and 3B are published at 384 pixels only.
"""

from tokgen.zoo.model import Model

FAMILY = dict(licence="MIT", family="LlamaGen", paper="arXiv:2406.06525")
CLASSES, TEXTS = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i"
# Cells, which no array tells
CELLS = {256: {}, 384: {"block_size": 576}, 512: {"block_size": 1024}}


def _tokenizer(repository: str, file: str, pixels: int, fid: float | None) -> Model:
    return Model(
        system="llamagen_vq",
        repository=repository,
        file=file,
        parameters=71_883_403,
        size=287_795_756,
        pixels=pixels,
        fid=fid,
        overrides=(f"view.size={pixels},{pixels}",) if pixels != 256 else (),
        **FAMILY,
    )


def _generator(size: str, pixels: int, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="llamagen_c2i",
        repository=CLASSES,
        file=f"c2i_{size}_{pixels}.pt",
        parameters=parameters,
        size=nbytes,
        tokenizer="llamagen-tokenizer" if pixels == 256 else f"llamagen-tokenizer-{pixels}",
        pixels=pixels,
        fid=fid,
        configuration=CELLS[pixels],
        classes="imagenet",
        **FAMILY,
    )


def _of_texts(file: str, pixels: int, tokenizer: str) -> Model:
    return Model(
        system="llamagen_t2i",
        repository=TEXTS,
        file=file,
        parameters=777_678_080,
        size=3_111_695_360,
        tokenizer=tokenizer,
        pixels=pixels,
        configuration=CELLS[pixels],
        text="FLAN-T5-XL, 120 x 2048",
        **FAMILY,
    )


MODELS = {
    "llamagen-tokenizer": _tokenizer(CLASSES, "vq_ds16_c2i.pt", 256, 2.19),
    "llamagen-tokenizer-384": _tokenizer(CLASSES, "vq_ds16_c2i.pt", 384, 0.94),
    "llamagen-tokenizer-f8": Model(
        system="llamagen_vq",
        repository=CLASSES,
        file="vq_ds8_c2i.pt",
        parameters=70_109_835,
        size=280_701_484,
        fid=0.59,
        **FAMILY,
    ),
    "llamagen-tokenizer-t2i": _tokenizer(TEXTS, "vq_ds16_t2i.pt", 256, None),
    "llamagen-tokenizer-t2i-512": _tokenizer(TEXTS, "vq_ds16_t2i.pt", 512, None),
    "llamagen-b": _generator("B", 256, 110_888_448, 443_553_792, 5.46),
    "llamagen-l": _generator("L", 256, 342_910_976, 1_371_643_904, 3.80),
    "llamagen-b-384": _generator("B", 384, 110_888_448, 443_553_792, 6.09),
    "llamagen-l-384": _generator("L", 384, 342_910_976, 1_371_643_904, 3.07),
    "llamagen-xl": _generator("XL", 384, 774_699_520, 3_098_798_080, 2.62),
    "llamagen-xxl": _generator("XXL", 384, 1_410_972_672, 5_643_890_688, 2.34),
    "llamagen-3b": _generator("3B", 384, 3_096_659_200, 12_386_636_800, 2.18),
    "llamagen-t2i-256": _of_texts("t2i_XL_stage1_256.pt", 256, "llamagen-tokenizer-t2i"),
    "llamagen-t2i-512": _of_texts("t2i_XL_stage2_512.pt", 512, "llamagen-tokenizer-t2i-512"),
}
