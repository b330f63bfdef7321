# SPDX-License-Identifier: Apache-2.0
"""LLaVA (arXiv 2304.08485, 2310.03744), BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500).

Reads and writes Hugging Face folders and LLaVA's original checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_hf_config, read_hf_config
from lionjax.convert.formats.config_fields import BLOCK_SIZES, ConfigFields
from lionjax.convert.formats.config_table import ConfigTable, join, require_equal, unsupported
from lionjax.convert.formats.hf_language import LLAMA, LLAMA_TABLE, OPT, T5, llama_from_settings
from lionjax.convert.formats.hf_vision import CLIP, LAVIS_IGNORE_PATTERN, VIT_FIELDS
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.formats.vision_tower import (
    CLIP_336,
    CLIP_SIZES,
    LLAVA_TOWER_PREFIX,
    complete_llava_config,
    find_tower_folder,
    open_vision_tower,
)
from lionjax.convert.io.reader import CheckpointTensors
from lionjax.core.types import UserError

if TYPE_CHECKING:
    from lionjax.models.language.decoder import DecoderConfig
    from lionjax.models.language.t5 import T5Config
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

FORMAT_OF_LANGUAGE = {name: fmt for fmt in (LLAMA, OPT, T5) for name in fmt.model_types}  # by model_type
LLAVA_KEY_PATTERNS = (  # names of newer transformers models and files -> names of the published files
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
LLAVA_MODULE_NAMES = (  # names of the published files -> modules of transformers' class since 4.52
    (r"^language_model\.(?=lm_head\.)", ""),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)


def language_config_from_hf(hf_config: dict | None, default_type: str, path: str = "") -> Any:
    """The language model's config of a `text_config`, at `path` of a config.json; null means no field.

    Raises UserError for an unsupported model_type.
    """
    hf_config = {} if hf_config is None else hf_config
    model_type = hf_config.get("model_type", default_type)
    if model_type not in FORMAT_OF_LANGUAGE:
        raise unsupported(join(path, "model_type"), model_type, tuple(FORMAT_OF_LANGUAGE))
    return FORMAT_OF_LANGUAGE[model_type].config_from_hf(hf_config, path)


def language_config_to_hf(c: DecoderConfig | T5Config) -> dict:
    """The `text_config` of a language model's config."""
    checkpoint_format = next(fmt for fmt in FORMAT_OF_LANGUAGE.values() if fmt.matches(c))
    return checkpoint_format.config_to_hf(c)


def _matches_prefix(c: VisualPrefixLM, matches_qformer: Callable[[Any], bool]) -> bool:
    return type(c).__name__ == "VisualPrefixLM" and c.resampler is None and matches_qformer(c.qformer)


def has_resampler(c: VisualPrefixLM, config_class: str) -> bool:
    """Whether `c` is a VisualPrefixLM whose resampler has a config of this class."""
    return type(c).__name__ == "VisualPrefixLM" and type(c.resampler).__name__ == config_class


# LLaVA


