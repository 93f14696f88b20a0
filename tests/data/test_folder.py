"""Layouts of folders: what is read, how it is split, and what is refused by name."""

import hashlib
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from tokgen import interfaces
from tokgen.data import folder, folder_layout, folder_split, pixels


def write(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".json", ".xml"):
            path.write_text("")
            continue
        form = {"jpg": "JPEG", "jpeg": "JPEG"}.get(path.suffix[1:].lower(), "PNG")
        Image.new("RGB", (2, 2), (number % 256, 0, 0)).save(path, form)
    return root


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_class_folders_give_sorted_classes_and_nested_images_belong_to_them(tmp_path):
    write(tmp_path, "zebra/b.png", "ant/x/y/1.JPG", "ant/0.jpeg", "zebra/A.PNG", "ant/.hidden.png")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    source = folder.Source(tmp_path, split="all")
    assert source.classes == ("ant", "zebra")
    assert names(source) == ["ant/0.jpeg", "ant/x/y/1.JPG", "zebra/A.PNG", "zebra/b.png"]
    assert [source[index]["label"] for index in range(4)] == [0, 0, 1, 1]
    assert pixels.decode(source[3]["image"], 3).shape == (2, 2, 3)
    assert source[-1] == source[3]
    with pytest.raises(IndexError):
        source[4]


def test_a_flat_folder_has_no_classes(tmp_path):
    source = folder.Source(write(tmp_path, "1.png", "2.PNG"), split="all")
    assert source.classes == () and [record["label"] for record in source] == [0, 0]


@pytest.mark.parametrize("held_out", folder_layout.HELD_OUT)
def test_split_folders_are_read_as_splits(tmp_path, held_out):
    write(tmp_path, "train/a/1.png", "train/b/2.png", f"{held_out}/b/3.png")
    train, other = folder.Source(tmp_path), folder.Source(tmp_path, split="held_out")
    assert names(train) == ["train/a/1.png", "train/b/2.png"]
    assert names(other) == [f"{held_out}/b/3.png"]
    assert train.classes == other.classes == ("a", "b") and other[0]["label"] == 1
    assert names(folder.Source(tmp_path, split="all")) == sorted(names(train) + names(other))


def test_split_folders_may_be_flat_and_are_chosen_by_name(tmp_path):
    write(tmp_path, "Train/1.png", "test/2.png", "val/3.png")
    assert names(folder.Source(tmp_path, split="held_out")) == ["val/3.png"]
    assert folder.Source(tmp_path).classes == ()


def test_a_class_named_train_among_others_is_a_class(tmp_path):
    source = folder.Source(write(tmp_path, "train/1.png", "car/2.png"), split="all")
    assert source.classes == ("car", "train")


def test_splits_are_a_partition_of_the_stated_size(tmp_path):
    write(tmp_path, *(f"c{n % 2}/{n}.png" for n in range(400)))
    train = folder.Source(tmp_path, held_out=0.2)
    other = folder.Source(tmp_path, split="held_out", held_out=0.2)
    everything = folder.Source(tmp_path, split="all")
    assert sorted(names(train) + names(other)) == names(everything)
    assert not set(names(train)) & set(names(other))
    assert 50 < len(other) < 110  # 80 +- 4 standard deviations


def test_adding_files_moves_none(tmp_path):
    write(tmp_path, *(f"a/{n}.png" for n in range(100)))
    before = set(names(folder.Source(tmp_path, split="held_out", held_out=0.1)))
    write(tmp_path, *(f"a/new{n}.png" for n in range(100)))
    after = set(names(folder.Source(tmp_path, split="held_out", held_out=0.1)))
    assert before and {name for name in after if "new" not in name} == before


def test_two_images_are_one_and_one(tmp_path):
    write(tmp_path, "1.png", "2.png")
    assert len(folder.Source(tmp_path)) == len(folder.Source(tmp_path, split="held_out")) == 1


