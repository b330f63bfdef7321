# SPDX-License-Identifier: Apache-2.0
"""Recognize and open PyTorch checkpoints; `FORMATS` lists every supported checkpoint format.

Modules under lionjax.models are imported only when a checkpoint of theirs is opened.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats import delta
from lionjax.convert.formats import peft as loras
from lionjax.convert.formats.bert import BERT
from lionjax.convert.formats.checkpoint_format import (
    OWN_PREFIX,
    SYSTEM_KEY,
    CheckpointFormat,
    CheckpointSource,
    read_hf_config,
)
from lionjax.convert.formats.clip import CONTRASTIVE_FORMATS, OPENAI_CLIP_FILES
from lionjax.convert.formats.grounding_dino import DETECTION_FORMATS, GROUNDING_DINO_FILES
from lionjax.convert.formats.hf_config import check_hf_config, config_from_hf
from lionjax.convert.formats.hf_language import LANGUAGE_FORMATS, LLAMA
from lionjax.convert.formats.hf_vision import CLIP_FILE, VISION_FORMATS
from lionjax.convert.formats.hf_vlm import LLAVA, VLM_FORMATS
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.formats.kosmos2 import KOSMOS_2
from lionjax.convert.formats.lavis import BLIP2_STAGE1, EVA_FILE, find_lavis_files, open_lavis
from lionjax.convert.formats.lion import LION, find_lion_file, open_lion
from lionjax.convert.formats.lisa import LISA, lisa_format_name
from lionjax.convert.formats.lyrics import LYRICS_FORMATS, lyrics_format_name
from lionjax.convert.formats.mplug_owl import MPLUG_OWL
from lionjax.convert.formats.nextchat import REGION_FORMATS
from lionjax.convert.formats.openflamingo import FLAMINGO, open_flamingo
from lionjax.convert.formats.peft_reader import MERGE_HINT, AdapterReader, open_non_lora
from lionjax.convert.formats.ram import RAM_FILE, TAGGING_FORMATS
from lionjax.convert.formats.sam import META_SAM_FILE
from lionjax.convert.formats.vision_tower import LLAVA_TOWER_PREFIX, complete_llava_config, open_vision_tower
from lionjax.convert.io.reader import (
    MAX_HEADER_BYTES,
    CheckpointTensors,
    check_folder_formats,
    check_readable_format,
    open_weights,
)
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError

CONFIG_FILE = "lionjax.json"  # the exact lionjax config; written beside torch and lionjax weights


def open_checkpoint(
    path: Path,
    format_name: str | None = None,
    adapter: Path | None = None,
    base: Path | None = None,
    vision_tower: Path | None = None,
    merge_lora: bool = False,
) -> CheckpointSource:
    """The checkpoint at `path` (a folder or a weight file), recognized and opened; tensors are read on access.

    The format comes from `format_name`, from lionjax.json beside the weights, from the released file names (LION,
    LAVIS, SAM, RAM, CLIP, Grounding DINO), or from model_type in config.json, in this order. `adapter`: a PEFT folder
    with a LoRA, by default the subfolder `adapter`; `merge_lora` merges it into the weights. `base`: the model that the
    checkpoint is a delta of, or a LoRA for. `vision_tower`: the folder of the CLIP of an original LLaVA, by default a
    subfolder. Raises UserError where the format is unknown or a part is missing.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        check_folder_formats(path)
    else:
        check_readable_format(path)
    if (folder / loras.ADAPTER_CONFIG_FILE).is_file():
        if base is None or adapter is not None:
            raise UserError(
                f"{folder} holds only a LoRA; give the folder of its base model, and this one as --adapter, or this "
                "one and the base model as --base"
            )
        return open_checkpoint(base, format_name, folder, None, vision_tower, merge_lora)
    if adapter is not None and _is_llava_adapter(adapter, folder):
        source = _open_llava_adapter(path, folder, adapter, vision_tower)
    else:
        source = _detect_and_open(path, folder, format_name, base, vision_tower)
    if vision_tower is not None and source.checkpoint_format.name not in ("llava", "lisa"):
        raise UserError(f"a {source.checkpoint_format.name} has no separate vision tower; leave out --vision-tower")
    adapter_folder = adapter or (source.folder or folder) / loras.ADAPTER_FOLDER
    if adapter is None and not adapter_folder.is_dir():
        if merge_lora:
            raise UserError(f"{path} has no adapter to merge; give its folder as --adapter, or leave out --merge-lora")
        return source
    return add_adapter(source, adapter_folder, merge_lora)