LLAVA_TABLE = ConfigTable(
    ("llava",),
    computed={
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    },
    fixed={
        "projector_hidden_act": ("gelu", "gelu_python"),
        "multimodal_projector_bias": (True,),
        "vision_feature_select_strategy": ("default", "full"),
    },
    inert=("image_seq_length", "ignore_index", "vocab_size"),
    parts=("text_config", "vision_config"),
    aliases={"image_token_id": "image_token_index"},
)
# Fields of LLaVA's original code and of NExT-Chat's, beside those of the language model: how it was trained, and what
# prompts and image processor take from config.json.
MM_INERT = (
    "freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler tune_mm_mlp_adapter tune_mm_vision_resampler "
    "unfreeze_mm_vision_tower mm_projector_lr mm_vision_tower_lr pretrain_mm_mlp_adapter mm_use_im_start_end "
    "mm_use_im_patch_token image_grid_pinpoints image_crop_resolution image_split_resolution"
).split()
MM_FIXED = {
    "use_mm_proj": (True, None),
    "mm_resampler_type": (None,),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "square", "pad"),
    "sep_image_conv_front": (False, None),
}
ORIGINAL_LLAVA_TABLE = ConfigTable(
    ("llava", "llava_llama"),
    LLAMA_TABLE.fields,
    {
        **LLAMA_TABLE.computed,
        "mm_vision_tower": None,
        "mm_hidden_size": None,
        "mm_projector_type": "linear",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_token_index": -200,  # IMAGE_TOKEN_INDEX
    },
    fixed={**LLAMA_TABLE.fixed, **MM_FIXED, "mm_vision_select_feature": ("patch", "cls_patch")},
    inert=(*LLAMA_TABLE.inert, *MM_INERT),
    parts=("vision_config",),
)
PROJECTOR_DEPTHS = {"linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2}


def feature_layer_index(path: str, layer: int, depth: int) -> int:
    """The index -depth..-1 of hidden state `layer` of a tower, counted as in transformers: 0 is the embeddings."""
    if not (-depth <= layer <= -1 or 1 <= layer <= depth):
        raise unsupported(path, layer, (f"-{depth}..-1", f"1..{depth}"))
    return layer if layer < 0 else layer - depth - 1


def _llava_config_from_hf(hf_config: dict) -> Any:
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    if "text_config" not in hf_config:
        return _original_llava_config_from_hf(hf_config)
    s = LLAVA_TABLE.read(hf_config)
    vision = CLIP.config_from_hf(CLIP_336 if s["vision_config"] is None else s["vision_config"], "vision_config")
    language = language_config_from_hf(s["text_config"], "llama", "text_config")
    if s["tie_word_embeddings"]:
        language = dataclasses.replace(language, tie_embeddings=True)
    return VisualPrefixLM(
        vision,
        language,
        feature_layer=feature_layer_index("vision_feature_layer", s["vision_feature_layer"], vision.depth),
        keep_class_token=s["vision_feature_select_strategy"] == "full",
        image_token_id=s["image_token_index"],
        prepend_image=False,
    )


def _original_llava_config_from_hf(hf_config: dict) -> Any:
    """The config of LLaVA's original config.json: the language model's, with additional mm_* fields."""
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    s = ORIGINAL_LLAVA_TABLE.read(hf_config)
    tower, kind = s["mm_vision_tower"], s["mm_projector_type"]
    vision_config = CLIP_SIZES.get(tower) if s["vision_config"] is None else s["vision_config"]
    if vision_config is None:
        raise unsupported("mm_vision_tower", tower, tuple(CLIP_SIZES))
    if kind not in PROJECTOR_DEPTHS:
        raise unsupported("mm_projector_type", kind, tuple(PROJECTOR_DEPTHS))
    vision = CLIP.config_from_hf(vision_config, "vision_config")
    require_equal("mm_hidden_size", s["mm_hidden_size"], "the width of its vision tower", vision.width)
    return VisualPrefixLM(
        vision,
        llama_from_settings(ORIGINAL_LLAVA_TABLE, s),
        feature_layer=feature_layer_index("mm_vision_select_layer", s["mm_vision_select_layer"], vision.depth),
        keep_class_token=s["mm_vision_select_feature"] == "cls_patch",
        projector_depth=PROJECTOR_DEPTHS[kind],
        image_token_id=s["image_token_index"],
        prepend_image=False,
        torch_names="original",
    )


IMAGE_TOKEN_INDEX = -200  # placeholder of an image in the original LLaVA's prompts; not in the vocabulary
EMBED_TOKENS_KEY, LM_HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"


def _llava_config_to_hf(c: VisualPrefixLM) -> dict:
    if c.torch_names == "original" and (c.is_encoder_decoder or c.num_prefix_tokens or not c.vision.pre_layernorm):
        return lionjax_hf_config(c, "llava")
    if c.torch_names == "original":
        return _original_llava_config_to_hf(c)
    vocab_size = c.language.vocab_size
    if c.image_token_id is None or not 0 <= c.image_token_id < vocab_size:
        raise UserError(
            f"image_token_id is {c.image_token_id}; Hugging Face's LLaVA needs a token id below {vocab_size}: "
            "add a token, or set the model's torch_names to 'original'"
        )
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": c.image_token_id,
        "image_seq_length": c.vision.num_patches + c.keep_class_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": c.feature_layer,
        "vision_feature_select_strategy": "full" if c.keep_class_token else "default",
        "tie_word_embeddings": c.language.tie_embeddings,
        "text_config": language_config_to_hf(c.language),
        "vision_config": CLIP.config_to_hf(c.vision),
    }


