"""What the processes of one job tell each other: texts that all exchange, events that all hear.

jax's coordination service carries them. It needs no device, so they meet before one is touched;
process 0 holds it, and it ends all when one of them dies. jax has no public name for it; Orbax
reaches it in the same way.

What ends one process ends all, in one line and with one exit code: it posts an event, and a thread
of each process says the line and leaves once all have heard it. So none waits in the middle of a
step for one that never comes. A request to stop is an event, too: then the threads agree on the
step after which all do, and no process waits for another in between.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
PATIENCE = 20 * 24 * 3600 * 1000  # milliseconds for which processes wait for one that is alive
# Characters of a text that goes whole, as all processes' come in one message, and of a piece of a
# longer one: a message has 4 MB at most.
SHORT, PIECE = 10_000, 500_000
GRACE = 5  # seconds for which a process that is ended may end by itself
HEARTBEAT = 20  # seconds without a sign of life after which a process is taken for dead
_job: Job | None = None


class Job:
    """This process among the others of its job.

    Attributes:
        index: which it is, from 0, as its launcher counts.
        count: how many there are.
        stopped: the signal that all have stopped for, else 0.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self.index, self.count, self.stopped = client, index, count, 0
        self._calls = itertools.count()  # of `exchange` and `of_first`, the same on all
        self._said: list[str] = []  # keys of what was said since all were last here
        self._turns, self._last, self._number = 0, None, 0
        self._lock = threading.Lock()
        self._over, self._idle = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="events", daemon=True)
        self._thread.start()

    def exchange(self, what: str, text: str) -> list[str]:
        """What each process says, in their order; all wait for all.

        `what` names the call, and is the same on all: an error where it is not.
        """
        place, before = f"tokgen/said/{next(self._calls)}", self._said
        self._said = self._put(f"{place}/{self.index:06}", what, text)
        self._first(place, what)  # before the wait, which would not end
        self._wait("said")
        said = dict(self._client.key_value_dir_get(place))
        for key in before:  # all are here, and have read what was said before
            self._client.key_value_delete(key)
        return [self._whole(key, said[key]) for key in sorted(said)]

    def of_first(self, what: str, text: str) -> str:
        """What process 0 says; what the others would is not sent. `what` as of `exchange`."""
        place = f"tokgen/said/{next(self._calls)}"
        if self.index == 0:
            self._said = self._said + self._put(f"{place}/{0:06}", what, text)
        return self._whole(*self._first(place, what))

    def ask(self, number: int) -> None:
        """Let all processes stop, as a signal to this one wants; `stops` tells them when."""
        self._post({"stop": int(number)})

    def stops(self) -> bool:
        """Whether all stop here: asked at the same places by all, as after each step."""
        with self._lock:  # held while all say how far they are
            self._turns += 1
            if self._last is None or self._turns < self._last:
                return False
            self.stopped = self._number
            return True

    def end(self, code: int, line: str, trace: Callable[[], None] = lambda: None) -> None:
        """End the job: returns when all have done their work (code 0), and else never.

        Where another process was quicker to end it, all say its line. `trace` says more, of this
        process alone.
        """
        self._idle.set()
        with contextlib.suppress(RuntimeError):  # jax is about to end this process
            if code == 0:
                self._wait("end")
            if not self._over.is_set():
                trace()
            self.break_off(code, line)
        self._thread.join()
        if line and not self._over.is_set():  # no thread is there that would say it
            print(line, file=sys.stderr)

    def break_off(self, code: int, line: str) -> None:
        """Let all processes end, wherever they are; the first that says so is heard."""
        self._post({"code": code, "line": line})

    def called(self) -> str:
        """What messages call this process."""
        return f"process {self.index} of {self.count} ({socket.gethostname()})"

    def _wait(self, what: str) -> None:
        """All processes wait here for each other."""
        awaited(self._client.wait_at_barrier, f"tokgen/{what}", PATIENCE)

    def _first(self, place: str, what: str) -> tuple[str, str]:
        """(the key of what process 0 says in a call, what it has), where it is the same call."""
        key = f"{place}/{0:06}"
        found = awaited(self._client.blocking_key_value_get, key, PATIENCE)
        theirs = found.partition("\n")[0]
        if theirs != what:
            raise RuntimeError(
                f"the processes of a job have gone different ways: process {self.index} asks for "
                f"{what!r} where process 0 asks for {theirs!r}"
            )
        return key, found

    def _put(self, key: str, what: str, text: str) -> list[str]:
        """Say a text in a call of that name, which `_whole` reads; the keys that hold it.

        A long one in pieces, and under the key how many: a message of the service has a limit.
        """
        if len(text) <= SHORT:
            self._client.key_value_set(key, f"{what}\n {text}")
            return [key]
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        keys = [f"tokgen/pieces/{key}/{number:06}" for number in range(len(pieces))]
        for place, piece in zip(keys, pieces, strict=True):
            self._client.key_value_set(place, piece)
        self._client.key_value_set(key, f"{what}\n{len(pieces)}")
        return [key, *keys]

    def _whole(self, key: str, found: str) -> str:
        """The text whose key has `found`."""
        found = found.partition("\n")[2]
        if found.startswith(" "):
            return found[1:]
        keys = [f"tokgen/pieces/{key}/{number:06}" for number in range(int(found))]
        return "".join(self._client.blocking_key_value_get(key, PATIENCE) for key in keys)

    def _post(self, event: dict) -> None:
        """Tell all processes, after what they were told before."""
        for number in itertools.count():
            try:
                self._client.key_value_set(f"tokgen/event/{number}", json.dumps(event))
                return
            except RuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise

    def _listen(self) -> None:
        """Act on each event, all processes in the same order."""
        number = 0
        while True:
            try:
                key = f"tokgen/event/{number}"
                event = json.loads(self._client.blocking_key_value_get(key, PATIENCE))
                number += 1
                if "stop" not in event:
                    break
                self._settle(event["stop"])
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # there is no service any more: jax ends this process
        self._over.set()
        if event["code"]:
            self._idle.wait(GRACE)  # it may be on the same way, and give up what it holds
            _leave(**event)

    def _settle(self, number: int) -> None:
        """Choose the turn at which all stop: the first that none has had."""
        if self._number:
            return
        with self._lock:
            self._client.key_value_set(f"tokgen/turns/{self.index}", str(self._turns))
            self._wait("turns")
            turns = [int(text) for _, text in self._client.key_value_dir_get("tokgen/turns")]
            self._last, self._number = max(turns) + 1, number


def awaited(wait: Callable[..., T], *args, **how) -> T:
    """What a wait of jax's gives, which lasts in C++, where Python handles no signal.

    So another thread waits, and this one for it.
    """
    found, wrong = [], []

    def act() -> None:
        try:
            found.append(wait(*args, **how))
        except BaseException as error:  # noqa: BLE001 (it is of the caller)
            wrong.append(error)

    thread = threading.Thread(target=act, name="wait", daemon=True)
    thread.start()
    thread.join()
    if wrong:
        raise wrong[0]
    return found[0]


def _leave(code: int, line: str) -> None:
    """End this process wherever it is: it may be deep in a step that the others never finish."""
    import jax

    # not sys.stderr: another thread may just keep what is said there for itself
    for stream, text in ((sys.stdout, ""), (sys.__stderr__, f"{line}\n" if line else "")):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may listen
            stream.write(text)
            stream.flush()
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()  # waits until all have heard: process 0 has the service
    os._exit(code)


def begin(client: Any, index: int, count: int) -> Job:
    """Be one of a job from now on."""
    global _job
    _job = Job(client, index, count)
    return _job


def job() -> Job | None:
    """The job that this process is one of several of; None where it is alone."""
    return _job
