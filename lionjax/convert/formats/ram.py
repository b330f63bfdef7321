# SPDX-License-Identifier: Apache-2.0
"""RAM, the image tagger (arXiv 2306.03514), as released; `TAGGING_FORMATS` also has its Swin backbone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_vision_params
from lionjax.convert.formats.hf_vision import SWIN
from lionjax.core import config as configs
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.ram import RamConfig

RAM_FILE = "ram_swin_large_14m.pth"  # the released file; recognized by its name, because it has no config


def _ram_config_from_hf(hf_config: dict) -> Any:
    """The config in a lionjax config.json; without one, the released sizes."""
    from lionjax.models.vision import ram

    return configs.from_json(json.dumps(hf_config["system"])) if "system" in hf_config else ram.RAM_SWIN_L


def _ram_weight_map(c: RamConfig) -> tuple:
    from lionjax.models.vision import ram

    return ram.weight_map(c)


def _ram_abstract_params(c: RamConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.ram import Ram

    return abstract_vision_params(Ram(c), c.swin.image_size, mesh)


RAM = CheckpointFormat(
    "ram",
    ("ram",),
    lambda c: type(c).__name__ == "RamConfig",
    _ram_config_from_hf,
    lambda c: {"model_type": "ram", "system": json.loads(configs.to_json(c))},
    _ram_weight_map,
    _ram_abstract_params,
    # The caption decoder, used only in training.
    ignore_patterns=(
        r"(?!visual_encoder\.|image_proj\.|label_embed$|wordvec_proj\.|tagging_head\.|fc\.).*(?#caption decoder)",
    ),
    # Some files have the tagging head under its earlier name.
    prepare_tensors=lambda config, tensors, folder: tensors.rename_keys((r"^vision_multi\.", "tagging_head.")),
)
TAGGING_FORMATS = (SWIN, RAM)
