# SPDX-License-Identifier: Apache-2.0
"""Parts of models without a transformers class, as models with one, for `--verify`.

LION without aggregator and adapters is an InstructBLIP, NExT-Chat without region head a LLaVA and a SAM, RAM starts
with a Swin, and EVA is the vision tower of a BLIP-2. Names are mapped by patterns taken from the original code, not by
the weight map, so that an error in the weight map shows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

StringPairs = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class HFPart:
    """A part of a model, as a model of its own that transformers runs."""

    name: str
    config: Any
    path_prefixes: StringPairs  # (prefix of a path in the part, prefix in the whole model)
    key_patterns: StringPairs  # (pattern of the original's torch names, transformers' name), applied in turn
    prepare_tensors: Callable[[Mapping], Mapping] = lambda tensors: tensors  # applied to the checkpoint first
    compared_prefix: str = ""  # only modules with this prefix are compared; all other parameters are random

    def to_hf_tensors(self, tensors: Mapping, expected_keys: Mapping) -> tuple[dict, set[str]]:
        """({transformers' name: array} for `expected_keys`, the used names of the checkpoint)."""
        hf_tensors, used_keys = {}, set()
        for name, array in self.prepare_tensors(tensors).items():
            hf_key = name
            for pattern, new in self.key_patterns:
                hf_key = re.sub(pattern, new, hf_key)
            if hf_key in expected_keys:
                hf_tensors[hf_key] = np.asarray(array)
                used_keys.add(name)
        return hf_tensors, used_keys

    def select_params(self, flat_params: Mapping, expected_paths: Mapping) -> dict:
        """The model's parameters by the paths of the part, for those `expected_paths` that exist."""
        params = {}
        for path in expected_paths:
            part_prefix, model_prefix = next(pair for pair in self.path_prefixes if path.startswith(pair[0]))
            if model_prefix + path.removeprefix(part_prefix) in flat_params:
                params[path] = flat_params[model_prefix + path.removeprefix(part_prefix)]
        return params


def _numbered_layers(pattern: str, prefix: str, names: Mapping[int, str]) -> StringPairs:
    """Patterns that name layers with numbers, as those of torch's Sequential: the one behind `pattern` by `names`."""
    return tuple((rf"{pattern}{number}\.", f"{prefix}{name}.") for number, name in names.items())


EVA_KEY_PATTERNS = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
)
QFORMER_KEY_PATTERNS = (
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^(qformer\..*attention)\.self\.", r"\1.attention."),
    (r"^t5_proj\.", "language_projection."),
    (r"^t5_model\.", "language_model."),
)
LLAVA_KEY_PATTERNS = (
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"),
)
SAM_KEY_PATTERNS = (
    (r"^sam\.model\.", ""),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    *_numbered_layers(
        r"^image_encoder\.neck\.", "vision_encoder.neck.", {0: "conv1", 1: "layer_norm1", 2: "conv2", 3: "layer_norm2"}
    ),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    *_numbered_layers(
        r"\.mask_downscaling\.",
        ".mask_embed.",
        {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"},
    ),
    *_numbered_layers(
        r"\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.",
        r".\1.",
        {0: "proj_in", 2: "proj_out", 1: "layers.0"},
    ),
    *_numbered_layers(r"\.output_upscaling\.", ".upscale_", {0: "conv1", 1: "layer_norm", 3: "conv2"}),
    (r"\.transformer\.layers\.(\d+)\.norm(\d)\.", r".transformer.layers.\1.layer_norm\2."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
)
SWIN_KEY_PATTERNS = (
    (r"^visual_encoder\.patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^visual_encoder\.patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^visual_encoder\.norm\.", "swin.layernorm."),
    (r"^visual_encoder\.layers\.", "swin.encoder.layers."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)

_BACKBONE = "model.backbone.conv_encoder.model."
GROUNDING_DINO_KEY_PATTERNS = (
    *((rf"^backbone\.0\.norm{n}\.", f"{_BACKBONE}hidden_states_norms.stage{n + 1}.") for n in range(4)),
    *(
        (old.replace("visual_encoder", r"backbone\.0"), new.replace("swin.", _BACKBONE))
        for old, new in SWIN_KEY_PATTERNS[:4]
    ),
    *((rf"^({re.escape(_BACKBONE)}.*){old}", rf"\1{new}") for old, new in SWIN_KEY_PATTERNS[4:]),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
    (r"^transformer\.", "model."),
    (r"\.gamma_v$", ".vision_param"),
    (r"\.gamma_l$", ".text_param"),
    (r"(\.fusion_layer\..*[._])v(_proj\.|\.)", r"\1vision\2"),
    (r"(\.fusion_layer\..*[._])l(_proj\.|\.)", r"\1text\2"),
    *_numbered_layers(
        r"\.text_enhancer_layer\.norm", ".text_enhancer_layer.", {1: "layer_norm_before", 2: "layer_norm_after"}
    ),
    *_numbered_layers(
        r"\.deformable_layer\.norm", ".deformable_layer.", {1: "self_attn_layer_norm", 2: "final_layer_norm"}
    ),
    *_numbered_layers(
        r"^(model\.decoder\.layers\.\d+)\.norm",
        r"\1.",
        {1: "encoder_attn_layer_norm", 2: "self_attn_layer_norm", 3: "final_layer_norm"},
    ),
    (r"\.catext_norm\.", ".encoder_attn_text_layer_norm."),
    (r"\.ca_text\.", ".encoder_attn_text."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.linear(\d)\.", r".fc\1."),
    (r"^model\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"\.ref_point_head\.", ".reference_points_head."),
)


def _merge_qkv_bias(tensors: Mapping) -> dict:
    """EVA's q_bias and v_bias as one qkv.bias; the keys' bias is zero."""
    merged = dict(tensors)
    for name in [name for name in tensors if name.endswith(".attn.q_bias")]:
        q, v = merged.pop(name), merged.pop(name.replace("q_bias", "v_bias"))
        merged[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, np.zeros_like(q), v])
    return merged


def _split_qkv(tensors: Mapping) -> dict:
    """Fused tensors of Swin (qkv) and of torch's attention (in_proj) split into query, key and value."""
    split = dict(tensors)
    for name in [name for name in tensors if ".attn.qkv." in name or ".in_proj_" in name]:
        for projection, part in zip(("query", "key", "value"), np.split(split.pop(name), 3)):
            split[name.replace("qkv", projection).replace("in_proj_", f"{projection}.")] = part
    return split


def _duplicate_positional_matrix(tensors: Mapping) -> dict:
    """Adds the second copy of SAM's positional encoding matrix, which transformers' checkpoints hold twice."""
    matrix = "sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    return {**tensors, "prompt_encoder.shared_embedding.positional_embedding": tensors[matrix]}


def _lion_parts(c: Any) -> list[HFPart]:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    if not c.is_encoder_decoder or c.visual_input == "AGGREGATOR":
        return []
    language = dataclasses.replace(c.language, adapters=None)
    # transformers has one epsilon for the vision tower and the norm after it.
    instructblip = VisualPrefixLM(
        c.vision,
        language,
        c.qformer,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=c.vision.norm_eps,
        projector_depth=1,
        image_token_id=language.vocab_size - 1,
    )
    paths = (("vision_norm/", "qformer_norm/"), ("projector/", "qformer_projector/"), ("", ""))
    names = (*EVA_KEY_PATTERNS, *QFORMER_KEY_PATTERNS)
    if not c.qformer.use_text_input:
        names = tuple((p, n.replace("qformer.embeddings.layernorm", "qformer.layernorm")) for p, n in names)
    return [HFPart("InstructBLIP", instructblip, paths, names, _merge_qkv_bias)]


def _nextchat_parts(c: Any) -> list[HFPart]:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    llava = VisualPrefixLM(
        c.vision, c.language, feature_layer=c.feature_layer, image_token_id=c.language.vocab_size - 1
    )
    llava_part = [HFPart("LLaVA", llava, (("", ""),), LLAVA_KEY_PATTERNS)]
    return [
        *(llava_part if c.projector_depth == 2 and c.vision.pre_layernorm else []),
        HFPart("SAM", c.sam, (("", "sam/"),), SAM_KEY_PATTERNS, _duplicate_positional_matrix),
    ]


def _ram_parts(c: Any) -> list[HFPart]:
    return [HFPart("Swin", c.swin, (("", "swin/"),), SWIN_KEY_PATTERNS, _split_qkv)]


def _grounding_dino_parts(c: Any) -> list[HFPart]:
    """The whole detector, with the epsilon that transformers has, and without BERT's pooler, which nothing reads."""
    text = dataclasses.replace(c.text, pooler=False)
    part = dataclasses.replace(c, text=text, inverse_sigmoid_eps=1e-5, delimiter_ids=(101, 102, 1012, 1029))
    return [HFPart("Grounding DINO", part, (("", ""),), GROUNDING_DINO_KEY_PATTERNS, _split_qkv)]


def _eva_parts(c: Any) -> list[HFPart]:
    from lionjax.models.connectors.qformer import QFormerConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    language = T5Config(32, 8, 4, 2, 8, 1, 1, 4, activation="gelu")
    qformer = QFormerConfig(8, 2, 2, 8, 2, 2, c.width, use_text_input=False)
    blip2 = VisualPrefixLM(
        c,
        language,
        qformer,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=c.norm_eps,
        projector_depth=1,
        image_token_id=31,
    )

    def prepare_tensors(tensors):
        return _merge_qkv_bias({f"visual_encoder.{name}": w for name, w in tensors.items()})

    paths = (("vision/", ""), ("", "random/"))
    return [HFPart("BLIP-2", blip2, paths, EVA_KEY_PATTERNS, prepare_tensors, "vision_model.e")]


HF_PARTS: dict[str, Callable[[Any], list[HFPart]]] = {
    "lion": _lion_parts,
    "nextchat": _nextchat_parts,
    "lisa": _nextchat_parts,
    "ram": _ram_parts,
    "eva": _eva_parts,
    "groundingdino": _grounding_dino_parts,
}
