# SPDX-License-Identifier: Apache-2.0
"""Prompts of a tiny model whose decoder reads image and question in one sequence."""

from typing import Any

from lionjax.data.processor import ProcessorConfig

PICTURE = 21  # <im_patch> of the tiny tokenizer


def decoder_prompts(**fields: Any) -> ProcessorConfig:
    """ProcessorConfig of image and question for a decoder; `fields`: those that differ from the defaults here."""
    lengths = {"max_prompt_tokens": 96, "max_question_tokens": 8}
    template = {"reader": "decoder", "prompt_template": "{image} {question}", "image_token": PICTURE}
    return ProcessorConfig(**{"image_size": 28, "use_tags": False} | lengths | template | fields)


def lengths(prompt: int, question: int, target: int) -> dict[str, int]:
    """Fields of ProcessorConfig: the most tokens of prompt, question and answer."""
    return {"max_prompt_tokens": prompt, "max_question_tokens": question, "max_target_tokens": target}