def _original_llava_config_to_hf(c: VisualPrefixLM) -> dict:
    vision = CLIP.config_to_hf(c.vision)
    tower_names = [name for name, sizes in CLIP_SIZES.items() if CLIP.config_from_hf(sizes) == c.vision]
    hf_config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",  # of LLaVA's code; transformers would read "llava" as its own LlavaConfig
        "mm_hidden_size": c.vision.width,
        "mm_projector_type": "mlp2x_gelu" if c.projector_depth == 2 else "linear",
        "mm_vision_select_layer": c.feature_layer,
        "mm_vision_select_feature": "cls_patch" if c.keep_class_token else "patch",
        "use_mm_proj": True,
    }
    hf_config |= {"mm_vision_tower": tower_names[0]} if tower_names else {"vision_config": vision}
    if c.image_token_id not in (None, IMAGE_TOKEN_INDEX):
        hf_config["image_token_index"] = c.image_token_id
    return LLAMA.config_to_hf(c.language) | hf_config


def _prepare_llava_tensors(c: VisualPrefixLM, tensors: CheckpointTensors, folder: Path) -> CheckpointTensors:
    """LLaVA's tensors under the weight map's names, with the CLIP and LLaMA of subfolders where the file lacks them."""
    if c.torch_names == "hugging_face":
        return tensors.rename_keys(*LLAVA_KEY_PATTERNS)
    if not any(name.startswith("model.layers.") for name in tensors):
        language_folder = _find_part_folder(folder, LLAMA, "language model")
        tensors = add_mm_projector(tensors, open_part(language_folder, LLAMA, c.language))
    return with_named_tower(c, tensors, folder)


def with_named_tower(c: Any, tensors: CheckpointTensors, folder: Path) -> CheckpointTensors:
    """The tensors with those of the CLIP in a subfolder of `folder`, unless they hold a tower."""
    if any(name.startswith(LLAVA_TOWER_PREFIX) for name in tensors):
        return tensors
    name = str(read_hf_config(folder / "config.json").get("mm_vision_tower") or "")
    tower_folder = find_tower_folder(folder, name) or _find_part_folder(folder, CLIP, "vision tower")
    return tensors | open_vision_tower(tower_folder, c.vision)


def _find_part_folder(folder: Path, checkpoint_format: CheckpointFormat, description: str) -> Path:
    """The only subfolder of `folder` with this checkpoint format. Raises UserError where there are none or several."""
    part_folders = [
        f.parent
        for f in sorted(folder.glob("*/config.json"))
        if read_hf_config(f).get("model_type") in checkpoint_format.model_types
    ]
    if len(part_folders) != 1:
        raise UserError(
            f"{folder} has {len(part_folders)} subfolders with a {description}; put the folder of its "
            f"{checkpoint_format.name} (config.json and weights) inside it, exactly one"
        )
    return part_folders[0]


