"""Who a process takes for the others of its job, and what it compares with them."""

import argparse
import json
import types

import jax
import numpy as np
import pytest

from tokgen import coordination, distributed, launchers, options, runtime
from tokgen.errors import SharedError, UserError
from tokgen.evaluation import inputs, sample_parts, validation

UNREACHABLE = ConnectionError(111, "metadata.google.internal: Connection refused")
UNKNOWN = ValueError("coordinator_address should be defined.")


class ConfigException(Exception):
    """As of the package kubernetes."""


UNASKED = ConfigException("Service token file does not exist.")


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

        def shutdown():
            state.client = None

        monkeypatch.setattr(jax.distributed, "initialize", ask)
        monkeypatch.setattr(jax.distributed, "shutdown", shutdown)
        monkeypatch.setattr(launchers, "others", lambda: list(others))
        parser = argparse.ArgumentParser()
        options.processes(parser)
        distributed.initialize(parser.parse_args(words))
        assert begun or state.client is None  # alone, with no port that another program would meet
        return begun

    return initialize


@pytest.mark.parametrize("found", [UNREACHABLE, UNKNOWN, UNASKED, (1, 0)])
def test_a_process_that_is_said_to_have_others_does_not_train_alone(found, joined):
    assert joined(found) == []  # a notebook: nothing says so
    with pytest.raises(
        UserError, match="one of several, by TPU_WORKER_ID=1.*--coordinator"
    ) as told:
        joined(found, others=["TPU_WORKER_ID=1"])
    if found in (UNREACHABLE, UNASKED):
        assert str(found) in str(told.value)
    assert joined(found, ["--processes", "1"], ["TPU_WORKER_ID=1"]) == []


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
        made.of_first = lambda what, text: next(texts, text)
        made.exchange = lambda what, text: list(next(texts, [text] * 3))
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


def test_long_values_are_compared_whole_and_shown_in_part(job):
    paths = [f"/{'a' * 200}/{end}" for end in "xy"]
    job(0, [])
    distributed.check_alike({"path": paths[0]})
    first, own = (json.dumps({"path": distributed._shown(path)}) for path in paths)
    job(1, [first, ["{}", own, "{}"]])
    with pytest.raises(SharedError, match=r'"/a{98}\.\.\. \(\w{8}\) \(process 1\)') as wrong:
        distributed.check_alike({"path": paths[1]})
    assert len(str(wrong.value)) < 500


class Seen:
    """What each process finds at each look; the last goes on."""

    def __init__(self, monkeypatch, *looks):
        self.looks, self.slept = [*looks], 0
        monkeypatch.setattr(distributed, "many", lambda: True)
        monkeypatch.setattr(distributed, "gathered", self.gathered)
        monkeypatch.setattr(distributed.time, "sleep", self.sleep)
        monkeypatch.setattr(distributed.time, "monotonic", lambda: self.slept)

    def sleep(self, seconds):
        self.slept += seconds
        if len(self.looks) > 1:
            self.looks.pop(0)

    def look(self):
        return self.looks[0][1]

    def gathered(self, what, text):
        """By process 1, whose clock stands still."""
        assert json.loads(text)[0] == self.look()
        return [json.dumps([found, self.slept > 60]) for found in self.looks[0]]


@pytest.mark.parametrize(
    "looks", [[([3], [3])], [([3, 6], [3]), ([3, 6], [3, 6])], [([3], [3, 6]), ([3, 6], [3, 6])]]
)
def test_what_processes_see_late_is_awaited(looks, monkeypatch):
    """Whichever of them is late: none decides by what another will never see."""
    seen = Seen(monkeypatch, *looks)
    assert distributed.alike("the steps", seen.look) == looks[-1][0]
    assert seen.slept == 0.5 * (len(looks) - 1)


def test_what_processes_never_see_alike_is_an_error_of_all(monkeypatch):
    seen = Seen(monkeypatch, ([3], []))
    with pytest.raises(
        SharedError, match=r"process 0 finds \[3\], process 1 finds \[\]; .* all see"
    ):
        distributed.alike("the steps", seen.look)
    assert 60 < seen.slept < 62


def test_a_file_of_another_process_is_awaited(monkeypatch):
    seen = Seen(monkeypatch, (None, None), (None, "found"))
    assert distributed.awaited(seen.look, "file") == "found" and seen.slept == 0.5


def test_texts_come_in_the_order_of_jax(job, monkeypatch):
    """Its numbers of processes may be others than a launcher's."""
    job(0, [['[2, "c"]', '[0, "a"]', '[1, "b"]']])
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert distributed.gathered("letters", "c") == ["a", "b", "c"]


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


def test_images_that_no_process_can_read_are_an_error_of_all_shares(monkeypatch):
    monkeypatch.setattr(distributed, "many", lambda: True)
    monkeypatch.setattr(distributed, "share", lambda: (1, 2))
    monkeypatch.setattr(distributed, "rows", lambda batch: 4)
    monkeypatch.setattr(distributed, "decided", lambda act, *args: [])
    source = types.SimpleNamespace(
        view=None, unreadable=types.SimpleNamespace(listed=lambda: "a.png")
    )
    assert len(validation._share(source, np.arange(6), 8).index_N) == 0
    monkeypatch.setattr(distributed, "gathered", lambda what, text: [text] * 2)
    with pytest.raises(UserError, match="0 images can be read.*\na.png"):
        validation._of_all(source, np.arange(6), {})


def test_processes_that_measure_together_have_the_same_images(monkeypatch):
    """Those that the first can read: while training, each reads them all by itself."""
    monkeypatch.setattr(distributed, "many", lambda: True)
    monkeypatch.setattr(distributed, "share", lambda: (0, 1))
    monkeypatch.setattr(distributed, "decided", lambda act, *args: [4, 1])
    share = validation._share(types.SimpleNamespace(view=None), np.asarray([4, 2, 1]), 2)
    assert (share.index_N.tolist(), share.batch, share.filled) == ([4, 1], 2, 2)


def test_whether_samples_are_all_there_is_one_answer_of_all_processes(monkeypatch, tmp_path):
    """They may come to be between two that look."""
    (tmp_path / sample_parts.WHOLE).touch()
    monkeypatch.setattr(distributed, "decided", lambda act, *args: [{"total": 9}, False])
    growing = types.SimpleNamespace(told=lambda: "4 of 9", classes=("a",))
    monkeypatch.setattr(sample_parts, "Growing", lambda path, told, each: growing)
    settings = types.SimpleNamespace(scored=str(tmp_path), labels="")
    assert inputs.given(settings) == (growing, 1)
