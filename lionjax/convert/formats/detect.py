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
from lionjax.convert.formats.checkpoint_format import Published, Source, read_settings
from lionjax.convert.formats.hf_language import TEXTS
from lionjax.convert.formats.hf_vision import CLIP_FILE, TOWERS
from lionjax.convert.formats.hf_vlm import PICTURE_FIRST
from lionjax.convert.formats.kosmos2 import KOSMOS
from lionjax.convert.formats.lavis import BLIP2_FIRST, EVA_FILE, lavis_files, open_lavis
from lionjax.convert.formats.lion import _LION, _lion_file, _open_lion
from lionjax.convert.formats.mplug_owl import OWL
from lionjax.convert.formats.nextchat import POINTING
from lionjax.convert.formats.openflamingo import FLAMINGO, open_flamingo
from lionjax.convert.formats.ram import EXPERTS, RAM_FILE
from lionjax.convert.formats.sam import META_SAM
from lionjax.convert.io.reader import HEADER_LIMIT, Tensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import Params, UserError

CONFIG_FILE = "lionjax.json"  # our exact config; written beside weights of either kind


def open_source(path: Path, system: str | None = None, adapter: Path | None = None, base: Path | None = None) -> Source:
    """Recognise and open a checkpoint with the original's names.

    By `system`, by our own config beside it, by the names of LION's files, or by config.json. `adapter`: the folder of
    a LoRA as PEFT writes it, by default the one inside the checkpoint's. `base`: the model of which the checkpoint is
    the difference. Raises UserError.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    folder = path if path.is_dir() else path.parent
    if (folder / loras.CONFIG).is_file():
        raise UserError(f"{folder} holds a LoRA alone; give the folder of its base model, and this one as --adapter")
    source = _recognised(path, folder, system, base)
    beside = (source.folder or folder) / loras.FOLDER
    if adapter is None and not beside.is_dir():
        return source
    kind, system = source.kind, system_in(source.config)
    made, detours = loras.opened(adapter or beside, system, kind.rows(system))
    config = made if system is source.config else dataclasses.replace(source.config, system=made)
    return dataclasses.replace(source, config=config, tensors=source.tensors | detours)


def _recognised(path: Path, folder: Path, system: str | None, added_to: Path | None) -> Source:
    if system is not None and system not in (known := [kind.name for kind in SYSTEMS]):
        raise UserError(f"system {system!r} is not known; it can be {', '.join(known)}")
    if (folder / CONFIG_FILE).is_file():
        if (folder / "params.safetensors").is_file() or (folder / "params.safetensors.index.json").is_file():
            raise UserError(f"{folder} is in lionjax's own names already")
        config = read_config(folder)
        return Source(of_config(config), config, open_weights(path), folder)
    if system is None:
        by_file = {EVA_FILE: "eva", META_SAM: "segment_anything", RAM_FILE: "ram"}
        by_file |= {CLIP_FILE: "openai_clip"}
        system = by_file.get(path.name)
    if system == "lion" or (system is None and path.is_dir() and _lion_file(path)):
        return _open_lion(path)
    if system is None and path.is_dir() and lavis_files(path):
        return _with_copies(*open_lavis(path))
    if system == "flamingo" and path.is_dir() and not (path / "config.json").is_file():
        return _with_copies(*open_flamingo(path))
    settings = read_settings(folder / "config.json")
    model_type = settings.get("model_type")
    kinds = [k for k in SYSTEMS if k.name == system or (system is None and model_type in k.model_types)]
    if not kinds:
        found = "no config.json that names a model_type" if model_type is None else f"model_type {model_type!r}"
        known = ", ".join(kind.name for kind in SYSTEMS)
        raise UserError(f"{folder} has {found}; known are {known}, which --system can name")
    try:
        config = kinds[0].config(settings)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} describes no {kinds[0].name}: {type(error).__name__} {error}"
        ) from error
    tensors = kinds[0].complete(config, _opened(path, kinds[0], added_to), folder)
    base, inside = kinds[0].base, kinds[0].inside
    if base and not any(name.startswith(base) for name in tensors):
        tensors = tensors.under(base)
    if inside and any(name.startswith(inside) for name in tensors):
        tensors = tensors.without(inside)
    config = kinds[0].told(config, tensors.keys())
    return _with_copies(kinds[0], config, tensors, folder)


def _opened(path: Path, kind: Published, added_to: Path | None) -> Tensors:
    """The tensors of a checkpoint, or the sums of what is a difference from another."""
    if added_to is not None:
        return delta.added(open_weights(path), open_weights(added_to), kind.ignore)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if kind.name in ("llama", "llava") and re.search(r"(?i)(^|[-_])delta([-_]|$)", folder.name):
        raise UserError(
            f"{folder.name} sounds like a difference from a LLaMA; give that as --base (or rename the folder)"
        )
    return open_weights(path)


def _with_copies(kind: Published, config: Any, tensors: Tensors, folder: Path) -> Source:
    """The source with the tensors that some files leave away because others hold the same."""
    copied: dict[str, tuple[str, ...]] = {}
    for name, origin in kind.copies:
        if name not in tensors and origin in tensors:
            tensors.arrays[name] = tensors[origin]
            copied[origin] = (*copied.get(origin, ()), name)
    return Source(kind, config, tensors, folder, copied)


def read_config(folder: Path) -> Any:
    """Our own config that lies in a folder. Raises UserError when it cannot be read."""
    try:
        if (folder / CONFIG_FILE).stat().st_size > HEADER_LIMIT:
            raise ValueError("it is too large")
        return configs.from_json((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_FILE} is damaged: {error}") from error


@functools.lru_cache(maxsize=8)
def table_and_model(kind: Published, config: Any) -> tuple[tuple, Params]:
    """The rows of a config and the shapes of its tree.

    Raises UserError for sizes of which no model can be made.
    """
    system = system_in(config)
    try:
        rows, model = tuple(kind.rows(system)), kind.abstract(system)
        return (*rows, *loras.rows_of(rows, model)), model
    except UserError:
        raise
    except Exception as error:  # whatever a layer finds wrong with the sizes it is given
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0][:200]
        raise UserError(f"no {kind.name} can be made with these sizes: {reason}") from error


def of_config(config: Any) -> Published:
    """The kind of checkpoint that one of our configs describes."""
    system = system_in(config)
    for kind in SYSTEMS:
        if kind.describes(system):
            return kind
    known = ", ".join(kind.name for kind in SYSTEMS)
    raise UserError(f"weights of a {type(system).__name__} have no torch names; known are {known}")


def system_in(config: Any) -> Any:
    """The system's config, also where it comes within the whole experiment that trained it."""
    return config.system if type(config).__name__ == "Experiment" else config


# LION: eva_vit_g.pth, the folder of a FlanT5, and LION-*.pth with what was trained


SYSTEMS = (_LION, *POINTING, *PICTURE_FIRST, BLIP2_FIRST, OWL, KOSMOS, FLAMINGO, *EXPERTS, *TEXTS, *TOWERS, BERT)
