# SPDX-License-Identifier: Apache-2.0
"""LISA (arXiv 2308.00692) as released: LLaVA's config.json and names, the [SEG] projector, SAM, and LoRA merged.

The released folder leaves out CLIP, which config.json names; its subfolder or --vision-tower holds it. The id of [SEG]
is that of its tokenizer: the first of the tokens that LISA adds to LLaMA's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.checkpoint_format import lionjax_config_format, lionjax_hf_config, read_lionjax_config
from lionjax.convert.formats.config_table import require_equal, unsupported
from lionjax.convert.formats.hf_language import LLAMA, llama_from_settings
from lionjax.convert.formats.hf_vision import CLIP
from lionjax.convert.formats.hf_vlm import ORIGINAL_LLAVA_TABLE, PROJECTOR_DEPTHS, feature_layer_index, with_named_tower
from lionjax.convert.formats.vision_tower import CLIP_SIZES, complete_llava_config

if TYPE_CHECKING:
    from lionjax.models.vlm.lisa import Lisa

LISA_CLASS = "LISAForCausalLM"  # in `architectures`; its model_type is LLaVA's
NUM_ADDED_TOKENS = 3  # [SEG], <im_start>, <im_end>
TABLE = dataclasses.replace(
    ORIGINAL_LLAVA_TABLE,
    model_types=("llava", "lisa"),
    computed={**ORIGINAL_LLAVA_TABLE.computed, "out_dim": 256},
    inert=(*ORIGINAL_LLAVA_TABLE.inert, "train_mask_decoder", "vision_tower"),
)


def _config_from_hf(hf_config: dict) -> Any:
    """The config in a lionjax config.json, else the released SAM beside config.json's language model and CLIP."""
    from lionjax.models.vlm.lisa import Lisa

    if "system" in hf_config:
        return read_lionjax_config(hf_config)
    s = TABLE.read(hf_config)
    language, kind, sizes = llama_from_settings(TABLE, s), s["mm_projector_type"], s["vision_config"]
    if sizes is None and (sizes := CLIP_SIZES.get(s["mm_vision_tower"])) is None:
        raise unsupported("mm_vision_tower", s["mm_vision_tower"], tuple(CLIP_SIZES))
    if PROJECTOR_DEPTHS.get(kind) not in (1, 2):
        raise unsupported("mm_projector_type", kind, tuple(PROJECTOR_DEPTHS))
    if s["mm_vision_select_feature"] != "patch":
        raise unsupported("mm_vision_select_feature", s["mm_vision_select_feature"], ("patch",))
    vision, model = CLIP.config_from_hf(sizes, "vision_config"), Lisa()
    require_equal("mm_hidden_size", s["mm_hidden_size"], "the width of its vision tower", vision.width)
    require_equal("out_dim", s["out_dim"], "the width of SAM's prompts", model.sam.prompt_embed_dim)
    return dataclasses.replace(
        model,
        vision=vision,
        language=language,
        feature_layer=feature_layer_index("mm_vision_select_layer", s["mm_vision_select_layer"], vision.depth),
        projector_depth=PROJECTOR_DEPTHS[kind],
        image_token_id=s["image_token_index"],
        mask_token_id=language.vocab_size - NUM_ADDED_TOKENS,
    )


def _config_to_hf(c: Lisa) -> dict:
    """The released config.json; with the lionjax config too where that cannot say all, and alone with a T5."""
    if c.is_encoder_decoder:
        return {"architectures": [LISA_CLASS], "model_type": "lisa"} | lionjax_hf_config(c, "lisa")
    hf_config = LLAMA.config_to_hf(c.language) | {
        "architectures": [LISA_CLASS],
        "model_type": "lisa",  # transformers would read "llava", the released one, as its own LlavaConfig
        "mm_hidden_size": c.vision.width,
        "mm_projector_type": "mlp2x_gelu" if c.projector_depth == 2 else "linear",
        "mm_use_im_start_end": True,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": c.feature_layer,
        "out_dim": c.sam.prompt_embed_dim,
        "train_mask_decoder": True,
        "use_mm_proj": True,
    }
    names = [name for name, sizes in CLIP_SIZES.items() if CLIP.config_from_hf(sizes) == c.vision]
    if names and _config_from_hf(named := hf_config | {"mm_vision_tower": names[0]}) == _plain(c):
        return named
    return hf_config | lionjax_hf_config(c, "lisa")


def _plain(c: Lisa) -> Lisa:
    """The config without what does not change its weights or outputs."""
    language = dataclasses.replace(c.language, remat="none", lora=type(c.language.lora)())
    parts = {name: dataclasses.replace(getattr(c, name), remat="none") for name in ("vision", "sam")}
    return dataclasses.replace(c, language=language, dtype="float32", max_masks=type(c)().max_masks, **parts)


LISA = lionjax_config_format(
    "lisa",
    "Lisa",
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    ignore_patterns=(
        *LLAMA.ignore_patterns,
        r"model\.vision_tower\.vision_tower\.vision_model\.embeddings\.position_ids(?#position indices)",
        r"model\.visual_model\.pixel_(mean|std)(?#image normalization)",
    ),
    complete_config=complete_llava_config,
    prepare_tensors=with_named_tower,
)


def lisa_format_name(hf_config: dict) -> str | None:
    """The format's name if config.json is that of a released LISA, else None."""
    return LISA.name if LISA_CLASS in (hf_config.get("architectures") or ()) else None
