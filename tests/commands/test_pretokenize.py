"""What pretokenize encodes in; and a tokenizer without tokens, which reconstructs all the same."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from PIL import Image

from tokgen import cli, parameters, rng, runtime, sharding
from tokgen.checkpoints import loading, run as runs
from tokgen.config import building, reading as configs
from tokgen.data import (
    folder as folder_,
    pixels,
    pretokenization,
    shapes,
    sources,
    token_header,
    token_shards,
)
from tokgen.interfaces import UserError
from tokgen.training import train_state

SMALL = (
    *("data.size=(16, 16)", "data.count=12", "view.size=(16, 16)", "encoder.widths=(16,)"),
    *("decoder.widths=(16,)", "encoder.blocks=0", "decoder.blocks=0"),
)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """jax is set up already, by conftest; a command must not set it up once more."""
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)


def saved(folder, quantizer, compute="float32"):
    """A checkpoint whose numbers are drawn."""
    config = configs.load("configs/tokenizer/shapes.py", SMALL)
    with config.unlocked():
        config.quantizer, config.precision.compute = quantizer, compute
    module = nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    _, params, stats = parameters.split(module)
    draw = np.random.default_rng(0).normal
    params, stats = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * draw(size=leaf.shape), leaf.dtype), (params, stats)
    )
    zero = jnp.zeros((), jnp.int32)
    run = runs.start(
        folder, config, kind="tokenizer", layout=module.layout, classes=(), best="l2", data=""
    )
    run.save({"model": train_state.TrainState(zero, zero, params, stats, (), None)}, {"l2": 0.5})
    run.close()
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tokenizer with a Gaussian bottleneck."""
    return saved(tmp_path_factory.mktemp("continuous"), dict(name="gaussian", channels=4))


def test_it_encodes_in_float32_unless_told_otherwise_and_records_it(tmp_path):
    """Trained in bfloat16; tokens that are stored once shall be the exact ones."""
    quantizer = dict(name="vq", codes=4096, channels=2, normalize=False)
    folder = saved(tmp_path / "tokenizer", quantizer, compute="bfloat16")
    assert loading.load_tokenizer(folder).config.precision.compute == "bfloat16"
    stored, expected = {}, {}
    encode = jax.jit(lambda tokenizer, image_BHW3: tokenizer.encode(image_BHW3))
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        words = ["pretokenize", "--tokenizer", str(folder), "--out", str(out), "--batch", "8"]
        words += [] if precision == "float32" else ["--precision", precision]
        assert cli.main([*words, "--views", "center"]) == 0
        source = token_shards.Source(out)
        assert source.header["tokenizer"]["precision"] == precision
        stored[precision] = np.stack([source[i]["tokens"][0] for i in range(len(source))])
        tokenizer = loading.load_tokenizer(folder, compute=precision).module
        pictures = shapes.Source((16, 16), count=12).batch(range(12))
        image_BHW3 = np.asarray(pictures, np.float32) / 255
        expected[precision] = np.asarray(encode(tokenizer, image_BHW3))
        sort = lambda array: sorted(row.astype(np.int64).tobytes() for row in array)  # noqa: E731
        assert sort(stored[precision]) == sort(expected[precision]), precision
    assert (expected["float32"] != expected["bfloat16"]).any()  # it matters


def test_it_is_a_function_without_a_command_line(tmp_path):
    """Of the same numbers the command writes the same files, and goes on with the function's."""
    folder = saved(tmp_path / "tokenizer", dict(name="vq", codes=64, channels=4))
    tokenizer = loading.load_tokenizer(folder, compute="float32")
    with pretokenization.folder(tmp_path / "tokens") as out:
        pretokenization.pretokenize(tokenizer, out, views=("flip",), batch=5)
    words = ["pretokenize", "--tokenizer", str(folder), "--views", "flip"]
    assert cli.main([*words, "--out", str(tmp_path / "others")]) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "tokens").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "others").iterdir()}
    assert cli.main([*words, "--out", str(tmp_path / "tokens")]) == 0
    with (
        pytest.raises(UserError, match="token shards of something else"),
        pretokenization.folder(tmp_path / "tokens") as out,
    ):
        pretokenization.pretokenize(tokenizer, out, views=("center",))


