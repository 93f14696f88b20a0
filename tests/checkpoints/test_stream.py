"""Steps that are written in pieces are the steps that are written whole."""

import dataclasses
import errno
import functools
import gc
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tokgen import parameters
from tokgen.checkpoints import checkpoint, imported as imports, importing, loading, manifest, stream
from tokgen.errors import UserError
from tokgen.pretrained import keymap, parity, system, transfer
from tokgen.pretrained.formats import stored, writer

HERE = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
# A generator, whose layers are stacked; an average in one entry; arrays that lie aside
FIXTURES = {
    "ibq_generator": "ibq_generator",
    "openmagvit2_ema": "openmagvit2",
    "taming_vqgan": "taming_vqgan",
}
SMALL = "ibq_generator"


def held(name, folder=HERE):
    """What an import holds against the model of a fixture; of SMALL with an average, too."""
    fixture = parity.Folder(folder / name, FIXTURES.get(name, name))
    weights = fixture.weights()
    average = {key: array / 2 for key, array in weights.items()} if name == SMALL else None
    return transfer.fitting(weights, fixture.name, fixture.config, source="here", average=average)


def record(step):
    meta = checkpoint.read_meta(step)
    return {name: value for name, value in meta.items() if name != "versions"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == SMALL else pytest.mark.long) for name in FIXTURES],
)
def test_a_step_in_pieces_is_the_step_of_the_whole_model(tmp_path, name):
    fitting = held(name)
    whole = imports.save_imported(tmp_path / "whole", fitting.imported(), {})
    pieces = imports.save_fitting(tmp_path / "pieces", fitting, {})
    assert record(whole) == record(pieces)
    assert loading.load(whole).fingerprint == loading.load(pieces).fingerprint
    checkpoint.verify(pieces)


@pytest.mark.long
@pytest.mark.parametrize("name", system.importable())
def test_pieces_are_the_numbers_of_the_model(shared, name):
    if not (shared / "parity" / name).is_dir():
        pytest.skip(f"no fixture of {name} is shared")
    fitting = held(name, shared / "parity")
    found = {path: np.full(leaf.shape, np.nan) for path, leaf in fitting.leaves().items()}
    for path, layer, part in fitting.pieces():
        found[path][... if layer is None else layer] = part
    imported = fitting.imported()
    _, params, stats = parameters.split(imported.module)
    wanted = {"params": params, "stats": stats}
    if imported.average is not None:
        wanted["ema"] = parameters.split(imported.average)[1]
    wanted = parameters.paths(wanted)
    assert set(wanted) == set(found)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf, path)


def test_sums_of_pieces_are_those_of_the_whole():
    whole = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
    sums = manifest.Sums()
    for layer in (3, 0, 4, 1, 2):
        sums.add("a", layer, whole[layer])
    leaf = jax.ShapeDtypeStruct(whole.shape, whole.dtype)
    assert sums.manifest({"a": leaf}) == manifest.of({"a": jax.numpy.asarray(whole)})


@pytest.mark.parametrize("few", [0, 2, 2**16])
@pytest.mark.parametrize("size", [1, 1000, 3])
def test_sums_in_blocks_are_those_of_the_whole(monkeypatch, size, few):
    leaf = jax.numpy.asarray(np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32))
    wanted = manifest.of({"a": leaf})
    monkeypatch.setattr(manifest, "FEW", few)
    traced = manifest._checksum_in_blocks.__wrapped__
    monkeypatch.setattr(manifest, "BLOCK", size)
    monkeypatch.setattr(manifest, "_checksum_in_blocks", jax.jit(lambda *given: traced(*given)))
    assert manifest.of({"a": leaf}) == wanted
    sums = manifest.Sums()
    for layer, piece in enumerate(np.asarray(leaf)):
        sums.add("a", layer, piece)
    assert sums.manifest({"a": leaf}) == wanted


def test_a_step_whose_pieces_end_early_is_not_there(tmp_path):
    fitting = held(SMALL)
    last = fitting.rows[-1].key
    fitting.weights[last] = stored.Stored(np.dtype("f4"), fitting.weights[last].shape, unreadable)
    with pytest.raises(UserError, match="the file is gone"):
        imports.save_fitting(tmp_path, fitting, {})
    assert not [f for f in (tmp_path / checkpoint.FOLDER).iterdir() if not f.name.startswith(".")]


