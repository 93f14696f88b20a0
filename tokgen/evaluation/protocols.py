"""What is compared with what, by name: two figures may be compared only under one protocol.

A protocol fixes the feature network and its layer, how many images are scored, and how those of the
reference were cut and resized. A figure carries its protocol's name.
"""

from __future__ import annotations

import dataclasses
import difflib

from tokgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How figures of one name are made.

    Attributes:
        extractor: the feature network, a name of `backbones.features.known()` or "local".
        metrics: what is reported, names of scoring.METRICS.
        samples: images that the figure is defined for; 0 where any number will do, which is then
            part of what must agree before two results are compared.
        reference: images of the reference; 0: as many as it has.
        split: of the data set that the reference is of.
        crop: how the reference's images were cut and resized: `center` is ADM's.
        paired: whether the reference is the very images that were reconstructed.
        neighbours: k of precision, recall, density and coverage.
        compared: reference images that neighbours are looked for among, at most.
        against: samples of precision and recall; 0 is as many as those. ADM's are all 50,000
            against 10,000: radii, and so both figures, depend on the numbers.
        splits: (images of a split, seed of the shuffle or None) of the Inception Score; 0 is all.
        about: who measures so.
    """

    extractor: str
    metrics: tuple[str, ...]
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


FRECHET = ("fid", "sfid", "is", "precision", "recall")
WIDE = ("kid", "density", "coverage", "fid_infinity", "vendi", "authenticity")
PROTOCOLS = {
    "adm-50k": Protocol(
        "inception",
        (*FRECHET, *WIDE, "is_infinity", "mifid"),
        "50,000 samples against the training set (guided-diffusion evaluator; DiT, VAR, LlamaGen)",
        samples=50_000,
        split="train",
        against=50_000,
    ),
    "val-centercrop-rfid": Protocol(
        "inception",
        ("fid", "sfid", "is", "precision", "recall", "kid"),
        "reconstructions of the 50,000 validation images against themselves (LlamaGen, VAR, TiTok)",
        samples=50_000,
        reference=50_000,
        split="held_out",
        paired=True,
    ),
    "fd-dinov2": Protocol(
        "dinov2",
        ("fid", *WIDE, "precision", "recall"),
        "50,000 samples against the training set in DINOv2 ViT-L/14 (arXiv:2306.04675, EDM2)",
        samples=50_000,
        split="train",
        neighbours=5,
    ),
    "cmmd": Protocol(
        "clip",
        ("cmmd", "kid", "vendi"),
        "CLIP ViT-L/14-336 embeddings, any number of images (arXiv:2401.09603)",
    ),
    "local": Protocol(
        "local",
        (*FRECHET, *WIDE, "cmmd", "is_infinity", "mifid", "classwise", "class_accuracy"),
        "a small network trained on the reference's own images: comparable with itself only",
        neighbours=3,
        splits=(0, None),
    ),
}


def named(name: str) -> Protocol:
    """The protocol of that name."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"protocols are {', '.join(PROTOCOLS)}; found {name!r}{hint}")
    return PROTOCOLS[name]
