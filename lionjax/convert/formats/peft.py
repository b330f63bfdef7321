# SPDX-License-Identifier: Apache-2.0
"""LoRA in PEFT's file layout: read from it, written to it, or merged into the matrices it goes around.

Beside the weights stands a folder `adapter` with `adapter_config.json` and `adapter_model.safetensors`. Its rows follow
from those of the matrices, so no table names them.
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
PEFT_PREFIX = "base_model.model."  # PEFT's, before the names of the model's modules
SUPPORTED_OPTIONS = {  # what the matrices around which we know a detour may ask of PEFT
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
    """The one LoRA of a system's config, None where there is none. Raises UserError for two that differ."""
    found = {getattr(config, name) for name in _config_fields(config) if name == "lora"}
    found |= {find_lora_config(getattr(config, name)) for name in _config_fields(config) if name != "lora"}
    found = {lora for lora in found if lora is not None and lora.rank}
    if len({(lora.rank, lora.alpha, lora.dropout) for lora in found}) > 1:
        raise UserError("the parts of this model have LoRAs that differ; PEFT's file holds one")
    return next(iter(found), None)


def with_lora(config: Any, lora: Any, part_filter: Callable[[str], bool] = lambda part: True) -> Any:
    """The config with another LoRA in those of its parts (fields such as "language") that `where` chooses."""
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


# The table


def lora_weight_map(weight_map: Iterable[WeightMapping], abstract_params: Params) -> tuple[WeightMapping, ...]:
    """Rows of all detours in a model (a tree of shapes), made from the rows of their matrices.

    PEFT's A (rank, in) and B (out, rank) change their layout as the matrix does on that side; the rank's side is plain.
    """
    matrices = {row.flax_paths[0]: row for row in weight_map if len(row.flax_paths) == len(row.torch_keys) == 1}
    made = []
    for path in trees.flatten(abstract_params):
        if not path.endswith("/lora_a"):
            continue
        layer = path.removesuffix("lora_a")
        row = matrices.get(layer + "kernel")
        kind = None if row is None else row.transform.name.partition("(")[0]
        if kind not in ("linear", "heads_in", "heads_out"):
            raise UserError(
                f"the LoRA of {layer[:-1]!r} has no place in PEFT's file, because there its matrix is "
                "a part of a larger one; merge it"
            )
        name = PEFT_PREFIX + row.torch_keys[0].removesuffix("weight")
        ops = (row.transform, linear) if kind == "heads_out" else (linear, row.transform)
        for letter, op in zip("AB", ops):
            made.append(WeightMapping(f"{name}lora_{letter}.weight", f"{layer}lora_{letter.lower()}", op))
    return tuple(made)


def is_lora_key(key: str) -> bool:
    """Whether a torch name is one of PEFT's."""
    return key.startswith(PEFT_PREFIX)


# Merged


def merge_lora(flat_params: Mapping, lora: Any) -> dict:
    """Parameters by path with W + (alpha / rank) A B for every W that has a detour, one layer at a time.

    The sum is made in float32 and rounded once to the dtype of W.
    """
    made = {path: leaf for path, leaf in flat_params.items() if not path.endswith(("/lora_a", "/lora_b"))}
    for path in flat_params:
        if path.endswith("/lora_a"):
            layer, letters = path.removesuffix("lora_a"), ("kernel", "lora_a", "lora_b")
            made[layer + "kernel"] = _merged_kernel(*(flat_params[layer + x] for x in letters), lora)
    return made


def _merged_kernel(kernel, lora_a, lora_b, lora: Any) -> LazyTensor:
    def layer(index):
        w, down, up = (np.asarray(leaf[(*index, ...)]) for leaf in (kernel, lora_a, lora_b))
        change = _as_matrix(down, (-1, lora.rank)) @ _as_matrix(up, (lora.rank, -1))
        whole = w.astype(np.float32) + change.reshape(w.shape) * (lora.alpha / lora.rank)
        return whole.astype(w.dtype)

    return LazyTensor(tuple(kernel.shape), np.dtype(kernel.dtype), layer)


def _as_matrix(array, shape) -> np.ndarray:
    return array.astype(np.float32).reshape(shape)


# PEFT's folder


def adapter_config(lora: Any, lora_keys: Iterable[str], matrix_keys: Iterable[str], architecture: str) -> dict:
    """adapter_config.json: `names` of the adapter's tensors, `modules` that are all of the model's matrices."""
    around = {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in lora_keys}
    short = {name.rpartition(".")[2] for name in around}
    others = {name.removesuffix(".weight") for name in matrix_keys} - around
    if clash := {name for name in others if name.rpartition(".")[2] in short}:
        # Other parts of the model have matrices of these names, so the whole names are told.
        targets: object = "|".join(sorted({_target_module_pattern(name) for name in around}))
        clash = {name for name in clash if re.fullmatch(targets, name)}
    else:
        targets = sorted(short)
    if clash:
        raise UserError(f"the LoRA leaves out {min(clash)!r}, which PEFT's file cannot say; merge it")
    causal = architecture.endswith("ForCausalLM")
    task = "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM" if architecture.startswith("T5For") else None
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
    """(the config with PEFT's LoRA in it, the adapter's tensors) of a folder. Raises UserError for another method."""
    file = folder / ADAPTER_CONFIG_FILE
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is too large")
        said = json.loads(file.read_bytes())
        rank, alpha = int(said["r"]), float(said.get("lora_alpha", 8))
        rate = float(said.get("lora_dropout") or 0.0)
        if rank < 1:
            raise ValueError(f"r is {rank}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no valid LoRA config: {type(error).__name__} {error}") from error
    for name, known in SUPPORTED_OPTIONS.items():
        if name in said and said[name] not in known:
            raise UserError(f"the adapter of {folder} has {name} {said[name]!r}; only plain LoRA is known")
    if said.get("use_rslora"):  # it divides by the root of the rank
        alpha *= math.sqrt(rank)
    tensors = open_weights(folder)
    paths = [path for name in tensors if (path := _kernel_path(name, weight_map)) is not None]
    if not paths:
        raise UserError(f"the adapter of {folder} belongs to another model: no name of it is known")
    if (lora := find_lora_config(config)) is None:
        from lionjax.nn.lora import LoraConfig

        lora = LoraConfig(rank, alpha, rate, tuple(sorted({path.split("/")[-2] for path in paths})))
        config = with_lora(config, lora, {path.split("/")[0] for path in paths}.__contains__)
    elif (lora.rank, lora.alpha) != (rank, alpha):
        raise UserError(
            f"the adapter of {folder} has rank {rank} and alpha {alpha:g}, the model {lora.rank} and {lora.alpha:g}"
        )
    return config, tensors


def _kernel_path(lora_key: str, weight_map: Iterable[WeightMapping]) -> str | None:
    """Our path of the matrix around which one of PEFT's tensors goes."""
    module = lora_key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
    for row in weight_map:
        if (
            row.torch_keys[0].endswith(".weight")
            and KeyTemplate.parse(row.torch_keys[0]).match(f"{module}.weight") is not None
        ):
            return row.flax_paths[0]
    return None
