"""The process: devices that cannot be used are one message, caches have a place."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import ml_collections
import pytest

from tokgen import runtime
from tokgen.interfaces import UserError

KNOWN = "Backend '{}' is not in the list of known backends: ['cpu', 'tpu']."
FOUND = {
    "no plugin": ("cuda", AssertionError(), r"tokgen\[cuda13"),
    "no plugin, said": ("cuda", RuntimeError(KNOWN.format("cuda")), r"tokgen\[cuda13"),
    "no GPU": ("cuda", RuntimeError("no supported devices found for platform CUDA"), "nvidia-smi"),
    "nonsense": ("abc", RuntimeError(KNOWN.format("abc")), "known backends.*unset JAX_PLATFORMS"),
    "no libtpu": ("tpu", RuntimeError("INTERNAL: Failed to open libtpu.so: none"), "tokgen.tpu."),
    "a TPU of another process": (
        *("", RuntimeError("ABORTED: The TPU is already in use by process with pid 7.")),
        "a device cannot be used.*pid 7; stop the process",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_device_that_cannot_be_used_is_one_message(case, monkeypatch):
    asked, error, words = FOUND[case]

    def devices():
        if str(error):
            raise type(error)(
                f"Unable to initialize backend: {error} (set JAX_PLATFORMS='' to automatically "
                "choose an available backend)"
            )
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax, "config", ml_collections.ConfigDict({"jax_platforms": asked}))
    with pytest.raises(UserError, match=words) as told:
        runtime.check_platform()
    said = str(told.value)
    assert "\n" not in said and "automatically" not in said
    assert f"JAX_PLATFORMS={asked}" in said or not asked


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("TOKGEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert runtime.cache_folder().parent == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / "tokgen"


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(runtime, "check_platform", lambda: None)
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    runtime.devices()
    assert "jax_compilation_cache_dir" not in changed
    assert "compiled programs are not kept" in capsys.readouterr().err
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    runtime.devices()
    assert changed["jax_compilation_cache_dir"] == str(tmp_path / "cache" / "xla")


def test_devices_that_jax_has_started_stay():
    code = (
        "import jax, tokgen.runtime as runtime; jax.numpy.zeros(1); runtime.devices(64); "
        "runtime.devices(64); print(jax.local_device_count())"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["1"], found.stderr
