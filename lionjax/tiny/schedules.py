# SPDX-License-Identifier: Apache-2.0
"""What the small frozen backbones share: sizes and schedules, the optimiser, and the files they are kept in.

LION freezes its ViT and its language model, so the ones that ship with the project are trained first, each by itself
(`vision_backbone`, `language_backbone`, `mask_backbone`). All heads used on the way are thrown away.
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
from lionjax.training.optimizer import make_optimizer as optimizer_optimizer


@renamed_fields(
    rate="learning_rate",
    patches="patch_fraction",
    hinted="tag_fraction",
    text="text_fraction",
    blind="no_scene_fraction",
    words_stay="freeze_embeddings",
)
@dataclasses.dataclass(frozen=True)
class LanguageSchedule:
    """Some steps of a language model. Shares say how a step's scenes are told; what is left is told as a few things."""

    steps: int
    learning_rate: float
    patch_fraction: float = 0.0  # patch by patch
    tag_fraction: float = 0.2  # as things, behind LION's sentence about tags; if there are patches, as many by patches
    text_fraction: float = 0.02  # in words
    no_scene_fraction: float = 0.0  # not told at all
    freeze_embeddings: bool = False  # what the T5 is told of a thing stays as it is, for a ViT aligned with it
    optimizer: Literal["adamw", "muon"] = "adamw"


@renamed_fields(
    scenes="num_scenes",
    mirrored_steps="augmented_steps",
    align_rate="align_learning_rate",
    vision_batch="vision_batch_size",
    vision_rate="vision_learning_rate",
    language_batch="language_batch_size",
)
@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Sizes and schedules of both; `scenes` are drawn from the training split only."""

    vision: ViTConfig
    language: T5Config | DecoderConfig
    num_scenes: int = 40_000
    vision_steps: int = 4_000
    augmented_steps: int = 7_000  # then as many with pictures mirrored and turned, which are as good as new ones
    align_steps: int = 7_000  # see `align_vision`
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
    """Rules of an update at a rate that rises and falls; `params` and their `layer_axes` are for Muon."""
    if optimizer == "muon":
        names = {"mixture": (), "batch_size": 1, "weight_decay": 0.02, "optimizer": optimizer}
        rates = {"learning_rate": learning_rate, "end_learning_rate": learning_rate * 0.02, "warmup_steps": 200}
        return optimizer_optimizer(Stage("", steps, (".*",), **names, **rates), params, layer_axes)
    schedule = optax.warmup_cosine_decay_schedule(
        0, learning_rate, min(200, steps // 4 + 1), steps, learning_rate * 0.02
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))


def load_params(file: Path) -> dict:
    """What `save` wrote, under its prefix; parts of a `reader`, and what it was `told` with, stand by themselves."""
    flat = safetensors.numpy.load_file(file)
    tree = trees.unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})
    return tree.get("reader", tree.get("told", tree))


def save_params(params: dict, prefix: str, file: Path, dtype: type = np.float32) -> None:
    """One part of a system as safetensors, by our paths."""
    flat = {f"{prefix}/{path}": np.asarray(leaf, dtype) for path, leaf in trees.flatten(params).items()}
    partial = file.with_suffix(".partial")
    safetensors.numpy.save_file(flat, partial)
    partial.rename(file)