def test_fingerprints_follow_names_and_sizes_and_not_the_place(tmp_path):
    first = folder.Source(write(tmp_path / "x", "a/1.png", "b/2.png", "b/3.png"), split="all")
    second = folder.Source(write(tmp_path / "y", "a/1.png", "b/2.png", "b/3.png"), split="all")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != folder.Source(tmp_path / "x").fingerprint
    with open(tmp_path / "y" / "a" / "1.png", "ab") as file:
        file.write(b"0")
    assert folder.Source(tmp_path / "y", split="all").fingerprint != first.fingerprint
    os.rename(tmp_path / "x" / "b" / "3.png", tmp_path / "x" / "b" / "4.png")
    assert folder.Source(tmp_path / "x", split="all").fingerprint != first.fingerprint


def test_fingerprints_see_contents_of_the_same_size_and_those_of_before_are_known(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    for number in range(2):  # only the middle of a large file differs
        (tmp_path / "a" / f"{number}.png").write_bytes(b"x" * 50_000)
    first = folder.Source(tmp_path, split="all")
    assert first.fingerprint != first.earlier[0]
    found = ("a/0.png", "a/1.png", "b/2.png")
    listed = [(name, name[0] == "b", os.path.getsize(tmp_path / name)) for name in found]
    digest = hashlib.sha256(b"a\0b")
    for name, label, size in listed:
        digest.update(f"{name}\0{int(label)}\0{size}\n".encode())
    assert first.earlier == (digest.hexdigest(),)  # what earlier versions wrote into their records
    with open(tmp_path / "a" / "1.png", "r+b") as file:
        file.seek(25_000)
        file.write(b"y")
    second = folder.Source(tmp_path, split="all")
    assert second.earlier == first.earlier and second.fingerprint != first.fingerprint
    assert second.changed > first._label_B.size  # nanoseconds
    os.remove(tmp_path / "a" / "0.png")
    assert len(second.fingerprint) == 64


def test_a_large_set_is_hashed_in_part(tmp_path, monkeypatch):
    write(tmp_path, *(f"{n}.png" for n in range(10)))
    monkeypatch.setattr(folder, "_HASHED", 5)
    source, opened = folder.Source(tmp_path, split="all"), []
    by_name = source.open
    monkeypatch.setattr(source, "open", lambda index: opened.append(index) or by_name(index))
    assert source.fingerprint and sorted(opened) == [0, 2, 4, 6, 8]


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "set", "a/1.png", "b/2.png")
    write(tmp_path / "elsewhere", "3.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/b/aside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/b/dead.png").symlink_to(tmp_path / "nothing.png")
    found = names(folder.Source(tmp_path / "set", split="all"))
    assert "b/aside/3.png" in found and "b/dead.png" not in found
    # Through `up` the tree is seen from a again, once: never from itself.
    assert len(found) == len(set(found)) <= 6


def test_a_source_travels_to_another_process(tmp_path):
    source = folder.Source(write(tmp_path, "a/1.png", "b/2.png"), split="all")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[1] == source[1] and copy.fingerprint == source.fingerprint


def missing(root):
    return root / "gone"


def a_file(root):
    return write(root, "1.png") / "1.png"


def empty(root):
    return root


def no_images(root):
    (root / "readme.txt").write_text("")
    return root


def empty_class(root):
    write(root, "a/1.png")
    (root / "barren" / "deeper").mkdir(parents=True)
    return root


def images_beside_classes(root):
    return write(root, "a/1.png", "stray.png")


def unknown_class_held_out(root):
    return write(root, "train/a/1.png", "val/stranger/2.png")


def held_out_without_classes(root):
    return write(root, "train/a/1.png", "test/2.png")


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (missing, "gone"),
        (a_file, "a file"),
        (empty, "no images in"),
        (no_images, "no images in"),
        (empty_class, "barren"),
        (images_beside_classes, "stray.png"),
        (unknown_class_held_out, "stranger"),
        (held_out_without_classes, "without classes"),
    ],
)
def test_unusable_layouts_are_refused_by_name(tmp_path, layout, named):
    path = layout(tmp_path)
    with pytest.raises(interfaces.UserError, match=named) as error:
        folder.Source(path, split="all")
    assert str(tmp_path) in str(error.value)


def test_a_config_without_a_path_says_which_option_gives_it():
    with pytest.raises(interfaces.UserError, match="--config.data.path=DIR"):
        folder.Source("")


