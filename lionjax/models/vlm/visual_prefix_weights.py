# SPDX-License-Identifier: Apache-2.0
"""Weight maps of `VisualPrefixLM`: torch names in Hugging Face's classes and in the original code of each paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lionjax.core.weight_map import WeightMapping, reshape, with_prefix
from lionjax.models.connectors import mqformer, perceiver, qformer
from lionjax.models.language import decoder_weights, t5
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import vit
from lionjax.models.vlm import experts
from lionjax.nn.layers import dense_weight_map, norm_weight_map

if TYPE_CHECKING:
    from lionjax.models.vlm.lyrics_stage1 import LyricsStage1
    from lionjax.models.vlm.visual_prefix import VisualPrefixLM


def language_weight_map(c: DecoderConfig | T5Config) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's class of the language model, without the prefix it has inside a VLM."""
    if isinstance(c, T5Config):
        return t5.weight_map(c)
    return decoder_weights.weight_map(c)


def _mlp_projector_weight_map(torch_prefix: str, up_name: str, down_name: str) -> tuple[WeightMapping, ...]:
    return (
        *dense_weight_map(torch_prefix + up_name, "projector/up"),
        *dense_weight_map(torch_prefix + down_name, "projector/down"),
    )


def hf_weight_map(c: VisualPrefixLM) -> tuple[WeightMapping, ...]:
    """Names of LlavaForConditionalGeneration, or with a Q-Former Blip2- and InstructBlipForConditionalGeneration.

    Newer versions of transformers use other names for LLaVA's submodules in memory, but still read these.
    """
    if c.resampler is not None:
        return kosmos2_weight_map(c)
    language = with_prefix("language_model.", "language/", language_weight_map(c.language))
    if c.qformer is None:
        return (
            *with_prefix("vision_tower.vision_model.", "vision/", vit.clip_weight_map(c.vision)),
            *_mlp_projector_weight_map("multi_modal_projector.", "linear_1", "linear_2"),
            *language,
        )
    return (
        *with_prefix("vision_model.", "vision/", vit.blip2_weight_map(c.vision)),
        *norm_weight_map("vision_model.post_layernorm", "vision_norm"),
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
        *with_prefix("qformer.", "qformer/", qformer.hf_weight_map(c.qformer)),
        *dense_weight_map("language_projection", "projector"),
        *language,
    )


def original_weight_map(c: VisualPrefixLM) -> tuple[WeightMapping, ...]:
    """Names of the original LLaVA code, or with a Q-Former those of LAVIS (BLIP-2, InstructBLIP) and MiniGPT-4."""
    if c.resampler is not None:
        return mplug_owl_weight_map(c)
    if mqformer.region_width(c.qformer):
        return lyrics_weight_map(c)
    if c.qformer is None:
        projector = _mlp_projector_weight_map("model.mm_projector.", "0", "2")
        if c.projector_depth == 1:
            projector = dense_weight_map("model.mm_projector", "projector")
        tower = "model.vision_tower.vision_tower.vision_model."
        return (
            *with_prefix(tower, "vision/", vit.tower_weight_map(c.vision, vit.clip_weight_map)),
            *projector,
            *with_prefix("", "language/", language_weight_map(c.language)),
        )
    language_name = lavis_language_name(c)
    return (
        *with_prefix("visual_encoder.", "vision/", vit.lavis_weight_map(c.vision)),
        *norm_weight_map("ln_vision", "vision_norm"),
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
        *with_prefix("Qformer.bert.", "qformer/", qformer.lavis_weight_map(c.qformer)),
        *dense_weight_map(f"{language_name}_proj", "projector"),
        *with_prefix(f"{language_name}_model.", "language/", language_weight_map(c.language)),
    )


def lavis_language_name(c: VisualPrefixLM) -> str:
    """LAVIS's name for the language model; "llama" is MiniGPT-4's, whose Q-Former reads no text."""
    if isinstance(c.language, T5Config):
        return "t5"
    if c.language.max_positions:
        return "opt"
    return "llm" if c.qformer.use_text_input else "llama"


def mplug_owl_weight_map(c: VisualPrefixLM) -> tuple[WeightMapping, ...]:
    """Names of the original mPLUG-Owl code."""
    return (
        *with_prefix("vision_model.", "vision/", vit.tower_weight_map(c.vision, vit.mplug_owl_weight_map)),
        *norm_weight_map("vision_model.post_layernorm", "vision_norm"),
        *with_prefix("", "latents/", perceiver.abstractor_weight_map(c.resampler)),
        *dense_weight_map("abstractor.visual_fc", "projector"),
        WeightMapping("abstractor.vit_eos", "last_word", reshape((1, 1, -1), (-1,))),
        *with_prefix("language_model.", "language/", language_weight_map(c.language)),
    )


def lyrics_weight_map(c: VisualPrefixLM) -> tuple[WeightMapping, ...]:
    """Names of the second stage of Lyrics' released code."""
    return (
        *lyrics_tower_weight_map(c),
        *with_prefix("", "qformer/", qformer.query_tokens_weight_map(c.qformer)),
        *with_prefix("qformer.", "qformer/", mqformer.weight_map(c.qformer)),
        *dense_weight_map("language_projection", "projector"),
        *with_prefix("language_model.", "language/", language_weight_map(c.language)),
    )


def lyrics_tower_weight_map(c: VisualPrefixLM | LyricsStage1) -> tuple[WeightMapping, ...]:
    """Names of the vision tower and the experts in both stages of Lyrics; a CLIP tower has Hugging Face's names."""
    names = vit.clip_weight_map if c.vision.pre_layernorm else vit.blip2_weight_map
    return (
        *with_prefix("vision_model.", "vision/", names(c.vision)),
        *norm_weight_map("vision_model.post_layernorm", "vision_norm"),
        *experts.experts_weight_map(c),
    )


def kosmos2_weight_map(c: VisualPrefixLM) -> tuple[WeightMapping, ...]:
    """Names of Kosmos2ForConditionalGeneration."""
    return (
        *with_prefix("vision_model.model.", "vision/", vit.tower_weight_map(c.vision, vit.clip_weight_map)),
        *norm_weight_map("vision_model.model.post_layernorm", "vision_norm"),
        *with_prefix("image_to_text_projection.", "latents/", perceiver.projection_weight_map(c.resampler)),
        *with_prefix("text_model.", "language/", language_weight_map(c.language)),
    )
