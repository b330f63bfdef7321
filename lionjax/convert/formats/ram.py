# SPDX-License-Identifier: Apache-2.0
"""RAM, the image tagger (arXiv 2306.03514), as released; `TAGGING_FORMATS` also has its Swin backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import abstract_vision_params, lionjax_config_format, read_lionjax_config
from lionjax.convert.formats.hf_vision import SWIN
from lionjax.core.types import Params

if TYPE_CHECKING:
    from lionjax.models.vision.ram import RamConfig

RAM_FILE = "ram_swin_large_14m.pth"  # the released file; recognized by its name, because it has no config


def _ram_config_from_hf(hf_config: dict) -> Any:
    """The config in a lionjax config.json; without one, the released sizes."""
    from lionjax.models.vision import ram

    return read_lionjax_config(hf_config) if "system" in hf_config else ram.RAM_SWIN_L


def _ram_weight_map(c: RamConfig) -> tuple:
    from lionjax.models.vision import ram

    return ram.weight_map(c)


def _ram_abstract_params(c: RamConfig, mesh: Any = None) -> Params:
    from lionjax.models.vision.ram import Ram

    return abstract_vision_params(Ram(c), c.swin.image_size, mesh)


KEY_PATTERNS = ((r"^vision_multi\.", "tagging_head."),)
RAM = lionjax_config_format(
    "ram",
    "RamConfig",
    config_from_hf=_ram_config_from_hf,
    weight_map=_ram_weight_map,
    abstract_params=_ram_abstract_params,
    # The caption decoder, used only in training.
    ignore_patterns=(
        r"(?!visual_encoder\.|image_proj\.|label_embed$|wordvec_proj\.|tagging_head\.|fc\.).*(?#caption decoder)",
    ),
    # Some files have the tagging head under its earlier name.
    key_patterns=KEY_PATTERNS,
    prepare_tensors=lambda config, tensors, folder: tensors.rename_keys(*KEY_PATTERNS),
)
TAGGING_FORMATS = (SWIN, RAM)
