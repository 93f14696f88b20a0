"""TiTok (arXiv:2406.07550; in one stage arXiv:2501.07730): tokens of one dimension."""

from tokgen.zoo.model import Model

FAMILY = dict(licence="Apache-2.0", family="TiTok")
PAPER, ONE_STAGE = "arXiv:2406.07550", "arXiv:2501.07730"


def _tokenizer(size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="titok_legacy",
        repository="fun-research/TiTok",
        file=f"tokenizer_titok_{size}.bin",
        parameters=parameters,
        size=nbytes,
        paper=PAPER,
        fid=fid,
        **FAMILY,
    )


def _one_stage(system: str, form: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system=system,
        repository=f"yucornetto/tokenizer_titok_{form}_imagenet",
        file="model.safetensors",
        parameters=parameters,
        size=nbytes,
        paper=ONE_STAGE,
        fid=fid,
        **FAMILY,
    )


def _generator(system: str, size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system=system,
        repository="fun-research/TiTok",
        file=f"generator_titok_{size}.bin",
        parameters=parameters,
        size=nbytes,
        paper=PAPER,
        tokenizer=f"titok-tokenizer-{size}",
        fid=fid,
        classes="imagenet",
        **FAMILY,
    )


MODELS = {
    "titok-tokenizer-l32": _tokenizer("l32", 641_054_735, 2_564_218_940, 2.21),
    "titok-tokenizer-b64": _tokenizer("b64", 204_814_095, 819_256_380, 1.70),
    "titok-tokenizer-s128": _tokenizer("s128", 83_674_639, 334_698_556, 1.71),
    "titok-tokenizer-bl64-vq": _one_stage(
        "titok_onestage_vq", "bl64_vq8k", 390_016_148, 1_560_064_592, 2.06
    ),
    "titok-tokenizer-bl128-vq": _one_stage(
        "titok_onestage_vq", "bl128_vq8k", 390_179_988, 1_560_719_952, 1.49
    ),
    "titok-tokenizer-sl256-vq": _one_stage(
        "titok_onestage_vq", "sl256_vq8k", 330_260_884, 1_321_043_536, 1.03
    ),
    "titok-tokenizer-ll32-vae": _one_stage(
        "titok_onestage_vae", "ll32_vae_c16", 606_879_604, 2_427_518_416, 1.61
    ),
    "titok-tokenizer-bl64-vae": _one_stage(
        "titok_onestage_vae", "bl64_vae_c16", 389_418_100, 1_557_672_400, 1.25
    ),
    "titok-tokenizer-bl128-vae": _one_stage(
        "titok_onestage_vae", "bl128_vae_c16", 389_581_940, 1_558_327_760, 0.84
    ),
    "titok-l32": _generator("titok_imagebert", "l32", 177_202_432, 708_809_728, 2.77),
    "titok-b64": _generator("titok_imagebert", "b64", 177_227_008, 708_908_032, 2.48),
    "titok-s128": _generator("titok_uvit", "s128", 294_990_848, 1_179_963_392, 1.97),
}
