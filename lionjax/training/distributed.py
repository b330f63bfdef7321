# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: how they find each other, agree, stop together, and end when one of them is stuck.

JAX's own runtime does the work. Here is when to call it, what to say when a host is missing, and what one process
must not decide alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lionjax.core.types import UserError

log = logging.getLogger(__name__)

# What a launcher that is neither SLURM, GKE, a TPU VM nor Open MPI sets for each process.
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# How long to wait for the others at the start, and for a sign of life from each later on.
JOIN_SECONDS, HEARTBEAT_SECONDS = "LIONJAX_JOIN_SECONDS", "LIONJAX_HEARTBEAT_SECONDS"
GRACE = 5.0  # seconds in which the others may say why they end, before process 0 takes the connection down


def join() -> None:
    """Meet the other processes of this run; before anything touches a device. Nothing happens where there are none.

    Our own variables come first, then what JAX finds by itself: SLURM, Open MPI, GKE, a TPU VM, Kubernetes. Raises
    UserError for variables that make no sense, and when not all processes came within LIONJAX_JOIN_SECONDS (300).
    """
    if jax.distributed.is_initialized():
        return
    given = given_place()
    limit = whole_number(JOIN_SECONDS, "300")
    times = {
        "initialization_timeout": limit + 60,  # JAX may end the process without a word
        "heartbeat_timeout_seconds": whole_number(HEARTBEAT_SECONDS, "100"),
    }
    try:
        with waiting(limit):
            jax.distributed.initialize(**given, **times)
            jax.devices()  # on a pod the devices meet as well
    except ValueError as error:
        if given or "coordinator_address" not in str(error):
            raise UserError(f"the processes of this run do not fit together: {error}") from error
        return  # no launcher in sight: one process
    except Exception as error:
        if not given and "must be called before" in str(error):
            return  # called from a program that has used its devices: it is on its own
        raise UserError(missing(limit, str(error))) from error
    if jax.process_index():
        logging.getLogger("lionjax").setLevel(logging.WARNING)
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    log.info(
        "process %d of %d on %s: %s (%s)",
        jax.process_index(),
        jax.process_count(),
        socket.gethostname(),
        devices,
        jax.devices()[0].device_kind,
    )


def given_place() -> dict[str, Any]:
    """What our own variables say; {} where they are not set. Raises UserError when only some are."""
    if COUNT not in os.environ and NUMBER not in os.environ:
        return {}
    if lacking := [name for name in (ADDRESS, COUNT, NUMBER) if name not in os.environ]:
        raise UserError(f"{lacking[0]} is not set; {ADDRESS}, {COUNT} and {NUMBER} go together")
    count, number = whole_number(COUNT), whole_number(NUMBER)
    if not 0 <= number < count:
        raise UserError(f"{NUMBER} is {number} and must lie in 0..{count - 1}, as {COUNT} says")
    address = os.environ[ADDRESS]
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"{ADDRESS} is {address!r} and must be HOST:PORT of process 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def whole_number(name: str, default: str = "") -> int:
    """A variable as a number. Raises UserError for anything else."""
    text = os.environ.get(name, default)
    if not text.isdigit():
        raise UserError(f"{name} is {text!r} and must be a whole number")
    return int(text)


def missing(limit: int, reason: str) -> str:
    """The sentence for a run whose processes did not all come."""
    where = f"{ADDRESS}={os.environ[ADDRESS]}" if ADDRESS in os.environ else "process 0"
    said = (reason.strip().splitlines() or ["no reason given"])[0]
    return (
        f"after {limit} s not all processes of this run had met at {where} ({said[:200]}); give the same command on "
        "every host (srun, or gcloud ... ssh --worker=all), see that its port is open between them, or wait longer "
        f"with {JOIN_SECONDS}"
    )


@contextlib.contextmanager
def waiting(limit: int) -> Iterator[None]:
    """Say after a while for what we wait; and end, with the hint, where JAX does not come back in time."""
    done = threading.Event()

    def tell():
        patience = min(20, limit / 2)
        if done.wait(patience):
            return
        print("waiting for the other processes of this run ...", file=sys.stderr, flush=True)
        if not done.wait(limit - patience):
            print(f"lionjax: {missing(limit, 'no answer')}", file=sys.stderr, flush=True)
            os._exit(2)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def together(explain: Callable[[BaseException], tuple[str, int]]) -> Iterator[None]:
    """The body as one of several processes (see `join`), or alone.

    Where one of several fails, it says why (`explain` gives a sentence and a code) and ends at once: to leave in good
    order it would wait for the others, who wait for it. They notice by a broken connection or a missing heartbeat.
    """
    join()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if os.environ.get("LIONJAX_TRACEBACK"):
            traceback.print_exception(error)
        sentence, code = explain(error)
        who = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"lionjax: {who}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(GRACE)
        os._exit(code)


def first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def sum_of(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    # Bits, as JAX would round a float64 to 32 bits.
    bits = np.asarray(numbers, np.float64).view(np.uint32)
    found = np.ascontiguousarray(multihost_utils.process_allgather(bits)).view(np.float64)
    return found.sum(0).tolist()


class Stop:
    """SIGTERM and Ctrl-C as a note that the loop reads: `with Stop() as stop: ... if stop.asked(): ...`.

    A second one acts at once, as it would without us. With several processes a signal to one of them is a note to
    all, which JAX hands round so that they stop after the same update.
    """

    def __init__(self):
        self.heard: int | None = None
        self.before: dict[int, Any] = {}
        self.calls = 0

    def __enter__(self):
        several = jax.process_count() > 1  # then SIGTERM is JAX's
        numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        self.heard = number
        signal.signal(number, self.before[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to stop now. Every process must ask as often as the others, once before each update."""
        if jax.process_count() == 1:
            return self.heard is not None
        from jax.experimental import multihost_utils

        self.calls += 1
        now = multihost_utils.reached_preemption_sync_point(self.calls)
        if now and self.heard is None:
            self.heard = signal.SIGTERM
        return now

    def leave(self) -> None:
        """End the run, whose state is on disk: code 0 after SIGTERM, KeyboardInterrupt after Ctrl-C."""
        if self.heard == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)


class Watch:
    """Ends this process where nothing has gone on for so many seconds (0: never): `with Watch(1800) as watch: ...`.

    The stacks of all threads go to stderr and the code is 1, so that a scheduler starts the run again. A peer that
    hangs while its heart beats is found by nothing else. It works while Python itself is stuck in a call.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.alive()
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()

    def alive(self, compiled: bool = False) -> None:
        """Something has gone on. Where the next thing has to be compiled first, it may take ten times as long."""
        if self.seconds > 0:
            seconds = self.seconds if compiled else 10 * self.seconds
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
