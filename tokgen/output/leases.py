"""Leases of places in a bucket, where there are no locks: one job at a time, by an object.

Who makes the object, which the store lets one do, holds the place until a time that stands in it.
The holder writes it anew before; what a job that was killed leaves behind expires, and may then be
replaced, again by one. Nobody who was overtaken goes on writing: such a process ends at once.
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

from tokgen import records, report, storage
from tokgen.errors import UserError

LASTS = 60.0  # seconds from a renewal to the end
RENEWED = 15.0  # seconds between renewals
APART = 10.0  # seconds that the clocks of hosts may differ by
ANSWER = 5.0  # seconds that the store may take to answer
MARGIN = 5.0  # seconds before the end at which a holder that could not renew ends
# goes on while the host sleeps, where the system has such a clock
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


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
    keeper.start()
    watch.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(LASTS)  # a request may hang for good
        lease.give_back()


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
    _end(f"{lease.file.parent} is lost ({why}); this process ends, so that two never write")


def _end(said: str) -> None:
    """End the process now: whatever else it wrote, it would write into another job's place."""
    print(f"error: {report.printable(said)}", file=sys.stderr, flush=True)
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
