# SPDX-License-Identifier: Apache-2.0
"""The CLIP of an original LLaVA, which its config.json only names: `mm_vision_tower`, a hub name or a path.

The path is one of the machine that trained the model, so it is not followed. The tower's sizes come from, in this
order: the folder that the user gives, `vision_config`, a CLIP in a subfolder, the known name at the end of the path,
and the weights themselves where they hold the tower.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.io.reader import CheckpointTensors, open_weights
from lionjax.core.types import UserError

CLIP_336 = {  # LLaVA's vision tower where config.json has no vision_config
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
CLIP_224 = CLIP_336 | {"image_size": 224}
CLIP_SIZES = {"openai/clip-vit-large-patch14-336": CLIP_336, "openai/clip-vit-large-patch14": CLIP_224}
LLAVA_TOWER_PREFIX = "model.vision_tower.vision_tower."
TOWER_KEY = re.compile(r"(.*\bvision_tower\.(?:vision_tower\.)?(?:vision_model\.)?)embeddings\.class_embedding")
OPENAI_WIDTHS = (768, 1024)  # of OpenAI's ViT-B and ViT-L, whose heads have 64 dimensions


def complete_llava_config(hf_config: dict, path: Path, vision_tower: Path | None = None) -> dict:
    """The config.json of an original LLaVA with the settings of its tower as `vision_config`.

    `path`: its folder or weight file. `vision_tower`: the folder of its CLIP, if the user gives it. Hugging Face's
    configs are returned as they are. Raises UserError where the tower is not found.
    """
    if "text_config" in hf_config and vision_tower is not None:
        raise UserError(f"the LLaVA in {path} holds its vision tower; leave out --vision-tower")
    if "text_config" in hf_config or (hf_config.get("vision_config") and vision_tower is None):
        return hf_config
    folder, name = path if path.is_dir() else path.parent, str(hf_config.get("mm_vision_tower") or "")
    tower_folder = find_tower_folder(folder, name, vision_tower)
    if tower_folder is not None:
        sizes: dict | None = read_hf_config(tower_folder / "config.json")
    else:
        sizes = _sizes_of_name(name) or _sizes_of_weights(path)
    if sizes is None:
        raise UserError(
            f"{folder / 'config.json'} names the vision tower {name!r}, which is no known CLIP "
            f"({', '.join(CLIP_SIZES)}); put the folder of its CLIP (config.json and weights) inside {folder}, or give "
            "it as --vision-tower"
        )
    return hf_config | {"vision_config": sizes}


def find_tower_folder(folder: Path, name: str = "", vision_tower: Path | None = None) -> Path | None:
    """The folder of a CLIP: `vision_tower`, else the subfolder of `folder` that ends as `name`, or the only one.

    None where there are none or several. Raises UserError where `vision_tower` holds no CLIP.
    """
    if vision_tower is not None:
        if read_hf_config(vision_tower / "config.json").get("model_type") not in CLIP.model_types:
            raise UserError(f"{vision_tower} holds no CLIP: its config.json must have model_type clip")
        return vision_tower
    configs = sorted(folder.glob("*/config.json"))
    folders = [f.parent for f in configs if read_hf_config(f).get("model_type") in CLIP.model_types]
    named = [f for f in folders if f.name == Path(name).name]
    return next(iter(named or folders)) if len(named or folders) == 1 else None


def open_vision_tower(folder: Path, vision: Any) -> CheckpointTensors:
    """The vision tower in the folder of a CLIP, under the names that LLaVA's checkpoints have for it."""
    clip = open_part(folder, CLIP, vision)
    unused = {name for name in clip if any(re.fullmatch(pattern, name) for pattern in CLIP.ignore_patterns)}
    kept = {name: array for name, array in clip.items() if name not in unused}
    tower = CheckpointTensors(kept, clip.files, clip.skipped | {name: "not of the vision tower" for name in unused})
    tower.memory_mapped = clip.memory_mapped & kept.keys()
    return tower.with_prefix(LLAVA_TOWER_PREFIX)


def _sizes_of_name(name: str) -> dict | None:
    """The sizes of a CLIP that LLaVA was released with, by the last part of a hub name, path or cache folder."""
    parts = {part.rpartition("--")[2].lower() for part in re.split(r"[/\\]", name)}
    return next((sizes for known, sizes in CLIP_SIZES.items() if known.rpartition("/")[2] in parts), None)


def _sizes_of_weights(path: Path) -> dict | None:
    """The sizes of the tower in a checkpoint's own tensors; None without a tower, or where its heads are not known."""
    tensors = open_weights(path)
    prefix = next((match[1] for name in tensors if (match := TOWER_KEY.fullmatch(name))), None)
    if prefix is None:
        return None
    layer = re.compile(re.escape(prefix) + r"encoder\.layers\.([0-9]{1,3})\.mlp\.fc1\.weight")
    depth = 1 + max((int(match[1]) for name in tensors if (match := layer.fullmatch(name))), default=-1)
    patch = tensors.get(f"{prefix}embeddings.patch_embedding.weight")
    position = tensors.get(f"{prefix}embeddings.position_embedding.weight")
    up = tensors.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if patch is None or position is None or up is None or patch.shape[0] not in OPENAI_WIDTHS:
        return None
    width, patch_size = patch.shape[0], patch.shape[-1]
    return {
        "image_size": patch_size * round((position.shape[0] - 1) ** 0.5),
        "patch_size": patch_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "intermediate_size": up.shape[0],
    }
