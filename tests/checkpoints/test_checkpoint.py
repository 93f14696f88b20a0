"""Checkpoints: what was saved comes back bit by bit, or is refused in one message."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, parameters, sharding
from tokgen.checkpoints import checkpoint, description, loading, manifest, run as runs
from tokgen.config import building, migration, reading as configs
from tokgen.training import optimizer as optimizers, train_state

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNEL = "model/ema/encoder/conv_in/kernel"
SMALL = (
    *("data.size=(16, 16)", "view.size=(16, 16)", "encoder.widths=(16,)", "decoder.widths=(16,)"),
    *("encoder.blocks=1", "decoder.blocks=1", "batch_size=8", "quantizer.codes=32"),
)


def load_config(*overrides):
    return configs.load("configs/tokenizer/shapes.py:ema", (*SMALL, *overrides))


def filled(config, seed=0):
    """The state of a config with something in every leaf; compiles nothing."""

    def make():
        return building.tokenizer(config, rngs=nnx.Rngs(0))

    optimizer = building.call(
        optimizers.optimizer, config.optimizer, "optimizer", steps=config.steps
    )
    _, params, stats = parameters.split(nnx.eval_shape(make))
    zero = jnp.zeros((), jnp.int32)

    def whole(params, stats):
        return train_state.TrainState(
            zero, zero, params, stats, optimizer.chain.init(params), params
        )

    abstract = jax.eval_shape(whole, params, stats)
    generator = np.random.default_rng(seed)

    def of(leaf, laid):
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        drawn = generator.normal(size=leaf.shape) if real else np.zeros(leaf.shape)
        return jax.device_put(drawn.astype(leaf.dtype), laid)

    return jax.tree.map(of, abstract, train_state.shardings(abstract, sharding.make_mesh(), "data"))


def start(workdir, config, **changes):
    layout = interfaces.TokenLayout((32,), ((4, 4),))
    meta = dict(kind="tokenizer", layout=layout, classes=("a", "b"), best="l2", data="abc")
    meta["held_out"] = "h"
    return runs.start(workdir, config, **(meta | changes))


def saved_in(workdir, network, config, steps=(5,), l2=(0.5,)):
    run = start(workdir, config)
    for step, loss in zip(steps, l2, strict=True):
        network = network.replace(step=jnp.asarray(step, jnp.int32))
        run.save({"model": network}, {"l2": loss})
    run.close()
    return network


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(config, saved state, work directory): made once, copied by those who damage it."""
    workdir = tmp_path_factory.mktemp("run")
    config = load_config()
    network = saved_in(workdir, filled(config), config)
    return config, network, workdir


@pytest.fixture
def copy(base, tmp_path):
    """The same work directory to be damaged."""
    return shutil.copytree(base[2], tmp_path / "copy")


def resumed(workdir, config, network, **changes):
    run = start(workdir, config, **changes)
    try:
        networks, what = runs.resume_or_start(run, {"model": network})
    finally:
        run.close()
    return networks["model"], what


def blank(network):
    return jax.tree.map(jnp.zeros_like, network)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- save and restore


def test_a_step_is_described(base):
    config, network, workdir = base
    found = description.describe(workdir, verify=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(network.params))
    assert found.rows["parameters"] == f"{count:,}" and found.rows["kind"] == "tokenizer"
    assert found.rows["classes"] == "2: a, b" and found.rows["data"] == "abc"
    assert found.rows["arrays"] == f"{found.arrays}, all verified"
    assert workdir in found.step.parents
    assert found.config["steps"] == config.steps


def test_a_resumed_state_is_bit_equal_and_lies_as_before(base):
    config, network, workdir = base
    found, what = resumed(workdir, config, blank(network))
    assert what.startswith("resumed step 5")
    equal(found, network)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(network), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_an_empty_work_directory_starts_anew(base, tmp_path):
    config, network, _ = base
    found, what = resumed(tmp_path / "new", config, network)
    assert what.startswith("started a new run")
    equal(found, network)


def test_init_from_takes_parameters_and_nothing_else(base, tmp_path):
    config, network, workdir = base
    config = load_config(f"init_from={workdir}")
    found, what = resumed(tmp_path / "new", config, blank(network))
    assert str(workdir) in what and found.step == 0
    equal((found.params, found.ema, found.stats), (network.params, network.ema, network.stats))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found.opt_state))
    wider = load_config(f"init_from={workdir}", "encoder.widths=(24,)")
    with pytest.raises(interfaces.UserError, match="encoder"):
        resumed(tmp_path / "other", wider, filled(wider))


