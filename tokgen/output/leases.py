"""Leases of places in a bucket, where there are no locks: one job at a time, by an object.

Who makes the object, which the store lets one do, holds the place until a time that stands in it.
The holder writes it anew before; what a job that was killed leaves behind expires, and may then be
replaced, again by one. Nobody who was overtaken goes on writing: such a process ends at once, and
the others of its job with it. Before a write that may come late, `check` is asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tokgen import coordination, records, report, storage
from tokgen.errors import UserError

LASTS = 80.0  # seconds from a renewal to the end
RENEWED = 15.0  # seconds between renewals
APART = 10.0  # seconds that the clocks of hosts may differ by
ANSWER = 5.0  # seconds that the store may take to answer
# Seconds before the end at which a holder that could not renew ends: in them the others of its job
# have ended, too, also where they hear nothing and miss its heartbeat.
MARGIN = float(coordination.HEARTBEAT + coordination.GRACE)
# goes on while the host sleeps, where the system has such a clock
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_held: dict[str, _Lease] = {}  # by the folder, of this process


@contextlib.contextmanager
def hold(file: pathlib.Path, refusal: str) -> Iterator[None]:
    """Hold a place of a bucket by the object `file`, which is gone afterwards.

    Of a holder that may be dead is waited until its lease expires; one that renews it is alive,
    and an error of `refusal`, in which {} is who, and until when.
    """
    with storage.reached(file):
        lease = _taken(file, refusal)
    ended = threading.Event()
    keeper, watch = (
        threading.Thread(target=target, args=(lease, ended), name="lease", daemon=True)
        for target in (_keep, _watch)
    )
    _held[str(file.parent)] = lease
    keeper.start()
    watch.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(LASTS)  # a request may hang for good
        lease.give_back()
        del _held[str(file.parent)]


def is_held(folder: pathlib.Path) -> bool:
    """Whether a folder that this process holds is still its own; so is one that needs no lease."""
    lease = _held.get(str(folder))
    return lease is None or not (lease.lost or _now() > lease.ends - MARGIN)


def check(folder: pathlib.Path) -> None:
    """An error where a folder that this process holds may be another's by now.

    To be asked before a write: of a host that slept, no other thread may have run yet.
    """
    if not is_held(folder):
        lease = _held[str(folder)]
        ended = time.strftime("%H:%M:%S UTC", time.gmtime(time.time() + lease.ends - _now()))
        why = lease.lost or f"it was good until {ended}, and was not renewed in time"
        raise UserError(
            f"the lease of {folder} is lost ({why}), as on a host that slept, or could not reach "
            "the bucket; nothing was written since. Start the same command again: it goes on from "
            "what was saved last, where no other job has taken the place"
        )


def _taken(file: pathlib.Path, refusal: str) -> _Lease:
    """The lease of a place, as soon as nobody else has it."""
    lease, seen, since = _Lease(file), None, 0.0
    while not lease.write(0):
        generation, holder = lease.found()
        if holder is None:  # it was given back meanwhile
            continue
        if seen is None:
            seen, since = generation, _now()
            report.say(
                f"{file.parent} is held by {holder}: waiting for it to be renewed, or to expire"
            )
        if generation != seen:
            raise UserError(refusal.format(holder))
        # the clock of this host alone may be wrong: nor was it renewed for twice the time
        if time.time() > holder.until + APART and _now() > since + 2 * RENEWED:
            if lease.write(generation):  # of several that wait, one
                return lease
            continue
        time.sleep(min(RENEWED / 5, 1.0))
    return lease


def _now() -> float:
    """Seconds of a clock that nobody sets."""
    return time.clock_gettime(_CLOCK)


def _keep(lease: _Lease, ended: threading.Event) -> None:
    """Renew a lease until the place is given back; what keeps it from that, `_watch` tells."""
    pause = RENEWED
    while not ended.wait(pause):
        pause = RENEWED
        try:
            if not lease.write(lease.generation):
                _lost(lease, "another job holds it now")
        except Exception as error:  # noqa: BLE001  (whatever it is: there is time to try again)
            lease.refused, pause = str(error) or repr(error), RENEWED / 5


def _watch(lease: _Lease, ended: threading.Event) -> None:
    """End the process before the lease does. It asks nobody, so that no request holds it up."""
    while (left := lease.ends - MARGIN - _now()) > 0:
        # in short waits: they do not count what the host sleeps
        if ended.wait(min(left, RENEWED / 15)):
            return
    if not ended.is_set():
        _lost(lease, f"it could not be renewed: {lease.refused}")


def _lost(lease: _Lease, why: str) -> None:
    lease.lost = why
    _end(f"{lease.file.parent} is lost ({why}); this job ends, so that two never write")


def _end(said: str) -> None:
    """End the process now, and the others of its job: they would write into another job's place."""
    line, job = f"error: {report.printable(said)}", coordination.job()
    if job is None:
        print(line, file=sys.stderr, flush=True)
    else:  # all say the line; whoever cannot be reached misses this process by its heartbeat
        ending = threading.Thread(target=job.end, args=(1, line), daemon=True)
        ending.start()
        ending.join(MARGIN)
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class _Holder:
    """Who has a lease, and until when, in seconds since 1970."""

    who: str
    until: float

    def __str__(self) -> str:
        return f"{self.who} until {time.strftime('%H:%M:%S UTC', time.gmtime(self.until))}"


