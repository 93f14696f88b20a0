"""Another source with text features beside its images: for decoders, and conditions of generators.

    features/train.npy       [N, T, E], row i belongs to image i of the source's training part
    features/held_out.npy    text features of its held-out part
    features/all.npy         text features of all images, for `tokgen reconstruct`
    features/train_mask.npy  [N, T] of 0 and 1, where a text is; generators read it, padded on the
                             left. Without the file every feature counts

Features are made once, by any text encoder; the files are mapped and not read into memory.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from tokgen import archives, interfaces, storage
from tokgen.data import sources

_SAMPLED = 1024  # rows that a fingerprint reads: the files may be larger than the images


class Features:
    """The rows of one part: `{"text": float32 [T, E]}`, and `"mask"`: bool [T], if there is one."""

    def __init__(self, folder: str | os.PathLike, split: str, images: int):
        storage.local(folder, "features of texts")
        self.path = os.path.join(os.fspath(folder), f"{split}.npy")
        self._text_NTE = _mapped(self.path)
        if len(self._text_NTE) != images:
            raise interfaces.UserError(
                f"{self.path} needs a row of features per image: the source has {images} "
                f"images in its part {split!r}, found {len(self._text_NTE)} rows; make them again, "
                "in the order of the source"
            )
        mask = os.path.join(os.fspath(folder), f"{split}_mask.npy")
        self.shape = self._text_NTE.shape[1:]
        self._mask_NT = None
        if os.path.exists(mask):
            self._mask_NT = _mask(mask, self._text_NTE.shape[:2])

    def __getitem__(self, index: int) -> dict:
        text = {"text": np.array(self._text_NTE[index], np.float32)}
        return text if self._mask_NT is None else text | {"mask": self._mask_NT[index]}

    def fingerprint(self, images: str) -> str:
        """Of the images with that fingerprint together with these features."""
        return _fingerprint(images, self._text_NTE, self._mask_NT)


class Source(sources.Around):
    """What another source gives, and `"text"`: float32 [T, E], and `"mask"`: bool [T].

    Args:
      images: the section of the other source, or the source, of images or of their tokens.
      features: folder with a file per split, such as `train.npy`: float16 or float32.
    """

    def __init__(
        self,
        images: sources.RandomAccess | dict,
        features: str | os.PathLike,
        *,
        split: str = "train",
    ):
        super().__init__(images)
        self.fingerprint = images.fingerprint
        if not len(images):  # nothing is held out, and has no texts
            self.features = None
            return
        self.features = Features(features, split, len(images))
        self.text_shape = self.features.shape
        self.fingerprint = self.features.fingerprint(images.fingerprint)
        self.earlier = tuple(map(self.features.fingerprint, images.earlier))

    def __getitem__(self, index: int) -> dict:
        return self._with_text(self.inner[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records, as the other source gives them."""
        return self._all_with_text(self.inner.__getitems__(indices), indices)

    def one_view(self, indices: Sequence[int], view_B: Sequence[int]) -> list[dict]:
        return self._all_with_text(self.inner.one_view(indices, view_B), indices)

    def _all_with_text(self, records: list[dict], indices: Sequence[int]) -> list[dict]:
        return [
            self._with_text(record, int(index))
            for record, index in zip(records, indices, strict=True)
        ]

    def _with_text(self, record: dict, index: int) -> dict:
        return record | self.features[index]


def _mapped(path: str) -> np.ndarray:
    text_NTE = _array(path)
    if text_NTE.ndim != 3:
        raise interfaces.UserError(
            f"{path} must hold one array [images, length, channels]; found {text_NTE.shape}"
        )
    if text_NTE.dtype not in (np.float16, np.float32):
        raise interfaces.UserError(
            f"{path} must hold float16 or float32; found {text_NTE.dtype}: convert it"
        )
    return text_NTE


def _mask(path: str, shape: tuple[int, int]) -> np.ndarray:
    """bool [N, T], in memory: it is small."""
    found_NT = _array(path)
    if found_NT.shape != shape or not ((found_NT == 0) | (found_NT == 1)).all():
        raise interfaces.UserError(
            f"{path} must hold 0 or 1 for each of the features, {shape}; found {found_NT.dtype} "
            f"{found_NT.shape}"
        )
    mask_NT = found_NT.astype(bool)
    if (mask_NT[:, :-1] & ~mask_NT[:, 1:]).any():
        row = int((mask_NT[:, :-1] & ~mask_NT[:, 1:]).any(axis=1).argmax())
        raise interfaces.UserError(
            f"{path} must be padded on the left, zeros and then ones; row {row} is not: move its "
            "features and mask to the end"
        )
    return mask_NT


def _array(path: str) -> np.ndarray:
    if not os.path.isfile(path):
        raise interfaces.UserError(
            f"text features are needed at {path}; found no file there; save an array [images, "
            "length, channels] with numpy.save, in the order of the images"
        )
    try:
        with np.errstate(over="ignore"):  # of sizes that no file has
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except archives.DAMAGE as error:
        raise interfaces.UserError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(found, np.ndarray):
        raise interfaces.UserError(f"{path} is no .npy file of one array: {type(found).__name__}")
    return found


def _fingerprint(images: str, text_NTE: np.ndarray, mask_NT: np.ndarray | None) -> str:
    """Of the images, the array's form, and all rows of it or as many as are quickly read."""
    digest = hashlib.sha256(f"{images}\0{text_NTE.dtype.str}\0{text_NTE.shape}".encode())
    for index in sources.evenly(len(text_NTE), _SAMPLED):
        digest.update(np.ascontiguousarray(text_NTE[index]).tobytes())
    if mask_NT is not None:
        digest.update(mask_NT.tobytes())
    return digest.hexdigest()


def conditions(path: str) -> interfaces.Text:
    """The conditions of an .npz that `--text` names: features [N, T, E], and their mask [N, T].

    The mask is true to the end of each row: texts are padded on the left.
    """
    try:
        found = archives.arrays(path)
    except interfaces.UserError as error:
        raise interfaces.UserError(
            f"--text needs an .npz file of arrays; found {path}: {error}; save features and mask "
            "with numpy.savez"
        ) from error
    if missing := {"features", "mask"} - set(found):
        raise interfaces.UserError(
            f"--text needs arrays features [N, T, E] and mask [N, T]; {path} has no "
            f"{' and no '.join(sorted(missing))}"
        )
    features_NTE, mask_NT = found["features"], found["mask"]
    numbers = features_NTE.dtype in (np.float16, np.float32) and features_NTE.ndim == 3
    if not numbers or not len(features_NTE) or not np.isfinite(features_NTE).all():
        raise interfaces.UserError(
            "features must be finite float16 or float32 numbers [N, T, E]; found "
            f"{features_NTE.dtype} {features_NTE.shape} in {path}"
        )
    if mask_NT.shape != features_NTE.shape[:2] or not np.isin(mask_NT, (0, 1)).all():
        raise interfaces.UserError(
            f"mask must hold 0 or 1 for each of the features {features_NTE.shape[:2]}; found "
            f"{mask_NT.dtype} {mask_NT.shape} in {path}"
        )
    mask_NT = mask_NT.astype(bool)
    if not mask_NT[:, -1].all() or (mask_NT[:, :-1] & ~mask_NT[:, 1:]).any():
        raise interfaces.UserError(
            f"features are padded on the left, so that every row of the mask ends in 1 and has no "
            f"0 after a 1; found other rows in {path}: move the padding to the front"
        )
    return interfaces.Text(features_NTE.astype(np.float32), mask_NT)
