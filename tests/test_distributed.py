"""Who a process takes for the others of its job, and what it compares with them."""

import argparse
import types

import jax
import pytest

from tokgen import coordination, distributed, launchers, options, runtime
from tokgen.errors import SharedError, UserError

UNREACHABLE = ConnectionError(111, "metadata.google.internal: Connection refused")
UNKNOWN = ValueError("coordinator_address should be defined.")


@pytest.fixture
def joined(monkeypatch):
    """`initialize` of a command line, where jax finds what it is told; what jax was asked for."""
    begun, state = [], types.SimpleNamespace(client=None, num_processes=1, process_id=0)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(distributed, "_state", lambda: state)
    monkeypatch.setattr(coordination, "begin", lambda *who: begun.append(who))

    def initialize(found, words=(), others=()):
        def ask(**how):
            if isinstance(found, Exception):
                raise found
            state.client, state.num_processes, state.process_id = "client", *found

        monkeypatch.setattr(jax.distributed, "initialize", ask)
        monkeypatch.setattr(launchers, "others", lambda: list(others))
        parser = argparse.ArgumentParser()
        options.processes(parser)
        distributed.initialize(parser.parse_args(words))
        return begun

    return initialize


@pytest.mark.parametrize("found", [UNREACHABLE, UNKNOWN, (1, 0)])
def test_a_process_that_is_said_to_have_others_does_not_train_alone(found, joined):
    assert joined(found) == []  # a notebook: nothing says so
    with pytest.raises(
        UserError, match="one of several, by TPU_WORKER_ID=1.*--coordinator"
    ) as told:
        joined(found, others=["TPU_WORKER_ID=1"])
    if found is UNREACHABLE:
        assert "metadata.google.internal" in str(told.value)


def test_a_process_joins_where_jax_finds_the_others(joined):
    assert joined((4, 3), others=["SLURM_STEP_NUM_TASKS=4"]) == [("client", 3, 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2"], "missing: --coordinator, --process"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "to --processes - 1 = 1; found 2",
        ),
    ],
)
def test_options_that_name_no_process_are_refused(words, said, joined):
    with pytest.raises(UserError, match=said):
        joined((2, 0), words)


def test_devices_of_processes_that_were_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="devices of 4 processes"):
        runtime.check_platform()


@pytest.fixture
def job(monkeypatch):
    """A job of three processes, as one of them sees it; the others say what they are told to."""

    def make(index, others):
        texts = iter(others)
        made = types.SimpleNamespace(index=index, count=3)
        made.of_first = lambda text: next(texts, text)
        made.exchange = lambda text: list(next(texts, [text] * 3))
        monkeypatch.setattr(coordination, "_job", made)

    return make


def test_what_differs_is_named_with_who_has_it(job):
    first = '{"config.seed": "0", "config.loss.l2": "1.0"}'
    told = {"config": {"seed": 1, "loss": {"l2": 1.0}}, "option": {"x": None}}
    job(1, [first, ["{}", '{"config.seed": "1", "option.x": "null"}', "{}"]])
    with pytest.raises(SharedError) as wrong:
        distributed.check_alike(told)
    lines = str(wrong.value).splitlines()[1:]
    assert lines[0] == "  config.seed: 0 (processes 0, 2), 1 (process 1)"
    assert lines[1] == "  option.x: None (processes 0, 2), null (process 1)"
    job(0, [])
    distributed.check_alike(told)


def test_texts_come_in_the_order_of_jax(job, monkeypatch):
    """Its numbers of processes may be others than a launcher's."""
    job(0, [['[2, "c"]', '[0, "a"]', '[1, "b"]']])
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert distributed.gathered("c") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ([(0, "a"), (1, "a"), (1, "a")], "process 0 has 1 a, process 1 has 2 a"),
        ([(0, "a"), (1, "b")], "process 0 has 1 a, process 1 has 1 b"),
        ([(0, "a"), (1, "a")], ""),
    ],
)
def test_processes_need_the_same_devices(devices, said, job, monkeypatch):
    job(0, [])
    made = [types.SimpleNamespace(process_index=i, device_kind=kind) for i, kind in devices]
    monkeypatch.setattr(jax, "devices", lambda: made)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.report, "silence", lambda whether: None)
    if not said:
        distributed.check_devices()
        return
    with pytest.raises(SharedError, match=said):
        distributed.check_devices()