class _Lease:
    """The object of a place; `generation` is what the store calls its present contents."""

    def __init__(self, file: pathlib.Path):
        from google.cloud import storage as cloud

        bucket, _, name = str(file).removeprefix(storage.SCHEME).partition("/")
        self.file, self.name, self.own = file, name, secrets.token_hex(8)
        self.bucket = cloud.Client().bucket(bucket)
        self.who = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
        self.generation, self.ends = 0, 0.0
        self.sent: dict[float, float] = {}  # `until` of what may be there: when it ends here
        self.refused = "the store did not answer"
        self.lost = ""  # why, once it is

    def write(self, generation: int) -> bool:
        """Hold it for a while where its contents are `generation` still, 0 for none."""
        from google.api_core import exceptions

        until, ends = time.time() + LASTS, _now() + LASTS
        self.sent[until] = ends
        blob = self.bucket.blob(self.name)
        text = records.text({"holder": self.who, "until": until, "lease": self.own})
        how = dict(if_generation_match=generation, timeout=ANSWER, retry=_patient())
        try:
            blob.upload_from_string(text, "application/json", **how)
            self.generation = int(blob.generation)
        except exceptions.PreconditionFailed:
            # an answer that was lost is asked for again, and then it is ours already, for as long
            # as was said then
            found, record = self._read()
            if record.get("lease") != self.own:
                return False
            self.generation, until = found, record["until"]
            ends = self.sent[until]
        self.ends, self.sent = ends, {until: ends}
        return True

    def found(self) -> tuple[int, _Holder | None]:
        """(generation, who has it); nobody where it is gone."""
        generation, record = self._read()
        return generation, _Holder(record["holder"], record["until"]) if record else None

    def _read(self) -> tuple[int, dict[str, Any]]:
        from google.api_core import exceptions

        how = dict(timeout=ANSWER, retry=_patient())
        while True:
            blob = self.bucket.get_blob(self.name, **how)
            if blob is None:
                return 0, {}
            generation = int(blob.generation)
            try:
                text = blob.download_as_bytes(if_generation_match=generation, **how)
            except (exceptions.NotFound, exceptions.PreconditionFailed):
                continue  # it was written anew
            try:
                kinds = {"holder": str, "until": (int, float), "lease": str}
                return generation, records.checked(records.parsed(text), **kinds)
            except ValueError as error:
                raise UserError(
                    f"{self.file} is no lease of a job: {error}; remove it, if no job runs there"
                ) from error

    def give_back(self) -> None:
        """Remove it, where it is this one still; else it expires."""
        with contextlib.suppress(*storage.refusals()):
            how = dict(timeout=ANSWER, retry=_patient())
            self.bucket.blob(self.name).delete(if_generation_match=self.generation, **how)


def _patient() -> Any:
    """How long the store is asked again where it does not answer."""
    from google.cloud.storage import retry

    return retry.DEFAULT_RETRY.with_timeout(ANSWER)
