# SPDX-License-Identifier: Apache-2.0
"""Plans made in a process of their own: where the compiler breaks off, it takes its process with it."""

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

from lionjax.core import config
from lionjax.core.experiment import Experiment
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.planner import plans
from lionjax.planner.plans import Plan
from lionjax.planner.topologies import Topology


class CompilerCrashed(UserError):
    """The compiler ended its process; says how, and where its last words are."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What `plans.plan` takes, so that another process can read it: the experiment is the text of `config.to_json`."""

    experiment_json: str
    topology: Topology
    stage_index: int
    mesh: MeshConfig | None
    remat: str | None
    generation: bool
    quick: bool


def run_job(job: Job) -> Plan:
    """The plan of a job."""
    experiment = config.from_json(job.experiment_json)
    return plans.plan(experiment, job.topology, job.stage_index, job.mesh, job.remat, job.generation, quick=job.quick)


class PlanWorker:
    """A process that makes plans, one after the other, and a new one after each that broke off. For `with`.

    `work`: what it does with a job; a function of a module, which the process imports.
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

    def plan(
        self,
        experiment: Experiment,
        topology: Topology,
        stage_index: int,
        mesh: MeshConfig | None = None,
        remat: str | None = None,
        generation: bool = False,
        quick: bool = False,
    ) -> Plan:
        """As `plans.plan`. Raises BrokeOff where the compiler does, and UserError as that does."""
        if self.process is None:
            self._start()
        text = config.to_json(experiment)
        self.pipe.send(Job(text, topology, stage_index, mesh, remat, generation, quick))
        try:
            made, error = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._end()
            raise CompilerCrashed(crash_message(self.exit_code, self.stderr_path)) from None
        with self.stderr_path.open(errors="replace") as lines:
            lines.seek(self.stderr_offset)
            sys.stderr.write(lines.read())
            self.stderr_offset = lines.tell()
        if error is not None:
            raise error
        return made

    def _start(self) -> None:
        number, name = tempfile.mkstemp(prefix="lionjax-plan-", suffix=".log")
        os.close(number)
        self.stderr_path, self.stderr_offset = Path(name), 0
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (theirs, name, self.job_fn)
        self.process = context.Process(target=_serve, args=given, daemon=True)
        self.process.start()
        theirs.close()

    def _end(self) -> None:
        self.process.join()
        self.exit_code, self.process = self.process.exitcode, None
        self.pipe.close()


def _serve(pipe, stderr_path: str, job_fn: Callable[[Job], Plan]) -> None:
    """The process: jobs in, (plan, None) or (None, exception) out, until nobody asks."""
    with open(stderr_path, "ab", buffering=0) as file:  # libtpu writes to the number, not to sys.stderr
        os.dup2(file.fileno(), 2)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("lionjax").setLevel(logging.INFO)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            job = pipe.recv()
            try:
                answer = job_fn(job), None
            except UserError as error:
                answer = None, error
            except Exception as error:
                if os.environ.get("LIONJAX_TRACEBACK"):
                    traceback.print_exception(error)
                answer = None, RuntimeError(f"{type(error).__name__}: {error}")
            sys.stderr.flush()
            pipe.send(answer)


def crash_message(exit_code: int | None, stderr_path: Path) -> str:
    """The sentence for a compiler that ended with an exit code, or with a signal as a negative one."""
    if exit_code == -signal.SIGKILL:
        return (
            "the process that compiled was killed, most likely because memory ran out (a plan of a model of 7 billion "
            "parameters wants about 3 GB, of 13 billion 5 GB); close other programs and try again"
        )
    names = {-one: one.name for one in signal.Signals}
    return (
        f"the compiler broke off ({names.get(exit_code, f'code {exit_code}')}), and left its last words in {stderr_path}; try another "
        "--mesh, --quick or its opposite, or --search, which passes over what breaks"
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
    """What is known of a plan for which the compiler broke off: what was asked."""
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
        remat=remat or "as the config says",
        quick=quick,
        notes=(reason,),
        broke_off=True,
    )
