"""Reference statistics: what samples are compared with, and everything that must agree first.

A reference is an .npz: mean and covariance of each layer, the features of some images for what
needs neighbours, the local network where that is what measures, and a `record` in JSON that says of
which images, how cut, by which network. It holds a checksum of every array. Files of others (ADM,
pytorch-fid) have no record: `--assume PROTOCOL` says by hand what they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from tokgen import archives, records
from tokgen.data import npz
from tokgen.evaluation import feature_extractors, protocols
from tokgen.interfaces import UserError
from tokgen.metrics import moments as moments_

FORMAT = 1
IMAGENET = 1_281_167  # training images: what ADM's statistics are of
KEPT = 10_000  # images whose features a reference keeps
# Arrays of ADM's references, and of pytorch-fid's, which has the first two only
ADM = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of a set of images.

    Attributes:
        record: what they are of; see `check`.
        moments: layer -> Moments, float64.
        features: layer -> float32 [n, D] of some of the images, in a mixed order.
        index_n: which of the data set these are; label_n their classes, where it has any.
        network: arrays of the local network by path; empty where a published one measures.
    """

    path: pathlib.Path
    record: dict
    moments: dict[str, moments_.Moments]
    features: dict[str, np.ndarray]
    index_n: np.ndarray
    label_n: np.ndarray
    network: dict[str, np.ndarray]

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        return self.record["digest"]


def save(
    path: pathlib.Path,
    record: Mapping,
    moments: Mapping[str, moments_.Moments],
    features: Mapping[str, np.ndarray],
    index_n: np.ndarray,
    label_n: np.ndarray,
    network: Mapping[str, np.ndarray],
) -> None:
    """Write a reference; it appears whole or not at all."""
    arrays = {"index": index_n, "label": label_n}
    for layer, found in moments.items():
        arrays |= {f"moments/{layer}/{name}": array for name, array in found.arrays().items()}
    arrays |= {f"features/{layer}": feature_nD for layer, feature_nD in features.items()}
    arrays |= {f"network/{name}": array for name, array in network.items()}
    record = {**record, "format": FORMAT, "checksums": {n: _sum(a) for n, a in arrays.items()}}
    record["digest"] = _digest(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, record=np.array(json.dumps(record)), **arrays)
    part.replace(path)


