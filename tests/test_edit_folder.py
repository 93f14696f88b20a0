"""`tokgen edit`: what is written, the same as from Python, and what is refused."""

import argparse
import json
import pathlib

import numpy as np
import PIL.Image
import pytest

import tokgen
from tests import recipes
from tests.command_line import call, refused
from tokgen.commands import edit as commands_edit
from tokgen.editing import edits

SMALL = ("--number", 2, "--particles", 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny generator, images of its size and of another, and masks for both."""
    folder = tmp_path_factory.mktemp("edit")
    recipes.tiny(folder, "masked")
    numbers = np.random.default_rng(0)
    for name, size in (("one", (32, 32)), ("two", (32, 32)), ("large", (48, 64))):
        image = numbers.integers(0, 256, (*size, 3), np.uint8)
        PIL.Image.fromarray(image).save(folder / f"{name}.png")
        mask = np.zeros(size, np.uint8)
        mask[:, size[1] // 2 :] = 255
        PIL.Image.fromarray(mask).save(folder / f"{name}-mask.png")
    PIL.Image.new("L", (32, 32)).save(folder / "black.png")
    PIL.Image.new("RGBA", (64, 48)).save(folder / "clear.png")
    (folder / "words.png").write_text("left")
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def edit(*words) -> tuple:
    return ("edit", "--generator", "runs/generator", *words, *SMALL)


def pixels(path: str | pathlib.Path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def test_edits_are_those_of_the_library_in_files_of_their_own(capfd):
    words = edit("one.png", "two.png", "--mask", "left", "--label", "ring,disc", "--seed", 3)
    assert call(*words, "--out", "edits") == 0
    assert "4 edits of 2 images, 32 x 32 pixels in edits" in capfd.readouterr().err
    model, files = tokgen.load("runs/generator"), ["one.png", "two.png"]
    images = np.stack([pixels(file) for file in files])
    edits = model.edit(
        images, ["ring", "disc"], mask="left", number=2, seed=3, particles=4, progress=False
    )
    record = json.loads(pathlib.Path("edits", "edit.json").read_text())
    assert record["edits"] == [f"{n}-seed3-00{i}.png" for n in ("one", "two") for i in (0, 1)]
    for file, image_HW3 in zip(record["edits"], edits.image_NHW3, strict=True):
        np.testing.assert_array_equal(pixels(f"edits/{file}"), image_HW3)
        np.testing.assert_array_equal(
            pixels(f"edits/{file}")[:, 16:], pixels(file[:3] + ".png")[:, 16:]
        )
    np.testing.assert_array_equal(pixels("edits/grid.png"), edits.sheet())
    assert (record["mask"], record["label"], record["seed"]) == ("left", "ring,disc", 3)
    assert "--overwrite" in refused(capfd, *words, "--out", "edits")


def test_an_image_of_another_size_is_cut_with_its_mask_when_asked(capfd):
    words = edit("large.png", "--mask", "large-mask.png", "--label", 2)
    said = refused(capfd, *words, "--out", "large")
    assert "32 x 32" in said and "48 x 64 in large.png" in said and "--fit" in said
    assert call(*words, "--fit", "--out", "large") == 0
    assert "cut in the middle and resized" in capfd.readouterr().err
    fitted = tokgen.load("runs/generator").fit("large.png")[0]
    found = pixels("large/large-seed0-001.png")
    np.testing.assert_array_equal(found[:, :16], fitted[:, :16])
    assert (found[:, 16:] != fitted[:, 16:]).any()
    # a mask of the model's size goes with a cut image, too
    words = edit("large.png", "--mask", "one-mask.png", "--label", 2, "--fit")
    assert call(*words, "--out", "same") == 0
    np.testing.assert_array_equal(pixels("same/large-seed0-001.png"), found)


def test_a_photograph_that_lies_on_its_side_is_as_large_as_it_is_seen(capfd):
    photo = PIL.Image.open("large.png").convert("RGB")
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees: 64 rows of 48 columns
    photo.save("side.jpg", exif=exif)
    upright = np.zeros((64, 48), np.uint8)
    upright[:16] = 255
    PIL.Image.fromarray(upright).save("side-mask.png")
    words = edit("side.jpg", "--mask", "side-mask.png", "--label", 2)
    assert "64 x 48 in side.jpg" in refused(capfd, *words, "--out", "side")
    assert call(*words, "--fit", "--out", "side") == 0
    fitted = tokgen.load("runs/generator").fit("side.jpg")[0]
    changed = (pixels("side/side-seed0-000.png") != fitted).any((1, 2))
    assert changed[:5].any() and not changed[6:].any()  # 16 rows, less what is cut, of 48


def test_images_of_one_name_keep_their_edits_apart():
    folders = ["a", "b"]
    for folder in folders:
        pathlib.Path(folder).mkdir()
        PIL.Image.open("one.png").save(f"{folder}/one.png")
    PIL.Image.open("two.png").save("one-1.png")
    words = edit("a/one.png", "b/one.png", "one-1.png", "--mask", "left", "--label", 2)
    assert call(*words, "--out", "apart") == 0
    files = json.loads(pathlib.Path("apart", "edit.json").read_text())["edits"]
    assert len(set(files)) == 6 == len(list(pathlib.Path("apart").glob("*-seed0-*.png")))
    np.testing.assert_array_equal(pixels(f"apart/{files[-1]}")[:, 16:], pixels("two.png")[:, 16:])


def test_a_mask_is_not_overwritten_by_what_is_made_with_it(capfd):
    assert call(*edit("one.png", "--mask", "left", "--label", 2), "--out", "mine") == 0
    PIL.Image.open("one-mask.png").save("mine/mask.png")
    words = edit("one.png", "--mask", "mine/mask.png", "--label", 2)
    assert "holds what the command reads" in refused(capfd, *words, "--out", "mine", "--overwrite")
    assert pathlib.Path("mine/mask.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one.png",), "one of --mask"),
        (("one.png", "--mask", "left", "--grow", "right=8"), "--mask and --grow"),
        (("none.png", "--mask", "left"), "none.png; found nothing"),
        (("runs", "--mask", "left"), "found a folder"),
        (("runs/generator", "one.png", "--mask", "left"), "found a folder"),
        (("one.png", "--mask", "large-mask.png"), "32 x 32"),
        (("one.png", "--mask", "middle"), "no file"),
        (("one.png", "--mask", "black.png"), "found none in black.png"),
        (("one.png", "--mask", "words.png", "--fit"), "words.png cannot be read as an image"),
        (("one.png", "--mask", "clear.png", "--fit"), "with transparency in clear.png"),
        (("one.png", "--mask", "left", "--label", "teapot"), "teapot"),
        (("one.png", "--mask", "left", "--generator", "runs/tokenizer"), "holds a tokenizer; need"),
        (("one.png", "--mask", "left"), "class of each image is needed"),
        (("one.png", "--strength", "0.5", "--feather", "3"), "--feather"),
        (("one.png", "--grow", "rights=3"), "right=128"),
        (("one.png", "--mask", "left", "--text", "x.npz"), "reads text"),
    ],
)
def test_what_cannot_be_edited_is_one_message_and_leaves_nothing(words, said, capfd, tmp_path):
    label = () if "class of each" in said or "--label" in words else ("--label", "ring")
    assert said in refused(capfd, *edit(*words), *label, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_with_as_many_particles_as_the_library():
    parser = argparse.ArgumentParser()
    commands_edit.arguments(parser)
    words = ["one.png", "--generator", "CKPT", "--mask", "left", "--out", "edits"]
    settings = commands_edit.settings_of(parser.parse_args(words)).edit
    assert settings == edits.Settings(mask="left", number=4)