def test_impossible_splits_are_refused(tmp_path):
    write(tmp_path, "1.png", "2.png")
    with pytest.raises(interfaces.UserError, match="'test'"):
        folder.Source(tmp_path, split="test")
    with pytest.raises(interfaces.UserError, match="held_out"):
        folder.Source(tmp_path, held_out=1.5)
    with pytest.raises(interfaces.UserError, match="labels must be one of"):
        folder.Source(tmp_path, labels="some")


def test_nothing_needs_to_be_held_out(tmp_path):
    write(tmp_path, "1.png", "2.png")
    assert len(folder.Source(tmp_path, held_out=0.0)) == 2
    assert len(folder.Source(tmp_path, split="held_out", held_out=0.0)) == 0


def test_one_image_is_not_enough_to_hold_one_out(tmp_path):
    write(tmp_path, "1.png")
    with pytest.raises(interfaces.UserError, match="nothing is held out.*data.held_out=0"):
        folder.Source(tmp_path, split="held_out")


@pytest.mark.parametrize(
    ("layout", "train", "held_out", "classes"),
    [
        (("train/cat/1.png", "train/cat/2.png", "train/dog/3.png"), 2, 1, ("cat", "dog")),
        (("Train/1.png", "Train/2.png"), 1, 1, ()),
        (("training/cat/1.png", "testing/cat/2.png"), 1, 1, ("cat",)),
        (("train/a/1.png", "val/a/2.png", "unlabeled/3.png"), 1, 1, ("a",)),
        (("train/a/1.png", "train/a/2.png", "unlabelled/3.png"), 1, 1, ("a",)),
        (("train2017/1.png", "val2017/2.png"), 1, 1, ()),
        (("flowers/rose/1.png", "flowers/rose/2.png", "flowers/daisy/3.png"), 2, 1, None),
        (("train/set/a/1.png", "train/set/b/2.png", "val/set/b/3.png"), 2, 1, ("a", "b")),
        (("__MACOSX/a/1.png", "a/2.png", "a/3.png", "b/4.png"), 2, 1, ("a", "b")),
        (("a/2.png", "a/3.png", ".ipynb_checkpoints/a.png", "a/@eaDir/t.png"), 1, 1, ("a",)),
        (("train/Cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/DOG/4.png"), 2, 2, None),
        (("dev/a/1.png", "dev/a/2.png"), 1, 1, ("a",)),
        (("train/1.png", "val/2.png", "annotations/a.json"), 1, 1, ()),
        (("train/a/images/1.png", "train/b/images/2.png", "val/b/3.png"), 2, 1, ("a", "b")),
    ],
)
def test_layouts_that_are_understood(tmp_path, layout, train, held_out, classes):
    write(tmp_path, *layout)
    parts = [folder.Source(tmp_path, split=split) for split in ("train", "held_out")]
    assert [len(part) for part in parts] == [train, held_out]
    known = classes or tuple(sorted(parts[0].classes))
    assert parts[0].classes == parts[1].classes == (known if classes is None else classes)
    for part in parts:
        for index in range(len(part)):
            pixels.decode(part[index]["image"], 3)
            if part.classes:
                own = part.classes[part[index]["label"]].lower()
                assert own in part.name(index).lower().split("/")


@pytest.mark.parametrize(
    "layout",
    [
        ("train/1.png", "training/2.png"),
        ("train/a/1.png", "extra/a/2.png"),
        ("val/a/1.png", "test/a/2.png"),
        ("train/a/1.png", "val/a/2.png", "roses/3.png"),
        ("train/a/1.png", "car/2.png"),
        ("train/1.png", "annotations/2.png"),
        ("images/1.png", "masks/1.png"),
        ("Data/a/1.png", "Annotations/1.xml"),
        ("JPEGImages/1.jpg", "Annotations/1.png", "ImageSets/2.png"),
        ("train/images/1.png", "train/labels/1.png", "val/images/2.png"),
        ("animals/cat/1.png", "animals/dog/2.png", "plants/rose/3.png"),
    ],
)
def test_what_is_not_certain_is_refused_with_what_was_understood(tmp_path, layout):
    write(tmp_path, *layout)
    with pytest.raises(interfaces.UserError, match="understood") as error:
        folder.Source(tmp_path)
    assert f"{tmp_path}{os.sep}" in str(error.value)  # a right path


