# SPDX-License-Identifier: Apache-2.0
"""config.json of an exported folder: its model_type, merging with the released one, and edits after the export."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import OWN_PREFIX, SYSTEM_KEY, CheckpointFormat, read_lionjax_config
from lionjax.core import config as configs
from lionjax.core.types import UserError

log = logging.getLogger(__name__)

# Sizes that older files also have at the top level: the nested config that decides them.
NESTED_SIZES = {"vocab_size": "text_config", "image_size": "vision_config"}
LABELS = ("model_type", "architectures")  # name a class, and change with versions
TRAINING_ONLY = re.compile(r"(^|.*\.)[a-z_]*(dropout|drop_path)[a-z_]*")  # fields that change no answer


def config_from_hf(checkpoint_format: CheckpointFormat, hf_config: dict) -> Any:
    """The lionjax config of a config.json, its own or that of a published model.

    Raises UserError for unsupported settings, LookupError, TypeError, ValueError or AttributeError for invalid ones.
    """
    return read_lionjax_config(hf_config) if SYSTEM_KEY in hf_config else checkpoint_format.config_from_hf(hf_config)


def merge_hf_config(released: dict, checkpoint_format: CheckpointFormat, model_config: Any, dtype: str) -> dict:
    """config.json of an exported model, with the fields of the `released` config.json that lionjax does not write.

    The released fields are left out where that file belongs to another model_type, such as the language model's of a
    LION, and where they would change the model.
    """
    written = checkpoint_format.config_to_hf(model_config) | {"dtype": dtype}
    if released.get("model_type") not in (written["model_type"], *checkpoint_format.model_types):
        return written
    merged = _deep_update(released, written)
    for name, part in NESTED_SIZES.items():
        if name in released and name not in written and name in written.get(part, {}):
            merged[name] = written[part][name]
    merged = _with_dtype(merged, dtype)
    try:
        same = not configs.diff_configs(
            config_from_hf(checkpoint_format, merged), config_from_hf(checkpoint_format, written)
        )
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        same = False
    return merged if same else written


def _deep_update(old: dict, new: dict) -> dict:
    """`old` updated with `new`, recursively in nested dicts."""
    nested = {key for key in old.keys() & new.keys() if isinstance(old[key], dict) and isinstance(new[key], dict)}
    return old | new | {key: _deep_update(old[key], new[key]) for key in nested}


def _with_dtype(hf_config: dict, dtype: str) -> dict:
    """`hf_config` with each dtype in it, also under its earlier name torch_dtype, replaced by `dtype`."""
    names = {name: dtype for name in ("dtype", "torch_dtype") if name in hf_config}
    nested = {key: _with_dtype(value, dtype) for key, value in hf_config.items() if isinstance(value, dict)}
    return hf_config | nested | names


def check_hf_config(file: Path, hf_config: dict, checkpoint_format: CheckpointFormat, model_config: Any) -> None:
    """Compare a folder's config.json with the config in its lionjax.json, which decides.

    Raises UserError where config.json was edited so that it describes another model; other differences are logged.
    """
    try:
        written = checkpoint_format.config_to_hf(model_config)
        expected = config_from_hf(checkpoint_format, written)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return  # nothing to compare with: this model has no config.json of its format
    edits = list(_differences(hf_config, written))
    known_types = (written["model_type"], *checkpoint_format.model_types)
    own_types = SYSTEM_KEY in hf_config or str(hf_config.get("model_type")).startswith(OWN_PREFIX)
    if not own_types and hf_config.get("model_type") not in known_types:
        raise UserError(_describe(file, "model_type", hf_config.get("model_type"), written["model_type"]))
    try:
        actual = config_from_hf(checkpoint_format, hf_config)
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} was edited after the export ({error}), but lionjax.json decides; undo the edit, or delete "
            "lionjax.json so that config.json decides"
        ) from error
    recorded_changes = configs.diff_configs(actual, model_config)
    changes = {name: pair for name, pair in configs.diff_configs(actual, expected).items() if name in recorded_changes}
    computed = {name: pair for name, pair in changes.items() if not TRAINING_ONLY.fullmatch(name)}
    edits = [edit for edit in edits if edit[0] not in LABELS]
    serious = [edit for edit in edits if not TRAINING_ONLY.fullmatch(edit[0])]
    beside_system = [edit for edit in serious if SYSTEM_KEY in hf_config and not edit[0].startswith(f"{SYSTEM_KEY}.")]
    if computed:
        field, value = next(iter(computed.items()))
        likely = [edit for edit in serious if edit[1:] == value] or serious
        raise UserError(_describe(file, *(likely[0] if likely else (field, *value))))
    if beside_system:  # for the original code; lionjax reads the system
        raise UserError(_describe(file, *beside_system[0]))
    for edit in edits:
        if not edit[0].startswith(f"{SYSTEM_KEY}."):
            log.warning("%s", _describe(file, *edit))


def _describe(file: Path, field: str, value: Any, recorded: Any) -> str:
    return (
        f"{file} says {field} {value!r}, but lionjax.json beside it, which decides, says {recorded!r}; undo the edit, "
        "or delete lionjax.json so that config.json decides"
    )


def _differences(hf_config: Mapping, written: Mapping, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, value, written value) of the fields of `written` that `hf_config` has with another value."""
    for name, value in written.items():
        if name not in hf_config:
            continue
        if isinstance(value, dict) and isinstance(hf_config[name], dict):
            yield from _differences(hf_config[name], value, f"{prefix}{name}.")
        elif hf_config[name] != value:
            yield prefix + name, hf_config[name], value