def add_mm_projector(trained: CheckpointTensors, language: CheckpointTensors) -> CheckpointTensors:
    """LLaVA's mm_projector.bin (`trained`) together with its language model.

    Where `trained` holds token embeddings, its last rows are new tokens; their LM head rows are the mean of all others,
    as in LLaVA's code.
    """
    if EMBED_TOKENS_KEY not in trained:
        return trained | language
    trained_table, table, head = trained[EMBED_TOKENS_KEY], language[EMBED_TOKENS_KEY], language[LM_HEAD_KEY]
    # The trained table holds all tokens, or only the new ones.
    num_new = len(trained_table) - len(table) if len(trained_table) > len(table) else len(trained_table)
    arrays = {name: array for name, array in trained.items() if name != EMBED_TOKENS_KEY}
    arrays |= {name: array for name, array in language.items() if name not in (EMBED_TOKENS_KEY, LM_HEAD_KEY)}
    new_rows = trained_table[len(trained_table) - num_new :].astype(table.dtype)
    arrays[EMBED_TOKENS_KEY] = np.concatenate([table, new_rows])
    mean = head.mean(0, dtype=np.float32).astype(head.dtype)
    arrays[LM_HEAD_KEY] = np.concatenate([head, np.broadcast_to(mean, (num_new, *mean.shape))])
    tensors = CheckpointTensors(arrays, trained.files + language.files, trained.skipped | language.skipped)
    tensors.memory_mapped = (trained.memory_mapped | language.memory_mapped) - {EMBED_TOKENS_KEY, LM_HEAD_KEY}
    return tensors


# BLIP-2 and InstructBLIP

