"""Several processes of one job: how they find each other, agree on what they do, and end.

Each runs the same program on devices of its own, which jax makes one set of devices. Where they
are is told by what launched them, which jax understands (SLURM, Open MPI, a TPU pod, Kubernetes),
or by three options (`options.processes`). Process 0 writes what there is one of, and speaks; what
ends one of them ends all (`coordination`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax

from tokgen import coordination, launchers, report, sharding
from tokgen.errors import SharedError, UserError

T = TypeVar("T")
LATE = 60.0  # seconds until every process must see what one wrote
SHOWN = 100  # characters of a value in a message


def initialize(args: argparse.Namespace) -> None:
    """Join the job that this process is one of, if it is; before anything touches a device.

    `args` are those of `options.processes`. Alone, where nothing says that there are others, or
    `--processes 1` says that there are none.

    Raises:
        UserError: process 0 was not there in time; the options contradict; the environment says
            that there are others, and not where.
    """
    given = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    missing = [f"--{name}" for name, value in given.items() if value in ("", None)]
    if args.processes == 1 and len(missing) == 2:
        return  # whatever the environment says, as of a Kubernetes Job that is an array of runs
    if 0 < len(missing) < len(given):
        raise UserError(
            "--coordinator, --processes and --process say together who the processes of a job are; "
            f"missing: {', '.join(missing)}"
        )
    if not missing and not 0 <= args.process < args.processes:
        raise UserError(
            f"--process counts from 0 to --processes - 1 = {args.processes - 1}; found "
            f"{args.process}"
        )
    known = dict(
        coordinator_address=args.coordinator,
        num_processes=args.processes,
        process_id=args.process,
    )
    if not missing:
        _tell(args)
    # it would take SIGTERM for itself, and count the steps of Orbax's saves with those of a run
    jax.config.update("jax_enable_preemption_service", False)
    found = "no launcher that jax knows"
    try:
        # another thread waits for the others, so that this one hears a signal meanwhile
        coordination.awaited(
            jax.distributed.initialize,
            **({} if missing else known),
            initialization_timeout=args.wait,
            heartbeat_timeout_seconds=coordination.HEARTBEAT,
            shutdown_timeout_seconds=coordination.HEARTBEAT,
        )
    except RuntimeError as error:
        raise UserError(f"this process cannot join its job: {error}") from error
    except Exception as error:
        # of whatever jax asks who else is there: a cloud that a notebook cannot reach (OSError), a
        # Kubernetes that lets no pod ask (exceptions of its package)
        if not missing:
            raise UserError(f"this process cannot join its job: {error}") from error
        if "coordinator_address" not in str(error):
            found = (str(error).splitlines() or [type(error).__name__])[0][:200]
    state = _state()
    if state.client is not None and state.num_processes > 1:
        coordination.begin(state.client, state.process_id, state.num_processes)
        return
    if state.client is not None:
        found = "a job of one process"
        jax.distributed.shutdown()  # nobody comes: the port is for a second program of this host
    if missing and (said := launchers.others()):
        raise UserError(
            f"this process is one of several, by {', '.join(said)}, and jax cannot tell where the "
            f"others are; found: {found}; say --coordinator, --processes and --process "
            "(docs/pods.md), or --processes 1 if it is alone"
        )


def _state():
    from jax._src import distributed  # `jax.distributed` names neither the client nor the count

    return distributed.global_state


def many() -> bool:
    """Whether this process is one of several; no device is touched to say so."""
    return coordination.job() is not None


def count() -> int:
    """How many processes there are."""
    return coordination.job().count if many() else 1


def _tell(args: argparse.Namespace) -> None:
    """Say what is waited for: where the others never come, jax ends the process in its own words.

    A process other than the first can tell by itself that the first is not there.
    """
    where = f"process {args.process} of {args.processes}, at {args.coordinator}"
    report.say(f"{where}: waiting up to {args.wait} s for the others (--wait)")
    host, _, port = args.coordinator.rpartition(":")
    until = time.monotonic() + args.wait
    while args.process:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except (OSError, ValueError) as error:
            if time.monotonic() > until or isinstance(error, ValueError):
                raise UserError(
                    f"{where}: process 0 is not there; found: {error}; start all processes within "
                    f"{args.wait} s (--wait), with one --coordinator HOST:PORT, and see that the "
                    "port is free and open between the hosts"
                ) from error
            time.sleep(0.5)


def gathered(what: str, text: str) -> list[str]:
    """What each process says, in the order of `jax.process_index`; all wait for all.

    `what` names the call, and is the same on all: an error where it is not.
    """
    if not many():
        return [text]
    # on a TPU that of a launcher may be another
    own = json.dumps([jax.process_index(), text])
    return [text for _, text in sorted(map(json.loads, coordination.job().exchange(what, own)))]


def check_alike(told: Mapping[str, object]) -> None:
    """An error, the same on all processes, where they were not started alike.

    `told` is what must be the same, by its name: plain values, JSON's. No device is touched.
    """
    if not many():
        return
    job, own = coordination.job(), {k: _shown(v) for k, v in _flat(told).items()}
    # all compare with the first, so that nobody reads what all have
    theirs = json.loads(job.of_first("whether all are alike", json.dumps(own)))
    names = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
    differing = json.dumps({name: own.get(name) for name in names})
    found = [json.loads(text) for text in job.exchange("what is not alike", differing)]
    lines = []
    for name in sorted(set().union(*found)):
        values = {}
        for index, each in enumerate(found):
            values.setdefault(each.get(name, theirs.get(name)), []).append(str(index))
        parts = (
            f"{value} ({'process' if len(who) == 1 else 'processes'} {', '.join(who)})"
            for value, who in values.items()
        )
        lines.append(f"  {name}: {', '.join(parts)}")
    if lines:
        raise SharedError(
            "the processes of a job are started alike, with one config, one code and one set of "
            "data; found different\n" + "\n".join(lines[:20])
        )


def platform() -> dict[str, object]:
    """What decides on which devices jax starts, as can be told before it does; for `check_alike`.

    Processes on several platforms would wait minutes for each other's devices.
    """
    asked = {
        name.upper(): getattr(jax.config, name)
        for name in ("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision")
    }
    if asked["JAX_PLATFORMS"]:
        return asked
    tpu = any(map(os.path.exists, launchers.TPUS))
    return asked | {"an NVIDIA GPU": os.path.exists("/dev/nvidiactl"), "a TPU": tpu}


def check_devices() -> None:
    """An error, the same on all processes, where they have not the same devices.

    From then on process 0 speaks for all.
    """
    if not many():
        return
    found = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        found[device.process_index].append(device.device_kind)
    counts = [f"{len(kinds)} {', '.join(sorted(set(kinds)))}" for kinds in found]
    if len(set(counts)) > 1:
        told = ", ".join(f"process {index} has {has}" for index, has in enumerate(counts))
        raise SharedError(
            f"the processes of a job need the same number of devices each; found: {told}; see to "
            "what each is given (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES, TPU_VISIBLE_CHIPS)"
        )
    report.silence(jax.process_index() != 0)


@contextlib.contextmanager
def led(what: str, context: contextlib.AbstractContextManager[T]) -> Iterator[T | None]:
    """Process 0 enters a context, such as a lock; where it cannot, all have its error.

    `what` is the same on all. Gives what the context gives, to process 0; None to the others.
    """
    if not many():
        with context as found:
            yield found
        return
    with contextlib.ExitStack() as stack:
        found, said = None, ""
        if jax.process_index() == 0:
            try:
                found = stack.enter_context(context)
            except UserError as error:
                said = str(error)
        if said := gathered(what, said)[0]:
            raise SharedError(said)
        yield found


def first(act: Callable[..., T], *args, **how) -> T | None:
    """Process 0 calls `act`, for the whole job; where that is refused, all have its error.

    What it gives, to process 0; None to the others.
    """
    with led(_name(act), _calling(act, *args, **how)) as found:
        return found


@contextlib.contextmanager
def _calling(act: Callable[..., T], *args, **how) -> Iterator[T]:
    yield act(*args, **how)


def decided(act: Callable[..., T], *args, **how) -> T:
    """Process 0 calls `act`, for the whole job, and all have what it gives: plain values, JSON's.

    Where it is refused, all have its error.
    """
    found = first(act, *args, **how)
    if not many():
        return found
    return json.loads(gathered(f"what {_name(act)} found", json.dumps(found))[0])


def alike(what: str, look: Callable[[], T]) -> T:
    """What `look` finds, once all find the same: plain values, JSON's; `what` names it.

    A network's file system may show a change to one process later than to another: they look again
    for a minute.

    Raises:
        SharedError: they still find different.
    """
    until = time.monotonic() + LATE
    while True:
        found = look()
        if not many():
            return found
        told = gathered(what, json.dumps([found, time.monotonic() > until]))
        seen, over = zip(*map(json.loads, told), strict=True)
        if all(each == seen[0] for each in seen):
            return found
        if over[0]:  # by one clock
            listed = ", ".join(f"process {n} finds {_shown(each)}" for n, each in enumerate(seen))
            raise SharedError(
                f"the processes of a job need {what} to be the same for all; {listed}; they need "
                "a file system that all see, and that shows each what another wrote"
            )
        time.sleep(0.5)


def awaited(look: Callable[[], T | None], file: str | os.PathLike) -> T:
    """What `look` finds of a file that another process wrote.

    A network's file system may show it to this one later: it looks again for a minute.

    Raises:
        UserError: there is none (None) until then.
    """
    until = time.monotonic() + LATE
    while (found := look()) is None:
        if time.monotonic() > until:
            raise UserError(
                f"{file} was written by another process, and is not there for this one: the "
                "processes of a job need --out on a file system that all see"
            )
        time.sleep(0.5)
    return found


def share() -> tuple[int, int]:
    """(I, N): of a work that is divided into N shares, this process does share I, from 0.

    All of it where this process is alone, or devices of all of them compute together.
    """
    if not many() or sharding.spans(sharding.current()):
        return 0, 1
    return jax.process_index(), jax.process_count()


def rows(batch: int) -> int:
    """How many rows of a batch lie on the devices of this process, where shares make it up.

    Each device has as many as it has where one process has all devices, and in the same order:
    only programs of one size, and rows at one place of them, round alike. All of them without
    shares.
    """
    shares = share()[1]
    if shares == 1:
        return batch
    ways = sharding.ways(sharding.current())
    return ways * -(-batch // (ways * shares))


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Each process does its share inside; where one is refused, all have its error.

    All wait here for all. What ends a process in another way ends all at once (`coordination`).
    Nothing where there are no shares.
    """
    if share()[1] == 1:
        yield
        return
    said = ""
    try:
        yield
    except UserError as error:
        said = str(error)
    if found := next(filter(None, gathered("what was refused of a share", said)), ""):
        raise SharedError(found)


def together(what: str) -> None:
    """All processes wait here for each other; `what` is the same on all, and of this place."""
    if many():
        coordination.job().exchange(what, "")


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping):
        return {path.removesuffix("."): tree}
    return {k: v for name, one in tree.items() for k, v in _flat(one, f"{path}{name}.").items()}


def _shown(value: object) -> str:
    """A value in a message; long ones differ by a hash of the whole."""
    text = json.dumps(value, default=str)
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _name(act: Callable) -> str:
    return getattr(act, "func", act).__qualname__
