# SPDX-License-Identifier: Apache-2.0
"""Load a model together with the models that work for it: `lionjax.load`."""

from __future__ import annotations

from pathlib import Path

from lionjax.core.sharding import MeshConfig
from lionjax.inference import loading
from lionjax.inference.model import Model
from lionjax.pipelines import refiner as refining


def load(
    folder: str | Path,
    mesh: MeshConfig | None = None,
    prompt_length: int | None = None,
    refiner: str | Path | None = None,
    int8: bool = False,
) -> Model:
    """The model of a run folder or a folder of weights, sharded over a mesh of all devices.

    Without a mesh it is on one CPU, or on accelerators in bfloat16 on this host's devices (`inference.answer_mesh`).
    `prompt_length` is the maximum prompt length in tokens (default: as in training); raise it for chat history and
    few-shot examples. `int8`: round the language model's matrices to int8, for answering only. For an unfinished run,
    the newest checkpoint is loaded; corrupt checkpoints are skipped with a warning. `shipped:NAME` is a folder of the
    package. `refiner`: a refiner's folder, for a model that reads regions; by default that in `origin/refiner/` of its
    folder or the experts in its checkpoint are used, if there are any. Raises UserError if the folder holds no model,
    and for a refiner that does not fit.
    """
    return refining.attach(loading.load(folder, mesh, prompt_length, int8), refiner)
