# SPDX-License-Identifier: Apache-2.0
"""Open weights under the names of their format: prefixes of training code are removed where the names fit without."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat
from lionjax.convert.io.key_names import fit_names, is_lora_key
from lionjax.convert.io.reader import CheckpointTensors, open_weights
from lionjax.core.types import UserError
from lionjax.core.weight_map import KeyTemplate


def open_part(path: Path, checkpoint_format: CheckpointFormat, config: Any) -> CheckpointTensors:
    """The tensors of a file or folder with the names of `checkpoint_format`, its base model's prefix included.

    Raises UserError as `open_weights`, and for LoRA matrices between the model's own tensors.
    """
    tensors = fit_names(open_weights(path), _known_names(checkpoint_format, config))
    if name := next(filter(is_lora_key, tensors), None):
        raise UserError(
            f"{path} holds LoRA matrices beside the model's weights, such as {name!r}, and no lora_alpha for them; "
            "merge them with PEFT's merge_and_unload, or save the adapter alone and give it as --adapter"
        )
    return normalize_prefix(tensors, checkpoint_format)


def normalize_prefix(tensors: CheckpointTensors, checkpoint_format: CheckpointFormat) -> CheckpointTensors:
    """The tensors with the base model's prefix that files of the bare model omit, and without the inner one."""
    base_prefix, inner_prefix = checkpoint_format.base_model_prefix, checkpoint_format.inner_prefix
    if base_prefix and not any(name.startswith(base_prefix) for name in tensors):
        tensors = tensors.with_prefix(base_prefix)
    if inner_prefix and any(name.startswith(inner_prefix) for name in tensors):
        tensors = tensors.without_prefix(inner_prefix)
    return tensors


def _known_names(checkpoint_format: CheckpointFormat, config: Any) -> Callable[[str], bool]:
    """Whether a name is in the weight map of a config, also as in files of the bare or a larger model."""
    templates: list[KeyTemplate] = []

    def is_known(name: str) -> bool:
        if not templates:
            weight_map = checkpoint_format.weight_map(config)
            templates.extend(KeyTemplate.parse(key) for m in weight_map for key in (*m.torch_keys, *m.tied_keys))
        renamed = name
        for pattern, new in checkpoint_format.key_patterns:
            renamed = re.sub(pattern, new, renamed, count=1)
        names = {
            name,
            renamed,
            checkpoint_format.base_model_prefix + name,
            name.removeprefix(checkpoint_format.inner_prefix),
        }
        return any(template.match(variant) is not None for template in templates for variant in names)

    return is_known
