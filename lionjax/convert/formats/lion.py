# SPDX-License-Identifier: Apache-2.0
"""The LION release: one checkpoint of the trained weights beside its frozen parts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import (
    CheckpointFormat,
    CheckpointSource,
    abstract_params,
    read_hf_config,
)
from lionjax.convert.formats.hf_language import T5
from lionjax.convert.formats.hf_vision import EVA_IGNORE_PATTERN
from lionjax.convert.formats.lavis import EVA_FILE
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError
from lionjax.core.weight_map import bitwise_equal

LION_FILE = re.compile(r"(?i)lion|xx?l_stage3_learnable\.")  # the second is what its makers called it


def find_lion_file(folder: Path) -> Path | None:
    files = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and LION_FILE.match(f.name)]
    return files[0] if len(files) == 1 else None


def open_lion(path: Path) -> CheckpointSource:
    """LION's three parts in one folder. The trained part alone does not make a model."""
    folder = path if path.is_dir() else path.parent
    trained, eva = find_lion_file(folder), folder / EVA_FILE
    towers = [f.parent for f in folder.glob("*/config.json") if read_hf_config(f).get("model_type") == "t5"]
    if trained is None or not eva.is_file() or len(towers) != 1:
        raise UserError(
            f"{folder} wants the three parts of a LION: LION-FlanT5-XL.pth (or XXL), eva_vit_g.pth, and one "
            "folder with the FlanT5 of the same size"
        )
    vision = open_weights(eva).with_prefix("visual_encoder.")
    language = open_weights(towers[0]).with_prefix("t5_model.")
    tensors = _without_tied_copies(open_weights(trained), language) | vision | language
    return CheckpointSource(
        LION, _lion_config_from_tensors(read_hf_config(towers[0] / "config.json"), tensors), tensors, towers[0]
    )


def _without_tied_copies(trained: CheckpointTensors, language: CheckpointTensors) -> CheckpointTensors:
    """The trained part without its copies of T5's word table, which its saver left in by mistake, as bfloat16."""
    table, kept, left = language.get("t5_model.shared.weight"), {}, dict(trained.skipped)
    for name, array in trained.items():
        if re.fullmatch(r"t5_model\.(encoder|decoder)\.embed_tokens\.weight", name) and table is not None:
            if not bitwise_equal(table, array):
                raise UserError(f"{name!r} of {trained.files[0]} is not the word table of this FlanT5")
            left[name] = "a copy of t5_model.shared.weight"
        else:
            kept[name] = array
    return CheckpointTensors(kept, trained.files, left)


def _lion_config_from_tensors(t5_hf_config: dict, tensors: CheckpointTensors) -> Any:
    """The released sizes, around this T5 and with adapters as wide as they are in the file."""
    from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
    from lionjax.models.vision.vit import EVA_VIT_G
    from lionjax.models.vlm.lion import Lion
    from lionjax.nn.adapters import AdapterConfig

    shape = re.compile(r".*adapter\.adapters\.([0-9])\.down_proj\.weight")
    downs = {int(found[1]): w for name, w in tensors.items() if (found := shape.fullmatch(name))}
    if 0 not in downs or downs[0].ndim != 2:
        raise UserError("the trained file holds no adapters, so it is no LION")
    adapters = AdapterConfig(downs[0].shape[0], len(downs))
    language = dataclasses.replace(T5.config_from_hf(t5_hf_config), activation="gelu", adapters=adapters)
    return Lion(EVA_VIT_G, QFormerConfig(), AggregatorConfig(), language)


# LION first: a folder with its files also holds a T5.
LION = CheckpointFormat(
    "lion",
    ("lion",),
    lambda c: type(c).__name__ == "Lion",
    config_from_hf=lambda settings: configs.from_json(json.dumps(settings["system"])),
    config_to_hf=lambda c: {"model_type": "lion", "system": json.loads(configs.to_json(c))},
    weight_map=lambda c: c.weight_map(),
    abstract_params=abstract_params,
    ignore_patterns=(r"visual_encoder\." + EVA_IGNORE_PATTERN, r"Qformer\.cls\..*(?#heads of its first stage)"),
)