def test_init_from_begins_a_discriminator_and_an_average_that_were_not_there(base, tmp_path):
    """As when a tokenizer without a discriminator, or an imported one, is tuned with one."""
    _, network, _ = base
    config = load_config()
    source = saved_in(tmp_path / "source", network.replace(ema=None), config)
    config = load_config(f"init_from={tmp_path / 'source'}")
    discriminator = jax.tree.map(lambda leaf: leaf + 1, network.replace(ema=None))
    averages = {"real": jnp.asarray(2.0)}
    run = start(tmp_path / "new", config)
    try:
        found, _ = runs.resume_or_start(
            run, {"model": blank(network), "discriminator": discriminator, "averages": averages}
        )
    finally:
        run.close()
    equal((found["model"].params, found["model"].stats), (source.params, source.stats))
    equal(found["model"].ema, source.params)
    equal((found["discriminator"], found["averages"]), (discriminator, averages))
    # as a training step does, which may not give the same buffer twice
    jax.block_until_ready(jax.jit(lambda model: model, donate_argnums=0)(found["model"]))


def test_steps_to_keep_and_steps_to_forget(base, tmp_path):
    """The step before the adversarial term stays however many follow; later ones can go."""
    config, network, _ = base
    run = start(tmp_path, config, kept=(2,))
    for step, loss in ((1, 0.9), (2, 0.8), (3, 0.2), (4, 0.5), (5, 0.7)):
        run.save({"model": network.replace(step=jnp.asarray(step, jnp.int32))}, {"l2": loss})
    run.wait()
    folder = tmp_path / checkpoint.FOLDER
    steps = lambda: sorted(int(s.name) for s in folder.iterdir() if s.name.isdigit())  # noqa: E731
    assert steps() == [2, 3, 5] and runs.latest(run) == 5
    assert runs.metrics(run, 2) == {"l2": 0.8} and runs.metrics(run, 4) == {}
    runs.drop_after(run, 2)
    assert steps() == [2] and runs.latest(run) == 2
    run.save({"model": network.replace(step=jnp.asarray(3, jnp.int32))}, {"l2": 0.6})
    run.close()
    assert steps() == [2, 3] and resumed(tmp_path, config, blank(network))[0].step == 3


def test_best_and_latest_are_kept(base, tmp_path):
    config, network, _ = base
    saved_in(tmp_path, network, config, steps=(1, 2, 3, 4, 5), l2=(0.9, 0.2, 0.5, 0.4, 0.8))
    folder = tmp_path / checkpoint.FOLDER
    assert sorted(s.name for s in folder.iterdir() if s.name.isdigit()) == ["2", "5"]
    assert checkpoint.find(tmp_path).name == "2"  # for use: the best
    assert checkpoint.find(folder / "5").name == "5"
    assert resumed(tmp_path, config, network)[0].step == 5  # to go on: the latest


def test_loading_for_use_takes_the_average(base):
    config, network, workdir = base
    loaded = loading.load_tokenizer(workdir)
    params, stats = parameters.split(loaded.module)[1:]
    equal((params, stats), (network.ema, network.stats))
    assert loaded.classes == ("a", "b") and loaded.layout.vocab == (32,)
    assert configs.flat(loaded.config) == configs.flat(
        json.loads(json.dumps(building.plain(config)))
    )
    with pytest.raises(interfaces.UserError, match="holds a tokenizer; need.*generator"):
        loading.load_generator(workdir)


def test_bfloat16_parameters_come_back(tmp_path):
    """Their averages and moments are float32; loaded for use they are what the config says."""
    config = load_config("precision.params=bfloat16")
    network = filled(config)
    widened = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, network
    )
    network = widened.replace(params=network.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(network.params)} == {jnp.dtype("bfloat16")}
    saved_in(tmp_path, network, config)
    found, _ = resumed(tmp_path, config, blank(network))
    equal(found, network.replace(step=5))
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, network)
    params = parameters.split(loading.load_tokenizer(tmp_path).module)[1]
    equal(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network.ema))
    # as an older version wrote its moments: they are cast
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf,
        network.opt_state,
    )
    saved_in(tmp_path / "old", network.replace(opt_state=half), config)
    found, _ = resumed(tmp_path / "old", config, blank(network))
    equal(found.opt_state, jax.tree.map(lambda a, b: a.astype(b.dtype), half, network.opt_state))
    # and other parameters are refused as ever
    with pytest.raises(interfaces.UserError, match="bfloat16"):
        resumed(tmp_path, config, blank(widened))


