# SPDX-License-Identifier: Apache-2.0
"""Lyrics (arXiv 2312.05278): the released folder of its second stage, and its first stage under that code's names."""

from __future__ import annotations

from lionjax.convert.formats.checkpoint_format import CheckpointFormat, lionjax_config_format, lionjax_hf_config

IGNORE_PATTERNS = (
    r"ram\.(tag_encoder|text_decoder)\..*(?#not used in tagging)",
    r"language_model\.model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq(?#computed)",
)


LYRICS = CheckpointFormat(
    "lyrics",
    (),
    lambda c: type(c).__name__ == "VisualPrefixLM" and type(c.qformer).__name__ == "MQFormerConfig",
    None,
    lambda c: lionjax_hf_config(c, "lyrics"),
    ignore_patterns=IGNORE_PATTERNS,
)
LYRICS_STAGE1 = lionjax_config_format("lyrics_stage1", "LyricsStage1", ignore_patterns=IGNORE_PATTERNS)
LYRICS_FORMATS = (LYRICS, LYRICS_STAGE1)
