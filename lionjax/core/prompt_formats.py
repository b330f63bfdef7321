# SPDX-License-Identifier: Apache-2.0
"""How each released system is asked: the text around a question and an image, and its own generation settings.

`SYSTEM_FORMATS` is the only definition of these formats. Training configs and released weights both read it:
`ProcessorConfig(**SYSTEM_FORMATS["vicuna_v1"].processor)`. The texts are those of the systems' own code; a newline
or a trailing space in them is a token of the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lionjax.core.experiment import GenerationDefaults

PROMPTCAP_CAPTIONER = "please describe this image according to the given question: "  # the question follows
HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
OWL_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True)
class SystemFormat:
    """Fields of `ProcessorConfig` for the prompt's text, and the generation settings of the system's own code."""

    processor: Mapping[str, Any]
    generation: GenerationDefaults


def _format(
    generation: GenerationDefaults, prompt_template: str, followup_template: str = "", **fields
) -> SystemFormat:
    text = {"use_tags": False, "prompt_tokenization": "whole", "prompt_template": prompt_template}
    return SystemFormat(text | {"followup_template": followup_template} | fields, generation)


def _two_roles(system: str, image: str = "{image}\n") -> tuple[str, str]:
    """(prompt template, followup template) of Vicuna 1.1: "USER: ... ASSISTANT:"."""
    return f"{system} USER: {image}{{question}} ASSISTANT:", "USER: {question} ASSISTANT:"


LLAVA_GENERATION = GenerationDefaults(max_new_tokens=512, penalize_boxes=True)
SHIKRA_GENERATION = GenerationDefaults(max_new_tokens=1024, penalize_boxes=True)

SYSTEM_FORMATS: Mapping[str, SystemFormat] = {
    # LLaVA (arXiv 2304.08485, 2310.03744): llava/conversation.py. Stage 1 is the image and a caption with a newline.
    "llava_v0": _format(
        LLAVA_GENERATION,
        f"{HUMAN_SYSTEM}###Human: {{image}}\n{{question}}###Assistant:",
        "Human: {question}###Assistant:",
        answer_end="###",
        caption_end="\n",
    ),
    "llava_v1": _format(LLAVA_GENERATION, *_two_roles(HUMAN_SYSTEM), caption_end="\n"),
    "vicuna_v1": _format(LLAVA_GENERATION, *_two_roles(USER_SYSTEM), caption_end="\n"),
    "llava_llama_2": _format(
        LLAVA_GENERATION,
        f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n{{image}}\n{{question}} [/INST]",
        "<s>[INST] {question} [/INST]",
        answer_end=" </s>",
        caption_end="\n",
    ),
    "mpt": _format(
        LLAVA_GENERATION,
        f"<|im_start|>system\n{MPT_SYSTEM}<|im_end|><|im_start|>user\n{{image}}\n{{question}}<|im_end|>"
        "<|im_start|>assistant\n",
        "<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n",
        answer_end="<|im_end|>",
        caption_end="\n",
    ),
    # BLIP-2 (arXiv 2301.12597): the queries, then the text alone; OPT learned captions that end in a newline.
    "blip2_opt": _format(
        GenerationDefaults(num_beams=5, max_new_tokens=30, penalize_boxes=True),
        "{question}",
        answer_end="\n",
        caption_end="\n",
    ),
    "blip2": _format(GenerationDefaults(num_beams=5, max_new_tokens=30, penalize_boxes=True), "{question}"),
    # InstructBLIP (arXiv 2305.06500): the instruction alone.
    "instructblip": _format(
        GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256, penalize_boxes=True), "{question}"
    ),
    # Lyrics (arXiv 2312.05278): as InstructBLIP; the end token follows a space.
    "lyrics": _format(GenerationDefaults(max_new_tokens=256, penalize_boxes=True), "{question}", answer_end=" </s>"),
    # MiniGPT-4 (arXiv 2304.10592): the instructions of its second stage.
    "minigpt4": _format(
        GenerationDefaults(do_sample=True, top_p=0.9, repetition_penalty=1.05, max_new_tokens=300, penalize_boxes=True),
        "###Human: <Img>{image}</Img> {question} ###Assistant: ",
        "Human: {question} ###Assistant: ",
        answer_end="###",
        caption_end="\n",
    ),
    # mPLUG-Owl (arXiv 2304.14178).
    "mplug_owl": _format(
        GenerationDefaults(do_sample=True, top_k=3, max_new_tokens=512, penalize_boxes=True),
        f"{OWL_SYSTEM}\nHuman: {{image}}\nHuman: {{question}}\nAI: ",
        "\nHuman: {question}\nAI: ",
    ),
    # Shikra (arXiv 2306.15195) and NExT-Chat (arXiv 2311.04498): an image between <im_start> and <im_end>. NExT-Chat's
    # prompt has one <im_patch> for each patch: `num_image_tokens` is the model's.
    "shikra": _format(SHIKRA_GENERATION, *_two_roles(USER_SYSTEM, "{image} "), num_image_tokens=1),
    "nextchat": _format(dataclasses.replace(SHIKRA_GENERATION, num_beams=5), *_two_roles(USER_SYSTEM, "{image} ")),
    # LISA (arXiv 2308.00692): LLaVA's first format with an image between <im_start> and <im_end>.
    "lisa": _format(LLAVA_GENERATION, *_two_roles(HUMAN_SYSTEM, "<im_start>{image}<im_end>\n")),
    # Kosmos-2 (arXiv 2306.14824): the question or caption follows the image's own tags.
    "kosmos2": _format(
        GenerationDefaults(max_new_tokens=128, penalize_boxes=True),
        "<image>{image}</image> {question}",
        location_bins_per_side=32,
    ),
    # LION (arXiv 2311.11860): the tag prompt, then the question; beams and penalty are those of its release.
    "lion": SystemFormat({}, GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256)),
}