def test_a_checkpoint_that_counted_no_skips_begins_to(base, tmp_path):
    config, network, workdir = base
    counted = blank(network).replace(skips=jnp.asarray(7, jnp.int32))
    found, _ = resumed(workdir, config, counted)
    assert found.skips == 7 and found.step == 5
    equal(found.params, network.params)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_path_without_a_checkpoint_is_named(tmp_path, name):
    with pytest.raises(interfaces.UserError, match="no checkpoint at"):
        checkpoint.find(tmp_path / name)


# ---------------------------------------------------------------- damage


def loaded_or_refused(step, network):
    """None when it was refused; else the arrays and the record are what was saved."""
    wanted = {f"model/{path}": leaf for path, leaf in parameters.paths(network).items()}
    try:
        meta = checkpoint.read_meta(step)
        leaves = checkpoint.restore(step, wanted, meta)
    except interfaces.UserError as error:
        assert str(step) in str(error) and "\n  File" not in str(error)
        return None
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    return meta


@pytest.mark.parametrize(
    ("most", "few", "least"), [pytest.param(10, 2, 8, marks=pytest.mark.long), (4, 1, 4)]
)
def test_a_flipped_byte_is_refused_or_harmless(most, few, least, base, copy):
    """Every file of the checkpoint, at its ends and at random places: never other arrays."""
    _, network, workdir = base
    step = copy / checkpoint.FOLDER / "5"
    intact = checkpoint.read_meta(workdir / checkpoint.FOLDER / "5")
    generator, refused = np.random.default_rng(0), 0
    files = sorted(file for file in step.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) > 4
    largest = max(files, key=lambda file: file.stat().st_size)
    for file in files:
        content = file.read_bytes()
        count = most if file == largest else few
        for place in generator.integers(0, len(content), count).tolist():
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(generator.integers(8))
            file.write_bytes(flipped)
            meta = loaded_or_refused(step, network)
            assert meta is None or meta == intact, f"{file} at {place}"
            refused += meta is None
        file.write_bytes(content)
    assert refused > least
    assert loaded_or_refused(step, network) == intact  # whole again


def test_a_truncated_or_missing_file_is_one_message_that_names_the_step(base, copy):
    config, network, _ = base
    step = copy / checkpoint.FOLDER / "5"
    files = sorted(file for file in step.rglob("*") if file.is_file() and file.stat().st_size)
    refused = {}
    for file in files:  # one that is never read may be missing
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        refused[file] = loaded_or_refused(step, network) is None
        file.unlink()
        refused[file] &= loaded_or_refused(step, network) is None
        file.write_bytes(content)
    assert len(files) > 5 and all(refused[file] for file in files if file.name != manifest.SIZES), (
        refused
    )
    for part in ("meta", "state"):
        shutil.move(step / part, step / "away")
        with pytest.raises(interfaces.UserError, match=f"{step} is damaged.*train it again"):
            loading.load_tokenizer(copy)
        with pytest.raises(interfaces.UserError, match=f"{step} is damaged"):
            resumed(copy, config, network)
        shutil.move(step / "away", step / part)
    equal(resumed(copy, config, blank(network))[0], network)


@pytest.mark.parametrize(
    "change",
    [
        *(dict(manifest=None), dict(manifest={"a": None}), dict(config=None), dict(step="5")),
        *(dict(layout={"vocab": [10**9], "grids": [[10**9, 10**9]]}), dict(layout=[1])),
        *(dict(classes=None), dict(metrics=[]), dict(best=None), dict(kind=None)),
        "shape",
    ],
)
def test_a_record_of_other_types_or_sizes_is_refused_before_work(base, copy, change):
    """Its digest is right, as that of a record that somebody edited with care."""
    step = copy / checkpoint.FOLDER / "5"
    meta = json.loads((step / "meta" / "metadata").read_text())
    meta.pop("digest")
    if change == "shape":
        entry = next(e for p, e in meta["manifest"].items() if p == KERNEL)
        entry["shape"] = [10**9] * len(entry["shape"])
    else:
        meta |= change
    meta["digest"] = manifest.digest(meta)
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    (step / manifest.SIZES).unlink()
    for read in (loading.load_tokenizer, lambda path: checkpoint.verify(checkpoint.find(path))):
        with pytest.raises(interfaces.UserError):
            read(copy)