def test_any_number_of_devices_writes_the_same_shards_and_decodes_once(tmp_path, monkeypatch):
    """Eight devices and batches of five; one device and one batch of all."""
    folder = saved(tmp_path / "tokenizer", dict(name="vq", codes=64, channels=4))
    rng, decode, decoded = np.random.default_rng(0), pixels.picture, []
    (tmp_path / "pictures").mkdir()
    for number in range(11):
        picture = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number:02d}.png")

    def counted(*words, **options):
        decoded.append(1)
        return decode(*words, **options)

    monkeypatch.setattr(pixels, "picture", counted)
    single = Mesh(
        np.asarray(jax.devices()[:1]).reshape(1, 1, 1),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 3,
    )
    written = []
    for mesh, batch in ((sharding.make_mesh(), 5), (single, 11)):
        monkeypatch.setattr(sharding, "make_mesh", lambda mesh=mesh: mesh)
        out = tmp_path / f"tokens{mesh.size}"
        words = ["--tokenizer", folder, "--data", tmp_path / "pictures", "--out", out]
        words += ["--batch", batch, "--views", "ten,flip"]
        assert cli.main(["pretokenize", *map(str, words)]) == 0
        files = sorted(out.glob("*.array_record"))
        written.append({file.name: file.read_bytes() for file in files})
        assert len(decoded) == 11
        decoded.clear()
    assert written[0] == written[1] and written[0]
    tokens_XLG = token_shards.Source(out)[0]["tokens"]
    assert tokens_XLG.shape[0] == 11 and len({view.tobytes() for view in tokens_XLG}) > 6


