# SPDX-License-Identifier: Apache-2.0
"""OpenFlamingo 3B: openflamingo_9b.py with MPT-1B and gated cross-attention before every layer."""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment
from lionjax.models.vlm.flamingo import OPENFLAMINGO_3B

larger = runpy.run_path(str(Path(__file__).with_name("openflamingo_9b.py")))


def get_config() -> Experiment:
    """The experiment."""
    return larger["get_config"](OPENFLAMINGO_3B, "openflamingo_3b", "mpt_1b")
