# SPDX-License-Identifier: Apache-2.0
"""Which published checkpoints are known: how each is recognised, what its settings mean here, which rows it has.

`SYSTEMS` is the whole list. Model files are imported when one of theirs is met.
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
from lionjax.convert.formats.checkpoint_format import CheckpointFormat, CheckpointSource, read_hf_config
from lionjax.convert.formats.hf_language import LANGUAGE_FORMATS
from lionjax.convert.formats.hf_vision import CLIP_FILE, VISION_FORMATS
from lionjax.convert.formats.hf_vlm import VLM_FORMATS
from lionjax.convert.formats.kosmos2 import KOSMOS_2
from lionjax.convert.formats.lavis import BLIP2_STAGE1, EVA_FILE, find_lavis_files, open_lavis
from lionjax.convert.formats.lion import LION, find_lion_file, open_lion
from lionjax.convert.formats.mplug_owl import MPLUG_OWL
from lionjax.convert.formats.nextchat import REGION_FORMATS
from lionjax.convert.formats.openflamingo import FLAMINGO, open_flamingo
from lionjax.convert.formats.ram import RAM_FILE, TAGGING_FORMATS
from lionjax.convert.formats.sam import META_SAM_FILE
from lionjax.convert.io.reader import MAX_HEADER_BYTES, CheckpointTensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import Params, UserError

CONFIG_FILE = "lionjax.json"  # our exact config; written beside weights of either kind


def open_checkpoint(
    path: Path, format_name: str | None = None, adapter: Path | None = None, base: Path | None = None
) -> CheckpointSource:
    """Recognise and open a checkpoint with the original's names.

    By `system`, by our own config beside it, by the names of LION's files, or by config.json. `adapter`: the folder of
    a LoRA as PEFT writes it, by default the one inside the checkpoint's. `base`: the model of which the checkpoint is
    the difference. Raises UserError.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    folder = path if path.is_dir() else path.parent
    if (folder / loras.ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds a LoRA alone; give the folder of its base model, and this one as --adapter")
    source = _detect_and_open(path, folder, format_name, base)
    beside = (source.folder or folder) / loras.ADAPTER_FOLDER
    if adapter is None and not beside.is_dir():
        return source
    kind, format_name = source.checkpoint_format, model_config_of(source.config)
    made, detours = loras.open_adapter(adapter or beside, format_name, kind.weight_map(format_name))
    config = made if format_name is source.config else dataclasses.replace(source.config, model=made)
    return dataclasses.replace(source, config=config, tensors=source.tensors | detours)


def _detect_and_open(path: Path, folder: Path, format_name: str | None, delta_base: Path | None) -> CheckpointSource:
    if format_name is not None and format_name not in (known := [kind.name for kind in FORMATS]):
        raise UserError(f"system {format_name!r} is not known; it can be {', '.join(known)}")
    if (folder / CONFIG_FILE).is_file():
        if (folder / "params.safetensors").is_file() or (folder / "params.safetensors.index.json").is_file():
            raise UserError(f"{folder} is in lionjax's own names already")
        config = read_config(folder)
        return CheckpointSource(format_of_config(config), config, open_weights(path), folder)
    if format_name is None:
        by_file = {EVA_FILE: "eva", META_SAM_FILE: "segment_anything", RAM_FILE: "ram"}
        by_file |= {CLIP_FILE: "openai_clip"}
        format_name = by_file.get(path.name)
    if format_name == "lion" or (format_name is None and path.is_dir() and find_lion_file(path)):
        return open_lion(path)
    if format_name is None and path.is_dir() and find_lavis_files(path):
        return _with_tied_tensors(*open_lavis(path))
    if format_name == "flamingo" and path.is_dir() and not (path / "config.json").is_file():
        return _with_tied_tensors(*open_flamingo(path))
    settings = read_hf_config(folder / "config.json")
    model_type = settings.get("model_type")
    kinds = [k for k in FORMATS if k.name == format_name or (format_name is None and model_type in k.model_types)]
    if not kinds:
        found = "no config.json that names a model_type" if model_type is None else f"model_type {model_type!r}"
        known = ", ".join(kind.name for kind in FORMATS)
        raise UserError(f"{folder} has {found}; known are {known}, which --system can name")
    try:
        config = kinds[0].config_from_hf(settings)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} describes no {kinds[0].name}: {type(error).__name__} {error}"
        ) from error
    tensors = kinds[0].prepare_tensors(config, _open_tensors(path, kinds[0], delta_base), folder)
    base, inside = kinds[0].base_model_prefix, kinds[0].inner_prefix
    if base and not any(name.startswith(base) for name in tensors):
        tensors = tensors.with_prefix(base)
    if inside and any(name.startswith(inside) for name in tensors):
        tensors = tensors.without_prefix(inside)
    config = kinds[0].infer_from_keys(config, tensors.keys())
    return _with_tied_tensors(kinds[0], config, tensors, folder)


