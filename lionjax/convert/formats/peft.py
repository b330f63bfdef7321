# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv 2106.09685) in PEFT's file format: read, written, or merged into the kernels.

A LoRA is in the subfolder `adapter`, as `adapter_config.json` and `adapter_model.safetensors`. Its weight map is
derived from the mappings of the kernels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.io.reader import MAX_HEADER_BYTES, open_weights
from lionjax.convert.mapping.apply import LazyTensor
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import KeyTemplate, WeightMapping, linear

ADAPTER_FOLDER, ADAPTER_CONFIG_FILE, ADAPTER_STEM = "adapter", "adapter_config.json", "adapter_model"
PEFT_PREFIX = "base_model.model."  # PEFT's prefix of the model's names
SUPPORTED_OPTIONS = {  # values of adapter_config.json that lionjax implements
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def find_lora_config(config: Any) -> Any:
    """The `LoraConfig` of a model config and its parts, None without LoRA. Raises UserError for different ones."""
    loras = {getattr(config, name) for name in _config_fields(config) if name == "lora"}
    loras |= {find_lora_config(getattr(config, name)) for name in _config_fields(config) if name != "lora"}
    loras = {lora for lora in loras if lora is not None and lora.rank}
    if len(settings := {(lora.rank, lora.alpha, lora.dropout) for lora in loras}) > 1:
        raise UserError(
            f"the parts of this model have different LoRAs (rank, alpha, dropout): {sorted(settings)}; a PEFT adapter "
            "holds one, so export with --merge-lora"
        )
    return next(iter(loras), None)


def with_lora(config: Any, lora: Any, part_filter: Callable[[str], bool] = lambda part: True) -> Any:
    """The config with `lora` in those parts (fields such as "language") that `part_filter` accepts."""
    changes = {}
    for name in _config_fields(config):
        if name == "lora":
            changes[name] = lora
        elif part_filter(name):
            changes[name] = with_lora(getattr(config, name), lora)
    return dataclasses.replace(config, **changes)


def _config_fields(config: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if dataclasses.is_dataclass(getattr(config, name))]


# Weight map


def lora_weight_map(weight_map: Iterable[WeightMapping], abstract_params: Params) -> tuple[WeightMapping, ...]:
    """Mappings of all LoRA matrices in abstract parameters, derived from the mappings of their kernels.

    PEFT's A (rank, in) and B (out, rank) use the kernel's transform on the side of the kernel and `linear` on the side
    of the rank. Raises UserError for a LoRA of a kernel that is a part of a larger torch tensor.
    """
    kernels = {m.flax_paths[0]: m for m in weight_map if len(m.flax_paths) == len(m.torch_keys) == 1}
    lora_map = []
    for path in trees.flatten(abstract_params):
        if not path.endswith("/lora_a"):
            continue
        layer = path.removesuffix("lora_a")
        kernel = kernels.get(layer + "kernel")
        transform_name = None if kernel is None else kernel.transform.name.partition("(")[0]
        if transform_name not in ("linear", "heads_in", "heads_out"):
            raise UserError(
                f"PEFT cannot hold the LoRA of {layer[:-1]!r}, because its torch weight is a part of a larger tensor; "
                "export with --merge-lora"
            )
        name = PEFT_PREFIX + kernel.torch_keys[0].removesuffix("weight")
        is_output = transform_name == "heads_out"
        transforms = (kernel.transform, linear) if is_output else (linear, kernel.transform)
        for letter, transform in zip("AB", transforms):
            lora_map.append(WeightMapping(f"{name}lora_{letter}.weight", f"{layer}lora_{letter.lower()}", transform))
    return tuple(lora_map)


def is_lora_key(key: str) -> bool:
    """Whether a torch name is a PEFT adapter's."""
    return key.startswith(PEFT_PREFIX)


# Merging


def merge_lora(flat_params: Mapping, lora: Any) -> dict:
    """Parameters by path with W + (alpha / rank) A B for every kernel W with a LoRA, computed lazily layer by layer.

    The sum is computed in float32 and rounded once to the dtype of W.
    """
    merged = {path: leaf for path, leaf in flat_params.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in flat_params:
        if path.endswith("/lora_a"):
            layer, letters = path.removesuffix("lora_a"), ("kernel", "lora_a", "lora_b")
            merged[layer + "kernel"] = _merged_kernel(*(flat_params[layer + x] for x in letters), lora)
    return merged


def _merged_kernel(kernel, lora_a, lora_b, lora: Any) -> LazyTensor:
    def get_layer(index):
        w, a, b = (np.asarray(leaf[(*index, ...)]) for leaf in (kernel, lora_a, lora_b))
        delta = _as_matrix(a, (-1, lora.rank)) @ _as_matrix(b, (lora.rank, -1))
        merged = w.astype(np.float32) + delta.reshape(w.shape) * (lora.alpha / lora.rank)
        return merged.astype(w.dtype)

    return LazyTensor(tuple(kernel.shape), np.dtype(kernel.dtype), get_layer)


def _as_matrix(array, shape) -> np.ndarray:
    return array.astype(np.float32).reshape(shape)


# PEFT's folder


def adapter_config(lora: Any, lora_keys: Iterable[str], matrix_keys: Iterable[str], architecture: str) -> dict:
    """Contents of adapter_config.json; `lora_keys` are the adapter's tensors, `matrix_keys` all matrices of the model.

    Raises UserError where PEFT's target_modules cannot tell modules with and without LoRA apart.
    """
    with_lora = {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in lora_keys}
    short_names = {name.rpartition(".")[2] for name in with_lora}
    without_lora = {name.removesuffix(".weight") for name in matrix_keys} - with_lora
    if ambiguous := {name for name in without_lora if name.rpartition(".")[2] in short_names}:
        # Modules without LoRA end in the same name, so target_modules is a pattern of full names.
        targets: object = "|".join(sorted({_target_module_pattern(name) for name in with_lora}))
        ambiguous = {name for name in ambiguous if re.fullmatch(targets, name)}
    else:
        targets = sorted(short_names)
    if ambiguous:
        raise UserError(
            f"{min(ambiguous)!r} has no LoRA, but PEFT's target_modules would match it; export with --merge-lora"
        )
    is_causal = architecture.endswith("ForCausalLM")
    task = "CAUSAL_LM" if is_causal else "SEQ_2_SEQ_LM" if architecture.startswith("T5For") else None
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _target_module_pattern(name: str) -> str:
    parts = name.split(".")
    return r"\.".join("[0-9]+" if part.isdigit() else re.escape(part) for part in parts)


def open_adapter(folder: Path, config: Any, weight_map: Iterable[WeightMapping]) -> tuple[Any, Mapping]:
    """(config with the adapter's LoRA, the adapter's tensors) of a PEFT folder.

    Raises UserError for a damaged adapter, another method than plain LoRA, and an adapter of another model.
    """
    file = folder / ADAPTER_CONFIG_FILE
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        settings = json.loads(file.read_bytes())
        rank, alpha = int(settings["r"]), float(settings.get("lora_alpha", 8))
        dropout = float(settings.get("lora_dropout") or 0.0)
        if rank < 1:
            raise ValueError(f"r is {rank}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no valid LoRA config: {type(error).__name__} {error}") from error
    for name, supported in SUPPORTED_OPTIONS.items():
        if name in settings and settings[name] not in supported:
            raise UserError(
                f"the adapter of {folder} has {name} {settings[name]!r}; only plain LoRA is supported, "
                f"with {name} {' or '.join(map(repr, supported))}"
            )
    if settings.get("use_rslora"):  # rsLoRA scales by alpha / sqrt(rank)
        alpha *= math.sqrt(rank)
    tensors = open_weights(folder)
    paths = [path for name in tensors if (path := _kernel_path(name, weight_map)) is not None]
    if not paths:
        raise UserError(f"the adapter of {folder} belongs to another model: none of its names is in this one")
    if (lora := find_lora_config(config)) is None:
        from lionjax.nn.lora import LoraConfig

        lora = LoraConfig(rank, alpha, dropout, tuple(sorted({path.split("/")[-2] for path in paths})))
        config = with_lora(config, lora, {path.split("/")[0] for path in paths}.__contains__)
    elif (lora.rank, lora.alpha) != (rank, alpha):
        raise UserError(
            f"the adapter of {folder} has rank {rank} and alpha {alpha:g}, the model's config {lora.rank} and "
            f"{lora.alpha:g}; they must be equal"
        )
    return config, tensors


def _kernel_path(lora_key: str, weight_map: Iterable[WeightMapping]) -> str | None:
    """The parameter path of the kernel that a PEFT tensor belongs to, None for names of other models."""
    module = lora_key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
    for mapping in weight_map:
        if (
            mapping.torch_keys[0].endswith(".weight")
            and KeyTemplate.parse(mapping.torch_keys[0]).match(f"{module}.weight") is not None
        ):
            return mapping.flax_paths[0]
    return None
