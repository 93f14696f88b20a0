"""NPP, next patch prediction (arXiv:2412.15321): generators in LlamaGen's form, of its tokens.

Neither the code nor the weights state a licence.
"""

from tokgen.zoo.model import Model


def _generator(size: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="llamagen_c2i",
        repository="pytttttt/LlamaGen-NPP",
        file=f"c2i_{size}_256.pt",
        parameters=parameters,
        size=nbytes,
        licence="not stated",
        family="NPP",
        paper="arXiv:2412.15321",
        tokenizer="llamagen-tokenizer",
        fid=fid,
        classes="imagenet",
    )


MODELS = {
    "npp-b": _generator("B", 110_888_448, 443_553_792, 4.47),
    "npp-l": _generator("L", 342_910_976, 1_371_643_904, 2.76),
    "npp-xl": _generator("XL", 774_699_520, 3_098_798_080, 2.65),
    "npp-xxl": _generator("XXL", 1_410_972_672, 5_643_890_688, 2.55),
}