def _open_tensors(path: Path, checkpoint_format: CheckpointFormat, delta_base: Path | None) -> CheckpointTensors:
    """The tensors of a checkpoint, or the sums of what is a difference from another."""
    if delta_base is not None:
        return delta.add_delta(open_weights(path), open_weights(delta_base), checkpoint_format.ignore_patterns)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if checkpoint_format.name in ("llama", "llava") and re.search(r"(?i)(^|[-_])delta([-_]|$)", folder.name):
        raise UserError(
            f"{folder.name} sounds like a difference from a LLaMA; give that as --base (or rename the folder)"
        )
    return open_weights(path)


def _with_tied_tensors(
    checkpoint_format: CheckpointFormat, config: Any, tensors: CheckpointTensors, folder: Path
) -> CheckpointSource:
    """The source with the tensors that some files leave away because others hold the same."""
    copied: dict[str, tuple[str, ...]] = {}
    for name, origin in checkpoint_format.tied_keys:
        if name not in tensors and origin in tensors:
            tensors.arrays[name] = tensors[origin]
            copied[origin] = (*copied.get(origin, ()), name)
    return CheckpointSource(checkpoint_format, config, tensors, folder, copied)


def read_config(folder: Path) -> Any:
    """Our own config that lies in a folder. Raises UserError when it cannot be read."""
    try:
        if (folder / CONFIG_FILE).stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is too large")
        return configs.from_json((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged: {error}") from error


@functools.lru_cache(maxsize=8)
def weight_map_and_abstract_params(checkpoint_format: CheckpointFormat, config: Any) -> tuple[tuple, Params]:
    """The rows of a config and the shapes of its tree.

    Raises UserError for sizes of which no model can be made.
    """
    system = model_config_of(config)
    try:
        rows, model = tuple(checkpoint_format.weight_map(system)), checkpoint_format.abstract_params(system)
        return (*rows, *loras.lora_weight_map(rows, model)), model
    except UserError:
        raise
    except Exception as error:  # whatever a layer finds wrong with the sizes it is given
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0][:200]
        raise UserError(f"no {checkpoint_format.name} can be made with these sizes: {reason}") from error


def format_of_config(config: Any) -> CheckpointFormat:
    """The kind of checkpoint that one of our configs describes."""
    system = model_config_of(config)
    for kind in FORMATS:
        if kind.matches(system):
            return kind
    known = ", ".join(kind.name for kind in FORMATS)
    raise UserError(f"weights of a {type(system).__name__} have no torch names; known are {known}")


def model_config_of(config: Any) -> Any:
    """The system's config, also where it comes within the whole experiment that trained it."""
    return config.model if type(config).__name__ == "Experiment" else config


# LION: eva_vit_g.pth, the folder of a FlanT5, and LION-*.pth with what was trained


FORMATS = (
    LION,
    *REGION_FORMATS,
    *VLM_FORMATS,
    BLIP2_STAGE1,
    MPLUG_OWL,
    KOSMOS_2,
    FLAMINGO,
    *TAGGING_FORMATS,
    *LANGUAGE_FORMATS,
    *VISION_FORMATS,
    BERT,
)
