# SPDX-License-Identifier: Apache-2.0
"""Parts of systems of which transformers has no class, as models of which it has one.

LION without its aggregator and adapters is an InstructBLIP, NExT-Chat without its places a LLaVA and a SAM, RAM begins
with a Swin, and EVA is the tower of a BLIP-2. Names change by patterns written down from the originals' code, not by
our tables, so that a mistake in a table shows.
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
    """A part of a system as a model by itself.

    `paths`: (prefix of its paths, prefix of the system's). `names`: patterns of the system's torch names and what
    transformers calls them, each replaced in turn. `taken`: what is made of the file's tensors before. `only`: the one
    part of it whose stages say something; the rest has random numbers.
    """

    name: str
    config: Any
    path_prefixes: StringPairs
    key_patterns: StringPairs
    prepare_tensors: Callable[[Mapping], Mapping] = lambda tensors: tensors
    compared_prefix: str = ""

    def to_hf_tensors(self, tensors: Mapping, expected_keys: Mapping) -> tuple[dict, set[str]]:
        """The file's tensors under transformers' names, those that are `wanted`; and which of the file's went in."""
        made, used = {}, set()
        for name, array in self.prepare_tensors(tensors).items():
            spelled = name
            for pattern, new in self.key_patterns:
                spelled = re.sub(pattern, new, spelled)
            if spelled in expected_keys:
                made[spelled] = np.asarray(array)
                used.add(name)
        return made, used

    def select_params(self, flat_params: Mapping, expected_paths: Mapping) -> dict:
        """Our parameters by the paths of the part, those that are `wanted` and there."""
        made = {}
        for path in expected_paths:
            front, ours = next(pair for pair in self.path_prefixes if path.startswith(pair[0]))
            if ours + path.removeprefix(front) in flat_params:
                made[path] = flat_params[ours + path.removeprefix(front)]
        return made


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
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.0\.", r".\1.proj_in."),
    (r"\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.2\.", r".\1.proj_out."),
    (r"\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.1\.", r".\1.layers.0."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
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


def _merge_qkv_bias(tensors: Mapping) -> dict:
    """EVA's biases of queries and values as one with that of the keys, which is zero."""
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith(".attn.q_bias")]:
        q, v = made.pop(name), made.pop(name.replace("q_bias", "v_bias"))
        made[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, np.zeros_like(q), v])
    return made


def _split_qkv(tensors: Mapping) -> dict:
    """A Swin's queries, keys and values each by itself."""
    made = dict(tensors)
    for name in [name for name in tensors if ".attn.qkv." in name]:
        for word, part in zip(("query", "key", "value"), np.split(made.pop(name), 3)):
            made[name.replace("qkv", word)] = part
    return made


def _duplicate_positional_matrix(tensors: Mapping) -> dict:
    """SAM's random matrix, which transformers' files hold twice."""
    matrix = "sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    return {**tensors, "prompt_encoder.shared_embedding.positional_embedding": tensors[matrix]}


def _lion_parts(c: Any) -> list[HFPart]:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    if not c.encodes or c.visual_input == "AGGREGATOR":
        return []
    language = dataclasses.replace(c.language, adapters=None)
    # transformers has one epsilon for the tower and the norm behind it.
    whole = VisualPrefixLM(
        c.vision,
        language,
        c.qformer,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=c.vision.eps,
        projector_depth=1,
        image_token_id=language.vocab - 1,
    )
    paths = (("vision_norm/", "qformer_norm/"), ("projector/", "qformer_projector/"), ("", ""))
    names = (*EVA_KEY_PATTERNS, *QFORMER_KEY_PATTERNS)
    if not c.qformer.text:
        names = tuple((p, n.replace("qformer.embeddings.layernorm", "qformer.layernorm")) for p, n in names)
    return [HFPart("InstructBLIP", whole, paths, names, _merge_qkv_bias)]


def _nextchat_parts(c: Any) -> list[HFPart]:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    front = VisualPrefixLM(c.vision, c.language, feature_layer=c.feature_layer, image_token_id=c.language.vocab - 1)
    seeing = [HFPart("LLaVA", front, (("", ""),), LLAVA_KEY_PATTERNS)]
    return [
        *(seeing if c.projector_depth == 2 and c.vision.pre_layernorm else []),
        HFPart("SAM", c.sam, (("", "sam/"),), SAM_KEY_PATTERNS, _duplicate_positional_matrix),
    ]


def _ram_parts(c: Any) -> list[HFPart]:
    return [HFPart("Swin", c.swin, (("", "swin/"),), SWIN_KEY_PATTERNS, _split_qkv)]


def _eva_parts(c: Any) -> list[HFPart]:
    from lionjax.models.connectors.qformer import QFormerConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    language = T5Config(32, 8, 4, 2, 8, 1, 1, 4, activation="gelu")
    bridge = QFormerConfig(8, 2, 2, 8, 2, 2, c.width, use_text_input=False)
    whole = VisualPrefixLM(
        c,
        language,
        bridge,
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=c.eps,
        projector_depth=1,
        image_token_id=31,
    )

    def taken(tensors):
        return _merge_qkv_bias({f"visual_encoder.{name}": w for name, w in tensors.items()})

    paths = (("vision/", ""), ("", "random/"))
    return [HFPart("BLIP-2", whole, paths, EVA_KEY_PATTERNS, taken, "vision_model.e")]


HF_PARTS: dict[str, Callable[[Any], list[HFPart]]] = {
    "lion": _lion_parts,
    "nextchat": _nextchat_parts,
    "ram": _ram_parts,
    "eva": _eva_parts,
}
