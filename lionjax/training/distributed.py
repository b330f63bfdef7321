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
ENV_COORDINATOR_ADDRESS, ENV_NUM_PROCESSES, ENV_PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
# How long to wait for the others at the start, and for a sign of life from each later on.
ENV_JOIN_SECONDS, ENV_HEARTBEAT_SECONDS = "LIONJAX_JOIN_SECONDS", "LIONJAX_HEARTBEAT_SECONDS"
GRACE_SECONDS = 5.0  # seconds in which the others may say why they end, before process 0 takes the connection down


def initialize() -> None:
    """Meet the other processes of this run; before anything touches a device. Nothing happens where there are none.

    Our own variables come first, then what JAX finds by itself: SLURM, Open MPI, GKE, a TPU VM, Kubernetes. Raises
    UserError for variables that make no sense, and when not all processes came within LIONJAX_JOIN_SECONDS (300).
    """
    if jax.distributed.is_initialized():
        return
    given = cluster_from_env()
    limit = int_from_env(ENV_JOIN_SECONDS, "300")
    times = {
        "initialization_timeout": limit + 60,  # JAX may end the process without a word
        "heartbeat_timeout_seconds": int_from_env(ENV_HEARTBEAT_SECONDS, "100"),
    }
    try:
        with join_watchdog(limit):
            jax.distributed.initialize(**given, **times)
            jax.devices()  # on a pod the devices meet as well
    except ValueError as error:
        if given or "coordinator_address" not in str(error):
            raise UserError(f"the processes of this run do not fit together: {error}") from error
        return  # no launcher in sight: one process
    except Exception as error:
        if not given and "must be called before" in str(error):
            return  # called from a program that has used its devices: it is on its own
        raise UserError(join_timeout_message(limit, str(error))) from error
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


def cluster_from_env() -> dict[str, Any]:
    """What our own variables say; {} where they are not set. Raises UserError when only some are."""
    if ENV_NUM_PROCESSES not in os.environ and ENV_PROCESS_ID not in os.environ:
        return {}
    if lacking := [
        name for name in (ENV_COORDINATOR_ADDRESS, ENV_NUM_PROCESSES, ENV_PROCESS_ID) if name not in os.environ
    ]:
        raise UserError(
            f"{lacking[0]} is not set; {ENV_COORDINATOR_ADDRESS}, {ENV_NUM_PROCESSES} and {ENV_PROCESS_ID} go together"
        )
    count, number = int_from_env(ENV_NUM_PROCESSES), int_from_env(ENV_PROCESS_ID)
    if not 0 <= number < count:
        raise UserError(f"{ENV_PROCESS_ID} is {number} and must lie in 0..{count - 1}, as {ENV_NUM_PROCESSES} says")
    address = os.environ[ENV_COORDINATOR_ADDRESS]
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"{ENV_COORDINATOR_ADDRESS} is {address!r} and must be HOST:PORT of process 0")
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def int_from_env(name: str, default: str = "") -> int:
    """A variable as a number. Raises UserError for anything else."""
    text = os.environ.get(name, default)
    if not text.isdigit():
        raise UserError(f"{name} is {text!r} and must be a whole number")
    return int(text)


def join_timeout_message(timeout: int, reason: str) -> str:
    """The sentence for a run whose processes did not all come."""
    where = (
        f"{ENV_COORDINATOR_ADDRESS}={os.environ[ENV_COORDINATOR_ADDRESS]}"
        if ENV_COORDINATOR_ADDRESS in os.environ
        else "process 0"
    )
    said = (reason.strip().splitlines() or ["no reason given"])[0]
    return (
        f"after {timeout} s not all processes of this run had met at {where} ({said[:200]}); give the same command on "
        "every host (srun, or gcloud ... ssh --worker=all), see that its port is open between them, or wait longer "
        f"with {ENV_JOIN_SECONDS}"
    )


@contextlib.contextmanager
def join_watchdog(timeout: int) -> Iterator[None]:
    """Say after a while for what we wait; and end, with the hint, where JAX does not come back in time."""
    done = threading.Event()

    def tell():
        patience = min(20, timeout / 2)
        if done.wait(patience):
            return
        print("waiting for the other processes of this run ...", file=sys.stderr, flush=True)
        if not done.wait(timeout - patience):
            print(f"lionjax: {join_timeout_message(timeout, 'no answer')}", file=sys.stderr, flush=True)
            os._exit(2)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def distributed_session(explain: Callable[[BaseException], tuple[str, int]]) -> Iterator[None]:
    """The body as one of several processes (see `join`), or alone.

    Where one of several fails, it says why (`explain` gives a sentence and a code) and ends at once: to leave in good
    order it would wait for the others, who wait for it. They notice by a broken connection or a missing heartbeat.
    """
    initialize()
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
            time.sleep(GRACE_SECONDS)
        os._exit(code)


def is_main_process() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def sum_across_processes(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    # Bits, as JAX would round a float64 to 32 bits.
    bits = np.asarray(numbers, np.float64).view(np.uint32)
    found = np.ascontiguousarray(multihost_utils.process_allgather(bits)).view(np.float64)
    return found.sum(0).tolist()


class PreemptionHandler:
    """SIGTERM and Ctrl-C as a note that the loop reads: `with Stop() as stop: ... if stop.asked(): ...`.

    A second one acts at once, as it would without us. With several processes a signal to one of them is a note to
    all, which JAX hands round so that they stop after the same update.
    """

    def __init__(self):
        self.received_signal: int | None = None
        self.previous_handlers: dict[int, Any] = {}
        self.sync_step = 0

    def __enter__(self):
        several = jax.process_count() > 1  # then SIGTERM is JAX's
        numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {number: signal.signal(number, self.handle_signal) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle_signal(self, signum: int, _) -> None:
        self.received_signal = signum
        signal.signal(signum, self.previous_handlers[signum])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to stop now. Every process must ask as often as the others, once before each update."""
        if jax.process_count() == 1:
            return self.received_signal is not None
        from jax.experimental import multihost_utils

        self.sync_step += 1
        now = multihost_utils.reached_preemption_sync_point(self.sync_step)
        if now and self.received_signal is None:
            self.received_signal = signal.SIGTERM
        return now

    def exit_process(self) -> None:
        """End the run, whose state is on disk: code 0 after SIGTERM, KeyboardInterrupt after Ctrl-C."""
        if self.received_signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)


class Watchdog:
    """Ends this process where nothing has gone on for so many seconds (0: never): `with Watch(1800) as watch: ...`.

    The stacks of all threads go to stderr and the code is 1, so that a scheduler starts the run again. A peer that
    hangs while its heart beats is found by nothing else. It works while Python itself is stuck in a call.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.beat()
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()

    def beat(self, compiled: bool = False) -> None:
        """Something has gone on. Where the next thing has to be compiled first, it may take ten times as long."""
        if self.seconds > 0:
            seconds = self.seconds if compiled else 10 * self.seconds
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