@pytest.mark.long  # the interrupt is of the whole process
def test_an_interrupt_ends_a_step_that_is_under_way(tmp_path):
    fitting = held(SMALL)
    read = []

    def fetch(array):
        read.append(array)
        if len(read) == 3:
            time.sleep(0.5)  # by now the main thread waits
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return array

    for key, array in fitting.weights.items():
        array = keymap.numbers(array)
        fitting.weights[key] = stored.Stored(
            array.dtype, array.shape, functools.partial(fetch, array)
        )
    before = set(threading.enumerate())
    # jax has a callback of the collector's, and what is raised in one is lost
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            imports.save_fitting(tmp_path, fitting, {})
    finally:
        gc.enable()
    left = [t.name for t in threading.enumerate() if t not in before and not t.daemon]
    assert not [name for name in left if not name.startswith("metadata_store")]  # which is idle
    assert len(read) < 10 < len(fitting.weights)
    assert not list((tmp_path / checkpoint.FOLDER).iterdir())


def test_an_error_of_the_store_is_told_and_nothing_waits_for_the_record(tmp_path, monkeypatch):
    async def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream._Handler, "_open_and_write", refuse)
    with pytest.raises(UserError, match="step 0 could not be saved.*No space left"):
        imports.save_fitting(tmp_path, held(SMALL), {})
    assert not list((tmp_path / checkpoint.FOLDER).iterdir())


def unreadable():
    raise UserError("the file is gone")


def test_pieces_must_make_the_leaves():
    leaf = jax.ShapeDtypeStruct((2, 3), np.dtype("f4"))
    found = stream.Stream({"a": leaf}, iter(()))
    found.error = ValueError("came in other pieces")
    found.ended.set()
    with pytest.raises(ValueError, match="other pieces"):
        found.manifest()


def test_every_array_is_read_once(tmp_path, monkeypatch):
    """Of the file, after its header; what a checksum of the file reads is not counted."""
    fixture, found = parity.Folder(HERE / SMALL, SMALL), system.named(SMALL)
    weights = fixture.weights() | {"first_stage_model.conv.weight": np.ones((2, 3), np.float32)}
    file = tmp_path / "x.ckpt"
    writer.write(file, weights, form="torch", wrap=found.wrap)
    read = []
    fetched = stored.Stored.read

    def counted(self):
        read.append(id(self))
        return fetched(self)

    monkeypatch.setattr(stored.Stored, "read", counted)
    made = importing.import_file(file, tmp_path / "out", SMALL, config=fixture.config)
    assert len(read) == len(set(read)) == len(made.fitting.weights) + len(made.fitting.aside)
    assert made.fitting.aside


def test_weights_that_are_their_own_average_are_read_once():
    """As those of an export, which holds what is used alone."""
    fitting, read = held(SMALL), []

    def fetch(key, array):
        read.append(key)
        return array

    weights = {
        key: stored.Stored(array.dtype, array.shape, functools.partial(fetch, key, array))
        for key, array in fitting.weights.items()
    }
    found = dataclasses.replace(fitting, weights=weights, average=weights)
    pieces = {(path, layer): part for path, layer, part in found.pieces()}
    assert sorted(read) == sorted(weights)
    averages = {path for path, _ in pieces if path.startswith("ema/")}
    assert averages == {path for path in found.leaves() if path.startswith("ema/")}
    for path, layer in pieces:
        if path.startswith("ema/"):
            live = pieces[path.replace("ema/", "params/"), layer]
            np.testing.assert_array_equal(pieces[path, layer], live)


# VmHWM: what getrusage says is never less than what the parent held
LARGE = """
import pathlib, sys
from tokgen.checkpoints import importing
importing.import_file(sys.argv[1], sys.argv[2], "llamagen_c2i", config={"n_head": 16})
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.long
def test_an_import_takes_less_memory_than_its_file(tmp_path):
    width, hidden, depth = 1024, 4096, 8
    shapes = {
        "cls_embedding.embedding_table.weight": (1001, width),
        "tok_embeddings.weight": (16384, width),
        "norm.weight": (width,),
        "output.weight": (16384, width),
        "freqs_cis": (257, 32, 2),
    }
    for layer in range(depth):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * width, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (hidden, width),
            f"layers.{layer}.feed_forward.w3.weight": (hidden, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, hidden),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    arrays = {
        name: stored.Stored(
            np.dtype("f4"),
            shape,
            lambda shape=shape: np.random.default_rng(0).normal(size=shape).astype(np.float32),
        )
        for name, shape in shapes.items()
    }
    file = tmp_path / "large.pt"
    found = system.named("llamagen_c2i")
    writer.write(file, arrays, form=found.form, wrap=found.wrap)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(file), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    size = file.stat().st_size / 2**20
    assert size > 600
    assert float(done.stdout) < size + 200  # jax and the store take 300, a copy of all `size` more
