# SPDX-License-Identifier: Apache-2.0
"""The answers of a released model in transformers: ids and their log-probabilities, to compare with ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lionjax.core.types import UserError

# Prompts of a system as its users write them in transformers, where {question} stands.
PROMPTS = {
    "llava": "USER: <image>\n{question} ASSISTANT:",
    "blip2": "Question: {question} Answer:",
    "instructblip": "{question}",
    "kosmos2": "<grounding> {question}",
}


class GeneratedIds(NamedTuple):
    """New token ids of one answer, up to the end token, and the log-probability of each."""

    ids: tuple[int, ...]
    logprobs: np.ndarray


def transformers_answers(
    folder: Path, images: Sequence[Any], prompts: Sequence[str], max_new_tokens: int
) -> list[GeneratedIds]:
    """Greedy answers of transformers' processor and class for a folder in its layout, each prompt alone, in float32.

    Raises UserError where transformers is missing or cannot open the folder.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"the comparison runs transformers and needs {error.name}; install lionjax[torch]") from error
    transformers.logging.set_verbosity_error()
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"transformers cannot open {folder}: {str(error).splitlines()[0]}") from error
    answers = []
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    settings |= {"length_penalty": 1.0, "min_length": 0, "return_dict_in_generate": True, "output_logits": True}
    for image, prompt in zip(images, prompts):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, **settings)
        logits_MV = torch.cat(output.logits).float()
        ids = output.sequences[0, -len(logits_MV) :].tolist()
        logprobs = logits_MV.log_softmax(-1)[range(len(ids)), ids].numpy()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        length = next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))
        answers.append(GeneratedIds(tuple(ids[:length]), logprobs[:length]))
    return answers
