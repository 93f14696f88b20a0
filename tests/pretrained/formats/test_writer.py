import io
import os
import pathlib
import pickletools
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization, traverse_util

from tokgen import interfaces
from tokgen.pretrained.formats import reader, writer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights"


def _arrays(form):
    """Every dtype of a form, and shapes that are easily written wrong."""
    rng = np.random.default_rng(0)
    _, dtypes = writer.FORMS[form]
    arrays = {
        f"every.{name}": rng.integers(0, 2, (3, 2, 4)).astype(jnp.dtype(name)) for name in dtypes
    }
    noise = rng.standard_normal((4, 3, 2)).astype(np.float32)
    return arrays | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((2, 0, 3), np.float32),
        "turned": noise.T,
        "stepped": noise[::2, :, 1],
        "big_endian": noise.astype(">f4"),
        "special": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "läng": np.arange(70_000),
        "of_jax": jnp.ones((2, 1)),
    }


def _assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        array = np.asarray(array)
        assert found[name].dtype == array.dtype.newbyteorder("="), name
        assert found[name].shape == array.shape, name
        # bit for bit: a NaN is itself, and zeros have a sign
        assert found[name].tobytes() == array.astype(found[name].dtype).tobytes(), name


@pytest.mark.parametrize("form", writer.FORMS)
def test_round_trip_is_exact(form, path):
    arrays = _arrays(form)
    writer.write(path, arrays, form=form)
    _assert_same(reader.read(path, flatten=True), arrays)
    first = path.read_bytes()
    writer.write(path, arrays, form=form)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize("form", writer.FORMS)
def test_the_mask_says_who_may_read(form, path):
    before = os.umask(0o022)
    try:
        for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(mask)
            writer.write(path, {"a": np.ones(3)}, form=form)
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_the_package_reads_safetensors(path):
    arrays = {name: np.ascontiguousarray(a) for name, a in _arrays("safetensors").items()}
    arrays["big_endian"] = arrays["big_endian"].astype("<f4")
    writer.write(path, arrays, form="safetensors", metadata={"b": "ä", "a": "1"})
    _assert_same(safetensors.numpy.load_file(path), arrays)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"a": "1", "b": "ä"}


@pytest.mark.parametrize("form", ["torch", "flax"])
@pytest.mark.parametrize("wrap", [("state_dict",), ("a", "model")])
def test_dicts_around_a_state_dict(form, wrap, path):
    arrays = {"x.y": np.ones(3), "x.z": np.zeros((2, 2))}
    writer.write(path, arrays, form=form, wrap=wrap)
    _assert_same(reader.read(path, *wrap, flatten=True), arrays)
    _assert_same(reader.read(path, flatten=True), {".".join((*wrap, k)): arrays[k] for k in arrays})


def test_published_files_survive(shared, path):
    for name, wrap, form in (
        ("openmagvit2/openmagvit2.ckpt", ("state_dict",), "torch"),
        ("lpips/vgg.pth", (), "torch"),
        ("titok_onestage_vq/model.safetensors", (), "safetensors"),
        ("maskgit_discriminator/discriminator_checkpoint", (), "flax"),
    ):
        arrays = reader.read(shared / "parity" / name, *wrap, flatten=True)
        writer.write(path, arrays, form=form)
        found = reader.read(path, flatten=True)
        assert list(found) == list(arrays)
        _assert_same(found, arrays)


def test_flax_bytes_of_a_published_file_are_the_same(shared, path):
    file = shared / "parity" / "maskgit_tokenizer" / "tokenizer_imagenet_checkpoint"
    writer.write(path, reader.read(file, flatten=True), form="flax")
    assert path.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("chunk", [2**30, 1000, 48])
