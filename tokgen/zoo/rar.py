"""RAR (arXiv:2411.00776): generators over the tokens of MaskGIT's VQGAN in its PyTorch form."""

from tokgen.zoo.model import Model


def _generator(size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="rar",
        repository="yucornetto/RAR",
        file=f"rar_{size}.bin",
        parameters=parameters,
        size=nbytes,
        licence="Apache-2.0",
        family="RAR",
        paper="arXiv:2411.00776",
        tokenizer="maskgit-vqgan",
        fid=fid,
        classes="imagenet",
    )


MODELS = {
    "rar-b": _generator("b", 260_923_648, 1_043_822_726, 1.95),
    "rar-l": _generator("l", 461_668_352, 1_846_801_542, 1.70),
    "rar-xl": _generator("xl", 955_425_024, 3_821_700_096, 1.50),
    "rar-xxl": _generator("xxl", 1_498_520_704, 5_994_082_816, 1.48),
}
