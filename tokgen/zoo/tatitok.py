"""TA-TiTok (arXiv:2501.07730): TiTok's tokenizers in one stage, whose decoder reads a caption."""

from tokgen.zoo.model import Model


def _tokenizer(form: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system=f"tatitok_{form.split('_')[1]}",
        repository=f"turkeyju/tokenizer_tatitok_{form}",
        file="model.safetensors",
        parameters=parameters,
        size=nbytes,
        licence="Apache-2.0",
        family="TA-TiTok",
        paper="arXiv:2501.07730",
        fid=fid,
        text="CLIP ViT-L/14-336, 77 x 768",
    )


MODELS = {
    "tatitok-tokenizer-bl32-vq": _tokenizer("bl32_vq", 390_800_532, 1_563_202_128, 3.95),
    "tatitok-tokenizer-bl64-vq": _tokenizer("bl64_vq", 390_882_452, 1_563_529_808, 2.43),
    "tatitok-tokenizer-bl128-vq": _tokenizer("bl128_vq", 391_046_292, 1_564_185_168, 1.53),
    "tatitok-tokenizer-bl32-vae": _tokenizer("bl32_vae", 390_202_484, 1_560_809_936, 1.53),
    "tatitok-tokenizer-bl64-vae": _tokenizer("bl64_vae", 390_284_404, 1_561_137_616, 1.47),
    "tatitok-tokenizer-sl128-vae": _tokenizer("sl128_vae", 330_275_188, 1_321_100_752, 0.90),
}