def _is_llava_adapter(adapter: Path, base: Path) -> bool:
    """Whether a folder is a LoRA of LLaVA's own code for a LLaMA: it has the config.json of the whole LLaVA."""
    hf_config, base_config = (read_hf_config(folder / "config.json") for folder in (adapter, base))
    is_llava = hf_config.get("model_type") in LLAVA.model_types and "text_config" not in hf_config
    return is_llava and base_config.get("model_type") in LLAMA.model_types


def _open_llava_adapter(path: Path, folder: Path, adapter: Path, vision_tower: Path | None) -> CheckpointSource:
    """The LLaVA of a LoRA of LLaVA's own code: its config and projector, the LLaMA at `path`, and the tower.

    The tower is a subfolder of `adapter` or of `folder`, the folder of the LLaMA.
    """
    tower_folder = adapter if any(adapter.glob("*/config.json")) else folder
    hf_config = read_hf_config(adapter / "config.json")
    config = LLAVA.config_from_hf(complete_llava_config(hf_config, tower_folder, vision_tower))
    language, trained = open_part(path, LLAMA, config.language), open_non_lora(adapter)
    tensors = language.replaced(trained, trained)
    tensors = _with_vision_tower(tensors, vision_tower, config)
    tensors = LLAVA.prepare_tensors(config, tensors, tower_folder)
    return CheckpointSource(LLAVA, config, tensors, folder)


def add_adapter(source: CheckpointSource, folder: Path, merge_lora: bool) -> CheckpointSource:
    """The checkpoint with the adapter of a PEFT folder, separate or merged into its tensors."""
    model_config = model_config_of(source.config)
    weight_map = source.checkpoint_format.weight_map(model_config)
    reader = AdapterReader(folder, source, weight_map)
    arrays, config = {}, model_config
    if merge_lora:
        if loras.find_lora_config(model_config) is not None:
            raise UserError(
                f"the config of {folder.parent} has a LoRA; convert to jax first, then merge with --to torch"
            )
        changed = reader.merged()
    elif reader.modules:
        known = loras.find_lora_config(model_config)
        lora, arrays, changed = reader.separate(known)
        if known is None:
            all_kernels = [path for m in weight_map for path in m.flax_paths if path.endswith("/kernel")]
            config = loras.add_lora(model_config, lora, reader.kernels(), all_kernels)
            _check_lora_paths(source.checkpoint_format, config, reader.kernels())
    else:
        changed = reader.merged()  # modules_to_save without LoRA
    tensors = source.tensors.replaced(changed | arrays, reader.tensors)
    return dataclasses.replace(source, config=replace_model_config(source.config, config), tensors=tensors)


def _check_lora_paths(checkpoint_format: CheckpointFormat, config: Any, kernels: list[str]) -> None:
    """Raise UserError unless the model with this config has LoRA matrices for exactly these kernels."""
    _, abstract_params = weight_map_and_abstract_params(checkpoint_format, config)
    layers = {path.removesuffix("/lora_a") for path in trees.flatten(abstract_params) if path.endswith("/lora_a")}
    if differing := layers ^ {path.removesuffix("/kernel") for path in kernels}:
        raise UserError(f"the LoRA of {min(differing)!r} cannot stay separate; {MERGE_HINT}")


