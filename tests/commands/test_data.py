"""`tokgen data` of token shards; options that say nothing of what is looked at."""

import pytest
from PIL import Image

from tests.data import test_token_shards
from tokgen import cli


def told(capfd, *words) -> tuple[int, str]:
    """(exit code, what is printed)."""
    code = cli.main(["data", *map(str, words)])
    said = capfd.readouterr()
    return code, said.out + said.err


def test_of_token_shards_classes_and_counts_are_told(tmp_path, capfd):
    path = test_token_shards.write(tmp_path / "tokens")
    code, said = told(capfd, path)
    assert code == 0 and f"{path}: 2 classes (daisy, rose); train 11, held out 3" in said
    assert "train     11 images in 2 views, 0 without tokens" in said
    label_N = [
        label for split in ("train", "held_out") for label in test_token_shards.content(split)[1]
    ]
    code, said = told(capfd, path, "--scan", "full")
    assert code == 0 and f"(daisy {label_N.count(0)}, rose {label_N.count(1)})" in said
    shard = path / "train-00001-of-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
    code, said = told(capfd, path, "--scan", "full")
    assert code == 0 and "checksum" in said and "held out 3" in said and "train 11" not in said
    (path / "layout.json").write_text("{}")
    code, said = told(capfd, path)
    assert code == 2 and said.count("layout.json") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--label", "coarse_label"), "--label (it is for sets of TFDS"),
        (("--splits", "a,b"), "--splits (it is for sets of TFDS"),
        (("--channels", "1"), "--channels (it is for images that are decoded, by --scan full)"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, capfd, words, named):
    code, said = told(capfd, tmp_path, *words)
    assert code == 2 and named in said


def test_folders_of_class_folders_are_read_as_it_is_said(tmp_path, capfd):
    for name in ("cats/tabby", "cats/tiger", "dogs/boxer"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "set" / name / f"{number}.png")
    code, said = told(capfd, tmp_path / "set")
    assert code == 2 and "--labels outer in commands" in said
    code, said = told(capfd, tmp_path / "set", "--labels", "outer")
    assert code == 0 and "2 classes (cats 8, dogs 4)" in said
    code, said = told(capfd, tmp_path / "set", "--labels", "none")
    assert code == 0 and "no classes" in said
    shards = test_token_shards.write(tmp_path / "tokens")
    code, said = told(capfd, shards, "--labels", "none")
    assert code == 2 and "--labels (it is for images" in said