def test_arrays_of_another_kind_are_refused(base):
    """The store itself would cast a dtype, and cut a shape, without a word."""
    config, network, workdir = base
    kernel = network.params["encoder"]["conv_in"]["kernel"]
    for other in (kernel.astype(jnp.bfloat16), kernel[..., :8], kernel[None]):
        changed = jax.tree.map(lambda leaf: leaf, network)
        changed.params["encoder"]["conv_in"]["kernel"] = other
        with pytest.raises(interfaces.UserError) as caught:
            resumed(workdir, config, changed)
        message = str(caught.value)
        assert "params/encoder/conv_in/kernel" in message
        assert str(tuple(kernel.shape)) in message and str(tuple(other.shape)) in message
        assert str(other.dtype) in message
    more = jax.tree.map(lambda leaf: leaf, network)
    more.params["encoder"]["more"] = kernel
    with pytest.raises(interfaces.UserError, match="encoder/more: absent there"):
        resumed(workdir, config, more)


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    ("override", "there", "here"),
    [
        ("seed=3", "0", "3"),
        ("batch_size=16", "8", "16"),
        ("optimizer.learning_rate=0.5", "0.003", "0.5"),
        ("quantizer.decay=0.5", None, None),
        ("data.form=hard", "'easy'", "'hard'"),
        ("ema=0.5", "0.998", "0.5"),
    ],
)
def test_another_config_is_refused_with_both_values(base, override, there, here):
    _, network, workdir = base
    config = load_config()
    if there is None:  # a field that was not there
        with config.unlocked():
            config.quantizer.decay = 0.5
        there, here = "'absent'", "0.5"
    else:
        configs.override(config, [override])
    with pytest.raises(interfaces.UserError) as caught:
        resumed(workdir, config, network)
    name = override.partition("=")[0]
    assert f"  {name}: {there} there, {here} here" in str(caught.value)
    assert str(caught.value).count(" there, ") == 1


def test_free_fields_may_change(base):
    _, network, workdir = base
    config = load_config(
        *("steps=9", "report.save=7", "keep.best=3", "held_out.images=3", "mesh.fsdp=2"),
        *("strategy=fsdp", "max_bad=0.5"),
    )
    assert resumed(workdir, config, network)[0].step == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(classes=("a", "c")),
            "other images.*(\n.*)*classes: \\['a', 'b'\\] there, \\['a', 'c'\\] here",
        ),
        (
            dict(layout=interfaces.TokenLayout((33,), ((4, 4),))),
            "layout: .*32.* there, .*33.* here",
        ),
        (dict(data="xyz"), "data: abc there, xyz here"),
        (
            dict(held_out="xyz"),
            "other images.*--accept-data.*(\n.*)*held-out data: h there, xyz here",
        ),
        (dict(kind="generator"), "holds a tokenizer; this program trains a generator"),
    ],
)
def test_other_data_are_refused(base, change, words):
    config, network, workdir = base
    with pytest.raises(interfaces.UserError, match=words):
        resumed(workdir, config, network, **change)


def test_changed_data_are_accepted_on_request_and_the_record_says_so(base, tmp_path):
    config, network, workdir = base
    with pytest.raises(interfaces.UserError, match="other images.*--accept-data"):
        resumed(workdir, config, network, data="new")
    assert resumed(workdir, config, network, data="new", earlier=("abc",))[0].step == 5
    folder = shutil.copytree(workdir, tmp_path / "run")
    run = start(folder, config, data="new", accept=("data",))
    networks, _ = runs.resume_or_start(run, {"model": network})
    later = networks["model"].replace(step=jnp.asarray(6, jnp.int32))
    run.save({"model": later}, {"l2": 0.4})
    # the record knows both, and needs no request any more; what was left is known, what is new not
    run.close()
    meta = checkpoint.read_meta(folder / "checkpoints" / "6")
    assert meta["data"] == "new"
    assert meta["data_changes"] == [{"step": 5, "from": "abc", "to": "new"}]
    assert resumed(folder, config, network, data="new")[0].step == 6
    with pytest.raises(interfaces.UserError, match="data: new there, abc here"):
        resumed(folder, config, network)
    found = resumed(folder, config, network, accept=("data",), classes=("a", "c"))
    assert found[0].step == 6  # a tokenizer learns none


# ---------------------------------------------------------------- the lock