def _detect_and_open(
    path: Path, folder: Path, format_name: str | None, delta_base: Path | None, vision_tower: Path | None
) -> CheckpointSource:
    if format_name is not None and format_name not in (known := [fmt.name for fmt in FORMATS]):
        raise UserError(f"--system is {format_name!r}; it can be one of {', '.join(known)}")
    if (folder / CONFIG_FILE).is_file():
        if (folder / "params.safetensors").is_file() or (folder / "params.safetensors.index.json").is_file():
            raise UserError(f"{folder} already holds lionjax parameters; convert it with --to torch or --to orbax")
        config = read_config(folder)
        checkpoint_format, hf_file = format_of_config(config), folder / "config.json"
        if hf_file.is_file():
            check_hf_config(hf_file, read_hf_config(hf_file), checkpoint_format, model_config_of(config))
        return CheckpointSource(checkpoint_format, config, open_weights(path), folder)
    if format_name is None:
        by_file = {EVA_FILE: "eva", META_SAM_FILE: "segment_anything", RAM_FILE: "ram"}
        by_file |= {CLIP_FILE: "openai_clip"} | dict.fromkeys(OPENAI_CLIP_FILES, "openai_clip_model")
        by_file |= dict.fromkeys(GROUNDING_DINO_FILES, "groundingdino")
        format_name = by_file.get(path.name)
    if format_name == "lion" or (format_name is None and path.is_dir() and find_lion_file(path)):
        return open_lion(path)
    if format_name is None and path.is_dir() and find_lavis_files(path):
        return _with_tied_tensors(*open_lavis(path))
    if format_name == "flamingo" and path.is_dir() and not (path / "config.json").is_file():
        return _with_tied_tensors(*open_flamingo(path))
    hf_config = read_hf_config(folder / "config.json")
    model_type = hf_config.get("model_type")
    if format_name is None and SYSTEM_KEY in hf_config and str(model_type).startswith(OWN_PREFIX):
        format_name = str(model_type).removeprefix(OWN_PREFIX)
    format_name = format_name or lyrics_format_name(hf_config) or lisa_format_name(hf_config)
    matches = [f for f in FORMATS if f.name == format_name or (format_name is None and model_type in f.model_types)]
    if not matches:
        reason = "no config.json with a model_type" if model_type is None else f"model_type {model_type!r}"
        known = ", ".join(fmt.name for fmt in FORMATS)
        raise UserError(f"{folder} has {reason}; name the format with --system, one of {known}")
    checkpoint_format = matches[0]
    try:
        if SYSTEM_KEY not in hf_config:
            hf_config = checkpoint_format.complete_config(hf_config, path, vision_tower)
        config = config_from_hf(checkpoint_format, hf_config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} is no valid config of a {checkpoint_format.name}: {type(error).__name__} {error}"
        ) from error
    tensors = _open_tensors(path, checkpoint_format, config, delta_base)
    tensors = _with_vision_tower(tensors, vision_tower, config)
    tensors = checkpoint_format.prepare_tensors(config, tensors, folder)
    config = checkpoint_format.infer_from_keys(config, tensors.keys())
    return _with_tied_tensors(checkpoint_format, config, tensors, folder)


def _with_vision_tower(tensors: CheckpointTensors, vision_tower: Path | None, config: Any) -> CheckpointTensors:
    """The tensors of a LLaVA with those of the CLIP in `vision_tower`, unless they hold a tower."""
    if vision_tower is None or any(name.startswith(LLAVA_TOWER_PREFIX) for name in tensors):
        return tensors
    return tensors | open_vision_tower(vision_tower, config.vision)


