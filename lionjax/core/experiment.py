# SPDX-License-Identifier: Apache-2.0
"""An experiment as one value: stages, run settings and generation settings as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError

Scalar = bool | int | float | str | None


@renamed_fields(
    accumulate="grad_accum_steps", learning_rate_scale="lr_multipliers", system="model_overrides", start="init_from"
)
@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a schedule: what trains, on what, for how long, and how fast.

    `trainable`, `learning_rate_scale`: path patterns as in `params.matches`; the learning rate of
    a parameter is multiplied by the factor of the first pattern that matches it.
    `mixture`: (task name, weight).
    `batch_size`: examples behind one update over all devices, read in `accumulate` equal parts.
    The learning rate rises from `warmup_learning_rate` to `learning_rate` in `warmup_steps` and
    falls along a cosine to `end_learning_rate`.
    `optimizer`: AdamW for all, or Muon for the matrices between an input and an output (arXiv 2502.16982), which finds
    where to look in fewer updates; its updates are as large as AdamW's, so that one learning rate serves both.
    `system`: fields of the system's config replaced in this stage: ("visual_input", "QFORMER").
    `start`: begin from the previous stage's weights, or from scratch.
    """

    name: str
    steps: int
    trainable: tuple[str, ...]
    mixture: tuple[tuple[str, float], ...]
    batch_size: int
    grad_accum_steps: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 1000
    warmup_learning_rate: float = 1e-8
    end_learning_rate: float = 0.0
    weight_decay: float = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW, also beside Muon
    clip_norm: float = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    model_overrides: tuple[tuple[str, Scalar], ...] = ()
    init_from: Literal["previous", "scratch"] = "previous"

    def __post_init__(self):
        for field in ("batch_size", "grad_accum_steps"):
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"stage {self.name!r}: {field} is {value} and must be at least 1")
        if self.batch_size % self.grad_accum_steps:
            raise UserError(
                f"stage {self.name!r}: batch_size {self.batch_size} does not divide into "
                f"grad_accum_steps={self.grad_accum_steps} equal parts"
            )


@renamed_fields(
    keep="max_to_keep",
    cache_gib="feature_cache_gib",
    features_dir="feature_cache_dir",
    on_bad_update="on_bad_step",
    spike="loss_spike_sigmas",
    bad_updates="max_bad_steps",
    stuck_seconds="watchdog_seconds",
)
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run goes about it: what it writes and when (in updates), how frozen weights are held."""

    log_every: int = 10
    save_every: int = 1000
    evaluate_every: int = 0  # 0: at the end of a stage only
    evaluate_limit: int = 200  # questions of each benchmark asked when all stages are done; 0: none
    max_to_keep: int = 3  # checkpoints kept, and the best one of the stage that runs
    frozen_dtype: str = "bfloat16"
    cache_features: bool = False  # keep what frozen towers make of each record, so that they run once
    feature_cache_gib: float = 4.0  # memory for that, on each host
    feature_cache_dir: str = ""  # a folder where it is kept on disk as well, for later starts and other runs
    # An update whose loss or gradient is not finite, or whose loss is a spike, changes nothing; then the run stops,
    # goes on, or goes back to the last checkpoint and on with the batches after that one.
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    loss_spike_sigmas: float = 0.0  # so many deviations above the mean of the last 128 losses is a spike; 0: none
    max_bad_steps: int = 20  # with so many in one stage the run stops all the same
    # An update that takes longer (ten times as long, where it is compiled) ends the process; 0: never.
    watchdog_seconds: float = 1800.0


@renamed_fields(beams="num_beams")
@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How the trained model answers where nobody says otherwise.

    The penalty is for sentences alone: the digits of a box repeat by right, so region-level prompts are answered
    without it. `max_new_tokens` 0: as many as the longest answer in training may have.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 0


@renamed_fields(system="model", answer="generation")
@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of.

    `weights`: (path prefix in the params tree, safetensors file with that part; behind a # its path in the file, where
    that is another).
    """

    name: str
    model: object  # a frozen dataclass, such as systems.lion.LionConfig
    data: object  # a frozen dataclass
    stages: tuple[Stage, ...]
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0
    weights: tuple[tuple[str, str], ...] = ()
    generation: GenerationDefaults = GenerationDefaults()

    def __post_init__(self):
        # What the data's processor needs to know of the model comes from the model, and is set in one place.
        for_model = getattr(self.data, "for_model", None)
        if for_model is not None:
            object.__setattr__(self, "data", for_model(self.model.info))
