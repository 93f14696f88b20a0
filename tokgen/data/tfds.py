"""A prepared tensorflow_datasets set, read without TensorFlow.

`tfds.data_source` reads array_record files with random access; with SkipDecoding the image stays
the bytes of its file, so that tokgen decodes it as it decodes every other image. Preparing a set
does need TensorFlow: the error for a set that isn't there names the command, which makes itself an
environment of its own.
"""

import hashlib

import tensorflow_datasets

from tokgen import interfaces

SPLITS = ("train", "held_out", "all")


class Source:
    """Random access to a prepared set: `{"image": bytes, "label": int}`.

    Args:
      dataset: the TFDS name, `imagenet2012` or `name/config:version`.
      split: `train`, `held_out` or `all`.
      splits: the names that the set has for its train and held-out parts; slices such as
        `train[:90%]` are names too.
      data_dir: where the set was prepared; empty for TFDS's own place.
    """

    classes: tuple[str, ...]

    def __init__(
        self,
        dataset: str,
        *,
        split: str = "train",
        splits: tuple[str, str] = ("train", "test"),
        data_dir: str = "",
    ):
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if len(splits) != 2:
            raise interfaces.UserError(
                f"splits names two parts of the set, train and held-out; found {tuple(splits)}"
            )
        self.dataset = dataset
        self.split = {"train": splits[0], "held_out": splits[1], "all": "+".join(splits)}[split]
        builder = _builder(dataset, data_dir)
        features = builder.info.features
        if "image" not in features:
            raise interfaces.UserError(
                f"the TFDS set {dataset} must have a feature named image; found "
                f"{', '.join(sorted(features))}; choose a set of images"
            )
        labels = features["label"] if "label" in features else None
        self.classes = tuple(getattr(labels, "names", None) or ())
        self._labelled = bool(self.classes)
        try:
            self._records = builder.as_data_source(
                split=self.split,
                file_format=tensorflow_datasets.core.FileFormat.ARRAY_RECORD,
                decoders={"image": tensorflow_datasets.decode.SkipDecoding()},
            )
            self._length = len(self._records)
        except (ValueError, KeyError) as error:  # as TFDS says that it has no such split
            raise interfaces.UserError(
                f"the TFDS set {dataset} has no split {self.split!r}; it has "
                f"{', '.join(sorted(builder.info.splits))}; name two of them in splits ({error})"
            ) from error
        if not self._length:
            raise interfaces.UserError(f"no images in the split {self.split!r} of {dataset}")
        self.fingerprint = _fingerprint(builder.info, self.split)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        record = self._records[range(self._length)[index]]
        return {"image": record["image"], "label": int(record["label"]) if self._labelled else 0}

    def name(self, index: int) -> str:
        """Set, split and number."""
        return f"{self.dataset}/{self.split}/{index}"


def _builder(dataset: str, data_dir: str):
    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=data_dir or None)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        where = f" in {data_dir}" if data_dir else ""
        raise interfaces.UserError(
            f"no TFDS set is called {dataset!r}, and none of that name is prepared{where}; "
            "look at tensorflow.org/datasets/catalog, or read a folder of images instead"
        ) from error
    except (ValueError, AssertionError) as error:  # TFDS's parser of names
        raise interfaces.UserError(f"{dataset!r} is no TFDS name: {error}") from error
    # TFDS looks for its default file format unless told, and a set that is absent looks like one
    # that is there as tfrecord: ask what the folder holds.
    formats = builder.info.available_file_formats() if builder.info.splits else set()
    if tensorflow_datasets.core.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(form.value for form in formats)) or "nothing"
        place = f" --data_dir={data_dir}" if data_dir else ""
        raise interfaces.UserError(
            f"the TFDS set {dataset} must be prepared as array_record in {builder.data_dir}; found "
            f"{found}. Prepare it once, with\n"
            "  uv run --no-project --with tensorflow-cpu --with tensorflow-datasets "
            f"--with array_record tfds build {dataset} --file_format=array_record{place}"
        )
    return builder


def _fingerprint(info, split: str) -> str:
    shape = [
        (name, part.num_examples, part.num_bytes) for name, part in sorted(info.splits.items())
    ]
    return hashlib.sha256(repr((info.full_name, split, shape)).encode()).hexdigest()
