"""VAR (arXiv:2404.02905): generators, and their tokenizer; d36 is of 512 pixels.

FIDs are those of the paper's second version; the repository's own are higher (d16: 3.55).
"""

from tokgen.zoo.model import Model

PUBLISHED = dict(
    repository="FoundationVision/var", licence="MIT", family="VAR", paper="arXiv:2404.02905"
)
# Of the images at 512 pixels; the file does not tell
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _tokenizer(**more) -> Model:
    return Model(
        system="var_vqvae",
        file="vae_ch160v4096z32.pth",
        parameters=108_948_355,
        size=435_957_260,
        **PUBLISHED,
        **more,
    )


def _generator(depth: int, parameters: int, size: int, fid: float) -> Model:
    """The first four are of 256 pixels."""
    return Model(
        system="var",
        file=f"var_d{depth}.pth",
        parameters=parameters,
        size=size,
        tokenizer="var-tokenizer",
        fid=fid,
        classes="imagenet",
        **PUBLISHED,
    )


MODELS = {
    "var-tokenizer": _tokenizer(),
    "var-tokenizer-512": _tokenizer(pixels=512, configuration={"v_patch_nums": SIDES_512}),
    "var-d16": _generator(16, 310_283_520, 1_243_054_656, 3.30),
    "var-d20": _generator(20, 600_917_136, 2_405_625_984, 2.57),
    "var-d24": _generator(24, 1_033_399_360, 4_135_599_936, 2.09),
    "var-d30": _generator(30, 2_010_020_356, 8_042_166_864, 1.92),
    "var-d36": Model(
        system="var_shared_aln",
        file="var_d36.pth",
        parameters=2_353_893_904,
        size=9_435_995_712,
        tokenizer="var-tokenizer-512",
        pixels=512,
        fid=2.63,
        classes="imagenet",
        **PUBLISHED,
    ),
}