_QFORMER_SIZES = {"vocab_size": "vocab_size", "max_positions": "max_position_embeddings"}
_QFORMER_VALUES = {"norm_eps": "layer_norm_eps", "dropout": "hidden_dropout_prob"}
QFORMER_FIELDS = ConfigFields(
    BLOCK_SIZES
    | _QFORMER_SIZES
    | _QFORMER_VALUES
    | {"cross_attention_frequency": "cross_attention_frequency", "vision_width": "encoder_hidden_size"},
    {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"intermediate_size": 3072, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
    | {"cross_attention_frequency": 2, "encoder_hidden_size": 1408},
)
QFORMER_TABLE = ConfigTable(
    ("blip_2_qformer", "instructblip_qformer"),
    QFORMER_FIELDS,
    fixed={
        "hidden_act": ("gelu", "gelu_python"),
        "use_qformer_text_input": (False, None),  # true: retrieval heads and no language model
        "position_embedding_type": ("absolute",),
    },
    inert=("attention_probs_dropout_prob",),
)
BLIP2_VISION_TABLE = ConfigTable(
    ("blip_2_vision_model", "instructblip_vision_model"),
    VIT_FIELDS,
    {"patch_size": 14, "hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16}
    | {"intermediate_size": 6144, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
    fixed={"qkv_bias": (True,), "num_channels": (3,)},
    inert=("attention_dropout", "dropout", "projection_dim"),
)
BLIP2_TABLE = ConfigTable(
    ("blip-2", "instructblip"),
    computed={"num_query_tokens": 32, "image_token_index": None},
    # use_decoder_only_language_model follows from text_config; tie_word_embeddings is that of text_config.
    inert=("image_text_hidden_size", "use_decoder_only_language_model", "tie_word_embeddings"),
    parts=("text_config", "vision_config", "qformer_config"),
    aliases={"image_token_id": "image_token_index"},
)


def _blip2_config_from_hf(hf_config: dict, qformer_text: bool) -> Any:
    from lionjax.models.connectors.qformer import QFormerConfig
    from lionjax.models.vision.vit import ViTConfig
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM

    s = BLIP2_TABLE.read(hf_config)
    v = BLIP2_VISION_TABLE.read(s["vision_config"], "vision_config")
    vision = ViTConfig(**BLIP2_VISION_TABLE.read_fields(v))
    # encoder_hidden_size is overridden by the width of the vision tower, as in transformers.
    q = QFORMER_TABLE.read(s["qformer_config"], "qformer_config") | {"encoder_hidden_size": vision.width}
    return VisualPrefixLM(
        vision,
        language_config_from_hf(s["text_config"], "opt", "text_config"),
        QFormerConfig(
            **QFORMER_TABLE.read_fields(q), num_query_tokens=s["num_query_tokens"], use_text_input=qformer_text
        ),
        feature_layer=-1,
        keep_class_token=True,
        vision_norm_eps=vision.norm_eps,
        projector_depth=1,
        image_token_id=s["image_token_index"],
    )


def _blip2_config_to_hf(c: VisualPrefixLM) -> dict:
    """config.json of a BLIP-2 or InstructBLIP.

    Hugging Face has one epsilon for the vision tower's norms and the norm after it; LAVIS has 1e-6 and 1e-5.
    """
    text, q = c.qformer.use_text_input, c.qformer
    hf_config = {
        "architectures": [f"{'InstructBlip' if text else 'Blip2'}ForConditionalGeneration"],
        "model_type": "instructblip" if text else "blip-2",
        "num_query_tokens": q.num_query_tokens,
        "use_decoder_only_language_model": not c.is_encoder_decoder,
        "text_config": language_config_to_hf(c.language),
        "vision_config": {
            "model_type": "instructblip_vision_model" if text else "blip_2_vision_model",
            "qkv_bias": True,
        }
        | VIT_FIELDS.write(c.vision),
        "qformer_config": {
            "model_type": "instructblip_qformer" if text else "blip_2_qformer",
            "attention_probs_dropout_prob": q.dropout,
        }
        | QFORMER_FIELDS.write(q),
    }
    return hf_config | ({} if c.image_token_id is None else {"image_token_index": c.image_token_id})


def _hf_or_original_config(hf_settings: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """A function to `hf_settings(c)` for Hugging Face's names, else to the lionjax config: LAVIS has no config.json."""

    def to_hf(c: VisualPrefixLM) -> dict:
        if c.torch_names == "hugging_face":
            return hf_settings(c)
        return lionjax_hf_config(c, "instructblip" if c.qformer.use_text_input else "blip2")

    return to_hf


_POSITION_IDS_PATTERN = r".*(vision_model\.embeddings|qformer\.embeddings)\.position_ids(?#position indices)"
_ROPE_BUFFER_PATTERN = r".*model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)"
_UNUSED_BIAS_PATTERN = r"(language_model|t5_model)\." + T5.ignore_patterns[0]
_STAGE1_HEADS_PATTERN = r"Qformer\.cls\..*|(vision_proj|text_proj|itm_head)\..*|temp(?#heads of stage 1)"
_BLIP2_IGNORE_PATTERNS = (
    _POSITION_IDS_PATTERN,
    _ROPE_BUFFER_PATTERN,
    _UNUSED_BIAS_PATTERN,
    _STAGE1_HEADS_PATTERN,
    LAVIS_IGNORE_PATTERN,
)
_TIED_HEAD_KEYS = tuple((f"{x}_model.lm_head.weight", f"{x}_model.shared.weight") for x in ("language", "t5"))

LLAVA = CheckpointFormat(
    "llava",
    ("llava", "llava_llama"),
    lambda c: _matches_prefix(c, lambda q: q is None),
    _llava_config_from_hf,
    _llava_config_to_hf,
    ignore_patterns=(_POSITION_IDS_PATTERN, _ROPE_BUFFER_PATTERN),
    key_patterns=LLAVA_KEY_PATTERNS,
    module_names=LLAVA_MODULE_NAMES,
    prepare_tensors=_prepare_llava_tensors,
    complete_config=complete_llava_config,
)
BLIP2 = CheckpointFormat(
    "blip2",
    ("blip-2",),
    lambda c: _matches_prefix(c, lambda q: q is not None and not q.use_text_input),
    lambda s: _blip2_config_from_hf(s, False),
    _hf_or_original_config(_blip2_config_to_hf),
    ignore_patterns=_BLIP2_IGNORE_PATTERNS,
    tied_keys=_TIED_HEAD_KEYS,
)
INSTRUCTBLIP = CheckpointFormat(
    "instructblip",
    ("instructblip",),
    lambda c: _matches_prefix(c, lambda q: q is not None and q.use_text_input),
    lambda s: _blip2_config_from_hf(s, True),
    _hf_or_original_config(_blip2_config_to_hf),
    ignore_patterns=_BLIP2_IGNORE_PATTERNS,
    tied_keys=_TIED_HEAD_KEYS,
)
VLM_FORMATS = (LLAVA, BLIP2, INSTRUCTBLIP)
