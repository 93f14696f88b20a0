"""A tiny set, prepared without TensorFlow, is read without TensorFlow."""

import io
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from tests import buckets
from tokgen import cli, interfaces, storage
from tokgen.config import building, reading
from tokgen.data import classes, datasets, loader, pixels, tfds, views


def png(number):
    loader = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(loader, "PNG")
    return loader.getvalue()


class _Generated:
    def _split_generators(self, _):
        return {"train": self._generate_examples(12), "test": self._generate_examples(5)}


class TokgenTiny(_Generated, tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return self.dataset_info_from_configs(
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "label": features.ClassLabel(names=["red", "green", "blue"]),
                }
            )
        )

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(number), "label": number % 3}


class TokgenPlain(_Generated, tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return self.dataset_info_from_configs(
            features=features.FeaturesDict({"image": features.Image(shape=(None, None, 3))})
        )

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(number)}


class TokgenOther(_Generated, tensorflow_datasets.core.GeneratorBasedBuilder):
    """Labels as sets have them: of two kinds, as numbers, unknown ones."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return self.dataset_info_from_configs(
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3)),
                    "coarse_label": features.ClassLabel(num_classes=2),
                    "number": np.int64,
                    "unknown": features.ClassLabel(names=["a", "b"]),
                    "box": features.BBoxFeature(),
                }
            )
        )

    def _generate_examples(self, count):
        box = tensorflow_datasets.features.BBox(0.0, 0.0, 1.0, 1.0)
        for number in range(count):
            labels = {"coarse_label": number % 2, "number": number % 4, "unknown": -1}
            yield number, {"image": png(number), "box": box, **labels}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TokgenTiny, TokgenPlain, TokgenOther):
        builder(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def numbers(source):
    return sorted(int(pixels.decode(source[i]["image"], 3)[0, 0, 0]) for i in range(len(source)))


def test_records_are_the_bytes_of_the_files_and_their_labels(prepared):
    source = tfds.Source("tokgen_tiny", data_dir=prepared)
    assert source.classes == ("red", "green", "blue") and len(source) == 12
    assert numbers(source) == list(range(12))
    for index in range(12):
        record = source[index]
        array = pixels.decode(record["image"], 3)
        np.testing.assert_array_equal(array[..., 0] % 3, record["label"])
    with pytest.raises(IndexError):
        source[12]


def test_splits_and_slices(prepared):
    assert len(tfds.Source("tokgen_tiny", split="held_out", data_dir=prepared)) == 5
    assert len(tfds.Source("tokgen_tiny", split="all", data_dir=prepared)) == 17
    sliced = ("train[:75%]", "train[75%:]")
    train = tfds.Source("tokgen_tiny", splits=sliced, data_dir=prepared)
    other = tfds.Source("tokgen_tiny", split="held_out", splits=sliced, data_dir=prepared)
    assert sorted(numbers(train) + numbers(other)) == list(range(12)) and len(other) == 3
    assert len({train.fingerprint, other.fingerprint, *train.earlier, *other.earlier}) == 4


def test_a_set_without_labels_is_unconditional(prepared):
    source = tfds.Source("tokgen_plain", data_dir=prepared)
    assert source.classes == () and source[3]["label"] == 0


def test_a_set_is_chosen_on_the_command_line(prepared):
    """In the place of the folder of a config, with all that its section held."""
    words = ["name=tfds", "dataset=tokgen_other", "label=coarse_label", f"data_dir={prepared}"]
    settings = reading.load(
        "configs/tokenizer/cifar10_f4.py", [f"data.{word}" for word in reversed(words)]
    )
    building.check(settings)
    sources = {
        split: building.build(settings.data, "data", split=split, order=(), doubtful="drop")
        for split in ("train", "held_out")
    }
    told = classes.told(datasets.called(settings.data), sources)
    assert told == "tokgen_other: 2 classes (0, 1); train 12, held out 5"


def test_a_source_travels_to_another_process(prepared):
    source = tfds.Source("tokgen_tiny", data_dir=prepared)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[7] == source[7] and copy.fingerprint == source.fingerprint


def test_tensorflow_is_never_imported(prepared):
    tfds.Source("tokgen_tiny", data_dir=prepared)
    assert "tensorflow" not in sys.modules


def test_a_label_is_named_or_counted(prepared):
    """By its feature's name; a plain number needs to be told how many there are."""
    coarse = tfds.Source("tokgen_other", label="coarse_label", data_dir=prepared)
    assert coarse.classes == ("0", "1") and {coarse[i]["label"] for i in range(12)} == {0, 1}
    plain = tfds.Source("tokgen_other", label="number", count=4, data_dir=prepared)
    assert plain.classes == ("0", "1", "2", "3") and {plain[i]["label"] for i in range(12)} == {
        *range(4)
    }
    nothing = tfds.Source("tokgen_other", labels="none", data_dir=prepared)
    assert nothing.classes == () and nothing[1]["label"] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "found the labels coarse_label, unknown: choose one, data.label=coarse_label "),
        ({"label": "number"}, "a number .* without names.*data.count=N"),
        ({"label": "number", "count": 3}, "has the number 3, and has 3 classes"),
        ({"label": "unknown"}, "has the unknown -1, that is, none: name other splits"),
        ({"label": "box"}, "must be one whole number"),
        ({"label": "colour"}, "no feature named colour; it has box, coarse_label, image"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_or_dropped(prepared, arguments, named):
    with pytest.raises(interfaces.UserError, match=named):
        tfds.Source("tokgen_other", **arguments, data_dir=prepared)
    source = tfds.Source("tokgen_other", **arguments, doubtful="drop", data_dir=prepared)
    assert source.classes == () and source[3]["label"] == 0
    assert source.notes[0].startswith("the images are read without classes: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dataset": "cifar10"}, "tfds build cifar10 --file_format=array_record --data_dir="),
        ({"dataset": "no_such_set"}, "no_such_set"),
        ({"dataset": "a b/c:d!"}, "a b"),
        ({"dataset": "tokgen_tiny", "splits": ("train", "missing"), "split": "all"}, "missing"),
        ({"dataset": "tokgen_tiny", "splits": ("train",)}, "two parts"),
        ({"dataset": "tokgen_tiny", "split": "test"}, "held_out"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(prepared, arguments, named):
    with pytest.raises(interfaces.UserError, match=named):
        tfds.Source(**arguments, data_dir=prepared)


@pytest.fixture
def damaged(prepared, tmp_path, monkeypatch):
    """A copy of the set, whose training shard is made anew by what it is called with."""
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "set"
    shutil.copytree(pathlib.Path(prepared) / "tokgen_tiny", place / "tokgen_tiny")
    (shard,) = place.rglob("*train*array_record*")

    def of(change):
        content = change(shard.read_bytes())
        shard.unlink()
        if content is not None:
            shard.write_bytes(content)
        return str(place)

    return of


@pytest.mark.parametrize(
    ("change", "why", "lost"),
    [
        (lambda whole: bytes(200) + whole[200:], "cannot be read: Corrupted", 1),
        (lambda whole: whole[: len(whole) // 2], "empty: the shard", 12),
        (lambda whole: b"", "cannot be read: ", 12),
        (lambda whole: None, "cannot be read: .*No such file", 12),
    ],
)
def test_a_damaged_shard_is_images_that_cannot_be_read(prepared, damaged, change, why, lost):
    """To whoever reads it: by name, as damaged files are; the rest of the set is there."""
    place, view = damaged(change), views.fixed("center", (8, 8), 3)
    source = tfds.Source("tokgen_tiny", data_dir=place)
    with pytest.raises(pixels.BrokenImage, match=why):
        source[0]
    assert source.fingerprint != tfds.Source("tokgen_tiny", data_dir=prepared).fingerprint
    both = tfds.Source("tokgen_tiny", split="all", data_dir=place)
    (part,) = loader.once(both, view, batch_size=20)
    assert part["index"].tolist() == list(range(lost, 17))
    names = both.unreadable.names()
    assert names == tuple(f"tokgen_tiny/train+test/{number}" for number in range(lost))
    if lost == len(source):
        with pytest.raises(interfaces.UserError, match="(?s)0 images can be.*tokgen_tiny/train/0"):
            list(loader.once(source, view, batch_size=5))


def test_the_command_says_whether_it_looked_at_the_images(damaged, capsys):
    words = ["data", "tfds:tokgen_tiny", "--data-dir", damaged(lambda whole: whole)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "tokgen_tiny: 3 classes (red, green, blue); train 12, held out 5" in said
    assert "17 images, none of them looked at" in said and "--scan full" in said
    assert "unreadable" not in said and "0 of them" not in said
    damaged(lambda whole: b"")
    assert cli.main([*words, "--scan", "full"]) == 0
    said = capsys.readouterr().out
    assert "train     12 images, 12 unreadable" in said
    assert "17 images decoded, 12 of them cannot be read" in said
    assert said.count("unreadable  tokgen_tiny/train/") == 12


def test_a_set_in_a_bucket_is_read_where_it_lies(prepared, bucket):
    """By array_record's own reader; nothing is copied."""
    for name in storage.sizes(pathlib.Path(prepared)):
        storage.upload(pathlib.Path(prepared, name), storage.path(bucket) / name)
    ours = tfds.Source("tokgen_tiny", data_dir=bucket)
    theirs = tfds.Source("tokgen_tiny", data_dir=prepared)
    assert ours.fingerprint == theirs.fingerprint and ours.classes == theirs.classes
    assert [ours[i] for i in range(12)] == [theirs[i] for i in range(12)]
    for name in storage.sizes(pathlib.Path(prepared)):
        storage.upload(pathlib.Path(prepared, name), storage.path(f"gs://{buckets.BUCKET}/{name}"))
    ours = tfds.Source("tokgen_tiny", data_dir=f"gs://{buckets.BUCKET}")  # the bucket itself
    assert ours[3] == theirs[3]
    with pytest.raises(interfaces.UserError, match="must be prepared as array_record in|none of"):
        tfds.Source("tokgen_none", data_dir=bucket)
    with pytest.raises(interfaces.UserError, match="data_dir s3://bucket/a: need a local path or"):
        tfds.Source("tokgen_tiny", data_dir="s3://bucket/a")


def test_images_that_are_no_archives_must_be_local():
    for source in ("gs://bucket/photographs", "gs://bucket/a.npz", "s3://bucket/a"):
        with pytest.raises(interfaces.UserError, match=f"must be local files; found {source}"):
            datasets.from_path(source, "train")
