"""What a score is asked to be, as plain values; and what of it cannot be meant."""

from __future__ import annotations

import dataclasses
import pathlib

from tokgen.checkpoints import checkpoint
from tokgen.evaluation import protocols, sample_parts
from tokgen.interfaces import UserError
from tokgen.sampling import presets


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is scored, against what, and where the result goes.

    Attributes:
        scored: a checkpoint (a work directory or one step), an .npz of images, or a folder of them.
        protocol: a name of protocols.PROTOCOLS.
        out: the folder of the score. What was begun there under the same settings is gone on with.
        reference: a file of tokgen reference, or ADM's .npz; "" where the originals are it.
        assume: the protocol of a reference that does not say its own.
        weights: weight file of a published feature network.
        samples: how many images; 0: as many as the protocol says, or are there; of a
            generator inputs.SAMPLES.
        seed: of what is drawn, and of the intervals.
        batch: images decoded together.
        accept: what is scored all the same, of given_images.ACCEPTED.
        overwrite: whether an earlier score at `out` is replaced.
        reconstruction: whether reconstructions are meant: an error where they cannot be.
        lpips: weight files of LPIPS, trunk and heads, of one or two trunks.
        data, split, labels: the images that a tokenizer reconstructs, in the place of its config's;
            `labels` also says what the class folders of samples mean.
        text: .npz of the conditions of a generator that reads text.
        tokenizer: where the generator's tokenizer lies now.
        precision: of the networks; "" is the preset's, of a tokenizer float32.
        sampling: the generator's preset, and what is in the place of its settings.

    Examples:
        >>> settings = tokgen.ScoreSettings(
        ...     "runs/generator", "local", "scored", reference="reference.npz", samples=2000
        ... )
        >>> settings.seed, settings.sampling.preset
        (0, 'default')
    """

    scored: str
    protocol: str
    out: str
    reference: str = ""
    assume: str = ""
    weights: str = ""
    samples: int = 0
    seed: int = 0
    batch: int = 32
    accept: tuple[str, ...] = ()
    overwrite: bool = False
    reconstruction: bool = False
    lpips: tuple[str, ...] = ()
    data: str = ""
    split: str = "held_out"
    labels: str = ""
    text: str = ""
    tokenizer: str = ""
    precision: str = ""
    sampling: presets.Choice = presets.Choice()


def check(settings: Settings) -> None:
    """Errors of the settings, before anything is loaded."""
    protocol = protocols.named(settings.protocol)
    if not settings.out:
        raise UserError(
            "a score needs --out DIR: what was seen is kept there, to go on after a kill"
        )
    if pathlib.Path(settings.out).is_file():
        raise UserError(f"--out names the folder of a score; {settings.out} is a file")
    place, out = (pathlib.Path(path).resolve() for path in (settings.scored, settings.out))
    if place.is_dir() and (out == place or (place in out.parents and _is_pictures(place))):
        raise UserError(
            f"--out must not lie in what is scored, where it would be taken for a part of it; "
            f"found {settings.out} in {settings.scored}"
        )
    if settings.overwrite and out in place.parents:
        raise UserError(
            f"--overwrite would remove what is scored, {settings.scored}, which lies in --out "
            f"{settings.out}; name another place for the score"
        )
    if settings.samples < 0 or settings.batch < 1 or not 0 <= settings.seed < 2**32:
        raise UserError(
            "--samples must be at least 0, --batch at least 1, --seed in [0, 2**32); found "
            f"{settings.samples}, {settings.batch}, {settings.seed}"
        )
    if not settings.reference and not (protocol.paired or settings.reconstruction):
        raise UserError(
            f"--protocol {settings.protocol} compares with a reference: --reference FILE.npz, "
            "which tokgen reference DATA --out FILE.npz writes"
        )
    if not settings.reference and protocol.extractor == "local":
        raise UserError(
            "the local network lies in a reference: --reference FILE.npz, which tokgen reference "
            "DATA --out FILE.npz writes"
        )


def kind_of(path: str) -> str:
    """ "tokenizer" or "generator" of a checkpoint; "" of samples."""
    place = pathlib.Path(path)
    if place.is_file() or _is_drawn(place):
        return ""
    try:
        step = checkpoint.find(path)
    except UserError as error:
        if place.is_dir():
            return ""
        raise UserError(f"{error}; need that, an .npz of images or a folder of images") from error
    return checkpoint.read_meta(step)["kind"]


def check_kind(settings: Settings) -> str:
    """The kind of what is scored; an error where the settings cannot be meant of it."""
    kind, protocol = kind_of(settings.scored), protocols.named(settings.protocol)
    if settings.lpips and kind != "tokenizer":
        raise UserError("--lpips compares originals with reconstructions: give a tokenizer's")
    if (protocol.paired or settings.reconstruction) and kind != "tokenizer":
        if not kind:
            raise UserError(
                f"--protocol {settings.protocol} scores a tokenizer's reconstructions; "
                f"{settings.scored} holds samples: give the tokenizer's checkpoint"
            )
        raise UserError(f"reconstructions are a tokenizer's; {settings.scored} holds a {kind}")
    return kind


def _is_pictures(place: pathlib.Path) -> bool:
    return not kind_of(str(place)) and not _is_drawn(place)


def _is_drawn(place: pathlib.Path) -> bool:
    """Whether a folder is one that tokgen sample wrote, or is filling."""
    return (place / sample_parts.WHOLE).is_file() or sample_parts.record(place) is not None