def _open_tensors(
    path: Path, checkpoint_format: CheckpointFormat, config: Any, delta_base: Path | None
) -> CheckpointTensors:
    """The tensors of a checkpoint; with `delta_base`, the sums of base and delta."""
    if delta_base is not None:
        parts = [open_part(file, checkpoint_format, config) for file in (path, delta_base)]
        return delta.add_delta(*parts, checkpoint_format.ignore_patterns)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if checkpoint_format.name in ("llama", "llava") and re.search(r"(?i)(^|[-_])delta([-_]|$)", folder.name):
        raise UserError(
            f"{folder.name} looks like a delta of a LLaMA by its name; give the LLaMA as --base, or rename the folder"
        )
    return open_part(path, checkpoint_format, config)


def _with_tied_tensors(
    checkpoint_format: CheckpointFormat, config: Any, tensors: CheckpointTensors, folder: Path
) -> CheckpointSource:
    """The checkpoint with those tied tensors added that the file omits."""
    tied: dict[str, tuple[str, ...]] = {}
    for name, origin in checkpoint_format.tied_keys:
        if name not in tensors and origin in tensors:
            tensors.arrays[name] = tensors[origin]
            tied[origin] = (*tied.get(origin, ()), name)
    return CheckpointSource(checkpoint_format, config, tensors, folder, tied)


def read_config(folder: Path) -> Any:
    """The config in a folder's lionjax.json. Raises UserError where the file is missing, damaged or too large."""
    try:
        if (folder / CONFIG_FILE).stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        return configs.from_json((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged: {error}") from error


@functools.lru_cache(maxsize=8)
def weight_map_and_abstract_params(checkpoint_format: CheckpointFormat, config: Any) -> tuple[tuple, Params]:
    """(weight map with the LoRA's mappings, abstract parameters) of a config.

    Raises UserError where the model cannot be built with the config's sizes.
    """
    model_config = model_config_of(config)
    try:
        weight_map = tuple(checkpoint_format.weight_map(model_config))
        abstract_params = checkpoint_format.abstract_params(model_config)
        lora_map = loras.lora_weight_map(weight_map, abstract_params, checkpoint_format.module_names)
        return (*weight_map, *lora_map), abstract_params
    except UserError:
        raise
    except Exception as error:  # any layer may raise any exception for sizes that it cannot use
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0][:200]
        raise UserError(f"a {checkpoint_format.name} cannot be built with the sizes of its config: {reason}") from error


def format_of_config(config: Any) -> CheckpointFormat:
    """The checkpoint format of a model config or experiment. Raises UserError for a model without one."""
    model_config = model_config_of(config)
    for checkpoint_format in FORMATS:
        if checkpoint_format.matches(model_config):
            return checkpoint_format
    known = ", ".join(fmt.name for fmt in FORMATS)
    raise UserError(f"a {type(model_config).__name__} has no torch checkpoint format; the formats are {known}")


def model_config_of(config: Any) -> Any:
    """The config of the published model: of an experiment its `model`, of a language model that answers alone that."""
    field = _inner_field(config)
    return config if field is None else model_config_of(getattr(config, field))


def replace_model_config(config: Any, model_config: Any) -> Any:
    """`config` with another model config in the place of `model_config_of(config)`."""
    if (field := _inner_field(config)) is None:
        return model_config
    return dataclasses.replace(config, **{field: replace_model_config(getattr(config, field), model_config)})


def _inner_field(config: Any) -> str | None:
    return {"Experiment": "model", "TextLM": "language"}.get(type(config).__name__)


FORMATS = (  # the first format that matches is used, so LION comes first: its folder also contains a T5
    LION,
    *REGION_FORMATS,
    LISA,
    *LYRICS_FORMATS,
    *VLM_FORMATS,
    BLIP2_STAGE1,
    MPLUG_OWL,
    KOSMOS_2,
    FLAMINGO,
    *TAGGING_FORMATS,
    *DETECTION_FORMATS,
    *LANGUAGE_FORMATS,
    *CONTRASTIVE_FORMATS,  # before the vision towers alone: model_type clip is both
    *VISION_FORMATS,
    BERT,
)
