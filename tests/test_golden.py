"""What tokgen wrote before its restructuring loads, samples to the same bytes, and resumes.

tests/fixtures/golden holds it, as fa066fe left it: runs that were stopped half-way, token sets,
imports, exports, scores, in the words of that time. The archive's README.md says how it was made.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from tokgen import metrics_log, parameters
from tokgen.checkpoints import checkpoint, exporting, imported, loading
from tokgen.config import building, migration, reading
from tokgen.data import token_shards
from tokgen.evaluation import collect
from tokgen.training import safeguards

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOKENIZERS = ("tok_vq", "tok_pyramid", "tok_vit", "tok_stylegan", "tok_bits")
SETS = {"tokens": "tok_vq", "pyramid_tokens": "tok_pyramid", "bits_tokens": "tok_bits"}
GENERATORS = {
    **dict.fromkeys(("gen_raster", "gen_random", "gen_rar", "gen_masked"), "tokens"),
    **{"gen_next_scale": "pyramid_tokens", "gen_bits": "bits_tokens"},
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The folder of the unpacked archive."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "golden.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return next(path.parent for path in (folder, *folder.iterdir()) for path in [path / "root"]
                if path.is_dir())  # fmt: skip


def program(*arguments):
    """A program as a user starts it: compiled with all optimizations, on one core."""
    ours = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "NPROC")
    kept = {name: value for name, value in os.environ.items() if name not in ours}

    def one_core():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)},
        preexec_fn=one_core if hasattr(os, "sched_setaffinity") else None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# ---------------------------------------------------------------- records


def test_the_record_of_every_shipped_config_is_todays(golden):
    """Its own file, or whoever imports it, gives what the record says in today's words."""
    records = json.loads((golden / "records.json").read_text())
    assert len(records) > 140
    for reference, record in records.items():
        today = json.loads(json.dumps(building.plain(reading.load(reference))))
        today.pop("made_for", None)  # of plans: it says nothing of what was trained
        assert migration.config(record) == today, reference
        assert migration.first_config(today) == record, reference
        assert migration.config(today) == today, reference


@pytest.mark.parametrize("step", EXPECTED["steps"])
def test_fingerprints_are_what_they_were(golden, step):
    expected, meta = EXPECTED["steps"][step], checkpoint.read_meta(golden / "root" / step)
    for which, fingerprint in expected["fingerprint"].items():
        assert loading.fingerprint(meta, which) == fingerprint
    assert {meta["written"].get(path, path) for path in meta["manifest"]} == set(expected["paths"])
    assert {migration.first_parameter(path) for path in meta["manifest"]} == set(expected["paths"])
    for name in ("kind", "step", "layout", "classes", "data"):
        assert meta[name] == expected[name], name
    assert meta["metrics"] == migration.metrics(expected["metrics"])


def test_every_array_of_a_run_in_earlier_words_is_read(golden):
    """Those of both networks of a GAN, moments and averages included."""
    meta = checkpoint.read_meta(golden / "root" / "tok_vq" / "checkpoints" / "4")
    assert any(path.startswith("discriminator/opt_state/") for path in meta["manifest"])
    checkpoint.verify(golden / "root" / "tok_vq" / "checkpoints" / "4")


def test_a_token_set_is_accepted_by_its_tokenizer(golden):
    _accepted(golden, "tokens")


def _accepted(golden, name):
    tokenizer = loading.load_tokenizer(golden / "root" / SETS[name])
    folder = golden / "root" / name
    source = token_shards.Source(folder, split="train")
    loading.check_tokens(tokenizer, source.header, str(folder))
    assert len(source) > 0


def test_returns_and_logs_are_read(golden):
    run = golden / "root" / "tok_stylegan"
    assert safeguards.returned(run) == 1 and not safeguards.unsettled(run)
    lines = [migration.metrics(line) for line in metrics_log.read(run)]
    assert any("discriminator_loss" in line for line in lines)
    assert not [name for line in lines for name in line if "critic" in name]


# ---------------------------------------------------------------- use


@pytest.mark.long
@pytest.mark.parametrize("step", EXPECTED["steps"])
def test_every_network_loads(golden, step):
    loaded = loading.load(golden / "root" / step)
    assert loaded.fingerprint == EXPECTED["steps"][step]["loaded"]
    if loaded.meta["tokenizer"] is not None:
        made_by = loading.load_tokenizer_of(loaded).fingerprint
        assert made_by == loaded.meta["tokenizer"]["fingerprint"]