def test_flax_bytes_are_those_of_flax(chunk, path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(writer, "FLAX_CHUNK", chunk)
    rng = np.random.default_rng(1)
    # Lengths on both sides of each of msgpack's steps: 1, 2, 4, 8, 16 bytes, 2**8, 2**16.
    arrays = {f"n.{n}": rng.integers(0, 9, n).astype(np.uint8) for n in range(300)}
    arrays |= {f"wide.{n}": np.zeros((n, 1), np.int8) for n in (65_500, 65_536, 70_000)}
    arrays |= {f"{'k' * n}.x": np.ones((1,) * (n % 20)) for n in (1, 31, 32, 255, 256, 70_000)}
    arrays = {name: a for name, a in arrays.items() if a.nbytes <= 500 * chunk}
    writer.write(path, arrays, form="flax", wrap=("params",))
    tree = traverse_util.unflatten_dict({f"params.{k}": arrays[k] for k in arrays}, sep=".")
    assert path.read_bytes() == serialization.msgpack_serialize(tree, in_place=True)


def test_torch_files_are_made_as_torch_makes_them(path):
    """Taken apart by the standard library: what torch.load(weights_only=True) asks for."""
    arrays = _arrays("torch")
    writer.write(path, arrays, form="torch", wrap=("model",))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = archive.infolist()
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        program = archive.read("archive/data.pkl")
        for i, (name, array) in enumerate(arrays.items()):
            data = np.asarray(array)
            data = data.astype(data.dtype.newbyteorder("<"))
            assert archive.read(f"archive/data/{i}") == data.tobytes(), name
    assert {member.filename for member in members} == {
        *(f"archive/{name}" for name in ("data.pkl", "version", "byteorder")),
        *(f"archive/data/{i}" for i in range(len(arrays))),
    }
    whole = path.read_bytes()
    for member in members:
        assert member.compress_type == zipfile.ZIP_STORED
        start = member.header_offset + 30 + len(member.filename) + len(member.extra)
        assert start % 64 == 0
        with zipfile.ZipFile(path) as archive:
            assert whole[start : start + member.file_size] == archive.read(member)
    pickletools.dis(program, out=io.StringIO())  # raises where the stack does not work out
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(program)]
    assert opcodes[0] == ("PROTO", 2)
    names = {argument for name, argument in opcodes if name == "GLOBAL"}
    assert names - {f"torch {kind}" for kind in writer.pickles.STORAGES} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
    }
    assert sum(name == "BINPERSID" for name, _ in opcodes) == len(arrays)


def test_metadata_of_safetensors(path):
    metadata = {"format": "pt", "source": "sha256:0"}
    writer.write(path, {"a": np.ones(2)}, form="safetensors", metadata=metadata)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == metadata


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"a": np.ones(1)}, dict(form="onnx"), "no form 'onnx'; safetensors, torch, flax"),
        ({}, dict(form="torch"), "no arrays"),
        ({"": np.ones(1)}, dict(form="torch"), "name of an array"),
        ({1: np.ones(1)}, dict(form="torch"), "name of an array"),
        ({"a": np.array(["x"])}, dict(form="flax"), "a has the dtype <U1"),
        ({"a": np.array([{}])}, dict(form="torch"), "a has the dtype object"),
        ({"a": np.ones(1, np.uint16)}, dict(form="torch"), "uint16.*float64, float32"),
        ({"a": np.ones(1)}, dict(form="torch", metadata={"a": "b"}), "only safetensors"),
        ({"a": np.ones(1)}, dict(form="flax", metadata={"a": "b"}), "only safetensors"),
        ({"a": np.ones(1)}, dict(form="safetensors", metadata={"a": 1}), "must be texts"),
        ({"a": np.ones(1)}, dict(form="safetensors", wrap=("model",)), "no dicts within"),
        ({"__metadata__": np.ones(1)}, dict(form="safetensors"), "__metadata__"),
        ({"a": np.ones(1), "a.b": np.ones(1)}, dict(form="flax"), "a.b lies within another"),
        ({"a.b": np.ones(1), "a": np.ones(1)}, dict(form="flax"), "a is an array and holds"),
    ],
)
def test_what_can_not_be_written(arrays, options, message, path):
    path.write_bytes(b"before")
    with pytest.raises(interfaces.UserError, match=message):
        writer.write(path, arrays, **options)
    # what was there stays, and nothing is left beside it
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"before"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(interfaces.UserError, match="no folder"):
        writer.write(tmp_path / "none" / "a.pt", {"a": np.ones(1)}, form="torch")


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    writer.write(path, {"a": np.ones(1)}, form="torch")

    def full(*arguments):
        raise OSError("no space left on device")

    for where in (zipfile.ZipFile, "writestr"), (writer.os, "fsync"), (writer.os, "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(*where, full)
            with pytest.raises(OSError, match="no space"):
                writer.write(path, {"a": np.zeros(1)}, form="torch")
        assert reader.read(path)["a"] == 1
        assert list(path.parent.iterdir()) == [pathlib.Path(path)]
