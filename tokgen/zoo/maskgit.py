"""MaskGIT (arXiv:2202.04200): in its Flax form, and its tokenizer in PyTorch, which RAR uses.

The Flax files lie in a bucket of Google's that states no terms; the code's are Apache-2.0.
"""

from tokgen.zoo.model import Model

BUCKET = "https://storage.googleapis.com/maskgit-public/checkpoints"
FAMILY = dict(family="MaskGIT", paper="arXiv:2202.04200")
TOKENIZER = dict(parameters=54_515_587, size=218_062_348)


def _flax(system: str, file: str, **more) -> Model:
    return Model(
        system=system,
        file=file,
        address=f"{BUCKET}/{file}",
        licence="Apache-2.0 (code)",
        **FAMILY,
        **more,
    )


MODELS = {
    "maskgit-vqgan": Model(
        system="maskgit_vqgan",
        repository="fun-research/TiTok",
        file="maskgit-vqgan-imagenet-f16-256.bin",
        licence="Apache-2.0",
        fid=2.28,
        **FAMILY,
        **TOKENIZER,
    ),
    "maskgit-tokenizer-256": _flax(
        "maskgit_tokenizer", "tokenizer_imagenet256_checkpoint", fid=2.28, **TOKENIZER
    ),
    "maskgit-tokenizer-512": _flax(
        "maskgit_tokenizer",
        "tokenizer_imagenet512_checkpoint",
        fid=1.97,
        pixels=512,
        overrides=("view.size=512,512",),
        **TOKENIZER,
    ),
    "maskgit-256": _flax(
        "maskgit_transformer",
        "maskgit_imagenet256_checkpoint",
        parameters=172_457_193,
        size=689_828_772,
        tokenizer="maskgit-tokenizer-256",
        fid=6.18,
        classes="imagenet",
    ),
    "maskgit-512": _flax(
        "maskgit_transformer",
        "maskgit_imagenet512_checkpoint",
        parameters=173_047_017,
        size=692_188_068,
        tokenizer="maskgit-tokenizer-512",
        pixels=512,
        fid=7.32,
        classes="imagenet",
    ),
}
