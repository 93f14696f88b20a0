"""Tokens made while training are those that shards of the same views would have given."""

import io

import numpy as np
import pytest
from PIL import Image

from tokgen import interfaces
from tokgen.data import (
    captioned,
    folder,
    loader,
    online_tokens,
    shapes,
    token_header,
    token_shards,
    token_writer,
    views,
)

SIZE, GRID, VOCAB = (16, 24), (4, 6), (97, 31)
VIEWS = ("flip", "center", "mirrored_middle", "bottom_left")
LAYOUT = {"vocab": list(VOCAB), "grids": [list(GRID)]}


def encode(image_BHW3):
    """Two symbols per cell of 4 x 4 pixels, of all of its pixels."""
    cells = np.asarray(image_BHW3, np.int64).reshape(-1, 4, 4, 6, 4, 3)
    weights = np.arange(1, 49).reshape(1, 1, 4, 1, 4, 3)
    sums = (cells * weights).sum((2, 4, 5)).reshape(len(cells), -1)
    return np.stack([sums % size for size in VOCAB], axis=-1).astype(np.int32)


def shards(path, parts):
    """Written image by image and view by view, as pretokenizing does."""
    writer = token_writer.Writer(
        path,
        images={split: len(source) for split, source in parts.items()},
        layout=LAYOUT,
        tokenizer={"path": "t", "fingerprint": "f", "precision": "float32"},
        data={"fingerprint": "d"},
        views=VIEWS,
        classes=parts["train"].classes,
        shard_images=7,
    )
    for shard in writer.remaining():
        index = np.arange(shard.start, shard.stop)
        per_view = []
        for name in VIEWS:
            view = views.fixed(name, SIZE)
            (part,) = loader.once(parts[shard.split], view, batch_size=7, indices=index)
            per_view.append(encode(part["image"]))
        writer.write(shard, np.stack(per_view, axis=1), part["label"])
    writer.finish()


def pictures(path):
    """Files of several sizes and shapes, in two classes."""
    draw = np.random.default_rng(0)
    for label in ("a", "b"):
        (path / label).mkdir(parents=True)
        for index in range(12):
            rows, columns = draw.integers(10, 60, 2)
            pixels = draw.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / label / f"{index}.png")


def source_of(parts, split, **changes):
    options = dict(size=SIZE, channels=3, layout=LAYOUT, tokenizer="f", encode=encode)
    return online_tokens.Source(parts[split], VIEWS, **(options | changes))


@pytest.fixture(params=["folder", "drawn"])
def both(request, tmp_path):
    """(images by split, folder of their shards)"""
    if request.param == "folder":
        pictures(tmp_path / "images")
        parts = {
            s: folder.Source(tmp_path / "images", split=s, held_out=0.3)
            for s in token_header.SPLITS
        }
    else:
        parts = {s: shapes.Source((20, 30), count=13, split=s) for s in token_header.SPLITS}
    shards(tmp_path / "tokens", parts)
    return parts, tmp_path / "tokens"


@pytest.mark.parametrize("split", token_header.SPLITS)
def test_the_stream_gives_the_tokens_of_the_shards(both, split):
    parts, path = both
    packed, flying = token_shards.Source(path, split=split), source_of(parts, split)
    assert flying.classes == packed.classes and flying.layout == packed.layout
    assert flying.views == packed.views and len(flying) == len(packed)
    for rows in (None, np.arange(3, 6)):
        options = dict(seed=3, batch_size=6, start=2, rows=rows)
        with loader.batches(packed, **options) as left, loader.batches(flying, **options) as right:
            seen = []
            for _ in range(12):
                expected, found = next(left), next(right)
                np.testing.assert_array_equal(encode(found["image"]), expected["tokens"])
                np.testing.assert_array_equal(found["label"], expected["label"])
                seen.append(expected["tokens"])
        assert len(np.unique(np.concatenate(seen)[:, :, 0], axis=0)) > len(packed)  # other views
    left, right = (list(loader.once(source, batch_size=5)) for source in (packed, flying))
    for expected, found in zip(left, right, strict=True):
        np.testing.assert_array_equal(encode(found["image"]), expected["tokens"])


