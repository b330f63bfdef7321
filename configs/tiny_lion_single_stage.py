# SPDX-License-Identifier: Apache-2.0
"""tiny_lion.py in one stage, for comparison: everything trains on every task from the first step on.

As many updates as the three stages have together.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment

staged = runpy.run_path(str(Path(__file__).with_name("tiny_lion.py")))["get_config"]


def get_config() -> Experiment:
    """The last of the three stages, from nothing and for longer."""
    three = staged()
    steps = sum(stage.steps for stage in three.stages)
    one = dataclasses.replace(three.stages[-1], name="all_at_once", steps=steps)
    return dataclasses.replace(three, name="tiny_lion_single_stage", stages=(one,))
