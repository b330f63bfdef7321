# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of PEFT's LoRA: which settings are computed, refused or inert, and which modules it names.

`ADAPTER_SETTINGS` lists every field of `peft.LoraConfig` (PEFT 0.21). A field that is not listed is refused unless its
value switches it off (null, false, empty).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from lionjax.convert.io.reader import MAX_HEADER_BYTES
from lionjax.core.types import UserError

ADAPTER_CONFIG_FILE = "adapter_config.json"
COMPUTED, INERT = "computed", "inert"
OFF = (None, False, [], {}, "")  # values that switch a field off

# Initial values that leave the base weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# field -> COMPUTED, INERT, or the values that are supported where others are refused
ADAPTER_SETTINGS: dict[str, str | tuple] = {
    "r": COMPUTED,
    "lora_alpha": COMPUTED,
    "lora_dropout": COMPUTED,
    "use_rslora": COMPUTED,
    "rank_pattern": COMPUTED,
    "alpha_pattern": COMPUTED,
    "target_modules": COMPUTED,
    "exclude_modules": COMPUTED,
    "layers_to_transform": COMPUTED,
    "layers_pattern": COMPUTED,
    "modules_to_save": COMPUTED,
    "trainable_token_indices": COMPUTED,
    "lora_bias": COMPUTED,
    "use_dora": COMPUTED,  # merged only
    "bias": ("none", "all", "lora_only"),
    "peft_type": ("LORA",),
    "init_lora_weights": HARMLESS_INITS,
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False, None),
    "fan_in_fan_out": INERT,  # the layout follows from the layer
    "task_type": INERT,
    "auto_mapping": INERT,
    "peft_version": INERT,
    "base_model_name_or_path": INERT,
    "revision": INERT,
    "inference_mode": INERT,
    "megatron_core": INERT,
    "qalora_group_size": INERT,
    "runtime_config": INERT,
    "loftq_config": INERT,  # this and the next three are read by init_lora_weights only
    "eva_config": INERT,
    "corda_config": INERT,
    "lora_ga_config": INERT,
    "velora_config": INERT,  # changes the backward pass only
}
SUPPORTED_OPTIONS = {name: kind for name, kind in ADAPTER_SETTINGS.items() if isinstance(kind, tuple)}


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The computed fields of an adapter_config.json. Module names are those of PEFT's tensors, without its prefix."""

    folder: Path
    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict = dataclasses.field(default_factory=dict)
    alpha_pattern: dict = dataclasses.field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    use_dora: bool = False
    lora_bias: bool = False

    def module_rank(self, module: str) -> int:
        """The rank of a module's LoRA."""
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def module_scale(self, module: str) -> float:
        """The factor of B A x: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        rank, alpha = self.module_rank(module), float(_pattern_value(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT gives this module a LoRA, by `check_target_module_exists` of peft/tuners/tuners_utils.py.

        With "all-linear" every module but the LM head is accepted; without target_modules every one.
        """
        if _matches(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module.rpartition(".")[2] != "lm_head"
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _matches(self.target_modules, module) and self._transforms_layer(module)

    def _transforms_layer(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return match is not None and int(match[1]) in self.layers_to_transform

    def trained_tokens(self, module: str) -> tuple[int, ...]:
        """The token ids whose rows of the embedding table `module` the adapter replaces."""
        if isinstance(self.token_indices, dict):
            names = [name for name in self.token_indices if module == name or module.endswith(f".{name}")]
            return self.token_indices[names[0]] if names else ()
        return self.token_indices


def read_adapter_settings(folder: Path) -> AdapterSettings:
    """The settings in a PEFT folder. Raises UserError where the file is damaged or asks for what is not supported."""
    file = folder / ADAPTER_CONFIG_FILE
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        fields = json.loads(file.read_bytes())
        if not isinstance(fields, dict):
            raise TypeError("it holds no object")
        _check_supported(folder, fields)
        settings = _parse_settings(folder, fields)
        if min([settings.rank, *settings.rank_pattern.values()]) < 1:
            raise ValueError(f"r is {settings.rank} and rank_pattern {settings.rank_pattern}")
        for pattern in (settings.target_modules, settings.exclude_modules, *settings.modules_to_save):
            re.compile(pattern if isinstance(pattern, str) else "")
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UserError(f"{file} is no valid LoRA config: {type(error).__name__} {error}") from error
    return settings


def _check_supported(folder: Path, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        kind = ADAPTER_SETTINGS.get(name, OFF)
        # 1 == True and 0 == False in Python, so types are compared too.
        if isinstance(kind, tuple) and not any(type(value) is type(known) and value == known for known in kind):
            known = " or ".join(map(repr, kind)) if name in ADAPTER_SETTINGS else "null, for it is unknown"
            raise UserError(f"the adapter of {folder} has {name} {value!r}; lionjax supports {name} {known}")


def _parse_settings(folder: Path, fields: dict[str, Any]) -> AdapterSettings:
    tokens = fields.get("trainable_token_indices") or ()
    if isinstance(tokens, dict):
        tokens = {str(name): tuple(map(int, ids)) for name, ids in tokens.items()}
    layers = fields.get("layers_to_transform")
    target_modules = fields.get("target_modules")
    return AdapterSettings(
        folder,
        rank=int(fields["r"]),
        alpha=float(fields.get("lora_alpha", 8)),
        dropout=float(fields.get("lora_dropout") or 0.0),
        use_rslora=bool(fields.get("use_rslora")),
        rank_pattern=dict(fields.get("rank_pattern") or {}),
        alpha_pattern=dict(fields.get("alpha_pattern") or {}),
        target_modules=target_modules if target_modules is None else _names(target_modules, allow_pattern=True),
        exclude_modules=_names(fields.get("exclude_modules") or (), allow_pattern=True),
        layers_to_transform=tuple(map(int, _list(layers))),
        layers_pattern=_names(_list(fields.get("layers_pattern") or None)),
        modules_to_save=_names(fields.get("modules_to_save") or ()),
        token_indices=tokens if isinstance(tokens, dict) else tuple(map(int, tokens)),
        use_dora=bool(fields.get("use_dora")),
        lora_bias=bool(fields.get("lora_bias")),
    )


def _list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _names(value: Any, allow_pattern: bool = False) -> Any:
    """A tuple of names, or a pattern. Raises TypeError for other values."""
    if isinstance(value, str) and allow_pattern:
        return value
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is no list of names")
    return tuple(value)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a module is in a list of names or ends of names, or matches a pattern."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_value(patterns: dict, module: str, default: float) -> Any:
    """PEFT's `get_pattern_key`: the value of the first pattern that matches the end of the module's name."""
    return next((value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), default)
