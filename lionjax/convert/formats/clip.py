# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP with both towers: Hugging Face's folders, and OpenAI's files (arXiv 2103.00020, 2303.15343).

`hf_vision.CLIP` reads the vision tower alone.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_config_format
from lionjax.convert.formats.config_fields import BLOCK_SIZES, IMAGE_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, join, require_equal
from lionjax.convert.formats.hf_vision import CLIP_VISION_TABLE, VIT_FIELDS, clip_vision_from_hf
from lionjax.convert.io.reader import open_weights
from lionjax.core.types import UserError

if TYPE_CHECKING:
    from lionjax.models.language.clip_text import ClipTextConfig
    from lionjax.models.vlm.clip import Clip

# The released files; recognized by their names, because they have no config.
OPENAI_CLIP_FILES = ("ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "ViT-L-14-336px.pt")
OPENAI_HEAD_DIM = 64  # of all released towers

TEXT_SIZES = {"vocab_size": "vocab_size", "max_positions": "max_position_embeddings"} | BLOCK_SIZES
TEXT_FIELDS = ConfigFields(
    TEXT_SIZES | {"norm_eps": "layer_norm_eps"},
    {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12}
    | {"num_attention_heads": 8, "intermediate_size": 2048, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    | {"pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407},
    ("pad_token_id", "bos_token_id", "eos_token_id"),
    "hidden_act",
)
CLIP_TEXT_TABLE = ConfigTable(
    ("clip_text_model",), TEXT_FIELDS, inert=("attention_dropout", "dropout", "projection_dim")
)
CLIP_MODEL_TABLE = ConfigTable(
    ("clip",),
    computed={"projection_dim": 512, "logit_scale_init_value": 2.6592},
    inert=("tie_word_embeddings",),
    parts=("vision_config", "vision_config_dict", "text_config", "text_config_dict"),
)
# Before transformers 4.32 config.json named this end token, whatever the tokenizer's was.
OLD_EOS, OLD_BOS = 2, 0

_SIGLIP_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-6}
_SIGLIP_DEFAULTS |= {"intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh"}
SIGLIP_VISION_FIELDS = ConfigFields(
    IMAGE_SIZES | BLOCK_SIZES | {"norm_eps": "layer_norm_eps"},
    {"image_size": 224, "patch_size": 16} | _SIGLIP_DEFAULTS,
    activation="hidden_act",
)
SIGLIP_VISION_TABLE = ConfigTable(
    ("siglip_vision_model",),
    SIGLIP_VISION_FIELDS,
    fixed={"num_channels": (3,), "vision_use_head": (True,)},
    inert=("attention_dropout",),
)
SIGLIP_TEXT_FIELDS = ConfigFields(
    TEXT_SIZES | {"norm_eps": "layer_norm_eps"},
    {"vocab_size": 32000, "max_position_embeddings": 64} | _SIGLIP_DEFAULTS | {"pad_token_id": 1},
    ("pad_token_id",),
    "hidden_act",
)
# Texts end in the padding token; transformers' own bos_token_id and eos_token_id are another tokenizer's.
SIGLIP_TEXT_TABLE = ConfigTable(
    ("siglip_text_model",), SIGLIP_TEXT_FIELDS, {"projection_size": None}, inert=("attention_dropout",)
)
SIGLIP_TABLE = ConfigTable(("siglip",), inert=("tie_word_embeddings",), parts=("vision_config", "text_config"))
SIGLIP_VIT = {"attention_biases": "qkvo", "post_layernorm": True, "attention_pool": True}


def _clip_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vlm.clip import Clip

    s = CLIP_MODEL_TABLE.read(hf_config)
    # `*_config_dict`, of earlier versions, replaces `*_config`.
    parts = {k: f"{k}_dict" if s[f"{k}_dict"] is not None else k for k in ("vision_config", "text_config")}
    vision = clip_vision_from_hf(CLIP_VISION_TABLE, s[parts["vision_config"]], parts["vision_config"])
    text = _clip_text_from_hf(s[parts["text_config"]], parts["text_config"])
    return Clip(vision, text, s["projection_dim"], init_logit_scale=float(s["logit_scale_init_value"]))


def _clip_text_from_hf(hf_config: dict | None, path: str) -> ClipTextConfig:
    from lionjax.models.language.clip_text import ClipTextConfig

    fields = CLIP_TEXT_TABLE.read_fields(CLIP_TEXT_TABLE.read(hf_config, path))
    if fields["eos_token_id"] == OLD_EOS:
        last = fields["vocab_size"] - 1
        fields |= {"pooling": "argmax", "bos_token_id": last - 1, "eos_token_id": last}
    return ClipTextConfig(**fields)


def _clip_to_hf(c: Clip) -> dict:
    text = TEXT_FIELDS.write(c.text)
    if c.text.pooling == "argmax":
        text |= {"bos_token_id": OLD_BOS, "eos_token_id": OLD_EOS}
    text |= {"bos_token_id": c.text.eos_token_id} if text["bos_token_id"] is None else {}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.embed_dim,
        "logit_scale_init_value": c.init_logit_scale,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": c.embed_dim}
        | VIT_FIELDS.write(c.vision),
        "text_config": {"model_type": "clip_text_model", "projection_dim": c.embed_dim} | text,
    }


def _siglip_from_hf(hf_config: dict) -> Any:
    from lionjax.models.language.clip_text import ClipTextConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.clip import Clip

    s = SIGLIP_TABLE.read(hf_config)
    vision = ViTConfig(
        **SIGLIP_VISION_TABLE.read_fields(SIGLIP_VISION_TABLE.read(s["vision_config"], "vision_config")), **SIGLIP_VIT
    )
    text = SIGLIP_TEXT_TABLE.read(s["text_config"], "text_config")
    size = "hidden_size" if text["projection_size"] is None else "projection_size"  # transformers' default
    require_equal(join("text_config", size), text[size], "vision_config.hidden_size", vision.width)
    fields = SIGLIP_TEXT_TABLE.read_fields(text)
    end = {"bos_token_id": None, "eos_token_id": fields["pad_token_id"]}
    return Clip(vision, ClipTextConfig(**fields, causal=False, pooling="last", **end), vision.width, "sigmoid")


def _siglip_to_hf(c: Clip) -> dict:
    text = SIGLIP_TEXT_FIELDS.write(c.text) | {"eos_token_id": c.text.eos_token_id, "projection_size": c.embed_dim}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {"model_type": "siglip_vision_model"} | SIGLIP_VISION_FIELDS.write(c.vision),
        "text_config": {"model_type": "siglip_text_model"} | text,
    }


