"""A prepared tensorflow_datasets set, read without TensorFlow.

`tfds.data_source` reads array_record files with random access; with SkipDecoding the image stays
the bytes of its file, so that tokgen decodes it as it decodes every other image. Preparing a set
does need TensorFlow: the error for a set that isn't there names the command, which makes itself an
environment of its own.
"""

import contextlib
import functools
import hashlib
import os

import numpy as np
import tensorflow_datasets

from tokgen import interfaces, storage
from tokgen.data import pixels, sources

SPLITS = ("train", "held_out", "all")
LABELS = ("feature", "none")
DOUBTFUL = ("refuse", "drop")
_LOOKED = 16  # records whose labels are looked at before anything is done
_HASHED = 256  # records that a fingerprint reads


class Source(sources.RandomAccess):
    """Random access to a prepared set: `{"image": bytes, "label": int}`.

    Args:
      dataset: the TFDS name, `imagenet2012` or `name/config:version`.
      split: `train`, `held_out` or `all`.
      splits: the names that the set has for its train and held-out parts; slices such as
        `train[:90%]` are names too.
      data_dir: where the set was prepared; empty for TFDS's own place.
      label: the feature that is the label; empty for `label`, where there is one.
      count: how many classes a label has that says neither their names nor their number.
      labels: `feature`, or `none`.
      doubtful: labels that are there and cannot be read: `refuse` or `drop` them.
    """

    def __init__(
        self,
        dataset: str,
        *,
        split: str = "train",
        splits: tuple[str, str] = ("train", "test"),
        data_dir: str = "",
        label: str = "",
        count: int = 0,
        labels: str = "feature",
        doubtful: str = "refuse",
    ):
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if len(splits) != 2:
            raise interfaces.UserError(
                f"splits names two parts of the set, train and held-out; found {tuple(splits)}"
            )
        if labels not in LABELS or doubtful not in DOUBTFUL or count < 0:
            raise interfaces.UserError(
                f"labels must be one of {', '.join(LABELS)}, doubtful one of "
                f"{', '.join(DOUBTFUL)} and count at least 0; found {labels!r}, {doubtful!r}, "
                f"{count}"
            )
        self.dataset = dataset
        self.split = {"train": splits[0], "held_out": splits[1], "all": "+".join(splits)}[split]
        builder = _builder(dataset, data_dir)
        features = builder.info.features
        if not hasattr(features, "keys") or "image" not in features:
            found = ", ".join(sorted(features)) if hasattr(features, "keys") else str(features)
            raise interfaces.UserError(
                f"the TFDS set {dataset} must have a feature named image; found {found}; choose a "
                "set of images"
            )
        try:
            self._label, self.classes = _classes(dataset, features, label, count, labels)
        except interfaces.UserError as error:
            if doubtful != "drop":
                raise
            self._label, self.classes = "", ()
            self.notes = (f"the images are read without classes: {error}",)
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
        self._look(doubtful)
        self.earlier = (_fingerprint(builder.info, self.split),)  # as earlier versions had it

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the set as it says of itself, and of some of its images, evenly over the split."""
        digest = hashlib.sha256(self.earlier[0].encode())
        for index in sources.evenly(self._length, _HASHED).tolist():
            try:
                record = self._record(index)
                digest.update(hashlib.sha256(record["image"]).digest())
            except pixels.BrokenImage:  # it is told when it is read
                digest.update(b"unreadable")
        return digest.hexdigest()

    def _look(self, doubtful: str) -> None:
        """Refuse a split without labels before anything is made of it, or leave them out."""
        if not self._label:
            return
        count = min(_LOOKED, self._length)
        try:
            for n in range(count):
                with contextlib.suppress(pixels.BrokenImage):  # it is told when it is read
                    self[n * self._length // count]
        except interfaces.UserError as error:
            if doubtful != "drop":
                raise
            self._label, self.classes = "", ()
            self.notes = (f"the images are read without classes: {error}",)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        record = self._record(range(self._length)[index])
        return {"image": record["image"], "label": self._label_of(record, index)}

    def _record(self, index: int) -> dict:
        """What lies in the set's shards; Unavailable where one of them is damaged or gone."""
        try:
            record = self._records[index]
        except (RuntimeError, IndexError) as error:  # as array_record says it
            raise sources.Unavailable(f"its record cannot be read: {error}") from error
        wanted = ("image", self._label) if self._label else ("image",)
        if any(record[name] is None for name in wanted):  # a shard that was cut off gives such
            raise sources.Unavailable("its record is empty: the shard that holds it is damaged")
        return record

    def _label_of(self, record: dict, index: int) -> int:
        if not self._label:
            return 0
        label = int(record[self._label])
        if 0 <= label < len(self.classes):
            return label
        what = "that is, none" if label == -1 else f"and has {len(self.classes)} classes"
        raise interfaces.UserError(
            f"{self.name(index)} has the {self._label} {label}, {what}: name other splits "
            "(data.splits, in commands --splits), or say that classes do not matter, "
            "data.labels=none (in commands --labels none)"
        )

    def name(self, index: int) -> str:
        """Set, split and number."""
        return f"{self.dataset}/{self.split}/{index}"


def _classes(
    dataset: str,
    features: tensorflow_datasets.features.FeaturesDict,
    label: str,
    count: int,
    labels: str,
) -> tuple[str, tuple[str, ...]]:
    """(the feature that is the label, its classes); "" and none where there are no labels."""
    if labels == "none":
        return "", ()
    named = {
        name: feature
        for name, feature in sorted(features.items())
        if isinstance(feature, tensorflow_datasets.features.ClassLabel)
    }
    if not label and "label" not in features:
        if not named:
            return "", ()
        raise interfaces.UserError(
            f"the TFDS set {dataset} has no feature named label; found the labels "
            f"{', '.join(named)}: choose one, data.label={next(iter(named))} (in commands "
            "--label), or say that classes do not matter, data.labels=none (in commands "
            "--labels none)"
        )
    label = label or "label"
    if label not in features:
        raise interfaces.UserError(
            f"the TFDS set {dataset} has no feature named {label}; it has "
            f"{', '.join(sorted(features))}: name one of them as data.label (in commands "
            "--label)"
        )
    feature = features[label]
    names = tuple(getattr(feature, "names", None) or ())
    if names:
        return label, names
    shape = getattr(feature, "shape", None)
    kind = np.dtype(getattr(feature, "np_dtype", object))
    if isinstance(feature, tensorflow_datasets.features.FeaturesDict) or shape != ():
        kind = np.dtype(object)
    if kind.kind not in "iu":
        raise interfaces.UserError(
            f"the feature {label} of the TFDS set {dataset} must be one whole number, the class; "
            f"found {feature}; choose another one as data.label, or say data.labels=none "
            "(in commands --label and --labels none)"
        )
    count = count or int(getattr(feature, "num_classes", None) or 0)
    if not count:
        raise interfaces.UserError(
            f"the feature {label} of the TFDS set {dataset} is a number ({kind}) without names, "
            "and nothing says how many classes there are: data.count=N says that they are 0 to "
            "N - 1, data.labels=none (in commands --labels none) that classes do not matter"
        )
    return label, tuple(map(str, range(count)))


def _builder(dataset: str, data_dir: str):
    place = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    if place:  # sets lie in folders of it, so a bucket itself will do
        storage.path(f"{place}/{dataset}" if storage.is_remote(place) else place, "data_dir")
    with storage.reached(place):
        return _prepared(dataset, data_dir)


def _prepared(dataset: str, data_dir: str):
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
