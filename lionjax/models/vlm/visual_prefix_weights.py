# SPDX-License-Identifier: Apache-2.0
"""What the weights of a `Prefix` are called in torch: in Hugging Face's classes, and in the code they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lionjax.core.weight_map import Row, reshaped, under
from lionjax.models.connectors import perceiver, qformer
from lionjax.models.language import decoder_weights, t5
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision import vit
from lionjax.nn.layers import dense_rows, norm_rows

if TYPE_CHECKING:
    from lionjax.models.vlm.visual_prefix import Prefix


def language_rows(c: DecoderConfig | T5Config) -> tuple[Row, ...]:
    """Names of Hugging Face's class of the language model alone."""
    if isinstance(c, T5Config):
        return t5.torch_rows(c)
    return decoder_weights.torch_rows(c)


def _two_layers(torch: str, first: str, second: str) -> tuple[Row, ...]:
    return (*dense_rows(torch + first, "projector/up"), *dense_rows(torch + second, "projector/down"))


def hugging_face_rows(c: Prefix) -> tuple[Row, ...]:
    """LlavaForConditionalGeneration, or with a Q-Former Blip2- and InstructBlipForConditionalGeneration, as published.

    Newer versions of transformers call LLaVA's parts otherwise in memory, and read these names all the same.
    """
    if c.latents is not None:
        return kosmos_rows(c)
    language = under("language_model.", "language/", language_rows(c.language))
    if c.qformer is None:
        return (
            *under("vision_tower.vision_model.", "vision/", vit.clip_rows(c.vision)),
            *_two_layers("multi_modal_projector.", "linear_1", "linear_2"),
            *language,
        )
    return (
        *under("vision_model.", "vision/", vit.blip_rows(c.vision)),
        *norm_rows("vision_model.post_layernorm", "vision_norm"),
        *under("", "qformer/", qformer.query_rows(c.qformer)),
        *under("qformer.", "qformer/", qformer.hugging_face_rows(c.qformer)),
        *dense_rows("language_projection", "projector"),
        *language,
    )


def original_rows(c: Prefix) -> tuple[Row, ...]:
    """LLaVA's own code, or with a Q-Former LAVIS (BLIP-2, InstructBLIP) and MiniGPT-4."""
    if c.latents is not None:
        return owl_rows(c)
    if c.qformer is None:
        projector = _two_layers("model.mm_projector.", "0", "2")
        if c.projector_depth == 1:
            projector = dense_rows("model.mm_projector", "projector")
        tower = "model.vision_tower.vision_tower.vision_model."
        return (
            *under(tower, "vision/", vit.tower_rows(c.vision, vit.clip_rows)),
            *projector,
            *under("", "language/", language_rows(c.language)),
        )
    word = original_word(c)
    return (
        *under("visual_encoder.", "vision/", vit.lavis_rows(c.vision)),
        *norm_rows("ln_vision", "vision_norm"),
        *under("", "qformer/", qformer.query_rows(c.qformer)),
        *under("Qformer.bert.", "qformer/", qformer.torch_rows(c.qformer)),
        *dense_rows(f"{word}_proj", "projector"),
        *under(f"{word}_model.", "language/", language_rows(c.language)),
    )


def original_word(c: Prefix) -> str:
    """What LAVIS calls the language model; MiniGPT-4, whose Q-Former reads no text, says llama."""
    if isinstance(c.language, T5Config):
        return "t5"
    if c.language.positions:
        return "opt"
    return "llm" if c.qformer.text else "llama"


def owl_rows(c: Prefix) -> tuple[Row, ...]:
    """mPLUG-Owl's own code."""
    return (
        *under("vision_model.", "vision/", vit.tower_rows(c.vision, vit.owl_rows)),
        *norm_rows("vision_model.post_layernorm", "vision_norm"),
        *under("", "latents/", perceiver.abstractor_rows(c.latents)),
        *dense_rows("abstractor.visual_fc", "projector"),
        Row("abstractor.vit_eos", "last_word", reshaped((1, 1, -1), (-1,))),
        *under("language_model.", "language/", language_rows(c.language)),
    )


def kosmos_rows(c: Prefix) -> tuple[Row, ...]:
    """Kosmos2ForConditionalGeneration."""
    return (
        *under("vision_model.model.", "vision/", vit.tower_rows(c.vision, vit.clip_rows)),
        *norm_rows("vision_model.model.post_layernorm", "vision_norm"),
        *under("image_to_text_projection.", "latents/", perceiver.projection_rows(c.latents)),
        *under("text_model.", "language/", language_rows(c.language)),
    )
