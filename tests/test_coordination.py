"""What processes of a job tell each other; here they are threads, and share a dictionary."""

import collections
import signal
import threading
import time

import pytest

from tokgen import coordination, runtime
from tokgen.errors import SharedError, UserError


class Service:
    """As jax's coordination service, for threads."""

    def __init__(self, count):
        self.values, self.changed = {}, threading.Condition()
        self.barriers = collections.defaultdict(lambda: threading.Barrier(count))

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise RuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, min(milliseconds / 1000, 20)):
                raise RuntimeError("CANCELLED")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(f"{folder}/")]

    def key_value_delete(self, key):
        with self.changed:
            del self.values[key]

    def wait_at_barrier(self, name, milliseconds):
        with self.changed:
            barrier = self.barriers[name]
        barrier.wait(min(milliseconds / 1000, 20))


@pytest.fixture
def left(monkeypatch):
    """What processes say when they leave, in the place of leaving."""
    found = []

    def leave(code, line):
        found.append((code, line))

    monkeypatch.setattr(coordination, "_leave", leave)
    monkeypatch.setattr(coordination, "GRACE", 0.3)
    return found


def each(service, count, act):
    """What `act` gives of every process; they run at the same time."""
    found = [None] * count

    def run(index):
        found[index] = act(coordination.Job(service, index, count))

    threads = [threading.Thread(target=run, args=[index]) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_texts_come_in_order_and_are_forgotten(left):
    service = Service(12)  # more than one digit

    def act(job):
        said = [job.exchange("x", f"{turn} {job.index}") for turn in range(3)]
        first = [job.of_first("y", f"{turn} {job.index}") for turn in range(2)]
        job.end(0, "")
        return said, first

    expected = [[f"{turn} {index}" for index in range(12)] for turn in range(3)]
    assert each(service, 12, act) == [(expected, ["0 0", "1 0"])] * 12
    kept = [key for key in service.values if key.startswith("tokgen/said")]
    assert len(kept) == 12 + 2 and not left  # of the last turn, and what the first said since


def test_long_texts_go_in_pieces(left, monkeypatch):
    """The service refuses messages over a limit, which it calls exhausted resources."""
    monkeypatch.setattr(coordination, "SHORT", 5)
    monkeypatch.setattr(coordination, "PIECE", 5)
    service = Service(2)
    texts = ["", "12345", "123456", "7" * 52, " 3"]

    def act(job):
        said = [job.exchange("", text + text[: job.index]) for text in texts]
        first = [job.of_first("", text) for text in texts]
        job.exchange("", "")
        job.end(0, "")
        return said, first

    said = [[text, text + text[:1]] for text in texts]
    assert each(service, 2, act) == [(said, texts)] * 2
    assert max(map(len, (v for k, v in service.values.items() if "event" not in k))) <= 7
    assert not [key for key in service.values if "pieces" in key]


@pytest.mark.parametrize("calls", [("exchange", "exchange"), ("exchange", "of_first")])
@pytest.mark.parametrize("turned", [False, True])
def test_processes_that_ask_for_different_things_are_told_both(calls, turned, left, monkeypatch):
    """Neither has what the other meant, and none waits for what never comes."""
    service, calls = Service(2), calls[::-1] if turned else calls

    def leave(code, line):
        left.append((code, line))
        service.barriers["tokgen/said"].abort()  # a process that has left waits no more

    monkeypatch.setattr(coordination, "_leave", leave)

    def act(job):
        job.exchange("the start", "")
        try:
            getattr(job, calls[job.index])(f"what {job.index} wants", "secret")
        except RuntimeError as error:
            job.end(1, str(error))
        job._thread.join(20)

    each(service, 2, act)
    said = "process 1 asks for 'what 1 wants' where process 0 asks for 'what 0 wants'"
    assert [(code, line.rpartition(": ")[2]) for code, line in left] == [(1, said)] * 2


@pytest.mark.parametrize("asked", [(0,), (2,), (0, 1, 2)])
def test_all_stop_at_one_turn_that_none_has_had(asked, left):
    service = Service(3)

    def act(job):
        for turn in range(1, 2000):
            if job.index in asked and turn == 3 + job.index:
                job.ask(signal.SIGTERM)
            if job.stops():
                break
            time.sleep(0.001 * (1 + job.index))  # some are ahead
        stopped = job.stopped
        job.end(143, "saved")
        return turn, stopped

    found = each(service, 3, act)
    assert len(set(found)) == 1 and found[0][0] < 1999 and found[0][1] == signal.SIGTERM
    assert left == [(143, "saved")] * 3


def test_what_ends_one_ends_all_in_its_words(left):
    """Also those that wait for it; who fails later has the words of the first."""
    service, traces = Service(3), []

    def act(job):
        if job.index == 1:
            job.end(2, "broken")
        elif job.index == 2:
            time.sleep(0.2)
            job.end(1, "later", lambda: traces.append(job.index))
        else:
            job._thread.join(20)  # deep in a step
        return job._thread.is_alive()

    assert each(service, 3, act) == [False] * 3
    assert left == [(2, "broken")] * 3 and not traces


def test_a_wait_leaves_its_caller_free_for_signals(left):
    """As the service's waits last in C++: another thread has them, and their errors come out."""
    service, threads = Service(2), []
    barrier = service.wait_at_barrier

    def waits(name, milliseconds):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise RuntimeError("INTERNAL")
        barrier(name, milliseconds)

    service.wait_at_barrier = waits
    job = coordination.Job(service, 0, 2)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        job.exchange("broken", "")

    def stop(number, frame):
        raise Ended

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGUSR1]).start()
    try:
        with pytest.raises(Ended):
            job.exchange("for ever", "")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert threading.main_thread() not in threads and len(threads) == 2


