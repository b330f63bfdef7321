# SPDX-License-Identifier: Apache-2.0
"""Sizes, schedules, optimizer and weight files of the tiny backbones.

LION freezes its ViT and language model, so those that ship with the project are pretrained separately (`tiny.vision`,
`tiny.language`, `tiny.sam`). The heads used in pretraining are not shipped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import optax
import safetensors.numpy

from lionjax.core import params as trees
from lionjax.core.experiment import Stage
from lionjax.core.renamed import renamed_fields
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.training import optimizer as training_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsSchedule:
    """Training of heads on scenes; `num_scenes`: of the training split."""

    num_scenes: int = 3_000
    steps: int = 1_200
    batch_size: int = 16
    learning_rate: float = 1e-3


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class LanguageSchedule:
    """Steps of a language model with one mix of scene inputs.

    The fractions of batches that are not listed get a few patches of the scene ("things").
    """

    steps: int
    learning_rate: float
    patch_fraction: float = 0.0  # all patches
    tag_fraction: float = 0.2  # a few patches and LION's tag prompt; if patch_fraction > 0 as many with all patches
    text_fraction: float = 0.02  # the scene as text
    no_scene_fraction: float = 0.0  # no scene
    freeze_embeddings: bool = False  # keeps the T5's embeddings, which a ViT may be aligned with
    optimizer: Literal["adamw", "muon"] = "adamw"


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Sizes and schedules of the vision and language backbones; `num_scenes`: of the training split."""

    vision: ViTConfig
    language: T5Config | DecoderConfig
    num_scenes: int = 40_000
    vision_steps: int = 4_000
    augmented_steps: int = 7_000  # further steps with mirrored and rotated images and permuted colors
    align_steps: int = 7_000  # see `vision.align_vision`
    align_learning_rate: float = 8e-4
    vision_batch_size: int = 64
    vision_learning_rate: float = 1e-3
    language_batch_size: int = 48
    language_schedules: tuple[LanguageSchedule, ...] = (
        LanguageSchedule(5_000, 6e-4),
        LanguageSchedule(11_000, 6e-4, patch_fraction=0.35),
        *[LanguageSchedule(5_500, 5e-4, patch_fraction=0.2, tag_fraction=0.29, freeze_embeddings=True)] * 2,
    )
    seed: int = 0


def make_optimizer(learning_rate: float, steps: int, optimizer: str = "adamw", params=None, layer_axes=None):
    """AdamW or Muon with warm-up and cosine decay; Muon needs `params` and their `layer_axes`."""
    if optimizer == "muon":
        fields = {"mixture": (), "batch_size": 1, "weight_decay": 0.02, "optimizer": optimizer}
        rates = {"learning_rate": learning_rate, "end_learning_rate": learning_rate * 0.02, "warmup_steps": 200}
        return training_optimizer.make_optimizer(Stage("", steps, (".*",), **fields, **rates), params, layer_axes)
    schedule = optax.warmup_cosine_decay_schedule(
        0, learning_rate, min(200, steps // 4 + 1), steps, learning_rate * 0.02
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))


def load_params(file: Path) -> dict:
    """The float32 parameters that `save_params` wrote, with its prefix; without it for "reader" and "told"."""
    flat = safetensors.numpy.load_file(file)
    tree = trees.unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})
    return tree.get("reader", tree.get("told", tree))


def save_params(params: dict, prefix: str, file: Path, dtype: type = np.float32) -> None:
    """Write parameters as a safetensors file with names PREFIX/PATH."""
    flat = {f"{prefix}/{path}": np.asarray(leaf, dtype) for path, leaf in trees.flatten(params).items()}
    partial = file.with_suffix(".partial")
    safetensors.numpy.save_file(flat, partial)
    partial.rename(file)
