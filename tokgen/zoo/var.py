"""VAR (arXiv:2404.02905)."""

from tokgen.zoo.model import Model

WHERE = dict(repository="FoundationVision/var", licence="MIT", paper="arXiv:2404.02905")

MODELS = {
    "var-tokenizer": Model(
        system="var_vqvae",
        file="vae_ch160v4096z32.pth",
        parameters=108_947_971,
        size=435_836_000,
        **WHERE,
    ),
    "var-d16": Model(
        system="var",
        file="var_d16.pth",
        parameters=310_283_520,
        size=1_241_175_000,
        tokenizer="var-tokenizer",
        classes="imagenet",
        fid=3.30,
        **WHERE,
    ),
}