def read(path: str | pathlib.Path, assume: str = "") -> Reference:
    """A reference of ours; or with `assume`, a plain one that is taken for a protocol's."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no reference at {path}: make one with tokgen reference DATA --out {path}")
    try:
        with archives.opened(path) as archive:
            names = set(archives.names(archive))
        # images of ADM's references are read when they are needed
        arrays = archives.arrays(path, () if "record" in names else ("arr_0", "arr_1"))
    except UserError as error:
        raise UserError(f"the reference {path} is damaged or no .npz: {error}") from error
    if "record" in arrays:
        return _ours(path, arrays, assume)
    if not {"mu", "sigma"} <= names:
        raise UserError(_not_statistics(path, names))
    return _plain(path, arrays, assume)


def is_one(path: pathlib.Path) -> bool:
    """Whether a file is a reference of ours, by its members."""
    try:
        with archives.opened(path) as archive:
            return {"record", "index"} <= set(archives.names(archive))
    except UserError:
        return False


def _not_statistics(path: pathlib.Path, names: set[str]) -> str:
    there = ", ".join(sorted(names)[:5]) or "nothing"
    if "arr_0" in names:
        return (
            f"the reference {path} holds images (arr_0) and no statistics; need means and "
            f"covariances: make them with tokgen reference {path} --out FILE.npz; or were samples "
            "and --reference swapped?"
        )
    return f"the reference {path} holds no statistics; found {there}"


def _ours(path: pathlib.Path, arrays: dict, assume: str) -> Reference:
    try:
        record = records.checked(records.parsed(str(arrays.pop("record"))))
        digest, sums = record.pop("digest"), record["checksums"]
        damaged = [name for name in sums if name not in arrays or _sum(arrays[name]) != sums[name]]
        if digest != _digest(record) or damaged or set(sums) != set(arrays):
            raise ValueError(f"checksum of {', '.join(damaged[:3]) or 'its record'}")
        if record["format"] != FORMAT:
            raise UserError(f"{path} has format {record['format']}; this tokgen reads {FORMAT}")
        record["digest"] = digest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the reference {path} is damaged: {error} does not match; make it again or restore a "
            "copy"
        ) from error
    if assume and assume != record["protocol"]:
        raise UserError(
            f"--assume is for files without a record; {path} says that it is of the protocol "
            f"{record['protocol']}, not {assume}"
        )
    try:
        layers = list(record["layers"])
        return Reference(
            path,
            record,
            {n: moments_.Moments.from_arrays(below(f"moments/{n}/", arrays)) for n in layers},
            {n: arrays[f"features/{n}"] for n in layers if f"features/{n}" in arrays},
            arrays["index"],
            arrays["label"],
            below("network/", arrays),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the reference {path} is not whole ({error!r:.200}); make it again"
        ) from error


def _plain(path: pathlib.Path, arrays: dict, assume: str) -> Reference:
    """ADM's statistics and pytorch-fid's, which say nothing of themselves."""
    if not assume:
        raise UserError(
            f"{path} holds statistics without a record of what they are of; if you know that they "
            f"fit, say --assume {' or '.join(_with_inception())}"
        )
    protocol = protocols.named(assume)
    if protocol.extractor != "inception":
        raise UserError(
            f"--assume {assume} takes features of {protocol.extractor}; plain mu and sigma are of "
            f"Inception: --assume {' or '.join(_with_inception())}"
        )
    moments = {}
    for layer, (mean, covariance) in ADM.items():
        if mean not in arrays or covariance not in arrays:
            continue
        found = [arrays[name] for name in (mean, covariance)]
        if any(array.dtype.kind not in "fiu" for array in found):
            kinds = " and ".join(str(array.dtype) for array in found)
            raise UserError(f"{mean} and {covariance} of {path} must hold numbers; found {kinds}")
        mean_D, covariance_DD = (array.astype(np.float64) for array in found)
        if mean_D.ndim != 1 or covariance_DD.shape != 2 * mean_D.shape:
            raise UserError(
                f"{mean} and {covariance} of {path} must be [D] and [D, D]; found "
                f"{mean_D.shape} and {covariance_DD.shape}"
            )
        if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
            raise UserError(f"{mean} or {covariance} of {path} is not finite: it is damaged")
        moments[layer] = moments_.Moments.from_covariance(mean_D, covariance_DD, IMAGENET)
    images = images_of(path)
    record = {
        "protocol": assume,
        "assumed": True,
        "dataset": path.name,
        "layers": {layer: len(found.mean_D) for layer, found in moments.items()},
        "count": IMAGENET,
        **({} if images is None else {"size": list(images.size)}),
        "digest": archives.sha256(path),
    }
    none = np.zeros(0, np.int64)
    return Reference(path, record, moments, {}, none, none, {})


def replaced(reference: Reference, features: Mapping[str, np.ndarray]) -> Reference:
    """The reference with features of some images."""
    return dataclasses.replace(reference, features=dict(features))


def images_of(path: pathlib.Path) -> npz.Archive | None:
    """The images that ADM's references hold beside their statistics."""
    with archives.opened(path) as archive:
        return npz.Archive(path) if "arr_0" in archives.names(archive) else None


def _with_inception() -> list[str]:
    table = protocols.PROTOCOLS.items()
    return [name for name, protocol in table if protocol.extractor == "inception"]


def check(
    reference: Reference,
    name: str,
    extractor: feature_extractors.Extractor,
    *,
    size: tuple[int, int],
    count: int,
) -> None:
    """One error that names every difference between a reference and what is compared with it."""
    protocol, record = protocols.named(name), reference.record
    wrong = []

    def differ(what: str, needed: object, found: object) -> None:
        if needed != found:
            wrong.append(f"{what}: need {needed}, found {found}")

    differ("protocol", name, record["protocol"])
    if not record.get("assumed"):
        theirs = record["extractor"]
        differ("feature network", extractor.name, theirs["name"])
        if extractor.name == theirs["name"]:
            mine = extractor.record["fingerprint"][:16]
            differ(f"weights of {extractor.name}", mine, theirs["fingerprint"][:16])
        differ("crop", protocol.crop, record["crop"])
        if protocol.split:
            differ("split", protocol.split, record["split"])
        if protocol.samples:  # published values are of whole splits
            available = record.get("available", record["count"])
            differ("images of its split", available, record["count"])
        if protocol.reference:
            differ("images of the reference", protocol.reference, record["count"])
    if "size" in record:
        differ("size of the images", "x".join(map(str, size)), "x".join(map(str, record["size"])))
    if not reference.moments:
        wrong.append("layers: it has none")
    for layer, width in record["layers"].items():
        if layer in WIDTHS.get(extractor.name, {}):
            differ(f"width of the layer {layer}", WIDTHS[extractor.name][layer], width)
    first = extractor.layers[0]
    if first not in record["layers"]:
        wrong.append(f"layer: need {first}, found {', '.join(record['layers']) or 'none'}")
    if protocol.samples:
        differ("samples", protocol.samples, count)
    if wrong:
        raise UserError(
            f"{reference.path} is no reference for this comparison under {name}; "
            + "; ".join(wrong)
            + ": use a reference that was made so, or make one with tokgen reference"
        )


WIDTHS = {"inception": {"pool3": 2048, "spatial": 2023}}


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _sum(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    text = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(text + array.tobytes()).hexdigest()[:32]


def _digest(record: Mapping) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
