"""Several processes of one job: how they find each other, agree on what they do, and end.

Each runs the same program on devices of its own, which jax makes one set of devices. Where they
are is told by what launched them, which jax understands (SLURM, Open MPI, a TPU pod, Kubernetes),
or by three options (`options.processes`). Process 0 writes what there is one of, and speaks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokgen import report, sharding
from tokgen.errors import UserError

T = TypeVar("T")
HEARTBEAT = 20  # seconds without a sign of life after which a process is taken for dead
BLOCK = 1024  # bytes by which texts are filled up: as many programs as sizes


def initialize(args: argparse.Namespace) -> None:
    """Join the job that this process is one of, if it is; before anything touches a device.

    `args` are those of `options.processes`. Alone, where nothing says that there are others.

    Raises:
        UserError: process 0 was not there in time; or the options contradict.
    """
    given = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    missing = [f"--{name}" for name, value in given.items() if value in ("", None)]
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
    try:
        jax.distributed.initialize(
            **({} if missing else known),
            initialization_timeout=args.wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, OSError) as error:
        # an OSError: a TPU of a notebook, which has no cloud to ask who else there is
        elsewhere = isinstance(error, OSError) and "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        if missing and os.environ.get("OMPI_COMM_WORLD_SIZE", "1") not in ("", "1"):
            raise UserError(
                "mpirun started several processes, and jax cannot tell where the first is: say "
                "--coordinator, --processes and --process"
            ) from error
        if (
            missing
            and not elsewhere
            and (isinstance(error, OSError) or "coordinator_address" in str(error))
        ):
            return  # no launcher that jax knows
        raise UserError(f"this process cannot join its job: {error}") from error
    except RuntimeError as error:
        raise UserError(f"this process cannot join its job: {error}") from error


def many() -> bool:
    """Whether this process is one of several; no device is touched to say no."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


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


def _check_even() -> None:
    """An error, the same on all, where processes have different numbers of devices."""
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        told = ", ".join(f"process {index} has {count}" for index, count in enumerate(counts))
        raise UserError(
            f"the processes of a job need the same number of devices each; found: {told}; see to "
            "what each is given (CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES, TPU_VISIBLE_CHIPS)"
        )


def gathered(text: str) -> list[str]:
    """What each process says, in their order; all wait for all."""
    if not many():
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    with jax.set_mesh(None):
        sizes = multihost_utils.process_allgather(np.int32(len(own)))
        room = BLOCK * -(-max(int(sizes.max()), 1) // BLOCK)
        rows = multihost_utils.process_allgather(np.pad(own, (0, room - len(own))))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def check_alike(told: Mapping[str, object]) -> None:
    """An error, the same on all processes, where they were not started alike.

    `told` is what must be the same, by its name: plain values, JSON's. From then on process 0
    speaks for all.
    """
    if not many():
        return
    _check_even()
    found = [json.loads(text) for text in gathered(json.dumps(_flat(told), default=str))]
    lines = []
    for name in sorted(set().union(*found)):
        values = {}
        for index, each in enumerate(found):
            values.setdefault(json.dumps(each.get(name)), []).append(str(index))
        if len(values) > 1:
            parts = (
                f"{value[:100]} ({'process' if len(who) == 1 else 'processes'} {', '.join(who)})"
                for value, who in values.items()
            )
            lines.append(f"  {name}: {', '.join(parts)}")
    if lines:
        raise UserError(
            "the processes of a job are started alike, with one config, one code and one set of "
            "data; found different\n" + "\n".join(lines[:20])
        )
    report.silence(jax.process_index() != 0)


@contextlib.contextmanager
def led(context: contextlib.AbstractContextManager[T]) -> Iterator[T | None]:
    """Process 0 enters a context, such as a lock; where it cannot, all have its error.

    Gives what the context gives, to process 0; None to the others.
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
        if said := gathered(said)[0]:
            raise UserError(said)
        yield found


def first(act: Callable[..., T], *args, **how) -> T | None:
    """Process 0 calls `act`, for the whole job; where that is refused, all have its error.

    What it gives, to process 0; None to the others.
    """
    with led(_calling(act, *args, **how)) as found:
        return found


@contextlib.contextmanager
def _calling(act: Callable[..., T], *args, **how) -> Iterator[T]:
    yield act(*args, **how)


def decided(act: Callable[..., T], *args, **how) -> T:
    """Process 0 calls `act`, for the whole job, and all have what it gives: plain values, JSON's.

    Where it is refused, all have its error.
    """
    found = first(act, *args, **how)
    return json.loads(gathered(json.dumps(found))[0]) if many() else found


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

    All wait here for all. What ends a process in another way ends the others: jax sees to that.
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
    if found := next(filter(None, gathered(said)), ""):
        raise UserError(found)


def together(what: str) -> None:
    """All processes wait here for each other; `what` is the same on all, and of this place."""
    if many():
        with jax.set_mesh(None):
            multihost_utils.sync_global_devices(what)


def stops(step: int) -> bool:
    """Whether all processes end after this step, since one was asked to: the same on all."""
    return multihost_utils.reached_preemption_sync_point(step)


def _flat(tree: object, path: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping):
        return {path.removesuffix("."): tree}
    return {k: v for name, one in tree.items() for k, v in _flat(one, f"{path}{name}.").items()}