def test_an_outer_folder_may_be_the_class_of_all_below(tmp_path):
    write(tmp_path, "ann/2019/1.png", "ann/2020/2.png", "bob/2019/3.png")
    source = folder.Source(tmp_path, split="all", labels="outer")
    assert source.classes == ("ann", "bob") and source.counts.tolist() == [2, 1]


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    write(tmp_path, *(f"{n}/1.png" for n in range(12)))
    source = folder.Source(tmp_path, split="all")
    assert source.classes == tuple(map(str, range(12)))
    assert all(str(source[n]["label"]) == source.name(n).split("/")[0] for n in range(12))
    old = folder.Source(tmp_path, split="all", order=sorted(source.classes))
    assert old.classes[:4] == ("0", "1", "10", "11")
    assert all(old.classes[old[n]["label"]] == old.name(n).split("/")[0] for n in range(12))
    assert folder.Source(tmp_path, split="all", order=("a", "b")).classes == source.classes


def test_other_files_are_counted_and_known_endings_are_read(tmp_path):
    write(tmp_path, "a/1.png", "a/2.jfif", "a/3.PNG", "b/4.jpe")
    for name in ("a/5.heic", "b/6.HEIC", "b/7.txt", "list.csv", "a/Thumbs.db", "b/.DS_Store"):
        (tmp_path / name).write_text("")
    source = folder.Source(tmp_path, split="all")
    assert len(source) == 4
    (found,) = source.unread.values()
    assert found == {".heic": 2, ".txt": 1, ".csv": 1}


def test_a_folder_of_archives_says_so(tmp_path):
    (tmp_path / "flowers.zip").write_text("")
    with pytest.raises(interfaces.UserError, match="1 .zip: unpack"):
        folder.Source(tmp_path)


def test_holding_out_leaves_every_class_an_image(tmp_path):
    write(tmp_path, *(f"{n}/{m}.png" for n in range(30) for m in range(1 + (n == 7))))
    train = folder.Source(tmp_path, held_out=0.3)
    assert set(train._label_B) == set(range(30))
    other = folder.Source(tmp_path, split="held_out", held_out=0.3)
    assert names(other) in (["7/0.png"], ["7/1.png"])
    (tmp_path / "7" / "1.png").unlink()
    nothing = folder.Source(tmp_path, split="held_out")
    assert len(nothing) == 0 and "each of the 30 classes" in nothing.notes[-1]


def test_held_out_images_are_those_of_before(tmp_path):
    write(tmp_path, *(f"c{n % 3}/{n}.png" for n in range(60)))
    place = {f"c{n % 3}/{n}.png": folder_split.place_of(f"c{n % 3}/{n}.png") for n in range(60)}
    wanted = {name for name, where in place.items() if where < 0.1} | {min(place, key=place.get)}
    assert set(names(folder.Source(tmp_path, split="held_out", held_out=0.1))) == wanted


@pytest.mark.parametrize("layout", [("val/2.png",), ("val/stranger/2.png", "val/a/3.png")])
def test_doubtful_classes_can_be_left_out(tmp_path, layout):
    write(tmp_path, "train/a/1.png", *layout)
    for split, count in (("train", 1), ("held_out", len(layout))):
        source = folder.Source(tmp_path, split=split, doubtful="drop")
        assert source.classes == () and len(source) == count and "same classes" in source.notes[-1]
    with pytest.raises(interfaces.UserError, match="must be among those of train"):
        folder.Source(tmp_path, split="held_out")
    assert len(folder.Source(tmp_path, split="all", labels="none")) == 1 + len(layout)


def test_labels_of_a_split_cover_the_classes_of_the_folder(tmp_path):
    write(tmp_path, *(f"c{n % 3}/{n}.png" for n in range(30)))
    source = folder.Source(tmp_path, split="train")
    assert {record["label"] for record in source} == {0, 1, 2}
    np.testing.assert_array_equal(
        [source[i]["label"] for i in range(len(source))],
        [int(name[1]) for name in names(source)],
    )


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "b/2.png")
    look = os.scandir

    def refused(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(interfaces.UserError, match="b below .* cannot be read: Permission denied"):
        folder.Source(tmp_path)
