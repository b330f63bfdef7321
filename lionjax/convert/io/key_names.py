# SPDX-License-Identifier: Apache-2.0
"""Tensor names as training code saves them: wrappers around a model, LoRA's names, quantized weights.

A training script saves the names of the module that it runs, and a module inside a wrapper has longer names:
DistributedDataParallel adds `module.`, torch.compile `_orig_mod.`, FSDP `_fsdp_wrapped_module.`, Lightning the name of
its attribute (`model.`), PEFT `base_model.model.` and, in LoRA's names, the adapter's (`.default.`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from lionjax.convert.io.tensors import CheckpointTensors
from lionjax.core.types import UserError

PEFT_PREFIX = "base_model.model."  # PEFT's prefix of the model's names
WRAPPER_MODULES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPERS = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPER_MODULES)})\.(?=.)")
_LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<rest>\.weight|\.bias)?"
)
MAX_PREFIXES = 4  # prefixes that are tried around a model's names
GENERIC_PREFIXES = ("model.", "state_dict.", "net.", "network.")  # removed from names of no known format
QUANTIZED_KEYS = (  # (pattern of tensor names that only a quantized checkpoint has, its method)
    (r".*\.(quant_state\.bitsandbytes__\w+|absmax|quant_map|nested_absmax|nested_quant_map)", "bitsandbytes (4-bit)"),
    (r".*\.(SCB|weight_format)", "bitsandbytes (8-bit)"),
    (r".*\.g_idx", "GPTQ"),
    (r".*\.(qweight|qzeros)", "GPTQ or AWQ"),
    (r".*\.(weight|input|activation|output|[kqv])_scale(_inv|_2)?", "FP8 (or another format with scales)"),
    (r".*\.(weight_packed|weight_zero_point)", "compressed-tensors"),
    (r".*\.(W_q|codebooks|codes|qscale|weight\._data|weight\._scale)", "HQQ, AQLM or Quanto"),
)
QUANTIZATION_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of AutoGPTQ and AutoAWQ


def remove_wrappers(name: str) -> str:
    """A tensor's name without the wrappers that no model's own names contain.

    Names of LoRA matrices keep PEFT's prefix and lose the adapter's name, as in the files that PEFT writes.
    """
    name = _WRAPPERS.sub("", name).replace(".base_layer.", ".")
    if match := _LORA_NAME.fullmatch(name):
        return f"{match['module']}.{match['kind']}{match['rest'] or ''}"
    while name.startswith(PEFT_PREFIX):
        name = _WRAPPERS.sub("", name.removeprefix(PEFT_PREFIX))
    return name


def is_lora_key(name: str) -> bool:
    """Whether a tensor's name is that of a LoRA matrix."""
    return _LORA_NAME.fullmatch(name) is not None


def iter_unprefixed(tensors: CheckpointTensors) -> Iterator[CheckpointTensors]:
    """Yields the tensors, then those without the first module name that all of them share, then without the next."""
    yield tensors
    for _ in range(MAX_PREFIXES):
        heads = {name.partition(".")[0] for name in tensors if not is_lora_key(name)}
        if len(heads) != 1 or any("." not in name for name in tensors):
            return
        tensors = tensors.without_prefix(f"{next(iter(heads))}.")
        yield tensors


def fit_names(tensors: CheckpointTensors, is_known: Callable[[str], bool]) -> CheckpointTensors:
    """The tensors without the prefix that hides most names from `is_known`; as they are where none is better."""
    best, best_count = tensors, -1
    for candidate in iter_unprefixed(tensors):
        if (count := sum(map(is_known, candidate))) > best_count:
            best, best_count = candidate, count
        if count == len(candidate):
            break
    return best


def remove_generic_prefix(tensors: CheckpointTensors) -> CheckpointTensors:
    """The tensors without prefixes such as `model.` that all names share, for models whose own names have none."""
    while prefix := next((p for p in GENERIC_PREFIXES if tensors and all(n.startswith(p) for n in tensors)), None):
        tensors = tensors.without_prefix(prefix)
    return tensors


def check_not_quantized(tensors: Mapping[str, np.ndarray], where: object) -> None:
    """Raise UserError where the names or dtypes of the tensors show quantized weights. Reads no values."""
    if name := next((name for name, array in tensors.items() if array.dtype.name.startswith("float8")), None):
        raise UserError(f"{where} {_quantized_text('FP8')} (its tensor {name!r} is {tensors[name].dtype})")
    for pattern, method in QUANTIZED_KEYS:
        if name := next((name for name in tensors if re.fullmatch(pattern, name)), None):
            raise UserError(f"{where} {_quantized_text(method)} (it has the tensor {name!r})")


def check_config_not_quantized(hf_config: Mapping, where: object, files: Collection[str] = ()) -> None:
    """Raise UserError where a config.json, or the name of a file beside it, says that the weights are quantized."""
    parts = [hf_config, *(part for part in hf_config.values() if isinstance(part, Mapping))]
    for part in parts:
        settings = part.get("quantization_config") or part.get("compression_config")
        if isinstance(settings, Mapping):
            raise UserError(
                f"{where} {_quantized_text(_method_name(settings))}; where its weights are full precision after all, "
                "remove quantization_config from it"
            )
    for file, method in QUANTIZATION_FILES.items():
        if file in files:
            raise UserError(f"{where} {_quantized_text(method)} ({file} lies beside it)")


def _quantized_text(method: str) -> str:
    return f"holds weights quantized with {method}, which are not supported; use the unquantized weights"


def _method_name(settings: Mapping) -> str:
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "an unnamed method")
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return "bitsandbytes (4-bit)"
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "bitsandbytes (8-bit)"
    known = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (fbgemm)", "bitsandbytes": "bitsandbytes"}
    return known.get(method, method)
