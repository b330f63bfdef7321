# SPDX-License-Identifier: Apache-2.0
"""What stands in for the compiler in processes of their own: it plans nothing, and some jobs end the process."""

import os
import signal
import sys

from lionjax.core import config
from lionjax.core.types import UserError
from lionjax.planner.plans import Plan
from lionjax.planner.worker import Job, failed_plan


def work(job: Job) -> Plan:
    """Break off as libtpu does where tensor is 2, refuse 4, fail where data is 4; else a plan that fits."""
    print("*** SIGSEGV STACK OVERFLOW", file=sys.stderr)
    if job.mesh is None or job.mesh.tensor == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.mesh.data == 4:
        raise ValueError("of libtpu")
    if job.mesh.tensor == 4:
        raise UserError("no such mesh")
    experiment = config.from_json(job.experiment_json)
    asked = (experiment, job.topology, job.stage_index, job.mesh, job.remat, job.quick, "")
    fitting = {"fits": True, "broke_off": False, "notes": (), "seconds": {"products": 1.0}}
    return Plan(**vars(failed_plan(*asked)) | fitting)
