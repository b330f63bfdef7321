# SPDX-License-Identifier: Apache-2.0
"""Plans in a worker process, because a crash of the compiler ends its process."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lionjax.core import config
from lionjax.core.experiment import Experiment
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.planner import plans
from lionjax.planner.plans import Plan
from lionjax.planner.topologies import Topology


class CompilerCrashed(UserError):
    """The compiler's process ended; the message has the signal or exit code and the path of its output."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of `plans.plan` in picklable form; `experiment_json`: from `config.to_json`."""

    experiment_json: str
    topology: Topology
    stage_index: int
    mesh: MeshConfig | None = None
    remat: str | None = None
    generation: bool = False
    quick: bool = False


def run_job(job: Job) -> Plan:
    """Run `plans.plan` with the arguments of a job."""
    experiment = config.from_json(job.experiment_json)
    return plans.plan(experiment, job.topology, job.stage_index, job.mesh, job.remat, job.generation, quick=job.quick)


class PlanWorker:
    """A context manager that runs plans in a worker process, which is restarted after a crash.

    `job_fn`: a module-level function (pickled by name) that turns a Job into a Plan.
    """

    def __init__(self, job_fn: Callable[[Job], Plan] = run_job):
        self.job_fn, self.process = job_fn, None

    def __enter__(self) -> PlanWorker:
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.kill()
            self._end()
            self.stderr_path.unlink(missing_ok=True)

    def plan(self, experiment: Experiment, *arguments: Any, **options: Any) -> Plan:
        """`plans.plan` in the worker process; after the experiment, arguments are the fields of `Job`.

        Raises CompilerCrashed if the process ends; UserError as `plans.plan`.
        """
        if self.process is None:
            self._start()
        self.pipe.send(Job(config.to_json(experiment), *arguments, **options))
        try:
            result, error = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._end()
            raise CompilerCrashed(crash_message(self.exit_code, self.stderr_path)) from None
        with self.stderr_path.open(errors="replace") as lines:
            lines.seek(self.stderr_offset)
            sys.stderr.write(lines.read())
            self.stderr_offset = lines.tell()
        if error is not None:
            raise error
        return result

    def _start(self) -> None:
        file_descriptor, name = tempfile.mkstemp(prefix="lionjax-plan-", suffix=".log")
        os.close(file_descriptor)
        self.stderr_path, self.stderr_offset = Path(name), 0
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_pipe, name, self.job_fn), daemon=True)
        self.process.start()
        worker_pipe.close()

    def _end(self) -> None:
        self.process.join()
        self.exit_code, self.process = self.process.exitcode, None
        self.pipe.close()


def _serve(pipe, stderr_path: str, job_fn: Callable[[Job], Plan]) -> None:
    """The worker process: receives jobs and sends (plan, None) or (None, exception) until the pipe is closed."""
    with open(stderr_path, "ab", buffering=0) as file:  # libtpu writes to file descriptor 2, not to sys.stderr
        os.dup2(file.fileno(), 2)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("lionjax").setLevel(logging.INFO)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            job = pipe.recv()
            try:
                reply = job_fn(job), None
            except UserError as error:
                reply = None, error
            except Exception as error:
                if os.environ.get("LIONJAX_TRACEBACK"):
                    traceback.print_exception(error)
                reply = None, RuntimeError(f"{type(error).__name__}: {error}")
            sys.stderr.flush()
            pipe.send(reply)


def crash_message(exit_code: int | None, stderr_path: Path) -> str:
    """The message for a compiler process that ended with an exit code (negative: a signal)."""
    if exit_code == -signal.SIGKILL:
        return (
            "the compiler's process was killed, most likely because the host ran out of memory (planning a model of 7 "
            "billion parameters needs about 3 GB, 13 billion 5 GB); close other programs and run the command again"
        )
    signal_names = {-number: number.name for number in signal.Signals}
    status = signal_names.get(exit_code, f"exit code {exit_code}")
    return (
        f"the compiler crashed ({status}), its output is in {stderr_path}; try another --mesh, add or remove --quick, "
        "or use --search, which skips crashes"
    )


def failed_plan(
    experiment: Experiment,
    topology: Topology,
    stage_index: int,
    mesh: MeshConfig,
    remat: str | None,
    quick: bool,
    reason: str,
) -> Plan:
    """The Plan of a compilation that crashed: only the settings, `broke_off` and `reason` as a note."""
    stage, chip = experiment.stages[stage_index], topology.chip
    return Plan(
        config=experiment.name,
        what=stage.name,
        topology=str(topology),
        devices=topology.devices,
        mesh=mesh.shape(topology.devices),
        rows=stage.batch_size,
        fits=False,
        peak_gib=None,
        hbm_gib=chip.hbm_gib,
        trained=0,
        frozen=0,
        flops=0.0,
        needed_flops=0.0,
        seconds={},
        collectives={},
        compile_seconds=0.0,
        peak_tflops=chip.peak_tflops,
        remat=remat or "as configured",
        quick=quick,
        notes=(reason,),
        broke_off=True,
    )
