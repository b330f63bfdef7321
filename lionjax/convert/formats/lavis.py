# SPDX-License-Identifier: Apache-2.0
"""LAVIS's files: what was trained of a BLIP-2, InstructBLIP or MiniGPT-4, and the parts that lie beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, abstract_params, read_hf_config
from lionjax.convert.formats.hf_vision import CLIP_FILE, LAVIS_IGNORE_PATTERN
from lionjax.convert.formats.hf_vlm import BLIP2, INSTRUCTBLIP, language_config_from_hf
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError

EVA_FILE = "eva_vit_g.pth"
LAVIS_FILE = re.compile(r"(blip2|instruct_?blip|.*minigpt4).*", re.IGNORECASE)
LAVIS_LANGUAGE_TYPES = {
    "t5": "t5",
    "opt": "opt",
    "llm": "llama",
    "llama": "llama",
}  # its word -> the language model's type


def find_lavis_files(folder: Path) -> list[Path]:
    """What LAVIS has trained in a folder: one file, or MiniGPT-4's and behind it the BLIP-2 that it builds on."""
    files = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and LAVIS_FILE.match(f.name)]
    files.sort(key=lambda file: "minigpt4" not in file.name.lower())
    built_on = len(files) == 2 and ["minigpt4" in f.name.lower() for f in files] == [True, False]
    return files if len(files) == 1 or built_on else []


def _open_trained(files: list[Path]) -> CheckpointTensors:
    """The trained tensors; of a BLIP-2 that another file builds on, its Q-Former without its language model."""
    trained = open_weights(files[0])
    for file in files[1:]:
        base = open_weights(file)
        other = re.compile(rf"({'|'.join(LAVIS_LANGUAGE_TYPES)})_(proj|model)\..*")
        unused = {n: "of the language model that it was trained with" for n in base if other.match(n)}
        unused |= {n: f"{files[0].name} has its own" for n in base if n in trained}
        kept = {n: w for n, w in base.items() if n not in unused}
        trained = trained | CheckpointTensors(kept, base.files, base.skipped | unused)
    return trained


def open_lavis(folder: Path) -> tuple[CheckpointFormat, Any, CheckpointTensors, Path]:
    """(kind, config, tensors, folder of its tokenizer) of LAVIS's parts in one folder."""
    trained = _open_trained(find_lavis_files(folder))
    word = next((w for w in LAVIS_LANGUAGE_TYPES if f"{w}_proj.weight" in trained), None)
    settings = {f.parent: read_hf_config(f) for f in sorted(folder.glob("*/config.json"))}
    towers = [f for f, s in settings.items() if s.get("model_type") == LAVIS_LANGUAGE_TYPES.get(word)]
    seen = any(name.startswith("visual_encoder.") for name in trained)
    # The norm behind the tower is as wide as the tower, which has not been trained.
    norm = trained.get("ln_vision.weight")
    tower = folder / (CLIP_FILE if norm is not None and norm.shape == (1024,) else EVA_FILE)
    first = "itm_head.weight" in trained and word is None
    if not (first or (word and len(towers) == 1)) or not (seen or tower.is_file()):
        raise UserError(
            f"{folder} wants the parts of a BLIP-2 or InstructBLIP: the trained file, with a projection into a "
            f"language model, or heads that compare; that model's folder; and {tower.name}, unless the trained file "
            "holds the tower"
        )
    tensors = trained
    if word and not any(name.startswith(f"{word}_model.") for name in trained):
        tensors = tensors | open_weights(towers[0]).with_prefix(f"{word}_model.")
    if not seen:
        tensors = tensors | open_weights(tower).without_prefix("visual.").with_prefix("visual_encoder.")
    if first:
        return BLIP2_STAGE1, stage1_config_from_tensors(tensors), tensors, folder
    config = config_from_tensors(language_config_from_hf(settings[towers[0]], word), tensors)
    return (INSTRUCTBLIP if config.qformer.text else BLIP2), config, tensors, towers[0]


def config_from_tensors(language: Any, tensors: CheckpointTensors) -> Any:
    """The released sizes around this language model, and the pixels that the file's positions are for."""
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    if type(language).__name__ == "T5Config":
        language = dataclasses.replace(language, activation="gelu")
    tower, bridge = _vision_and_qformer_configs(tensors)
    return VisualPrefixLM(
        tower,
        language,
        bridge,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=1e-5,
        projector_depth=1,
        image_token_id=None,
        torch_names="original",
    )


def stage1_config_from_tensors(tensors: CheckpointTensors) -> Any:
    """The first stage at the released sizes, and the pixels that the file's positions are for."""
    from lionjax.models.vlm.blip2_stage1 import Blip2Stage1

    return Blip2Stage1(*_vision_and_qformer_configs(tensors))


def _vision_and_qformer_configs(tensors: CheckpointTensors) -> tuple[Any, Any]:
    from lionjax.models.connectors import qformer
    from lionjax.models.vision import vit

    words = tensors.get("Qformer.bert.embeddings.word_embeddings.weight")
    bridge = dataclasses.replace(qformer.QFormerConfig(), use_text_input=words is not None)
    if words is not None:
        bridge = dataclasses.replace(bridge, vocab_size=words.shape[0])
    tower, places = vit.EVA_VIT_G, tensors.get("visual_encoder.pos_embed")
    if "visual_encoder.conv1.weight" in tensors:
        # All but the last layer of OpenAI's CLIP.
        depth = vit.CLIP_VIT_L.depth - 1
        tower = dataclasses.replace(vit.CLIP_VIT_L, image_size=224, depth=depth, post_layernorm=False)
        places = tensors.get("visual_encoder.positional_embedding")
        bridge = dataclasses.replace(bridge, vision_width=tower.width)
    if places is not None and places.ndim > 1:
        side = round((places.shape[-2] - 1) ** 0.5)
        tower = dataclasses.replace(tower, image_size=tower.patch_size * side)
    return tower, bridge


BLIP2_STAGE1 = CheckpointFormat(
    "blip2_first",
    ("blip2_first",),
    lambda c: type(c).__name__ == "Blip2Stage1",
    lambda s: configs.from_json(json.dumps(s["system"])),
    lambda c: {"model_type": "blip2_first", "system": json.loads(configs.to_json(c))},
    lambda c: c.weight_map(),
    abstract_params,
    ignore_patterns=(LAVIS_IGNORE_PATTERN,),
)
