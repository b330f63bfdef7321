# SPDX-License-Identifier: Apache-2.0
"""LAVIS checkpoints of BLIP-2, InstructBLIP and MiniGPT-4: a file of trained weights next to the frozen parts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_config_format, read_hf_config
from lionjax.convert.formats.hf_vision import CLIP_FILE, LAVIS_IGNORE_PATTERN
from lionjax.convert.formats.hf_vlm import BLIP2, FORMAT_OF_LANGUAGE, INSTRUCTBLIP, language_config_from_hf
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.io.key_names import remove_generic_prefix
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core.types import UserError

EVA_FILE = "eva_vit_g.pth"
LAVIS_FILE = re.compile(r"(blip2|instruct_?blip|.*minigpt4).*", re.IGNORECASE)
LAVIS_LANGUAGE_TYPES = {
    "t5": "t5",
    "opt": "opt",
    "llm": "llama",
    "llama": "llama",
}  # prefix of LAVIS's names -> model_type of the language model


def find_lavis_files(folder: Path) -> list[Path]:
    """LAVIS's trained files in a folder: one, or MiniGPT-4's followed by the BLIP-2 that it builds on; else []."""
    files = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and LAVIS_FILE.match(f.name)]
    files.sort(key=lambda file: "minigpt4" not in file.name.lower())
    built_on = len(files) == 2 and ["minigpt4" in f.name.lower() for f in files] == [True, False]
    return files if len(files) == 1 or built_on else []


def _open_trained(files: list[Path]) -> CheckpointTensors:
    """The trained tensors; MiniGPT-4's together with the Q-Former of its BLIP-2."""
    trained = remove_generic_prefix(open_weights(files[0]))
    for file in files[1:]:
        base = remove_generic_prefix(open_weights(file))
        other = re.compile(rf"({'|'.join(LAVIS_LANGUAGE_TYPES)})_(proj|model)\..*")
        unused = {n: "of another language model" for n in base if other.match(n)}
        unused |= {n: f"{files[0].name} has its own" for n in base if n in trained}
        arrays = {n: w for n, w in base.items() if n not in unused}
        trained = trained | CheckpointTensors(arrays, base.files, base.skipped | unused)
    return trained


def open_lavis(folder: Path) -> tuple[CheckpointFormat, Any, CheckpointTensors, Path]:
    """(checkpoint format, config, tensors, folder of the tokenizer) from LAVIS's parts in one folder.

    Raises UserError where a part is missing.
    """
    trained = _open_trained(find_lavis_files(folder))
    prefix = next((p for p in LAVIS_LANGUAGE_TYPES if f"{p}_proj.weight" in trained), None)
    hf_configs = {f.parent: read_hf_config(f) for f in sorted(folder.glob("*/config.json"))}
    language_folders = [f for f, s in hf_configs.items() if s.get("model_type") == LAVIS_LANGUAGE_TYPES.get(prefix)]
    has_vision = any(name.startswith("visual_encoder.") for name in trained)
    # The trained norm after the vision tower has the tower's width, which tells CLIP ViT-L and EVA ViT-g apart.
    norm = trained.get("ln_vision.weight")
    vision_file = folder / (CLIP_FILE if norm is not None and norm.shape == (1024,) else EVA_FILE)
    is_stage1 = "itm_head.weight" in trained and prefix is None
    if not (is_stage1 or (prefix and len(language_folders) == 1)) or not (has_vision or vision_file.is_file()):
        raise UserError(
            f"{folder} needs the parts of a BLIP-2 or InstructBLIP: the trained file, with a projection to a language "
            f"model or the heads of stage 1; the language model's folder; and {vision_file.name}, unless the trained "
            "file holds the vision tower"
        )
    tensors = trained
    if prefix and not any(name.startswith(f"{prefix}_model.") for name in trained):
        tensors = tensors | _open_language(language_folders[0], hf_configs[language_folders[0]], prefix)
    if not has_vision:
        vision = remove_generic_prefix(open_weights(vision_file))
        tensors = tensors | vision.without_prefix("visual.").with_prefix("visual_encoder.")
    if is_stage1:
        return BLIP2_STAGE1, stage1_config_from_tensors(tensors), tensors, folder
    config = config_from_tensors(language_config_from_hf(hf_configs[language_folders[0]], prefix), tensors)
    return (INSTRUCTBLIP if config.qformer.use_text_input else BLIP2), config, tensors, language_folders[0]


def _open_language(folder: Path, hf_config: dict, prefix: str) -> CheckpointTensors:
    """The language model of a LAVIS checkpoint, under the names that it has there."""
    checkpoint_format = FORMAT_OF_LANGUAGE[LAVIS_LANGUAGE_TYPES[prefix]]
    language = open_part(folder, checkpoint_format, language_config_from_hf(hf_config, prefix))
    return language.with_prefix(f"{prefix}_model.")


def config_from_tensors(language: Any, tensors: CheckpointTensors) -> Any:
    """The config of a LAVIS BLIP-2 with this language model, and with the image size of the file's positions."""
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    if type(language).__name__ == "T5Config":
        language = dataclasses.replace(language, activation="gelu")
    vision, qformer = _vision_and_qformer_configs(tensors)
    return VisualPrefixLM(
        vision,
        language,
        qformer,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=1e-5,
        projector_depth=1,
        # MiniGPT-4 ("llama_proj") has its image inside the prompt; the id lies outside the vocabulary.
        image_token_id=language.vocab_size if "llama_proj.weight" in tensors else None,
        torch_names="original",
    )


def stage1_config_from_tensors(tensors: CheckpointTensors) -> Any:
    """The config of a LAVIS BLIP-2 stage 1, with the image size of the file's positions."""
    from lionjax.models.vlm.blip2_stage1 import Blip2Stage1

    return Blip2Stage1(*_vision_and_qformer_configs(tensors))


def _vision_and_qformer_configs(tensors: CheckpointTensors) -> tuple[Any, Any]:
    from lionjax.models.connectors import qformer
    from lionjax.models.vision import vit

    word_embeddings = tensors.get("Qformer.bert.embeddings.word_embeddings.weight")
    qformer_config = dataclasses.replace(qformer.QFormerConfig(), use_text_input=word_embeddings is not None)
    if word_embeddings is not None:
        qformer_config = dataclasses.replace(qformer_config, vocab_size=word_embeddings.shape[0])
    vision, positions = vit.EVA_VIT_G, tensors.get("visual_encoder.pos_embed")
    if "visual_encoder.conv1.weight" in tensors:
        # OpenAI's CLIP without its last layer.
        depth = vit.CLIP_VIT_L.depth - 1
        vision = dataclasses.replace(vit.CLIP_VIT_L, image_size=224, depth=depth, post_layernorm=False)
        positions = tensors.get("visual_encoder.positional_embedding")
        qformer_config = dataclasses.replace(qformer_config, vision_width=vision.width)
    if positions is not None and positions.ndim > 1:
        side = round((positions.shape[-2] - 1) ** 0.5)
        vision = dataclasses.replace(vision, image_size=vision.patch_size * side)
    return vision, qformer_config


BLIP2_STAGE1 = lionjax_config_format("blip2_first", "Blip2Stage1", ignore_patterns=(LAVIS_IGNORE_PATTERN,))
