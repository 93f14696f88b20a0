"""What is compared with what, by name: two values may be compared only under one protocol.

A protocol fixes the feature network and its layer, how many images are scored, and how those of the
reference were cut and resized. A result carries its protocol's name.
"""

from __future__ import annotations

import dataclasses

from tokgen import choices


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How values under one name are made.

    Attributes:
        extractor: the feature network, a name of `backbones.features.known()` or "local".
        samples: images that it is defined for; 0 where any number will do, which is then
            part of what must agree before two results are compared.
        reference: images of the reference; 0: as many as it has.
        split: of the data set that the reference is of.
        crop: how the reference's images were cut and resized: `center` is ADM's.
        paired: whether the reference is the very images that were reconstructed.
        neighbours: k of precision, recall, density and coverage.
        compared: reference images that neighbours are looked for among, at most.
        against: samples of precision and recall; 0 is as many as those. ADM's are all 50,000
            against 10,000: radii, and so both metrics, depend on the numbers.
        splits: (images of a split, seed of the shuffle or None) of the Inception Score; 0 is all.
        about: who measures so.
        metrics: what is reported, by name; () is every metric that names the protocol
            (tokgen/metrics/).
    """

    extractor: str
    about: str
    samples: int = 0
    reference: int = 0
    split: str = ""
    crop: str = "center"
    paired: bool = False
    neighbours: int = 3
    compared: int = 10_000
    against: int = 0
    splits: tuple[int, int | None] = (5000, None)
    metrics: tuple[str, ...] = ()


PROTOCOLS = {
    "adm-50k": Protocol(
        "inception",
        "50,000 samples against the training set (guided-diffusion evaluator; DiT, VAR, LlamaGen)",
        samples=50_000,
        split="train",
        against=50_000,
    ),
    "val-centercrop-rfid": Protocol(
        "inception",
        "reconstructions of the 50,000 validation images against themselves (LlamaGen, VAR, TiTok)",
        samples=50_000,
        reference=50_000,
        split="held_out",
        paired=True,
    ),
    "fd-dinov2": Protocol(
        "dinov2",
        "50,000 samples against the training set in DINOv2 ViT-L/14 (arXiv:2306.04675, EDM2)",
        samples=50_000,
        split="train",
        neighbours=5,
    ),
    "cmmd": Protocol(
        "clip",
        "CLIP ViT-L/14-336 embeddings, any number of images (arXiv:2401.09603)",
    ),
    "local": Protocol(
        "local",
        "a small network trained on the reference's own images: comparable with itself only",
        neighbours=3,
        splits=(0, None),
    ),
}


def named(name: str) -> Protocol:
    """The protocol of that name."""
    return choices.named(PROTOCOLS, name, "--protocol")
