# SPDX-License-Identifier: Apache-2.0
"""tiny_lion.py in one stage, for comparison: all parts train on all tasks from the first step on.

The number of steps is that of the three stages together.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

staged = runpy.run_path(str(Path(__file__).with_name("tiny_lion.py")))["get_config"]


def get_config() -> Experiment:
    """The last of the three stages, from the initial parameters, with more steps."""
    base = staged()
    steps = sum(part.steps for part in base.stages)
    stage = dataclasses.replace(base.stages[-1], name="all_at_once", steps=steps)
    return dataclasses.replace(base, name="tiny_lion_single_stage", stages=(stage,))
