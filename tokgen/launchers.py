"""What the environment says of other processes of the same job: what launchers set, and means it.

A process that is one of several, and doesn't know, would train a model of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

# How many processes, or slices, there are.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MEGASCALE_NUM_SLICES")
# Who they are, with commas between.
NAMES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
# Which of them this one is, from 0.
PLACES = ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "MEGASCALE_SLICE_ID", "JOB_COMPLETION_INDEX")
# How they lie, as 2,2,1.
BOUNDS = ("TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS")
# A TPU by its chips or its cores, as v5litepod-16; of some kinds a chip is two cores.
KIND = "TPU_ACCELERATOR_TYPE"
CORES = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2}
LARGEST = 8  # chips of a host
# Said by who wants several.
ADDRESS = "JAX_COORDINATOR_ADDRESS"
# Said to a single process, too.
STARTED = ("JOBSET_NAME", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
TPUS = ("/dev/accel0", "/dev/vfio/0")  # of a host of a pod, which jax asks about the others


def others(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What says that there are other processes, as `NAME=value`; nothing where nothing does."""
    means = (
        *((name, lambda text: _number(text) > 1) for name in COUNTS),
        *((name, lambda text: len(text.strip(",").split(",")) > 1) for name in NAMES),
        *((name, lambda text: _number(text) > 0) for name in PLACES),
        *((name, lambda text: math.prod(map(_number, text.split(","))) > 1) for name in BOUNDS),
        (KIND, lambda text: _chips(text) > LARGEST),
        (ADDRESS, bool),
    )
    found = {name: environment[name] for name, says in means if says(environment.get(name, ""))}
    return [f"{name}={value[:60]}" for name, value in found.items()]


def is_started(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what started this process may know of others, by which jax finds them."""
    pod = any(os.path.exists(device) for device in TPUS)
    return pod or bool(others(environment)) or any(environment.get(name) for name in STARTED)


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _chips(text: str) -> int:
    match = re.fullmatch(r"(v\d+\w*)-(\d+)", text)
    return int(match[2]) // CORES.get(match[1], 1) if match else 0