def test_both_bring_the_text_of_their_images(both, tmp_path):
    parts, path = both
    count = len(parts["train"])
    text_NTE = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 3, 2), np.float32)
    mask_NT = np.arange(3) >= np.arange(count)[:, None] % 3
    np.save(tmp_path / "train.npy", text_NTE)
    np.save(tmp_path / "train_mask.npy", mask_NT.astype(np.uint8))
    packed = captioned.Source(token_shards.Source(path), tmp_path)
    with_text = {"train": captioned.Source(parts["train"], tmp_path)}
    flying = source_of(with_text, "train")
    options = dict(seed=0, batch_size=5)
    with loader.batches(packed, **options) as left, loader.batches(flying, **options) as right:
        for _ in range(5):
            expected, found = next(left), next(right)
            np.testing.assert_array_equal(encode(found["image"]), expected["tokens"])
            for name in ("text", "mask"):
                np.testing.assert_array_equal(found[name], expected[name])
            index_B = expected["text"][:, 0, 0].astype(int)
            tokens_BXLG = np.stack([packed.inner[i]["tokens"] for i in index_B])
            whose = (tokens_BXLG == expected["tokens"][:, None]).all((2, 3)).any(1)
            assert whose.all() and found["mask"].dtype == bool
            np.testing.assert_array_equal(found["mask"], mask_NT[index_B])
    plain = token_shards.Source(path)
    assert len({plain.fingerprint, packed.fingerprint, flying.fingerprint}) == 3


def test_the_fingerprint_knows_images_views_and_tokenizer(both):
    parts, _ = both
    found = [
        source_of(parts, "train").fingerprint,
        source_of(parts, "held_out").fingerprint,
        source_of(parts, "train", tokenizer="g").fingerprint,
        source_of(parts, "train", size=(16, 32)).fingerprint,
        online_tokens.Source(parts["train"], VIEWS[:2], size=SIZE, channels=3, layout=LAYOUT,
                     tokenizer="f", encode=encode).fingerprint,
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert found[0] == source_of(parts, "train").fingerprint
    earlier = source_of(parts, "train").earlier
    assert len(earlier) == len(getattr(parts["train"], "earlier", ())) and found[0] not in earlier


def test_a_mask_that_does_not_fit_is_said(tmp_path):
    drawn = shapes.Source((8, 8), count=4)
    np.save(tmp_path / "train.npy", np.zeros((4, 3, 2), np.float32))
    for mask, message in (
        (np.ones((4, 2)), "0 or 1 for each"),
        (np.full((4, 3), 2), "0 or 1 for each"),
        (np.array([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]]), "on the left.*row 3"),
    ):
        np.save(tmp_path / "train_mask.npy", mask)
        with pytest.raises(interfaces.UserError, match=message):
            captioned.Source(drawn, tmp_path)


def test_a_broken_image_is_replaced_and_counted(tmp_path):
    for index in range(6):
        data = io.BytesIO()
        Image.new("RGB", (24, 16), (index,) * 3).save(data, "PNG")
        (tmp_path / f"{index}.png").write_bytes(b"broken" if index == 2 else data.getvalue())
    source = source_of({"all": folder.Source(tmp_path, split="all")}, "all")
    with loader.batches(source, seed=0, batch_size=6) as batches:
        seen = next(batches)["image"][:, 0, 0, 0]
        assert batches.bad == 1 and batches.broken == ("2.png",)
    assert sorted(set(seen.tolist())) == [0, 1, 3, 4, 5]


def test_images_without_tokens_are_replaced_by_the_same_ones_as_broken_images(tmp_path):
    """A run on the fly and one from shards see the same elements also where images are broken."""
    pictures(tmp_path / "images")
    sound = {
        s: folder.Source(tmp_path / "images", split=s, held_out=0.3) for s in token_header.SPLITS
    }
    shards(tmp_path / "tokens", sound)
    packed, flying = token_shards.Source(tmp_path / "tokens"), source_of(sound, "train")
    for index in (3, 4, 9):
        name = sound["train"].name(index)
        (tmp_path / "images" / name).write_text("no image any more")
        packed.missing[index] = (name, "no image any more")
    options = dict(seed=3, batch_size=6)
    with loader.batches(packed, **options) as left, loader.batches(flying, **options) as right:
        for _ in range(9):
            expected, found = next(left), next(right)
            np.testing.assert_array_equal(encode(found["image"]), expected["tokens"])
            np.testing.assert_array_equal(found["label"], expected["label"])
        assert left.bad == right.bad == 3
