"""What the environment says of other processes: named where there are some, silent where not."""

import pytest

from tokgen import launchers

OTHERS = {
    "a step of SLURM": {"SLURM_STEP_NUM_TASKS": "4"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2"},
    "another MPI": {"PMI_SIZE": "8"},
    "hosts of a pod": {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "0"},
    "a worker that is not the first": {"TPU_WORKER_ID": "3"},
    "slices": {"MEGASCALE_NUM_SLICES": "2"},
    "bounds": {"TPU_PROCESS_BOUNDS": "2,2,1"},
    "more chips than a host has": {"TPU_ACCELERATOR_TYPE": "v5litepod-16"},
    "more cores than a host has": {"TPU_ACCELERATOR_TYPE": "v4-32"},
    "a pod of an indexed job": {"JOB_COMPLETION_INDEX": "1"},
    "a user": {"JAX_COORDINATOR_ADDRESS": "host-0:1234"},
}
ALONE = {
    "nothing": {},
    "a task of its own": {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
    "a notebook": {
        **{"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_HOST_BOUNDS": "1,1,1"},
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    },
    "a chip of two cores": {"TPU_ACCELERATOR_TYPE": "v3-8"},
    "an indexed job of one": {"JOB_COMPLETION_INDEX": "0"},
    "nonsense": {"PMI_SIZE": "many", "TPU_PROCESS_BOUNDS": "", "TPU_ACCELERATOR_TYPE": "tpu"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_named(case):
    found = launchers.others(OTHERS[case])
    assert found and set(found) <= {f"{name}={value}" for name, value in OTHERS[case].items()}
    assert launchers.is_started(OTHERS[case])


@pytest.mark.parametrize("case", ALONE)
def test_a_process_alone_is_left_alone(case):
    assert launchers.others(ALONE[case]) == []


def test_what_started_a_process_may_know_of_others(monkeypatch):
    monkeypatch.setattr(launchers, "TPUS", ())
    assert not launchers.is_started({})
    assert launchers.is_started({"JOB_COMPLETION_INDEX": "0"})
    monkeypatch.setattr(launchers, "TPUS", (__file__,))
    assert launchers.is_started({})
