"""What every source says of itself, held against the protocol."""

import io
import re

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from tests.data import test_online_tokens
from tokgen.config import building
from tokgen.data import (
    captioned,
    folder,
    markov,
    npz,
    online_tokens,
    pixels,
    shapes,
    sources,
    tfds,
    token_header,
    token_shards,
)
from tokgen.interfaces import TokenLayout, UserError

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class TokgenDrawn(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        named = {"image": features.Image(shape=(8, 8, 3)), "label": features.ClassLabel(names="ab")}
        return self.dataset_info_from_configs(features=features.FeaturesDict(named))

    def _split_generators(self, _):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            with io.BytesIO() as file:
                Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
                yield number, {"image": file.getvalue(), "label": number % 2}


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """One source of every kind, by its name."""
    path = tmp_path_factory.mktemp("sources")
    test_online_tokens.pictures(path / "images")
    TokgenDrawn(data_dir=path, file_format="array_record").download_and_prepare()
    parts = {
        split: folder.Source(path / "images", split=split, held_out=0.3)
        for split in token_header.SPLITS
    }
    test_online_tokens.shards(path / "tokens", parts)
    drawn, shards = shapes.Source((8, 8), count=13), token_shards.Source(path / "tokens")
    np.savez(path / "a.npz", arr_0=drawn.batch(range(13)), arr_1=np.arange(13) % 10)
    for name, count in (("drawn", 13), ("shards", len(shards))):
        (path / name).mkdir()
        np.save(path / name / "train.npy", np.zeros((count, 3, 2), np.float32))
    return {
        "folder": parts["train"],
        "one image": folder.OneImage(next((path / "images" / "a").iterdir())),
        "tfds": tfds.Source("tokgen_drawn", data_dir=str(path)),
        "shapes": drawn,
        "npz": npz.Source(path / "a.npz"),
        "archive": npz.Archive(path / "a.npz", classes=shapes.CLASSES),
        "captioned": captioned.Source(drawn, path / "drawn"),
        "captioned tokens": captioned.Source(shards, path / "shards"),
        "online tokens": test_online_tokens.source_of(parts, "train"),
        "token shards": shards,
        "language": markov.mesh(count=5),
    }


KINDS = (
    *("folder", "one image", "tfds", "shapes", "npz", "archive", "captioned", "captioned tokens"),
    *("online tokens", "token shards", "language"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_says_what_the_protocol_has(every, kind):
    source, inner = every[kind], sources.innermost(every[kind])
    assert source.holds in sources.HOLDS and source.holds == inner.holds
    assert isinstance(source.split, str) and source.split
    assert isinstance(source.classes, tuple) and all(isinstance(c, str) for c in source.classes)
    known = (source.fingerprint, *source.earlier)
    assert len(set(known)) == len(known)
    if kind not in ("one image", "archive"):
        assert all(FINGERPRINT.fullmatch(one) for one in known)
    if source.counts is not None:
        assert source.counts.shape == (max(1, len(source.classes)),)
        assert source.counts.sum() == len(source) - len(source.missing)
    assert source.changed == inner.changed and (source.changed > 0) == (inner.holds == "files")
    assert all(isinstance(note, str) for note in source.notes) and not source.missing
    assert all(isinstance(ending, str) for found in source.unread.values() for ending in found)
    assert (source.layout is None) == (source.holds != "tokens" and source.view is None)
    if source.layout is not None:
        assert TokenLayout.from_json(source.layout).to_json() == source.layout and source.views
    assert source.unreadable is inner.unreadable and not len(source.unreadable)


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_as_the_protocol_has_them(every, kind):
    source = every[kind]
    order = np.random.default_rng(0).permutation(len(source))
    for index, record in zip(order, source.__getitems__(order), strict=True):
        again = source[int(index)]
        assert record.keys() == again.keys()
        for name, value in record.items():
            np.testing.assert_array_equal(value, again[name])
        assert 0 <= record["label"] < max(1, len(source.classes))
        assert isinstance(source.name(int(index)), str) and source.name(int(index))
        if source.text_shape is not None:
            assert record["text"].shape == source.text_shape and record["text"].dtype == np.float32
        assert ("text" in record) == (source.text_shape is not None)
        if source.holds == "tokens":
            layout = TokenLayout.from_json(source.layout)
            assert record["tokens"].shape == (len(source.views), layout.length, layout.groups)
            assert record["tokens"].dtype in (np.uint8, np.uint16, np.int32)
            (one,) = source.one_view([int(index)], [len(source.views) - 1])
            np.testing.assert_array_equal(one["tokens"], record["tokens"][-1])
            assert one.keys() == record.keys() and one["label"] == record["label"]
            continue
        if source.holds == "pixels":
            assert record["image"].dtype == np.uint8 and record["image"].ndim == 3
        else:
            assert isinstance(record["image"], bytes)
            form, size = sources.header(source, int(index))
            assert form == "PNG" and size == pixels.decode(record["image"], 3).shape[:2]
        if source.holds == "files":
            with source.open(int(index)) as file:
                assert file.read() == record["image"]


def test_all_sources_of_the_room_are_held(every):
    """Whoever adds one adds it to the test."""
    held = {type(source) for source in every.values()}
    for module in (captioned, folder, markov, npz, online_tokens, shapes, tfds, token_shards):
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, sources.RandomAccess):
                assert found in held


def test_fields_of_a_source_are_its_arguments():
    with pytest.raises(UserError, match="data has no argument 'counts'; did you mean 'count'"):
        building.check(dict(data=dict(name="shapes", counts=50)))