def _matches_clip(c: Any) -> bool:
    """Whether transformers' CLIPModel computes what this model does."""
    if type(c).__name__ != "Clip" or c.vision.attention_pool:
        return False
    v, t = c.vision, c.text
    has_layers = v.pre_layernorm and v.post_layernorm and v.attention_biases == "qkvo" and not v.patch_bias
    pools = t.causal and (t.pooling == "argmax" or (t.pooling == "eos" and t.eos_token_id != OLD_EOS))
    return has_layers and pools and t.attention_biases == "qkvo" and c.objective == "softmax"


def _matches_siglip(c: Any) -> bool:
    """Whether transformers' SiglipModel computes what this model does."""
    if type(c).__name__ != "Clip" or not c.vision.attention_pool:
        return False
    v, t = c.vision, c.text
    has_layers = v.post_layernorm and not v.pre_layernorm and v.attention_biases == "qkvo" and v.patch_bias
    return has_layers and not t.causal and t.pooling == "last" and c.objective == "sigmoid"


def _openai_sizes(hf_config: dict, path: Path, vision_tower: Path | None = None) -> dict:
    """Sizes of a CLIP with OpenAI's names, from its tensors. Raises UserError where it is none."""
    tensors = open_weights(path)
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "text_projection")
    needed += ("token_embedding.weight", "positional_embedding")
    if missing := [name for name in needed if name not in tensors]:
        raise UserError(
            f"{path} has no tensor {missing[0]!r}; a CLIP with OpenAI's names and a vision transformer has it "
            "(those with a ResNet are not supported)"
        )

    def depth(prefix: str) -> int:
        block = re.compile(re.escape(prefix) + r"transformer\.resblocks\.([0-9]{1,3})\..*")
        return 1 + max((int(match[1]) for name in tensors if (match := block.fullmatch(name))), default=0)

    patch_size, vocab_size = tensors["visual.conv1.weight"].shape[-1], tensors["token_embedding.weight"].shape[0]
    positions = tensors["visual.positional_embedding"].shape[0] - 1
    width, text_width = tensors["visual.conv1.weight"].shape[0], tensors["token_embedding.weight"].shape[1]
    return {
        "image_size": patch_size * round(positions**0.5),
        "patch_size": patch_size,
        "width": width,
        "depth": depth("visual."),
        "text_width": text_width,
        "text_depth": depth(""),
        "vocab_size": vocab_size,
        "max_positions": tensors["positional_embedding"].shape[0],
        "embed_dim": tensors["text_projection"].shape[1],
    }


