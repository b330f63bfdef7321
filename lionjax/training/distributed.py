# SPDX-License-Identifier: Apache-2.0
"""Multi-process runs with jax.distributed: initialization, barriers, sums, preemption signals and a watchdog."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import logging
import os
import re
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

from lionjax.core.errors import RetryError, UserError

log = logging.getLogger(__name__)

# Set for each process by launchers that JAX does not detect (it detects SLURM, Open MPI, GKE and TPU VMs).
ENV_COORDINATOR_ADDRESS, ENV_NUM_PROCESSES, ENV_PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
# Seconds to wait for the other processes at the start, and for a heartbeat from each of them later.
ENV_JOIN_SECONDS, ENV_HEARTBEAT_SECONDS = "LIONJAX_JOIN_SECONDS", "LIONJAX_HEARTBEAT_SECONDS"
LOST_CONNECTION = re.compile(
    r"unavailable|deadline.exceeded|heartbeat|connection (reset|closed|refused)|socket closed|gloo|preempted", re.I
)
GRACE_SECONDS = 5.0  # process 0 exits this much later, so that the other processes can print their own errors


def initialize() -> None:
    """Call jax.distributed.initialize; must run before any device is used. Does nothing for a single process.

    The cluster is read from our environment variables (`cluster_from_env`), else detected by JAX (SLURM, Open MPI,
    GKE, TPU VM, Kubernetes). Raises UserError for invalid variables, and RetryError if not all processes have connected
    within LIONJAX_JOIN_SECONDS (default 300).
    """
    if jax.distributed.is_initialized():
        return
    cluster = cluster_from_env()
    limit = int_from_env(ENV_JOIN_SECONDS, "300")
    timeouts = {
        "initialization_timeout": limit + 60,  # after our own: JAX may end the process without a message
        "heartbeat_timeout_seconds": int_from_env(ENV_HEARTBEAT_SECONDS, "100"),
    }
    try:
        with join_watchdog(limit):
            jax.distributed.initialize(**cluster, **timeouts)
            jax.devices()  # on a TPU pod this waits for the other hosts too
    except ValueError as error:
        if cluster or "coordinator_address" not in str(error):
            raise UserError(f"the processes of this run do not fit together: {error}") from error
        return  # no launcher detected: a single process
    except Exception as error:
        if not cluster and "must be called before" in str(error):
            return  # the caller has already used its devices: a single process
        raise RetryError(join_timeout_message(limit, str(error))) from error
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
    """Keyword arguments for jax.distributed.initialize from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    {} if neither JAX_NUM_PROCESSES nor JAX_PROCESS_ID is set. Raises UserError if one of the three is missing or
    invalid.
    """
    if ENV_NUM_PROCESSES not in os.environ and ENV_PROCESS_ID not in os.environ:
        return {}
    names = (ENV_COORDINATOR_ADDRESS, ENV_NUM_PROCESSES, ENV_PROCESS_ID)
    if missing := [name for name in names if name not in os.environ]:
        raise UserError(f"{missing[0]} is not set; set all of {', '.join(names)}, or none of them")
    num_processes, process_id = int_from_env(ENV_NUM_PROCESSES), int_from_env(ENV_PROCESS_ID)
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"{ENV_PROCESS_ID} is {process_id} and must be in 0..{num_processes - 1} "
            f"({ENV_NUM_PROCESSES} is {num_processes})"
        )
    address = os.environ[ENV_COORDINATOR_ADDRESS]
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"{ENV_COORDINATOR_ADDRESS} is {address!r} and must be HOST:PORT of process 0")
    return {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}


def int_from_env(name: str, default: str = "") -> int:
    """An environment variable as a non-negative integer. Raises UserError if it is not one."""
    text = os.environ.get(name, default)
    if not text.isdigit():
        raise UserError(f"{name} is {text!r} and must be a non-negative integer")
    return int(text)


def join_timeout_message(timeout: int, reason: str) -> str:
    """The error message for a run whose processes did not all connect within `timeout` seconds."""
    coordinator = (
        f"{ENV_COORDINATOR_ADDRESS}={os.environ[ENV_COORDINATOR_ADDRESS]}"
        if ENV_COORDINATOR_ADDRESS in os.environ
        else "process 0"
    )
    first_line = (reason.strip().splitlines() or ["no reason given"])[0]
    return (
        f"after {timeout} s not all processes of this run had connected to {coordinator} ({first_line[:200]}); run the "
        "same command on every host (srun, or gcloud ... ssh --worker=all), check that the port is open between the "
        f"hosts, or set a longer {ENV_JOIN_SECONDS}"
    )


@contextlib.contextmanager
def join_watchdog(timeout: int) -> Iterator[None]:
    """Context: prints a notice after min(20, timeout / 2) seconds; ends the process with code 75 after `timeout`."""
    done = threading.Event()

    def wait_and_exit():
        notice_seconds = min(20, timeout / 2)
        if done.wait(notice_seconds):
            return
        print("waiting for the other processes of this run ...", file=sys.stderr, flush=True)
        if not done.wait(timeout - notice_seconds):
            print(f"lionjax: {join_timeout_message(timeout, 'no answer')}", file=sys.stderr, flush=True)
            os._exit(RetryError.exit_code)

    threading.Thread(target=wait_and_exit, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def distributed_session(explain: Callable[[BaseException], tuple[str, int]]) -> Iterator[None]:
    """Context: initializes jax.distributed (see `initialize`) and runs the body.

    With several processes, an exception is printed (`explain` returns a sentence and an exit code) and the process
    exits at once: a regular shutdown would wait for the other processes, which wait for this one. The others end when
    the connection breaks or a heartbeat is missing. With one process the exception is raised.
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
        if is_lost_connection(error):
            code = RetryError.exit_code
        process = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"lionjax: {process}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(GRACE_SECONDS)
        os._exit(code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of JAX says that another process of the run is gone; the cause is in that process's output."""
    return isinstance(error, jax.errors.JaxRuntimeError) and LOST_CONNECTION.search(str(error)) is not None


def is_main_process() -> bool:
    """Whether this is process 0, which writes the files that are written once per run."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached this barrier; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def sum_across_processes(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    # Sent as uint32 bits, because JAX would round float64 to float32.
    bits = np.asarray(numbers, np.float64).view(np.uint32)
    values = np.ascontiguousarray(multihost_utils.process_allgather(bits)).view(np.float64)
    return values.sum(0).tolist()


_exchanges = itertools.count()  # number of calls of `max_across_processes`, the same in all processes


def max_across_processes(*numbers: int) -> list[int]:
    """The largest of each number over the processes, which must all call this.

    It goes through the coordinator and uses no device, so that it need not wait for the update that is running.
    """
    if jax.process_count() == 1:
        return list(numbers)
    from jax._src import distributed

    client, name, number = distributed.global_state.client, "lionjax/max", next(_exchanges)
    wait_ms = 24 * 3600 * 1000  # a lost process ends this one by its missing heartbeat
    if jax.process_index():
        client.key_value_set(f"{name}/{number}/{jax.process_index()}", json.dumps(numbers))
        return json.loads(client.blocking_key_value_get(f"{name}/{number}/all", wait_ms))
    others = range(1, jax.process_count())
    given = [json.loads(client.blocking_key_value_get(f"{name}/{number}/{k}", wait_ms)) for k in others]
    largest = [max(values) for values in zip(numbers, *given)]
    client.key_value_set(f"{name}/{number}/all", json.dumps(largest))
    if number:  # all others have read the previous answer, as they have asked again
        client.key_value_delete(f"{name}/{number - 1}/")
    return largest


class PreemptionHandler:
    """Turns SIGTERM and Ctrl-C into a flag: `with PreemptionHandler() as handler: ... if handler.should_stop(): ...`.

    A second signal has its default effect. With several processes, JAX's preemption sync makes all of them stop after
    the same update when one of them receives a signal.
    """

    def __init__(self):
        self.received_signal: int | None = None
        self.previous_handlers: dict[int, Any] = {}
        self.sync_step = 0

    def __enter__(self):
        multiprocess = jax.process_count() > 1  # then JAX handles SIGTERM
        signals = (signal.SIGINT,) if multiprocess else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {signum: signal.signal(signum, self.handle_signal) for signum in signals}
        return self

    def __exit__(self, *_):
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)

    def handle_signal(self, signum: int, _) -> None:
        self.received_signal = signum
        signal.signal(signum, self.previous_handlers[signum])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self) -> bool:
        """Whether to stop before the next update. All processes must call it once before each update."""
        if jax.process_count() == 1:
            return self.received_signal is not None
        from jax.experimental import multihost_utils

        self.sync_step += 1
        stop = multihost_utils.reached_preemption_sync_point(self.sync_step)
        if stop and self.received_signal is None:
            self.received_signal = signal.SIGTERM
        return stop

    def exit_process(self) -> None:
        """End the process after the state was saved: exit code 0 after SIGTERM, KeyboardInterrupt after Ctrl-C."""
        if self.received_signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(0)


class Watchdog:
    """Ends the process when `beat` was not called for `seconds` (0: never): `with Watchdog(1800) as watchdog: ...`.

    Prints the stacks of all threads to stderr and exits with code 1, so that a scheduler restarts the run. It finds
    hangs that heartbeats miss, and also works while Python is blocked in a C call.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        self.beat()
        return self

    def __exit__(self, *_):
        faulthandler.cancel_dump_traceback_later()

    def beat(self, compiled: bool = False) -> None:
        """Restart the countdown: `seconds`, or ten times that if the next step may compile (`compiled` False)."""
        if self.seconds > 0:
            seconds = self.seconds if compiled else 10 * self.seconds
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
