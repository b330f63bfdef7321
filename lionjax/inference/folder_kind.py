# SPDX-License-Identifier: Apache-2.0
"""Which kind of model a folder holds, told from its config and file names before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lionjax import convert
from lionjax.convert.formats.grounding_dino import GROUNDING_DINO_FILES
from lionjax.core.errors import UserError
from lionjax.core.files import read_json
from lionjax.inference.tagger import RAM_FILE, TAG_LIST_FILE
from lionjax.models.vision.grounding_dino import GroundingDinoConfig
from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.sam_encoder import SamConfig

Kind = Literal["model", "detector", "tagger", "segmenter"]
KINDS: dict[type, Kind] = {GroundingDinoConfig: "detector", RamConfig: "tagger", SamConfig: "segmenter"}
MODEL_TYPES: dict[str, Kind] = {"grounding-dino": "detector", "sam": "segmenter"}  # of Hugging Face's config.json
SAM_FILES = "sam_vit_*.pth"


def folder_kind(folder: str | Path) -> Kind:
    """The kind of a folder of weights; "model" for runs and for everything that is no RAM, Grounding DINO or SAM.

    Raises UserError if there is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder or a folder of weights")
    if convert.holds_params(folder):
        return KINDS.get(type(convert.open_params(folder)[0]), "model")
    if (folder / RAM_FILE).is_file() or (folder / TAG_LIST_FILE).is_file():
        return "tagger"
    if any((folder / name).is_file() for name in GROUNDING_DINO_FILES):
        return "detector"
    if any(folder.glob(SAM_FILES)):
        return "segmenter"
    config = read_json(folder / "config.json") or {}
    return MODEL_TYPES.get(str(config.get("model_type")), "model") if isinstance(config, dict) else "model"