@pytest.mark.long
@pytest.mark.parametrize("name", SETS)
def test_every_token_set_is_accepted(golden, name):
    _accepted(golden, name)


@pytest.mark.long
@pytest.mark.parametrize("name", EXPECTED["samples"])
def test_samples_are_the_same_bytes(golden, tmp_path, name):
    options = EXPECTED["samples"][name]["options"]
    run = golden / options[1]
    program("-m", "tokgen.cli", "sample", run, *options[2:], "--out", tmp_path / "out")
    expected = np.load(golden / "expected" / f"{name}.samples.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "tokens.npy"), expected["tokens"])
    found = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    versions = checkpoint.versions()
    if all(EXPECTED["versions"][name] == versions[name] for name in ("jax", "jaxlib", "flax")):
        np.testing.assert_array_equal(found, expected["arr_0"])
    assert np.abs(found.astype(int) - expected["arr_0"]).max() <= 1  # other programs may round so


@pytest.mark.long
@pytest.mark.parametrize("name", [*TOKENIZERS, *GENERATORS])
def test_a_run_that_was_stopped_goes_on(golden, name):
    """To what the uninterrupted run came to; its new steps and its log are in today's words."""
    run, root = golden / "root" / name, golden / "root"
    kind, _, variant = name.partition("_")
    if kind == "tok":
        program("train_tokenizer.py", f"--config={GOLDEN}/tokenizers.py:{variant}",
                f"--workdir={run}")  # fmt: skip
    else:
        tokens = GENERATORS[name]
        program("train_generator.py", f"--config={GOLDEN}/generators.py:{variant}",
                f"--workdir={run}", f"--config.data.tokens={root / tokens}",
                f"--config.data.tokenizer={root / SETS[tokens]}/checkpoints/4")  # fmt: skip
    step = run / "checkpoints" / "8"
    meta = checkpoint.read_meta(step)
    assert meta["step"] == 8 and meta["written"] == {}
    # this one went back once, which its record of returns says
    said = f"{name}.returned" if name == "tok_stylegan" else name
    arrays = np.load(golden / "expected" / f"{said}.step8.npz")
    wanted = {migration.parameter(path): arrays[path] for path in arrays}
    paths = json.loads((golden / "expected" / f"{said}.step8.json").read_text())["leaves"]
    assert {migration.parameter(path) for path in paths} <= set(meta["manifest"])
    loaded = loading.load(step, which="params")
    _, params, stats = parameters.split(loaded.module)
    found = parameters.paths({"model": {"params": params, "stats": stats}})
    for path, array in wanted.items():
        np.testing.assert_allclose(found[path], array, rtol=1e-4, atol=2e-5, err_msg=path)
    names = {name for line in metrics_log.read(run) for name in line}
    assert names == set(migration.metrics(dict.fromkeys(names)))
    assert {line["step"] for line in metrics_log.read(run)} == set(range(1, 9))


@pytest.mark.long
@pytest.mark.parametrize("name", ["export_vit", "export_raster"])
def test_an_export_is_read_with_the_fingerprint_that_it_states(golden, tmp_path, name):
    found, record = exporting.read(golden / "root" / name)
    step = imported.save_fitting(tmp_path, found, {})
    assert loading.load(step).fingerprint == record["fingerprint"]


def test_results_of_scores_are_read_in_todays_words(golden):
    for name in ("score_raster", "score_raster_warm", "score_vq"):
        folder = golden / "root" / name
        first = json.loads((folder / "results.jsonl").read_text())
        (line,) = collect.results(folder)
        assert (line["metrics"], line["images"]) == (first["figures"], first["supply"])
        run = json.loads((folder / "run.json").read_text())
        assert collect.migrated(run)["images"] == run["supply"]


@pytest.mark.long
def test_scores_are_compared(golden, tmp_path):
    root = golden / "root"
    program("-m", "tokgen.cli", "compare", root / "score_raster", root / "score_raster_warm",
            "--out", tmp_path / "out")  # fmt: skip
    assert (tmp_path / "out" / "compare.json").is_file()