def test_it_reconstructs_by_the_mean(workdir, tmp_path, capfd):
    pictures = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    words = [
        "reconstruct",
        str(workdir),
        str(tmp_path / "pictures"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    loaded = loading.load_tokenizer(workdir)
    assert loaded.layout is None

    def painted(tokenizer, image_BHW3):
        mean_BPC = tokenizer.latents(image_BHW3)[..., :4]
        return tokenizer.decode_latents(mean_BPC)

    image = pictures.astype(np.float32) / 255
    found = np.round(np.asarray(jax.jit(painted)(loaded.module, image)) * 255) / 255
    errors = ((image.astype(np.float64) - found) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(figures["psnr_db"], (-10 * np.log10(errors)).mean(), rtol=1e-4)
    assert figures["images"] == 3 and not any("codebook" in name for name in figures)


def test_it_is_measured_on_its_data(workdir, capfd):
    assert cli.main(["evaluate", str(workdir), "--images", "5"]) == 0
    said = capfd.readouterr().out
    assert "psnr_db" in said and "codebook" not in said
    assert cli.main(["checkpoint", str(workdir)]) == 0
    said = capfd.readouterr().out
    assert "layout      null" in said and "source      trained" in said


def test_it_has_no_tokens_to_store(workdir, tmp_path, capfd):
    out = tmp_path / "tokens"
    words = ["pretokenize", "--tokenizer", str(workdir), "--out", str(out), "--batch", "8"]
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    assert "continuous tokenizer, which writes no tokens" in said and "Traceback" not in said
    assert said.count("error:") == 1 and str(workdir) in said and not out.exists()


@pytest.fixture
def broken(tmp_path):
    """Twelve pictures in two classes; one is text, one cut off, one too large."""
    draw = np.random.default_rng(2)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            values = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / "cat" / "1.png").write_text("a page in the place of a picture")
    whole = (tmp_path / "set" / "dog" / "2.png").read_bytes()
    (tmp_path / "set" / "dog" / "2.png").write_bytes(whole[:-200])
    Image.new("1", (9000, 9000)).save(tmp_path / "set" / "dog" / "4.png")
    return tmp_path / "set", ("cat/1.png", "dog/2.png", "dog/4.png")


def test_what_cannot_be_read_is_told_and_has_no_tokens(broken, tmp_path, capfd):
    pictures, names = broken
    quantizer = dict(name="vq", codes=4096, channels=2, normalize=False)
    folder, out = saved(tmp_path / "tokenizer", quantizer), tmp_path / "tokens"
    words = ["pretokenize", "--tokenizer", str(folder), "--data", str(pictures), "--out", str(out)]
    assert cli.main([*words, "--batch", "8", "--max-bad", "0"]) == 2  # none is allowed
    told = capfd.readouterr().err
    assert "--max-bad=SHARE" in told and "Traceback" not in told
    assert cli.main([*words, "--batch", "8"]) == 0
    told = capfd.readouterr().err
    assert all(told.count(f"{name}: ") == 1 for name in names) and " at 0x" not in told
    listed = {}
    encode = jax.jit(lambda tokenizer, image_BHW3: tokenizer.encode(image_BHW3))
    tokenizer = loading.load_tokenizer(folder).module
    for split in token_header.SPLITS:
        shards, images_ = (
            token_shards.Source(out, split=split),
            folder_.Source(pictures, split=split),
        )
        assert len(shards) == len(images_)
        listed |= dict(shards.missing.values())
        for index in set(range(len(images_))) - set(shards.missing):
            record = sources.read(images_, index, 3)
            image_BHW3 = np.asarray(record["image"], np.float32)[None] / 255
            np.testing.assert_array_equal(
                shards[index]["tokens"][0], encode(tokenizer, image_BHW3)[0]
            )
            assert shards[index]["label"] == record["label"]
    assert set(listed) == set(names) and "9000 x 9000" in listed["dog/4.png"]
    header = json.loads((out / "layout.json").read_text())
    assert sum(part.get("unreadable", 0) for part in header["splits"].values()) == 3


def test_a_set_that_replaces_another_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """In an order of classes of its own; what is made of other images is begun anew."""
    folder = saved(tmp_path / "tokenizer", dict(name="vq", codes=64, channels=4))
    for name in ("2", "10"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (16, 16), (number, 0, int(name))).save(
                tmp_path / "set" / name / f"{number}.png"
            )
    out, made, ends = tmp_path / "tokens", [], []
    out.mkdir()
    old = json.dumps({"format": 1, "layout": {}, "classes": ["10", "2"]})
    (out / "layout.json").write_text(old)

    def shard(tokenizer, source, shard, views, *words):
        if made and ends:
            raise ends.pop()
        made.append(shard.split)
        shape = (shard.stop - shard.start, len(views), tokenizer.layout.length, 1)
        return np.zeros(shape, np.int32), np.zeros(shape[0], np.int32), {}

    monkeypatch.setattr(pretokenization, "_shard", shard)
    words = ["pretokenize", "--tokenizer", folder, "--data", tmp_path / "set", "--out", out]
    words = [*map(str, words), "--overwrite"]
    for end, code in ((KeyboardInterrupt(), 130), (UserError("too many are unreadable"), 2)):
        made.clear()
        ends.append(end)
        assert cli.main(words) == code and made == ["train"]
        assert (out / "layout.json").read_text() == old
        if code == 130:
            shutil.copy(tmp_path / "set" / "2" / "0.png", tmp_path / "set" / "2" / "one_more.png")
    made.clear()
    assert cli.main(words) == 0 and made == ["held_out"]
    source = token_shards.Source(out)
    assert tuple(source.classes) == ("2", "10")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["set", "tokenizer", "tokens"]
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_figures_leave_out_what_cannot_be_read(workdir, broken, tmp_path, capfd):
    pictures, names = broken
    words = ["evaluate", str(workdir), "--data", str(pictures), "--split", "all"]
    assert cli.main([*words, "--out", str(tmp_path / "figures.jsonl")]) == 0
    said = capfd.readouterr()
    assert said.out.split("images ")[1].split()[0] == "9" and "unreadable           3" in said.out
    assert all(said.err.count(f"{name}: ") == 1 for name in names)
    record = json.loads((tmp_path / "figures.jsonl").read_text())
    assert record["images"] == 9 and set(record["unreadable_files"]) == set(names)
    for name in ("cat", "dog/0.png", "dog/1.png", "dog/2.png", "dog/3.png"):
        place = pictures / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    # one image beside a large one: it is measured once
    assert (
        cli.main(["reconstruct", str(workdir), str(pictures), "--out", str(tmp_path / "two")]) == 0
    )
    figures = json.loads((tmp_path / "two" / "figures.json").read_text())
    assert figures["images"] == 1 == figures["unreadable"]
    assert set(figures["unreadable_files"]) == {"dog/4.png"}
    capfd.readouterr()
    alone = pictures / "dog" / "4.png"
    assert cli.main(["reconstruct", str(workdir), str(alone), "--out", str(tmp_path / "one")]) == 2
    assert "9000 x 9000" in capfd.readouterr().err
