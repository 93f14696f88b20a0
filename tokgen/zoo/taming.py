"""VQGAN (arXiv:2012.09841), two tokenizers, on a server that states no terms.

Their files hold discriminators and the state of optimizers, too: their sizes are the server's.
"""

from tokgen.zoo.model import Model


def _tokenizer(folder: str, parameters: int, nbytes: int, fid: float) -> Model:
    return Model(
        system="taming_vqgan",
        file="last.ckpt",
        address=f"https://heibox.uni-heidelberg.de/d/{folder}/",
        parameters=parameters,
        size=nbytes,
        licence="MIT (code)",
        family="VQGAN",
        paper="arXiv:2012.09841",
        fid=fid,
        unknown="opaque",
    )


MODELS = {
    "vqgan-1024": _tokenizer("8088892a516d4e3baf92", 72_141_699, 957_954_257, 7.94),
    "vqgan-16384": _tokenizer("a7530b09fed84f80a887", 76_073_859, 980_092_370, 4.98),
}
