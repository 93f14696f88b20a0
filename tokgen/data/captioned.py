"""Images of another source with text features beside them, for decoders that read text.

    features/train.npy       [N, T, E], row i belongs to image i of the source's training part
    features/held_out.npy    the same of its held-out part
    features/all.npy         the same of all images, for `tokgen reconstruct`

Features are made once, by any text encoder; the files are mapped and not read into memory.
"""

import hashlib
import os

import numpy as np

from tokgen import interfaces

_SAMPLED = 1024  # rows that a fingerprint reads: the files may be larger than the images


class Source:
    """What `images` gives, and `"text"`: float32 [T, E].

    Args:
      images: the section of another source, or the source.
      features: folder with a file per split, such as `train.npy`: float16 or float32.
    """

    classes: tuple[str, ...]

    def __init__(self, images, features: str | os.PathLike, *, split: str = "train"):
        self.images, self.classes = images, images.classes
        self.path = os.path.join(os.fspath(features), f"{split}.npy")
        self._text_NTE = _mapped(self.path)
        if len(self._text_NTE) != len(images):
            raise interfaces.UserError(
                f"{self.path} needs a row of features per image: the source has {len(images)} "
                f"images in its part {split!r}, found {len(self._text_NTE)} rows; make them again, "
                "in the order of the source"
            )
        self.fingerprint = _fingerprint(images.fingerprint, self._text_NTE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {**self.images[index], "text": np.array(self._text_NTE[index], np.float32)}

    def name(self, index: int) -> str:
        """The other source's name of the image."""
        return self.images.name(index)


def _mapped(path: str) -> np.ndarray:
    if not os.path.isfile(path):
        raise interfaces.UserError(
            f"text features are needed at {path}; found no file there; save an array [images, "
            "length, channels] with numpy.save, in the order of the images"
        )
    try:
        text_NTE = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise interfaces.UserError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(text_NTE, np.ndarray) or text_NTE.ndim != 3:
        raise interfaces.UserError(
            f"{path} must hold one array [images, length, channels]; found "
            f"{getattr(text_NTE, 'shape', type(text_NTE).__name__)}"
        )
    if text_NTE.dtype not in (np.float16, np.float32):
        raise interfaces.UserError(
            f"{path} must hold float16 or float32; found {text_NTE.dtype}: convert it"
        )
    return text_NTE


def _fingerprint(images: str, text_NTE: np.ndarray) -> str:
    """Of the images, the array's form, and all rows of it or as many as are quickly read."""
    digest = hashlib.sha256(f"{images}\0{text_NTE.dtype.str}\0{text_NTE.shape}".encode())
    count = min(len(text_NTE), _SAMPLED)
    for index in np.arange(count) * len(text_NTE) // max(count, 1):
        digest.update(np.ascontiguousarray(text_NTE[index]).tobytes())
    return digest.hexdigest()
