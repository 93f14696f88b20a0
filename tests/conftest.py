"""What every test runs under: eight virtual CPU devices, strict broadcasting, a compilation cache.

The settings stand above the first use of jax, which reads them once. Those that go through
`jax.config` stay in this process: a program that a test starts sees one device, as a user's does.
"""

import gc
import importlib.metadata
import os
import pathlib
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA sizes its thread pool by NPROC. With one thread per device, several collective programs in
# flight take each other's threads and wait for ever (jax 0.10.2 on 2 cores: a loop over a sharded
# step aborts after 40 s); four per device were never seen to.
os.environ.setdefault("NPROC", str(4 * DEVICES))
# numpy's matrices are small here. OpenBLAS' threads, in each worker as many as cores, wait for each
# other in loops: tests of scores take 2.5 times the CPU time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# One folder per environment: an entry does not outlive the jax that wrote it.
if sys.prefix != sys.base_prefix:
    CACHE = pathlib.Path(sys.prefix) / "cache"
    os.environ.setdefault("TOKGEN_CACHE", str(CACHE))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
# Tests compile far longer than they compute: without optimizations in half the time. Programs that
# tests start inherit it; `optimized` turns it back on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters compile a small program in half the time, a large one in nine tenths (jax
# 0.10.2). What must be compiled as for users asks for the newer ones in `compiler_options`. Later
# versions have none but these, and end a process that names a flag they do not know.
EMITTERS = "xla_cpu_use_fusion_emitters"
CHOICE = importlib.metadata.version("jaxlib").split(".")[:2] == ["0", "10"]
if CHOICE and EMITTERS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{EMITTERS}=false".strip()
# Programs are compiled in one piece: in 32, for as many cores, it takes an eighth longer on few.
PIECES = "xla_cpu_parallel_codegen_split_count"
if CHOICE and PIECES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{PIECES}=1".strip()
# Tests compile many small programs, each below the default of one second. Not 0: with every program
# kept, a worker of 3,233 tests ended in a segmentation fault once (jax 0.10.2), at no great gain.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests import buckets

# jax makes an MLIR context for every program, which takes longer than to lower a small one (jax
# 0.10.2); here fifty programs of a thread share one. What a context has interned goes with it.
if CHOICE:
    from jax._src.interpreters import mlir

    SHARED, make_ir_context = threading.local(), mlir.make_ir_context

    def shared_context():
        """The context of this thread; a new one after every fifty programs."""
        used = getattr(SHARED, "used", 0)
        if used % 50 == 0:
            SHARED.context = make_ir_context()
        SHARED.used = used + 1
        return SHARED.context

    mlir.make_ir_context = shared_context

# Tracing makes many objects and little garbage: python's searches for it are 5 % of a run.
gc.freeze()
gc.set_threshold(20_000, 10, 10)

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    """Skip what only an accelerator can show."""
    if item.get_closest_marker("accelerator") and jax.default_backend() == "cpu":
        pytest.skip("needs a GPU or TPU: run with JAX_PLATFORMS=cuda or tpu")


@pytest.fixture
def key() -> jax.Array:
    """The randomness of a test: split it, or fold in."""
    return jax.random.key(20)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of material beside the repository; tests that need it skip where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder ../shared beside the repository")
    return path


@pytest.fixture(scope="session")
def served():
    """Google Cloud Storage on the loopback, which all clients of this process ask."""
    with pytest.MonkeyPatch.context() as patch, buckets.served() as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def bucket(served, tmp_path) -> str:
    """A folder of a bucket that no other test has."""
    return f"gs://{buckets.BUCKET}/{tmp_path.parent.name}/{tmp_path.name}"


@pytest.fixture(autouse=True)
def no_mesh():
    """Every test begins without a mesh, whatever ran before it.

    Once in five full runs a mesh was found set that no test had left (jax 0.10.2). Suspected, not
    shown: coroutines that Orbax leaves behind when a store is damaged on purpose.
    """
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


@pytest.fixture
def optimized():
    """Programs as users compile them, for tests of what optimizing might break."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