HOLD = """
import pathlib, sys, time
from tokgen.checkpoints import run as runs
with runs.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    workdir = tmp_path / "deep" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(interfaces.UserError, match=f"in use by process {holder.pid} "):
            with runs.lock(workdir):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with runs.lock(workdir):
        pass
    with runs.lock(workdir):  # and it was released
        pass


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(interfaces.UserError, match="cannot write to the work directory"):
        with runs.lock(tmp_path / "file" / "run"):
            pass


# ---------------------------------------------------------------- fingerprints and checksums


def test_the_fingerprint_follows_the_weights_and_not_the_path(base, copy, tmp_path):
    config, network, workdir = base
    first = loading.load_tokenizer(workdir).fingerprint
    assert loading.load_tokenizer(copy).fingerprint == first
    # neither the optimizer nor the parameters that are not used: the average is
    moved = network.replace(opt_state=blank(network.opt_state), params=blank(network.params))
    saved_in(tmp_path / "moved", moved, config)
    assert loading.load_tokenizer(tmp_path / "moved").fingerprint == first
    bias = network.ema["decoder"]["conv_out"]["bias"]
    network.ema["decoder"]["conv_out"]["bias"] = bias.at[0].add(1e-6)
    saved_in(tmp_path / "other", network, config)
    network.ema["decoder"]["conv_out"]["bias"] = bias
    other = loading.load_tokenizer(tmp_path / "other")
    assert other.fingerprint != first
    with pytest.raises(interfaces.UserError, match="another tokenizer"):
        loading.check_tokenizer(other, first, "a token set")


def entry(leaf):
    return manifest.of({"leaf": leaf})["leaf"]["checksum"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_the_checksum_sees_any_flipped_bit_and_no_sharding(dtype, key):
    shape = (16, 6, 2)
    bits = np.asarray(jax.random.bits(key, shape, jnp.uint32))
    width = {"float32": np.uint32, "int32": np.uint32, "bfloat16": np.uint16}.get(dtype)
    view = jnp.dtype(dtype)
    raw = bits.astype(width) if width else (bits & 1).astype(bool)

    def checksum(raw):
        return entry(jnp.asarray(raw.view(view) if width else raw))

    intact = checksum(raw)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    for spec in (("data",), ("fsdp", None, None), (("data", "fsdp"),), (None, "fsdp")):
        laid = jax.NamedSharding(mesh, jax.P(*spec))
        assert entry(jax.device_put(raw.view(view) if width else raw, laid)) == intact
    generator = np.random.default_rng(0)
    seen = {intact}
    for _ in range(40):
        place = tuple(generator.integers(0, shape))
        flipped = raw.copy()
        if width:
            flipped[place] ^= width(1 << int(generator.integers(8 * raw.itemsize)))
        else:
            flipped[place] = not flipped[place]
        assert checksum(flipped) != intact
        seen.add(checksum(flipped))
    assert len(seen) > 25  # and tells them apart (some places were drawn twice)
    # places matter: the same elements in another order, the same bits in another shape
    assert checksum(raw[::-1].copy()) != intact
    assert checksum(raw[:, ::-1].copy()) != intact


def test_zeros_of_any_sign_and_not_a_numbers_are_told_apart():
    values = [0.0, -0.0, np.nan, -np.nan, np.inf, 1e-45]
    sums = {entry(jnp.full((3,), value, jnp.float32)) for value in values}
    assert len(sums) == len(values)


# ---------------------------------------------------------------- compiled once


def test_a_rebuilt_model_compiles_nothing_twice(base):
    _, _, workdir = base
    first, second = loading.load_tokenizer(workdir), loading.load_tokenizer(workdir)

    @jax.jit
    def encode(tokenizer, image_BHW3):
        return tokenizer.encode(image_BHW3)

    image_BHW3 = jnp.zeros((1, 16, 16, 3))
    assert first.module is not second.module
    encode(first.module, image_BHW3)
    assert encode._cache_size() == 1
    encode(second.module, image_BHW3)
    assert encode._cache_size() == 1


def test_step_in_earlier_words_is_read_in_todays(base, monkeypatch):
    """Arrays lie under the names that they were written with; the fingerprint stays the first."""
    _, _, workdir = base
    step = checkpoint.find(workdir)
    before = checkpoint.read_meta(step)
    rows = (migration.Row(r"model/(params|ema)/encoder", "conv_in", "entry"),)
    monkeypatch.setattr(migration, "PARAMETERS", rows)
    monkeypatch.setattr(migration, "FIELDS", (migration.Row("", "keep", "kept"),))
    meta, now = checkpoint.read_meta(step), KERNEL.replace("conv_in", "entry")
    assert now in meta["manifest"] and KERNEL not in meta["manifest"]
    assert "kept" in meta["config"] and "keep" not in meta["config"]
    whole = sharding.replicated(sharding.make_mesh())
    entry = meta["manifest"][now]
    leaf = jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
    assert checkpoint.restore(step, {now: leaf}, meta)[now].shape == leaf.shape
    assert loading.fingerprint(meta, "ema") == loading.fingerprint(before, "ema")