def _openai_from_sizes(sizes: dict) -> Any:
    """The Clip of `_openai_sizes`; MLPs are four times as wide as their tower, and heads have 64 dimensions."""
    from lionjax.models.vlm.clip import CLIP_B32, Clip

    def layers(width: int, depth: int) -> dict:
        heads = max(1, width // OPENAI_HEAD_DIM)
        return {"width": width, "depth": depth, "num_heads": heads, "mlp_dim": 4 * width}

    image = {name: sizes[name] for name in ("image_size", "patch_size")}
    text = {name: sizes[name] for name in ("vocab_size", "max_positions")}
    ends = {"bos_token_id": sizes["vocab_size"] - 2, "eos_token_id": sizes["vocab_size"] - 1, "pad_token_id": 0}
    return Clip(
        dataclasses.replace(CLIP_B32.vision, **image, **layers(sizes["width"], sizes["depth"])),
        dataclasses.replace(
            CLIP_B32.text, **text, **layers(sizes["text_width"], sizes["text_depth"]), **ends, pooling="argmax"
        ),
        sizes["embed_dim"],
    )


def _openai_weight_map(c: Clip) -> tuple:
    from lionjax.models.vlm.clip import openai_weight_map

    return openai_weight_map(c)


CLIP_MODEL = CheckpointFormat(
    "clip_model",
    ("clip",),
    _matches_clip,
    _clip_from_hf,
    _clip_to_hf,
    ignore_patterns=(r"(vision|text)_model\.embeddings\.position_ids(?#position indices)",),
)
SIGLIP = CheckpointFormat(
    "siglip",
    ("siglip",),
    _matches_siglip,
    _siglip_from_hf,
    _siglip_to_hf,
    ignore_patterns=(r"(vision|text)_model\.embeddings\.position_ids(?#position indices)",),
)
# Read only; written as CLIP_MODEL, with Hugging Face's names.
OPENAI_CLIP_MODEL = CheckpointFormat(
    "openai_clip_model",
    (),
    lambda c: False,
    _openai_from_sizes,
    _clip_to_hf,
    _openai_weight_map,
    ignore_patterns=(r"(input_resolution|context_length|vocab_size)(?#sizes)", r".*attn_mask(?#causal mask)"),
    complete_config=_openai_sizes,
)
# Models that no class of transformers is, such as one over another tower; names are CLIP_MODEL's as far as they go.
OWN_CLIP = lionjax_config_format("clip_own", "Clip")
CONTRASTIVE_FORMATS = (CLIP_MODEL, SIGLIP, OPENAI_CLIP_MODEL, OWN_CLIP)