def test_what_ends_a_process_is_said_also_where_no_service_is_left(left, capfd):
    """A service that is only slow is asked again."""
    service, answers = Service(1), ["DEADLINE_EXCEEDED", "UNAVAILABLE"]

    def fails(key, milliseconds):
        raise RuntimeError(answers.pop(0))

    service.blocking_key_value_get = fails
    coordination.Job(service, 0, 1).end(2, "prog: broken")
    assert capfd.readouterr().err == "prog: broken\n" and not answers and not left


class Ended(Exception):
    """A job has ended here."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("bad"), 2, "prog: error: process 1 of 2 (here): bad"),
        (SharedError("bad"), 2, "prog: error: bad"),
        (runtime.Stopped(signal.SIGTERM, "terminated"), 143, "prog: terminated"),
        (KeyError("x"), 1, "prog: process 1 of 2 (here) ended in KeyError: 'x'"),
        (SystemExit(3), 3, "prog: process 1 of 2 (here) ended"),
        (SystemExit(0), 0, ""),
        (None, 0, ""),
    ],
)
def test_a_program_tells_its_job_how_it_ends(error, code, said, monkeypatch, capsys):
    ends = []

    class Job:
        def called(self):
            return "process 1 of 2 (here)"

        def end(self, code, line, trace):
            ends.append((code, line))
            trace()

    def run():
        if error is not None:
            raise error

    monkeypatch.setattr(coordination, "_job", Job())
    assert runtime.call("prog", run) == code and ends == [(code, said)]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_a_command_line_that_is_refused_is_an_error_of_the_job(monkeypatch, capsys):
    def parse(words):
        import sys

        print("read", file=sys.stderr)
        if words:
            print("usage: prog\nprog: error: unknown argument 'x'", file=sys.stderr)
            raise SystemExit(2)
        return 5

    with pytest.raises(SystemExit):
        runtime.parsed(parse, ["x"])
    monkeypatch.setattr(coordination, "_job", object())
    capsys.readouterr()
    with pytest.raises(UserError, match="^unknown argument 'x'$"):
        runtime.parsed(parse, ["x"])
    assert runtime.parsed(parse, []) == 5 and capsys.readouterr().err == "read\n"
